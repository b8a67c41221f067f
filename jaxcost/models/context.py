"""Causal attention over sequences that are split along the `context` mesh axis: all-to-all, or a ring.

With all-to-all, a device trades its part of the tokens of all heads for all tokens of a part of the heads, attends with
the platform's own kernel, and trades back; the heads must divide. In a ring, the keys and values go round the devices
while each attends from its own queries; any number of heads will do, and no device ever holds a whole sequence.

The ring's work is not balanced: under the causal mask the last device attends to every part and the first to its own
alone, so a step takes as long as the last one's. Orders of the tokens that balance it (zig-zag) are not built.

Sources: Jacobs et al. 2023 (DeepSpeed-Ulysses), arXiv:2309.14509, for all-to-all; Liu et al. 2023, arXiv:2310.01889,
for the ring. Shapes: B rows, H and K query and key heads, G = H / K, h head size, T tokens of a sequence, C of a
device's part of it, t of a piece of that part, S keys that are seen at once; all of one device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxcost.sharding import mesh_spec

Method = Literal["auto", "all_to_all", "ring"]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

AXIS = "context"
_SCORES = 2**23
"""Scores that the ring makes at a time, those of one key head, which bounds its working memory."""


def resolve(method: Method, heads: int, kv_heads: int, ways: int) -> Method:
    """What `auto` means: all-to-all where the heads of a device divide into so many ways, else the ring.

    Keys and values with too few heads are repeated, as long as each query head still finds its own.

    Raises:
        ValueError: all-to-all was asked for and the heads do not divide.
    """
    divides = heads % math.lcm(kv_heads, ways) == 0
    if method == "all_to_all" and not divides:
        raise ValueError(
            f"execution.context is 'all_to_all', and the {heads} query and {kv_heads} key heads of a device do not "
            f"divide over mesh.context ({ways}); use 'ring', or change mesh.context."
        )
    return method if method != "auto" else "all_to_all" if divides else "ring"


def attend(method: Method, whole: Attend, q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> jax.Array:
    """Causal attention on the current mesh, whose `context` axis splits the tokens: (B, T, H, h).

    Args:
        method: from `resolve`.
        whole: causal attention of one device over whole sequences, for all-to-all.
        q_BTHh: queries.
        k_BTKh: keys.
        v_BTKh: values.

    Raises:
        ValueError: the axis does not divide the sequence.
    """
    mesh = jax.sharding.get_abstract_mesh()
    check_length(q_BTHh.shape[1], mesh.shape[AXIS])
    queries = mesh_spec(PartitionSpec("batch", "length", "heads", None), mesh.shape)
    keys = mesh_spec(PartitionSpec("batch", "length", "kv_heads", None), mesh.shape)
    local = functools.partial(_all_to_all, whole) if method == "all_to_all" else _ring
    mapped = jax.shard_map(local, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)
    return mapped(q_BTHh, k_BTKh, v_BTKh)


def check_length(length: int, ways: int) -> None:
    """ValueError if a sequence does not divide over the axis."""
    if length % ways:
        raise ValueError(
            f"data.sequence_length ({length}) must be a multiple of mesh.context ({ways}), which splits the sequence; "
            "change either."
        )


def _all_to_all(whole: Attend, q_BCHh, k_BCKh, v_BCKh):
    ways = lax.axis_size(AXIS)
    repeats = math.lcm(k_BCKh.shape[2], ways) // k_BCKh.shape[2]
    k_BCKh, v_BCKh = (jnp.repeat(x, repeats, axis=2) for x in (k_BCKh, v_BCKh))
    # From all heads of the device's tokens to a part of the heads of all tokens, and back.
    trade = functools.partial(lax.all_to_all, axis_name=AXIS, tiled=True)
    out_BTHh = whole(*(trade(x, split_axis=2, concat_axis=1) for x in (q_BCHh, k_BCKh, v_BCKh)))
    return trade(out_BTHh, split_axis=1, concat_axis=2)


def _ring(q_BCHh, k_BCKh, v_BCKh):
    rows, tokens, _, head_dim = q_BCHh.shape
    q_BCKGh = q_BCHh.reshape(rows, tokens, k_BCKh.shape[2], -1, head_dim)
    out_KBGCh = _around(q_BCKGh.transpose(2, 0, 3, 1, 4), *(x.transpose(2, 0, 1, 3) for x in (k_BCKh, v_BCKh)))
    return out_KBGCh.transpose(1, 3, 0, 2, 4).reshape(q_BCHh.shape)


@jax.custom_vjp
def _around(q_KBGCh, k_KBCh, v_KBCh):
    return _around_forward(q_KBGCh, k_KBCh, v_KBCh)[0]


def _around_forward(q_KBGCh, k_KBCh, v_KBCh):
    index, k, v = lax.axis_index(AXIS), k_KBCh, v_KBCh
    seen = _attend(q_KBGCh, k, v, causal=True)
    for step in range(1, lax.axis_size(AXIS)):
        k, v = _rotated((k, v))
        # What came round belongs to the device `step` places before this one; there is none before the first.
        add = functools.partial(_seen_too, q_KBGCh, k, v)
        seen = lax.cond(step <= index, add, lambda seen: seen, seen)
    out_KBGCh, log_sum_KBGC = seen
    out_KBGCh = out_KBGCh.astype(q_KBGCh.dtype)
    return out_KBGCh, (q_KBGCh, k_KBCh, v_KBCh, out_KBGCh, log_sum_KBGC)


def _around_backward(kept, dout_KBGCh):
    """The gradients of keys and values go round with them and end where they began.

    Source: Dao 2023, arXiv:2307.08691, algorithm 2, for the gradient from the kept sums.
    """
    q, k, v, out, log_sum = kept
    row_sum = jnp.sum(out.astype(jnp.float32) * dout_KBGCh.astype(jnp.float32), axis=-1)
    from_rows = (q, dout_KBGCh, log_sum, row_sum)
    index = lax.axis_index(AXIS)
    dq, dk, dv = _gradients(from_rows, k, v, causal=True)
    for step in range(1, lax.axis_size(AXIS)):
        k, v, dk, dv = _rotated((k, v, dk, dv))
        add = functools.partial(_gradients_too, from_rows, k, v)
        dq, dk, dv = lax.cond(step <= index, add, lambda sums: sums, (dq, dk, dv))
    dk, dv = _rotated((dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_around.defvjp(_around_forward, _around_backward)


def _rotated(tree):
    """Each device's arrays, at the next device."""
    ways = lax.axis_size(AXIS)
    return lax.ppermute(tree, AXIS, [(device, (device + 1) % ways) for device in range(ways)])


def _seen_too(q, k, v, seen):
    """Attention to what was seen so far and to further keys, weighted by the sums of their exponentials."""
    (out, its_sum), (more, more_sum) = seen, _attend(q, k, v, causal=False)
    log_sum = jnp.logaddexp(its_sum, more_sum)
    return out * jnp.exp(its_sum - log_sum)[..., None] + more * jnp.exp(more_sum - log_sum)[..., None], log_sum


def _gradients_too(from_rows, k, v, sums):
    return jax.tree.map(jnp.add, sums, _gradients(from_rows, k, v, causal=False))


def _attend(q_KBGCh, k_KBSh, v_KBSh, causal: bool):
    """Attention to some keys alone: float32 outputs (K, B, G, C, h) and logarithms of the sums of their weights."""

    def head(arrays):
        q_BGCh, k_BSh, v_BSh = arrays

        def piece(rows):
            q_BGth, first = rows
            scores = _scores(q_BGth, k_BSh, first if causal else None)
            log_sum = jax.nn.logsumexp(scores, axis=-1)
            weights = jnp.exp(scores - log_sum[..., None]).astype(v_BSh.dtype)
            return _product("bgts,bsh->bgth", weights, v_BSh), log_sum

        return jax.tree.map(_joined, lax.map(piece, _pieces((q_BGCh,), k_BSh)))

    return lax.map(head, (q_KBGCh, k_KBSh, v_KBSh))


def _gradients(from_rows, k_KBSh, v_KBSh, causal: bool):
    """Float32 gradients of queries, keys and values from the attention to some keys."""
    scale = k_KBSh.shape[-1] ** -0.5

    def head(arrays):
        *from_rows, k_BSh, v_BSh = arrays

        def piece(sums, rows):
            q, dout, log_sum, row_sum, first = rows
            weights = jnp.exp(_scores(q, k_BSh, first if causal else None) - log_sum[..., None])
            dweights = _product("bgth,bsh->bgts", dout, v_BSh)
            dscores = (weights * (dweights - row_sum[..., None]) * scale).astype(q.dtype)
            dk = sums[0] + _product("bgts,bgth->bsh", dscores, q)
            dv = sums[1] + _product("bgts,bgth->bsh", weights.astype(q.dtype), dout)
            return (dk, dv), _product("bgts,bsh->bgth", dscores, k_BSh)

        zeros = jnp.zeros(k_BSh.shape, jnp.float32)
        (dk, dv), dq = lax.scan(piece, (zeros, zeros), _pieces(from_rows, k_BSh))
        return _joined(dq), dk, dv

    return lax.map(head, (*from_rows, k_KBSh, v_KBSh))


def _scores(q_BGth, k_BSh, first):
    """Scaled scores (B, G, t, S); `first` is the first query's place among the keys if those after it are masked."""
    scores = _product("bgth,bsh->bgts", q_BGth, k_BSh) * q_BGth.shape[-1] ** -0.5
    if first is None:
        return scores
    places = first + jnp.arange(q_BGth.shape[2])
    return jnp.where(jnp.arange(k_BSh.shape[1]) <= places[:, None], scores, -jnp.inf)


def _product(equation: str, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _pieces(from_rows, k_BSh):
    """Arrays (B, G, C, ...) in the fewest pieces along C whose scores are few enough, and the first row of each."""
    rows, groups, tokens = from_rows[0].shape[:3]
    most = max(1, _SCORES // (rows * groups * k_BSh.shape[1]))
    size = max(n for n in range(1, min(most, tokens) + 1) if tokens % n == 0)

    def cut(x):
        return jnp.moveaxis(x.reshape(*x.shape[:2], tokens // size, size, *x.shape[3:]), 2, 0)

    return *map(cut, from_rows), jnp.arange(0, tokens, size)


def _joined(x_nBGt):
    x = jnp.moveaxis(x_nBGt, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
