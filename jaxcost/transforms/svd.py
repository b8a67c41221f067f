"""Singular value decompositions of matrices that the devices of a mesh share, and of which none ever holds one.

One device calls the decomposition that JAX has. Of several, each has some of the columns, in two blocks, and the blocks
meet as the players of a tournament do, every one every other: where two meet, their columns are made orthogonal to each
other, by the decomposition of these few. After some tournaments all columns are, and their lengths are the singular
values. Only blocks of columns are ever sent.

Sources: Hestenes 1958, "Inversion of matrices by biorthogonalization and related results" (one-sided Jacobi); Brent and
Luk 1985, "The solution of singular-value and symmetric eigenvalue problems on multiprocessor arrays" (the tournament).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcost.transforms.whole import Share, alone, split

_TOLERANCE = 3e-5
"""The part of a column that may lie along a longer one before a last tournament, as a share of the longest column. What
is left of it afterwards is rounding."""
_MOST_TOURNAMENTS = 40


def factors(w: jax.Array, rank: int, gram: jax.Array | None = None, damping: float = 0.0) -> tuple:
    """Two thin factors of a matrix whose product is the best of that rank, for the matrix or for its outputs.

    They share the singular values evenly, and the largest entry of each column of the first is positive, so that any
    number of devices gives the same up to rounding. If several devices do not come to an end in 40 tournaments, where
    4 to 9 are usual, the factors are NaN, as those of JAX's own decomposition then are.

    Args:
      w: float32 (..., in, out); the matrices of a stack have their turns.
      rank: at most the smaller of in and out.
      gram: float32 (..., in, in), the sum of the outer products of the inputs, if the outputs are to be near; every
        device gets it whole, but for its part of the stack.
      damping: added to every direction of the inputs, as a share of their mean square.

    Returns:
      float32 (..., in, rank) and (..., rank, out).
    """
    one = functools.partial(_factors, rank=rank, damping=damping)
    left, right = _of_each(one, w, gram, lambda rows, columns, whole: (rows, columns))
    return left[..., : w.shape[-2], :], right[..., : w.shape[-1]]


def singular_values(w: jax.Array, gram: jax.Array | None = None, damping: float = 0.0) -> jax.Array:
    """Those of a matrix, or of its outputs as `factors` takes them, largest first: float32 (..., min(in, out))."""
    found = _of_each(functools.partial(_values, damping=damping), w, gram, lambda rows, columns, whole: whole)
    return found[..., : min(w.shape[-2:])]


def _of_each(one: Callable[..., Any], w: jax.Array, gram: jax.Array | None, gives: Callable[..., Any]) -> Any:
    """one(share, matrix, gram) of every matrix of a stack, each device with its columns.

    `gives` picks from the specs of split rows, of split columns and of what all devices know for what comes back, whose
    rows and columns have zeros at the end where the devices do not divide them.
    """
    grams, stack = () if gram is None else (gram,), w.shape[:-2]

    def every(share, *arrays):
        local = arrays[0].shape[:-2]
        flat = tuple(a.reshape(-1, *a.shape[len(stack) :]) for a in arrays)
        found = lax.map(lambda matrices: one(share, *matrices), flat)
        return jax.tree.map(lambda a: a.reshape(*local, *a.shape[1:]), found)

    if alone():
        return every(Share(), w, *grams)
    places = split(stack)
    axes = places.matrix
    # Two blocks for each device, and rows that can be traded for columns.
    multiple = 2 * math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    w = _padded(w, *(-(-size // multiple) * multiple for size in w.shape[-2:]))
    rows, columns, whole = places.spec(axes or None, None), places.spec(None, axes or None), places.spec()
    mapped = jax.shard_map(
        functools.partial(every, Share(axes)),
        in_specs=(columns, *(whole for _ in grams)),
        out_specs=gives(rows, columns, whole),
        check_vma=False,
    )
    return mapped(w, *grams)


def _factors(share: Share, w: jax.Array, gram: jax.Array | None = None, *, rank: int, damping: float) -> tuple:
    """From the device's columns (in, part) its rows (in / devices, rank) and columns (rank, out / devices)."""
    whiten, restore = (None, None) if gram is None else _whitening(gram, damping, len(w))
    turned, turns, wide = _orthogonal(share, w, whiten)
    lengths = jnp.linalg.norm(turned, axis=0)
    root = jnp.sqrt(lengths)
    turned, turns = turned * jnp.where(lengths > 0, 1 / root, 0.0), turns * root
    left, right = (turns, turned) if wide else (turned, turns)
    left = left if restore is None else _product(restore, left)
    largest = jnp.take_along_axis(left, jnp.argmax(jnp.abs(left), axis=0)[None], axis=0)
    sign = jnp.where(largest < 0, -1.0, 1.0)
    first = jnp.argsort(share.all(lengths), descending=True)[:rank]
    return share.rows(left * sign)[:, first], share.rows(right * sign)[:, first].T


def _values(share: Share, w: jax.Array, gram: jax.Array | None = None, *, damping: float) -> jax.Array:
    whiten = None if gram is None else _whitening(gram, damping, len(w))[0]
    if not share.axes:
        return jnp.linalg.svd(w if whiten is None else _product(whiten, w), compute_uv=False)
    turned, _, _ = _orthogonal(share, w, whiten)
    return jnp.sort(share.all(jnp.linalg.norm(turned, axis=0)), descending=True)


def _whitening(gram: jax.Array, damping: float, rows: int) -> tuple[jax.Array, jax.Array]:
    """S such that ‖S·M‖ is the size of x·M over the data, damped, and its inverse, both with zeros up to so many rows.

    They stand on the eigenvectors of the gram matrix (in, in); a Cholesky factor fails where inputs are dependent.
    """
    size = jnp.trace(gram) / len(gram)
    values, vectors = jnp.linalg.eigh(gram / jnp.where(size > 0, size, 1.0))
    root = jnp.sqrt(jnp.maximum(values, 0.0) + damping)
    return _padded(root[:, None] * vectors.T, rows, rows), _padded(vectors / root, rows, rows)


def _orthogonal(share: Share, w: jax.Array, whiten: jax.Array | None) -> tuple[jax.Array, jax.Array, bool]:
    """Orthogonal columns T = M·Q, the turns Q, of both what the device has, and whether M is the transpose of w.

    It is where that has fewer columns. M is weighted by `whiten`, if given.
    """
    x = w if whiten is None else _product(whiten, w)
    wide = len(x) < x.shape[1] * share.devices
    x = share.rows(x).T if wide else x
    if share.axes:
        return *_tournaments(share.axes, x), wide
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return u * s, vt.T, wide


def _tournaments(axes: tuple[str, ...], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The columns that a device has of T = M·Q, orthogonal, and of Q, from those of M (rows, part)."""
    rows, part = x.shape
    own = lax.axis_index(axes) * part + jnp.arange(part)
    # By ppermute, JAX (0.10.2) numbers devices along the axes in the mesh's order, in whichever they are named.
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in mesh.axis_names if name in axes)
    devices, device = lax.axis_size(axes), lax.axis_index(axes)

    def meet(times, carry):
        both, worst = carry
        columns = both[:rows]
        turn = jnp.linalg.svd(columns, full_matrices=False)[2].T
        # A step of Newton's to orthogonal columns: what is left to their lengths would add up over the rounds.
        turn = 1.5 * turn - 0.5 * _product(turn, _product(turn.T, turn))
        both = _product(both, turn)
        # The longer columns go to the block that was the earlier one when the tournament began: if they went by place,
        # some columns would follow each other and never meet.
        both = jnp.where(_in_order(device, times, devices), both, jnp.roll(both, part // 2, axis=1))
        return _next_round(axes, both), jnp.maximum(worst, _along_longer(columns))

    def tournament(carry):
        both, _, times = carry
        both, worst = lax.fori_loop(0, 2 * devices - 1, meet, (both, jnp.float32(0)))
        longest = lax.pmax(jnp.max(jnp.linalg.norm(both[:rows], axis=0)), axes)
        share = jnp.where(longest == 0, 0.0, worst / longest)
        # All devices of the mesh wait for each other's messages, and so must go on for as long, with whichever matrix.
        return both, lax.pmax(share, mesh.axis_names), times + 1

    def unsettled(carry):
        _, worst, times = carry
        return (worst > _TOLERANCE) & (times < _MOST_TOURNAMENTS)

    identity = jnp.arange(devices * part)[:, None] == own
    start = (jnp.concatenate([x, identity.astype(x.dtype)]), jnp.float32(jnp.inf), 0)
    both, worst, _ = lax.while_loop(unsettled, tournament, start)
    both = jnp.where(worst <= _TOLERANCE, both, jnp.nan)
    return both[:rows], both[rows:]


def _along_longer(x: jax.Array) -> jax.Array:
    """The largest part of a column that lies along another one that is longer."""
    products = jnp.abs(_product(x.T, x))
    lengths = jnp.sqrt(jnp.diagonal(products))
    longer = jnp.maximum(lengths[:, None], lengths)
    return jnp.max(jnp.fill_diagonal(products, 0.0, inplace=False) / jnp.where(longer > 0, longer, 1.0))


# The tournament is the usual one by the circle method. A device is a table with a first and a second seat. The first
# seat of table 0 is never left; in all others, players move on by one: up the first seats and down the second ones.


def _in_order(device: jax.Array, times: jax.Array, devices: int) -> jax.Array:
    """Whether the earlier of the two blocks at a table, after so many rounds, is in the first seat."""
    seats = 2 * devices - 1
    return (device == 0) | ((device - times) % seats < (-device - times) % seats)


def _next_round(axes: tuple[str, ...], blocks: jax.Array) -> jax.Array:
    """The two blocks (rows, part) of a device in the next round."""
    devices, device = lax.axis_size(axes), lax.axis_index(axes)
    first, second = jnp.split(blocks, 2, axis=1)
    up, down = ([(i, i + step) for i in range(devices) if 0 <= i + step < devices] for step in (1, -1))
    from_below = lax.ppermute(jnp.where(device == 0, second, first), axes, up)
    from_above = lax.ppermute(second, axes, down)
    return jnp.concatenate(
        [jnp.where(device == 0, first, from_below), jnp.where(device == devices - 1, first, from_above)], axis=1
    )


def _padded(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """(..., rows, columns) with zeros after what is there."""
    missing = (rows - a.shape[-2], columns - a.shape[-1])
    return jnp.pad(a, (*((0, 0),) * (a.ndim - 2), *((0, n) for n in missing))) if any(missing) else a


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
