"""Keys and values that are kept: of the tokens seen so far, and of a source; as computed, or as 8-bit integers.

Shapes: L layers, B batch, T new tokens, S slots, K key-value heads, h head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxcost.sharding import platform
from jaxcost.weights import integer_limit, quantization_scale

_BITS = 8


@struct.dataclass
class Codes:
    """Keys or values as integers with a scale for each token and head: codes * scale."""

    codes: jax.Array
    """int8, (..., B, S, K, h), -127..127."""
    scale: jax.Array
    """float32, (..., B, S, K, 1)."""


@struct.dataclass
class Source:
    """What attention to a source meets: keys and values, which are `states` until a layer has made them."""

    key: Any = None
    """(L, B, S, K, h), or (B, S, K, h) of one layer: compute dtype, or `Codes`; None while there are states."""
    value: Any = None
    """As the keys."""
    states: jax.Array | None = None
    """(B, S, D): what the encoder gave; None once there are keys."""
    valid: jax.Array | None = None
    """(B, S) bool: the tokens that are no padding; None if all are valid."""


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, for every layer and row."""

    key: Any
    """(L, B, S, K, h), compute dtype, or the `Codes` of as many; or L of them, (1, B, S, K, h), if they are `apart`."""
    value: Any
    """As the keys."""
    length: jax.Array
    """(B,) int32: tokens in each row, virtual ones included."""
    source: Source | None = None
    """What the encoder has read, as keys and values of every layer, of B rows or of so few that several of them, one
    behind the other, share each; None without an encoder."""
    virtual: int = struct.field(pytree_node=False, default=0)
    """Virtual tokens that it was started with."""


def empty(shape: tuple[int, ...], dtype) -> Any:
    """Zeros of a shape (..., B, S, K, h): an array, or `Codes` where the dtype is int8."""
    if jnp.dtype(dtype) != jnp.int8:
        return jnp.zeros(shape, dtype)
    return Codes(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))


def write(old: Any, new_BTKh: jax.Array, positions_BT: jax.Array) -> Any:
    """The cache of one layer with row b's new tokens from slot positions[b, 0] on."""

    def row(cache, new, start):
        return lax.dynamic_update_slice(cache, new.astype(cache.dtype), (start, 0, 0))

    def rows(cache, new):
        # XLA on a CPU scatters 16-bit floats through a float32 copy of the whole cache: 0.46 against 0.07 ms for one
        # token of 8 rows in (8, 384, 4, 64).
        if platform() == "cpu" and new.shape[1] == 1 and cache.dtype in (jnp.bfloat16, jnp.float16):
            last = cache.shape[1] - 1
            here_BS11 = (jnp.arange(last + 1) == jnp.minimum(positions_BT[:, :1], last))[..., None, None]
            return jnp.where(here_BS11, new.astype(cache.dtype), cache)
        return jax.vmap(row)(cache, new, positions_BT[:, 0])

    new = _quantized(new_BTKh) if isinstance(old, Codes) else new_BTKh
    return jax.tree.map(rows, old, new)


def held(x: jax.Array, dtype) -> Any:
    """Keys or values (..., B, S, K, h) as a cache of that dtype holds them: `Codes` where it is int8."""
    return _quantized(x) if jnp.dtype(dtype) == jnp.int8 else x.astype(dtype)


def read(held: Any, dtype) -> jax.Array:
    """The keys or values (..., B, S, K, h) in a dtype."""
    if not isinstance(held, Codes):
        return held
    return (held.codes.astype(jnp.float32) * held.scale).astype(dtype)


def _quantized(x: jax.Array) -> Codes:
    scale = quantization_scale(x, _BITS, axis=-1)
    limit = integer_limit(_BITS)
    codes = jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -limit, limit)
    return Codes(codes.astype(jnp.int8), scale)
