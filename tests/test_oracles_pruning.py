"""Parity of masks and updated weights with torch, the papers' algorithms written out, and llm-compressor.

Run with `pytest -m oracles`. Torch kernels are (out, in), ours (in, out). The tests of llm-compressor run where it is
installed; it pins older transformers than the other oracles, so it is no part of the `oracles` extra, and the published
algorithms stand beside it in float64.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost.transforms import prune
from jaxcost.weights import Inputs, materialize

pytestmark = pytest.mark.oracles

INWARD, OUTWARD, ROWS = 96, 40, 400


def layer(seed=0):
    """A kernel (in, out) and inputs (rows, in) with outlying channels and one that is always zero."""
    rng = np.random.default_rng(seed)
    scale = np.where(np.arange(INWARD) % 12 == 5, 8.0, 1.0)
    x = rng.normal(size=(ROWS, INWARD)) @ (np.eye(INWARD) + 0.3 * rng.normal(size=(INWARD, INWARD)) / INWARD**0.5)
    x = (x * scale).astype(np.float32)
    x[:, 17] = 0.0
    return rng.normal(size=(INWARD, OUTWARD)).astype(np.float32), x


def ours(w, x, **options):
    gram = jnp.asarray(x.T.astype(np.float64) @ x, jnp.float32)[None]
    largest = jnp.max(jnp.abs(x), axis=0)[None]
    inputs = Inputs(jnp.full(1, float(len(x))), jnp.diagonal(gram, axis1=-2, axis2=-1), largest, gram)
    path = "layers/kernel"
    params = prune(**options)({"layers": {"kernel": jnp.asarray(w)[None]}}, None, {path: inputs})
    return params["layers"]["kernel"]


# ---- torch ----


@pytest.mark.parametrize("sparsity", [0.1, 0.335, 0.5, 0.9])
def test_magnitude_masks_equal_torchs(sparsity):
    torch = pytest.importorskip("torch")
    import torch.nn.utils.prune as torch_prune

    w, x = layer()
    module = torch.nn.Linear(INWARD, OUTWARD)
    module.weight.data = torch.from_numpy(w.T.copy())
    torch_prune.l1_unstructured(module, "weight", amount=sparsity)
    np.testing.assert_array_equal(ours(w, x, sparsity=sparsity).mask[0], module.weight_mask.numpy().T != 0)


# ---- The papers, in float64 ----


def published_wanda(torch, w, x, sparsity, pattern):
    """Sun et al. 2023, algorithm 1: |W|·‖X‖₂, the smallest of each output, or of each group of an output."""
    metric = torch.abs(torch.from_numpy(w.T.copy()).double()) * torch.linalg.norm(torch.from_numpy(x).double(), dim=0)
    mask = torch.zeros_like(metric, dtype=torch.bool)
    if pattern:
        for start in range(0, INWARD, pattern[1]):
            group = metric[:, start : start + pattern[1]]
            lost = torch.topk(group, pattern[1] - pattern[0], dim=1, largest=False)[1]
            mask.scatter_(1, start + lost, True)
    else:
        order = torch.sort(metric, dim=1, stable=True)[1]
        mask.scatter_(1, order[:, : int(INWARD * sparsity)], True)
    return ~mask.numpy().T


def published_sparsegpt(torch, w, x, sparsity, pattern, block, damping=0.01):
    """Frantar and Alistarh 2023, algorithm 1, with the dead columns, the rounding and the damping of their code."""
    W, X = torch.from_numpy(w.T.copy()).double(), torch.from_numpy(x).double()
    H = 2 * X.T @ X / len(X)
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H += damping * torch.mean(torch.diag(H)) * torch.eye(INWARD, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    lost = torch.zeros_like(W, dtype=torch.bool)
    for start in range(0, INWARD, block):
        end = min(start + block, INWARD)
        if not pattern:
            score = (W[:, start:end] / torch.diag(upper)[start:end]) ** 2
            lost[:, start:end] = score <= torch.sort(score.flatten())[0][int(score.numel() * sparsity)]
        for i in range(start, end):
            if pattern and i % pattern[1] == 0:
                score = (W[:, i : i + pattern[1]] / torch.diag(upper)[i : i + pattern[1]]) ** 2
                lost.scatter_(1, i + torch.topk(score, pattern[1] - pattern[0], dim=1, largest=False)[1], True)
            error = torch.where(lost[:, i], W[:, i], 0.0) / upper[i, i]
            W[:, i:] -= error[:, None] * upper[i, i:]
            W[lost[:, i], i] = 0.0
    return ~lost.numpy().T, W.numpy().T


PATTERNS = {"unstructured": None, "2:4": (2, 4), "4:8": (4, 8)}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_wanda_is_the_papers(pattern, sparsity):
    torch = pytest.importorskip("torch")
    w, x = layer()
    got = ours(w, x, method="wanda", sparsity=sparsity, pattern=pattern)
    np.testing.assert_array_equal(got.mask[0], published_wanda(torch, w, x, sparsity, PATTERNS[pattern]))


@pytest.mark.parametrize("block", [32, 40, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_sparsegpt_is_the_papers(pattern, sparsity, block):
    torch = pytest.importorskip("torch")
    w, x = layer()
    got = ours(w, x, method="sparsegpt", sparsity=sparsity, pattern=pattern, block=block)
    mask, dense = published_sparsegpt(torch, w, x, sparsity, PATTERNS[pattern], block)
    np.testing.assert_array_equal(got.mask[0], mask)
    np.testing.assert_allclose(materialize(got)[0], dense, rtol=1e-3, atol=1e-4)


# ---- llm-compressor ----


def module_of(torch, w):
    module = torch.nn.Linear(INWARD, OUTWARD, bias=False)
    module.weight.data = torch.from_numpy(w.T.copy())
    return module


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_wanda_is_llm_compressors(pattern, sparsity):
    torch = pytest.importorskip("torch")
    wanda = pytest.importorskip("llmcompressor.modifiers.pruning.wanda.wanda_sparsify")
    w, x = layer()
    module, (n, m) = module_of(torch, w), PATTERNS[pattern] or (0, 0)
    scalars = wanda.make_empty_row_scalars(module)
    scalars, _ = wanda.accumulate_row_scalars(torch.from_numpy(x), module, scalars, 0)
    expected = wanda.sparsify_weight(module, {module: scalars}, sparsity, m - n, m).numpy().T
    got = ours(w, x, method="wanda", sparsity=sparsity, pattern=pattern)
    np.testing.assert_array_equal(got.mask[0], expected != 0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_sparsegpt_is_llm_compressors(pattern, sparsity):
    torch = pytest.importorskip("torch")
    sgpt = pytest.importorskip("llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify")
    w, x = layer()
    # Its Hessian is a mean over samples, ours over tokens, which the ones for dead columns make a difference of.
    x = x[:, :, None].transpose(0, 2, 1)
    module, (n, m) = module_of(torch, w), PATTERNS[pattern] or (0, 0)
    hessian = sgpt.make_empty_hessian(module)
    hessian, _ = sgpt.accumulate_hessian(torch.from_numpy(x), module, hessian, 0)
    _, expected = sgpt.sparsify_weight(module, {module: hessian}, sparsity, m - n, m, 32, 0.01, False)
    got = ours(w, x[:, 0], method="sparsegpt", sparsity=sparsity, pattern=pattern, block=32)
    expected = expected.detach().numpy().T
    np.testing.assert_array_equal(got.mask[0], expected != 0)
    np.testing.assert_allclose(materialize(got)[0], expected, rtol=1e-3, atol=1e-4)
