"""Which entries a mask keeps, by their scores: thresholds by bisection, groups of neighbours, tiles, and budgets.

Every step of a bisection is a count, which a sharded matrix answers with a scalar all-reduce where a sort would gather
it. Scores are float32 (..., in, out), a stack of matrices; what is pruned already counts first and stays pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

MATRIX = (-2, -1)
"""The axes over which the entries of a whole matrix are compared."""

OUTPUT = (-2,)
"""The axes over which the entries that make one output are compared."""


@jax.jit(static_argnames="axes")
def drop_smallest(
    score: jax.Array, kept: jax.Array, number: jax.Array | int, axes: tuple[int, ...] = MATRIX
) -> jax.Array:
    """`kept` without the `number` entries of smallest score along the axes; of equals, the first.

    Args:
      score: (..., in, out).
      kept: boolean, of the score's shape.
      number: how many entries are pruned afterwards, those that were before included; one for all or (..., 1, 1).
      axes: `MATRIX` or `OUTPUT`.
    """
    number = jnp.asarray(number, jnp.uint32)
    order = _order(score, kept)
    start = jnp.zeros_like(order, shape=[1 if axis - order.ndim in axes else n for axis, n in enumerate(order.shape)])
    threshold = _first(lambda bound: _count(order <= bound, axes) >= number, start, 0xFFFFFFFF)
    below, tied = order < threshold, order == threshold
    rest = number - _count(below, axes)
    position, size = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(axes):
        position = position + size * lax.broadcasted_iota(jnp.uint32, order.shape, order.ndim + axis)
        size *= order.shape[axis]
    end = _first(lambda bound: _count(tied & (position < bound), axes) >= rest, start, size)
    return kept & ~(below | (tied & (position < end)))


@jax.jit
def numbers_under_one_threshold(
    scores: Sequence[jax.Array], kept: Sequence[jax.Array], numbers: Sequence[jax.Array | int]
) -> list[jax.Array]:
    """How many entries every matrix loses to one threshold over all of them: uint32 (..., 1, 1) for each stack.

    All together they lose what `numbers`, of each matrix of a stack, come to. Of equals, the first matrix's go first.
    """
    orders = [_order(score, mask) for score, mask in zip(scores, kept, strict=True)]

    def counts(choose):
        return jnp.concatenate([_count(choose(order), MATRIX).ravel() for order in orders])

    stacks = [order.shape[:-2] for order in orders]
    asked = [jnp.broadcast_to(jnp.asarray(n, jnp.uint32), stack) for n, stack in zip(numbers, stacks, strict=True)]
    total = _wide_sum(jnp.concatenate([n.ravel() for n in asked]))
    zero = jnp.zeros((), jnp.uint32)
    threshold = _first(lambda bound: _at_least(_wide_sum(counts(lambda o: o <= bound)), total), zero, 0xFFFFFFFF)
    below, tied = counts(lambda o: o < threshold), counts(lambda o: o == threshold)
    index = jnp.arange(len(below), dtype=jnp.uint32)
    # The ties of the first matrices go whole, one matrix loses some of them, the later ones keep theirs.
    last = _first(lambda i: _at_least(_wide_sum(below + jnp.where(index <= i, tied, 0)), total), zero, len(below) - 1)
    before = below + jnp.where(index < last, tied, 0)
    high, low = (a - b for a, b in zip(total, _wide_sum(before), strict=True))
    lost = before + jnp.where(index == last, (high << 16) + low, 0)
    ends = [0]
    for stack in stacks:
        ends.append(ends[-1] + math.prod(stack))
    return [lost[a:b].reshape(*stack, 1, 1) for a, b, stack in zip(ends, ends[1:], stacks, strict=False)]


def keep_largest_of_group(score: jax.Array, kept: jax.Array, n: int, m: int) -> jax.Array:
    """`kept` without all but the n largest scores of every m neighbours along axis -2; of equals, the first stay."""
    *stack, inward, outward = score.shape
    groups = jnp.where(kept, score, -1.0).reshape(*stack, inward // m, m, outward)
    mine, other = groups[..., :, None, :], groups[..., None, :, :]
    earlier = (jnp.arange(m)[None, :] < jnp.arange(m)[:, None])[:, :, None]
    beaten_by = jnp.sum((other > mine) | ((other == mine) & earlier), axis=-2)
    return kept & (beaten_by < n).reshape(score.shape)


def tiles(x: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """(..., in, out) as (..., in / rows, rows, out / columns, columns)."""
    *stack, inward, outward = x.shape
    rows, columns = tile
    return x.reshape(*stack, inward // rows, rows, outward // columns, columns)


def untiled(mask: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """A mask over tiles as one over their entries."""
    return jnp.repeat(jnp.repeat(mask, tile[0], axis=-2), tile[1], axis=-1)


def erdos_renyi_shares(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """The share of every matrix (..., in, out) that goes, so that `sparsity` of all entries together go.

    The share that stays is in proportion to (in + out) / (in·out), so that thin matrices stay denser; what would come
    above 1 stays whole, and the others make up for it. Source: Mocanu et al. 2018, arXiv:1707.04780, with the
    correction of Evci et al. 2020, arXiv:1911.11134, section 3.
    """
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    whole: set[str] = set()
    while True:
        sparse = shapes.keys() - whole
        stays = (1 - sparsity) * sum(sizes.values()) - sum(sizes[path] for path in whole)
        raw = {path: (shapes[path][-2] + shapes[path][-1]) / (shapes[path][-2] * shapes[path][-1]) for path in sparse}
        scale = stays / sum(sizes[path] * raw[path] for path in sparse)
        full = {path for path in sparse if scale * raw[path] > 1 + 1e-9}
        if not full:
            return {path: 0.0 if path in whole else max(0.0, 1 - scale * raw[path]) for path in shapes}
        whole |= full


def _order(score: jax.Array, kept: jax.Array) -> jax.Array:
    """Integers in the order of the scores, with zero for what is pruned already."""
    bits = lax.bitcast_convert_type(score.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where(kept, jnp.where(bits < sign, bits | sign, ~bits), 0)


def _count(chosen: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(chosen, axis=axes, keepdims=True, dtype=jnp.uint32)


def _first(reached: Callable[[jax.Array], jax.Array], start: jax.Array, largest: int) -> jax.Array:
    """For each entry of `start`, which is zeros, the first of the integers 0..largest that `reached` holds for."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = reached(middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low, _ = lax.fori_loop(0, int(largest).bit_length(), halve, (start, jnp.full_like(start, largest)))
    return low


def _wide_sum(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of up to 2^16 numbers as (high, low) with 16 bits in low: a model has more weights than 32 bits count."""
    high, low = jnp.sum(counts >> 16, dtype=jnp.uint32), jnp.sum(counts & 0xFFFF, dtype=jnp.uint32)
    return high + (low >> 16), low & 0xFFFF


def _at_least(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> jax.Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))
