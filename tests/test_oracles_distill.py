"""Live parity of the distillation losses with torch's.

Run with `pytest -m oracles`, with torch installed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost.evaluation import distillation

pytestmark = pytest.mark.oracles


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_divergences_and_their_gradients_equal_torchs(direction, temperature):
    torch = pytest.importorskip("torch")
    teacher, student = (np.random.default_rng(seed).normal(0, 3, (16, 96)).astype(np.float32) for seed in (0, 1))

    def ours(s):
        return jnp.mean(distillation.kl_divergence(teacher, s, temperature, direction))

    t, s = torch.tensor(teacher), torch.tensor(student, requires_grad=True)
    log_p, log_q = (torch.log_softmax(x / temperature, dim=-1) for x in (t, s))
    inputs, target = (log_q, log_p.exp()) if direction == "forward" else (log_p.expand_as(log_q), log_q.exp())
    theirs = torch.nn.functional.kl_div(inputs, target, reduction="batchmean") * temperature**2
    theirs.backward()
    value, gradient = jax.value_and_grad(ours)(student)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, s.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_what_is_stored_equals_torch_on_the_merged_outcomes(direction):
    torch = pytest.importorskip("torch")
    teacher, student = (np.random.default_rng(seed).normal(0, 3, (16, 96)).astype(np.float32) for seed in (0, 1))
    k, temperature = 8, 2.0
    found = distillation.stored_divergence(
        *distillation.top_k_log_probs(jnp.asarray(teacher), k, temperature), student, temperature, direction
    )
    p, q = (torch.softmax(torch.tensor(x, dtype=torch.float64) / temperature, dim=-1) for x in (teacher, student))
    order = torch.topk(p, k).indices
    merged = [torch.cat([x.gather(1, order), 1 - x.gather(1, order).sum(1, keepdim=True)], 1) for x in (p, q)]
    first, second = merged if direction == "forward" else merged[::-1]
    theirs = torch.nn.functional.kl_div(second.log(), first, reduction="none").sum(1) * temperature**2
    np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-4)


def test_hidden_losses_equal_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    student, teacher, projection = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 8), (2, 5, 12), (8, 12)))
    ours = distillation.hidden_loss(student, teacher, projection, np.ones((2, 5), np.float32)) / 10
    theirs = torch.nn.functional.mse_loss(torch.tensor(student) @ torch.tensor(projection), torch.tensor(teacher))
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
