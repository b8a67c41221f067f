"""The solver that pruning and quantisation share, against the surgeon's formula written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost.transforms.second_order import inverse_factor, solve


def inputs(rows=64, inward=12, seed=0):
    mix = np.eye(inward) + 0.4 * np.random.default_rng(seed + 1).normal(size=(inward, inward))
    return np.random.default_rng(seed).normal(size=(rows, inward)) @ mix


def grid(rows, pivots, first):
    return jnp.full(rows.shape, 0.25)


def to_grid(row, step):
    value = jnp.round(row / step) * step
    return value, value == 0


def surgeon(w, hessian, new_value):
    """Each row is set in turn and the later rows make up for it: one inverse of what is left of the Hessian a row."""
    w = w.copy()
    for row in range(len(w)):
        inverse = np.linalg.inv(hessian[row:, row:])
        error = (w[row] - new_value(w[row])) / inverse[0, 0]
        w[row:] -= inverse[:, :1] * error
    return w


@pytest.mark.parametrize(("block", "group"), [(128, None), (128, 16), (10, 5), (4, 2), (5, None), (1, None)])
def test_rows_take_their_values_and_later_rows_make_up_for_it(block, group):
    x, w = inputs(), np.random.default_rng(3).normal(size=(12, 7))
    got, kept = solve(jnp.asarray(w), jnp.asarray(x.T @ x), jnp.asarray(64.0), grid, to_grid, block=block, group=group)
    hessian = 2 * x.T @ x / 64
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(12)
    expected = surgeon(w, hessian, lambda row: np.round(row / 0.25) * 0.25)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_array_equal(kept, got == 0)
    rounded = np.round(w / 0.25) * 0.25
    assert np.linalg.norm(x @ (w - got)) < 0.8 * np.linalg.norm(x @ (w - rounded))


def test_a_group_is_planned_with_its_rows_as_they_are_by_then_and_the_pivots():
    x, w = inputs(), np.random.default_rng(3).normal(size=(12, 7))

    def plan(rows, pivots, first):
        return rows, pivots, first + jnp.arange(4)

    def decide(row, planned):
        return jnp.zeros_like(row), planned

    _, (rows, pivots, numbers) = solve(
        jnp.asarray(w), jnp.asarray(x.T @ x), jnp.asarray(64.0), plan, decide, block=8, group=4
    )
    factor, _ = inverse_factor(jnp.asarray(x.T @ x), jnp.asarray(64.0), 0.01)
    np.testing.assert_array_equal(numbers, np.arange(12))
    np.testing.assert_allclose(pivots, np.diag(factor), rtol=1e-5)
    np.testing.assert_allclose(rows[:4], w[:4], rtol=1e-6)
    assert np.max(np.abs(rows[4:] - w[4:])) > 0.01


def test_the_factor_is_that_of_the_damped_inverse_with_ones_for_silent_inputs():
    x = inputs()
    x[:, 5] = 0.0
    factor, dead = inverse_factor(jnp.asarray(x.T @ x), jnp.asarray(64.0), 0.05)
    hessian = 2 * x.T @ x / 64
    hessian[5, 5] = 1.0
    hessian += 0.05 * np.mean(np.diag(hessian)) * np.eye(12)
    expected = np.linalg.cholesky(np.linalg.inv(hessian)).T
    np.testing.assert_allclose(factor, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(dead, np.arange(12) == 5)
    untouched, none = inverse_factor(jnp.zeros((3, 3)), jnp.asarray(0.0), 0.0)
    np.testing.assert_array_equal(untouched, np.eye(3))
    assert not np.any(none)


def test_a_stack_is_mapped():
    x = np.stack([inputs(seed=0), inputs(seed=5)])
    w = jnp.asarray(np.random.default_rng(3).normal(size=(2, 12, 7)))
    gram, count = jnp.einsum("lri,lrj->lij", x, x), jnp.full(2, 64.0)

    def one(w, gram, count):
        return solve(w, gram, count, grid, to_grid, block=4)

    got, _ = jax.jit(jax.vmap(one))(w, gram, count)
    for layer in range(2):
        np.testing.assert_allclose(got[layer], one(w[layer], gram[layer], count[layer])[0], rtol=1e-4, atol=1e-5)
