"""Quantisation beside other libraries: GPTQ, NF4 and SmoothQuant's scales on the same weights and inputs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost.transforms.rounding import gptq
from jaxcost.transforms.smooth import smoothing_factor
from jaxcost.weights import Inputs, contract, encode, materialize, quantized
from jaxcost.weights.quant_aware import QuantAware, QuantSpec, _aqt_dot

pytestmark = pytest.mark.oracles

INWARD, OUTWARD, ROWS, STEP = 96, 40, 512, 2.0**-6


def layer(bits, group=None, dead=(), seed=0):
    """A weight (in, out) and the gram matrix of correlated inputs, on a grid on which libraries agree.

    They scale the largest weight onto different codes (7 here, 7.5 in qwix, 7.5 or 8 in llm-compressor), and codes that
    the errors of others push beyond the last are cut at different ends. So the first input of every group has the
    largest weight, onto the last code of all, and is correlated with no other input; the rest stays well inside.
    """
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(ROWS, INWARD // 4)) @ generator.normal(size=(INWARD // 4, INWARD))
    x = 0.95 * mixed / (INWARD // 4) ** 0.5 + 0.3 * generator.normal(size=(ROWS, INWARD))
    x[:, list(dead)] = 0.0
    gram = x.T @ x
    firsts = np.arange(0, INWARD, group or INWARD)
    scales = np.diag(gram)[firsts].copy()
    gram[firsts], gram[:, firsts] = 0.0, 0.0
    gram[firsts, firsts] = scales
    limit = 2 ** (bits - 1) - 1
    w = np.clip(generator.normal(size=(INWARD, OUTWARD)) * 0.25, -0.6, 0.6) * limit * STEP
    w[firsts] = limit * STEP
    return w.astype(np.float32), gram.astype(np.float32), firsts


def ours(w, gram, bits, group):
    inputs = Inputs(jnp.float32(ROWS), jnp.diagonal(gram), jnp.zeros(INWARD), jnp.asarray(gram))
    return jax.jit(lambda w, inputs: gptq(w, None, inputs, f"int{bits}", group))(jnp.asarray(w), inputs)


def changed(found, w):
    """The share of codes that rounding to nearest would have chosen otherwise: GPTQ must have done something."""
    nearest = encode(w / STEP, found.grid)
    return np.mean(np.asarray(found.codes, np.int32) != np.asarray(nearest, np.int32))


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_codes_are_qwixs(bits, group):
    gptq_core = pytest.importorskip("qwix.contrib.gptq_core")
    from qwix._src.core import qarray

    w, gram, firsts = layer(bits, group)
    theirs = w.copy()
    limit = 2 ** (bits - 1) - 1
    theirs[firsts] *= (limit + 0.5) / limit
    how = qarray.HowToQuantize(
        qtype={4: jnp.int4, 8: jnp.int8}[bits], channelwise_axes=(0,), tiled_axes={1: group} if group else {}
    )
    # Of a group, qwix sees the weights as they were when its block began, so blocks and groups are the same here.
    want, _ = gptq_core.quantize_weight(jnp.asarray(theirs.T), jnp.asarray(gram), how, blocksize=group or 128)
    found = ours(w, gram, bits, group)
    np.testing.assert_allclose(found.scale, np.full(found.scale.shape, STEP), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(found.codes, np.int32), np.asarray(want.qvalue, np.int32).T)
    assert changed(found, w) > 0.1


@pytest.mark.parametrize("dead", [(), (3, 50)])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_codes_are_llm_compressors(bits, dead):
    reference = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize")
    import torch
    from compressed_tensors.quantization import QuantizationArgs

    w, gram, _ = layer(bits, dead=dead)
    arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy="channel", actorder=None)
    want, _, _ = reference.quantize_weight(
        torch.tensor(w.T)[None].clone(),
        torch.tensor(2.0 * gram / ROWS)[None],
        torch.full((1, OUTWARD, 1), STEP),
        torch.zeros((1, OUTWARD, 1)),
        None,
        arguments,
    )
    found = ours(w, gram, bits, None)
    np.testing.assert_array_equal(np.asarray(found.codes, np.int32), np.round(want[0].numpy().T / STEP))
    assert changed(found, w) > 0.1
    assert not np.any(np.asarray(found.codes, np.int32)[list(dead)])


def test_nf4_codes_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    import torch

    w = np.random.default_rng(0).normal(size=(256, 48)).astype(np.float32)
    packed, state = functional.quantize_4bit(
        torch.tensor(w.T.copy()), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    # The first of two codes is in the high half; blocks run along the inputs of each output.
    halves = packed.numpy().ravel()
    codes = np.stack([halves >> 4, halves & 15], axis=-1).reshape(48, 256).T
    found = quantized(jnp.asarray(w), "nf4", group=64)
    np.testing.assert_allclose(found.scale, state.absmax.numpy().reshape(48, 4).T, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(found.codes, np.int32) + 8, codes)
    whole = functional.dequantize_4bit(packed, state).numpy().T
    np.testing.assert_allclose(materialize(found), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_smoothing_factors_are_llm_compressors(alpha):
    base = pytest.importorskip("llmcompressor.modifiers.transform.smoothquant.base")
    import torch

    generator = np.random.default_rng(1)
    w, largest = (
        generator.normal(size=(96, 40)).astype(np.float32),
        np.exp(generator.normal(size=96)).astype(np.float32),
    )
    module = torch.nn.Linear(96, 40, bias=False)
    module.weight.data = torch.tensor(w.T.copy())
    settings = types.SimpleNamespace(algorithm="smoothquant", smoothing_strength=alpha)
    calculate = base.SmoothQuantModifier._calculate_smoothing_scales
    # It measures ranges, twice the largest magnitude, of weights and of activations alike.
    want = calculate(settings, [module], torch.tensor(2 * largest)).detach().numpy() / 2 ** (2 * alpha - 1)
    inputs = Inputs(jnp.float32(1), jnp.zeros(96), jnp.asarray(largest))
    np.testing.assert_allclose(smoothing_factor(jnp.asarray(w), inputs, alpha), want, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_forward_pass_of_training_and_serving_is_aqts_own(bits):
    w = jax.random.normal(jax.random.key(0), (300, 40)).at[:, 3].set(0.0)
    x = jax.random.normal(jax.random.key(1), (33, 300)).at[5].set(0.0)
    spec = QuantSpec(bits)
    # AQT, given the float weight, rounds and scales by itself.
    want = jax.jit(lambda x, w: _aqt_dot(x, w, spec, None))(x, w)
    np.testing.assert_array_equal(jax.jit(contract)(x, QuantAware(w, spec)), want)
    np.testing.assert_array_equal(jax.jit(contract)(x, jax.jit(spec.served)(w)), want)
