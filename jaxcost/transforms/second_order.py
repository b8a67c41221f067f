"""The solver behind the transforms that change a weight one input at a time and let the rest make up for it.

For a weight W (in, out) and its inputs X, they seek values on some set (sparse, on a grid) for which ‖X·W - X·Ŵ‖² is
small. The rows of W, one for each input, get their new values in turn, and what that does to the output is undone as
well as can be by the rows still to come. Which new values is the caller's affair, so this serves pruning and
quantisation alike.

Source: Hassibi and Stork 1993 (optimal brain surgeon); the order and the blocks are those of Frantar et al. 2022,
arXiv:2210.17323 (GPTQ), and Frantar and Alistarh 2023, arXiv:2301.00774 (SparseGPT).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Plan = Callable[[jax.Array, jax.Array, jax.Array], Any]
"""(rows (group, out) as they are now, pivots (group,), number of the first row) → a tree with a leading group axis."""

Decide = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
"""(row (out,) as it is now, its part of the plan) → (its new values (out,), whatever else is to be kept of it)."""


def solve(
    w: jax.Array,
    gram: jax.Array,
    count: jax.Array,
    plan: Plan,
    decide: Decide,
    *,
    damping: float = 0.01,
    block: int = 128,
    group: int | None = None,
) -> tuple[jax.Array, Any]:
    """New values for every row of one matrix; `jax.vmap` it over the stack axes.

    Args:
      w: (in, out); inputs that are always zero get zero weights first.
      gram: (in, in), the sum of the outer products of the inputs.
      count: scalar, the rows of inputs that it sums.
      plan: called at each group's first row, when the rows before it have their new values and their errors are
        spread: a row's error ε costs at least (ε / pivot)² / 2 in the output once the rest has made up for it.
      decide: called for each row in turn.
      damping: share of the mean of the Hessian's diagonal that is added to it.
      block: rows whose errors are spread among themselves at once and over the rest together; any size gives the same
        result up to rounding.
      group: rows that are planned together, a divisor of `block`; None for the whole block. Where they do not divide
        the rows, the last group is smaller.

    Returns:
      The new values, float32 (in, out), and what `decide` kept, with a leading axis of rows.
    """
    factor, dead = inverse_factor(gram, count, damping)
    w = jnp.where(dead[:, None], 0.0, w.astype(jnp.float32))
    group = block if group is None else group
    end, parts = 0, []
    # Whole blocks, what is left of whole groups, and what is left.
    for size in (block, w.shape[0] % block // group * group, w.shape[0] % block % group):
        times = (w.shape[0] - end) // size if size else 0
        if times:
            step = functools.partial(
                _solve_block, factor=factor, size=size, group=min(group, size), plan=plan, decide=decide
            )
            w, kept = lax.scan(step, w, end + size * jnp.arange(times))
            parts.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), kept))
            end += times * size
    return w, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


# One matrix of a stack after the other: on CPUs, jaxlib's batched solve (0.10.2) waits for a pool whose threads, where
# there are as many devices as those, all wait in it.
@jax.custom_batching.sequential_vmap
def inverse_factor(gram: jax.Array, count: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """The upper triangular U (in, in) with UᵀU the inverse of the damped Hessian, and which inputs are always zero.

    The Hessian is 2·gram / count, with ones for the inputs that are always zero, plus `damping` times the mean of its
    diagonal. Of a matrix that has met no inputs at all it is the identity, and no input counts as zero.
    """
    hessian = 2.0 * gram.astype(jnp.float32) / jnp.maximum(count, 1.0)
    silent = jnp.diagonal(hessian) == 0
    diagonal = jnp.where(silent, 1.0, jnp.diagonal(hessian))
    damped = jnp.fill_diagonal(hessian, diagonal + damping * jnp.mean(diagonal), inplace=False)
    # Turned end for end, the lower factor L·Lᵀ is an upper one R·Rᵀ, and the inverse of R is U.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    factor = jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(diagonal), dtype=jnp.float32))
    return factor, silent & (count > 0)


def _solve_block(w, start, *, factor, size: int, group: int, plan: Plan, decide: Decide):
    """The rows start .. start + size get their values; every later row takes its share of their errors."""
    between = lax.dynamic_slice(factor, (start, start), (size, size))
    pivots = jnp.diagonal(between)
    block = lax.dynamic_slice_in_dim(w, start, size)

    def plan_and_decide(block, index):
        first = index * group
        rows = (lax.dynamic_slice_in_dim(a, first, group) for a in (block, pivots))
        planned = plan(*rows, start + first)
        return lax.scan(one, block, (first + jnp.arange(group), planned))

    def one(block, row):
        index, planned = row
        value, kept = decide(block[index], planned)
        error = (block[index] - value) / pivots[index]
        # Above the diagonal are the rows to come; on it, this one lands on its value, up to rounding.
        block = block - between[index][:, None] * error
        return block.at[index].set(value), (error, kept)

    block, (errors, kept) = lax.scan(plan_and_decide, block, jnp.arange(size // group))
    errors, kept = jax.tree.map(lambda a: a.reshape(size, *a.shape[2:]), (errors, kept))
    later = jnp.where(jnp.arange(w.shape[0]) >= start + size, lax.dynamic_slice_in_dim(factor, start, size), 0.0)
    w = w - jnp.matmul(later.T, errors, precision="highest")
    return lax.dynamic_update_slice_in_dim(w, block, start, axis=0), kept
