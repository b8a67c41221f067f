"""Weights that are stored as codes on a grid: integers, the 16 levels of NF4, or 8-bit floats."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from jaxcost.weights.base import Weight, contract, full, nothing

GridName = Literal["int8", "int4", "nf4", "fp8"]

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The quantiles of a normal distribution. Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, appendix E."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that a code can stand for, before they are scaled."""

    dtype: Any
    """Of a code; those of 4 bits are held two a byte where the platform packs them, as TPUs do."""
    largest: float
    """The largest value, onto which the largest weight of a group is scaled; the smallest is its negative."""
    rounds: Literal["integers", "levels", "floats"]
    """How a value finds its code."""


GRIDS: dict[str, Grid] = {
    "int8": Grid(jnp.int8, 127.0, "integers"),
    "int4": Grid(jnp.int4, 7.0, "integers"),
    "nf4": Grid(jnp.int4, 1.0, "levels"),
    "fp8": Grid(jnp.float8_e4m3fn, 448.0, "floats"),
}
"""The grids by name. Integers are symmetric, -127..127 and -7..7, so that zero is a value and signs are alike.

The codes of NF4 are those of its levels less 8: checkpoints hold signed codes of 4 bits and no unsigned ones.
"""
_FIRST_LEVEL = -8


@struct.dataclass
class Quantized(Weight):
    """Codes on a grid times a scale for each output channel and group of inputs. Nothing in it trains.

    With `activation_bits`, activations are put on the integer grid of so many bits too, and the product is one of
    integers. Its gradient with respect to the activation is that of the weight, as if the activation were not rounded.
    """

    codes: jax.Array
    """(..., in, out), of the grid's dtype."""
    scale: jax.Array
    """float32, (..., groups, out): each stands for in / groups neighbours along the contracted axis."""
    activation_scale: jax.Array | None = None
    """float32, (...): the calibrated scale of the activations; None takes the largest value of each token."""
    grid: GridName = struct.field(pytree_node=False, default="int8")
    """What the codes mean."""
    activation_bits: int | None = struct.field(pytree_node=False, default=None)
    """Bits of an activation; None leaves it in floating point."""

    def contract(self, x, key):
        if self.activation_bits is not None:
            return _integer_product(self.activation_bits, x, self.codes, self.scale, self.activation_scale)
        if self.scale.shape[-2] > 1:
            # Contracting each group by itself makes groups times the output: as fast for a few tokens on a CPU, 6
            # times slower for 512, and out of memory for a TPU's batch.
            return contract(x, self.materialize().astype(x.dtype))
        # The scale belongs to the output channel, so it is applied after the contraction: `in` times fewer products,
        # and what is read as an operand are the codes.
        y = contract(x, decode(self.codes, self.grid, x.dtype)).astype(jnp.float32) * self.scale[..., 0, :]
        return y.astype(x.dtype)

    def materialize(self):
        levels = decode(self.codes, self.grid, self.scale.dtype)
        return levels * spread(self.scale, self.codes.shape[-2])

    def logical_axes(self, axes):
        *stack, inward, outward = full(axes, self.codes)
        # A group lives where its inputs do, or each device would hold the scales of all.
        groups = None if inward is None or self.scale.shape[-2] == 1 else f"{inward}/groups"
        return self.replace(
            codes=PartitionSpec(*stack, inward, outward),
            scale=PartitionSpec(*stack, groups, outward),
            activation_scale=None if self.activation_scale is None else PartitionSpec(*stack),
        )

    def trainable(self):
        return nothing(self)

    def masked(self, mask: jax.Array) -> Quantized:
        """The same with zeros where the mask (..., in, out) is False."""
        return self.replace(codes=jnp.where(mask, self.codes, encode(jnp.zeros(()), self.grid)))


def quantized(
    dense: jax.Array, grid: GridName = "int8", group: int | None = None, activation_bits: int | None = None
) -> Quantized:
    """The dense array (..., in, out) with each value on the nearest of its grid.

    Args:
      dense: the weight.
      grid: what the codes mean.
      group: neighbours along the contracted axis that share a scale, a divisor of `in`; None for all of them.
      activation_bits: bits of the activations that it will meet; None leaves them in floating point.
    """
    scale = group_scale(dense, grid, group)
    codes = encode(dense.astype(jnp.float32) * (1.0 / spread(scale, dense.shape[-2])), grid)
    return Quantized(codes, scale, grid=grid, activation_bits=activation_bits)


def group_scale(dense: jax.Array, grid: GridName, group: int | None = None) -> jax.Array:
    """The scales (..., groups, out) that put the largest |value| of each group on the grid's largest."""
    *stack, inward, outward = dense.shape
    groups = dense.reshape(*stack, inward // (group or inward), group or inward, outward)
    largest = jnp.max(jnp.abs(groups), axis=-2).astype(jnp.float32)
    return jnp.where(largest > 0, largest, 1.0) / GRIDS[grid].largest


def spread(scale: jax.Array, inward: int) -> jax.Array:
    """Scales (..., groups, out) for each row of a matrix: (..., in, out), or (..., 1, out) for a single group."""
    groups = scale.shape[-2]
    return scale if groups == 1 else jnp.repeat(scale, inward // groups, axis=-2)


def encode(values: jax.Array, grid: GridName) -> jax.Array:
    """The codes of the grid's values that are nearest to `values`; what is beyond the largest becomes the largest."""
    found = GRIDS[grid]
    if found.rounds == "levels":
        # The midpoints passed; a search for each value would not fuse with what comes before it.
        middles = (np.array(NF4_LEVELS[1:], np.float32) + np.array(NF4_LEVELS[:-1], np.float32)) / 2
        return (sum((values > middle).astype(jnp.int8) for middle in middles) + _FIRST_LEVEL).astype(found.dtype)
    values = jnp.clip(values, -found.largest, found.largest)
    return (jnp.round(values) if found.rounds == "integers" else values).astype(found.dtype)


def decode(codes: jax.Array, grid: GridName, dtype) -> jax.Array:
    """What the codes stand for, before it is scaled."""
    if GRIDS[grid].rounds != "levels":
        return codes.astype(dtype)
    # Selects, unlike a look-up in a table, fuse into the product that follows.
    codes = codes.astype(jnp.int8)
    values = jnp.full(codes.shape, NF4_LEVELS[0], dtype)
    for code, level in enumerate(NF4_LEVELS[1:], start=_FIRST_LEVEL + 1):
        values = jnp.where(codes >= code, jnp.asarray(level, dtype), values)
    return values


def integer_limit(bits: int) -> int:
    """The largest code of a symmetric signed grid: 127 for 8 bits."""
    return 2 ** (bits - 1) - 1


def quantization_scale(x: jax.Array, bits: int, axis: int) -> jax.Array:
    """The scale, keeping `axis` as 1, that maps the largest absolute value along it onto the largest code."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32)
    return jnp.where(largest > 0, largest, 1.0) / integer_limit(bits)


def storage_bytes(array: Any) -> int:
    """Bytes of an array, or of one that only has a shape, with codes of 4 bits two a byte."""
    return -(-array.size * jax.dtypes.itemsize_bits(array.dtype) // 8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _integer_product(bits, x, codes, scale, activation_scale):
    """x (..., in) on its grid times codes (in, out): integers, summed in int32, scaled to x's dtype."""
    limit = integer_limit(bits)
    values = x.astype(jnp.float32)
    step = quantization_scale(values, bits, axis=-1) if activation_scale is None else activation_scale
    rounded = jnp.clip(jnp.round(values * (1.0 / step)), -limit, limit).astype(jnp.int8)
    contracted = (((x.ndim - 1,), (0,)), ((), ()))
    total = lax.dot_general(rounded, codes.astype(jnp.int8), contracted, preferred_element_type=jnp.int32)
    return (total.astype(jnp.float32) * step * scale[0]).astype(x.dtype)


def _integer_product_forward(bits, x, codes, scale, activation_scale):
    return _integer_product(bits, x, codes, scale, activation_scale), (codes, scale)


def _integer_product_backward(bits, residuals, g):
    codes, scale = residuals
    scaled = (g * scale[0]).astype(g.dtype)
    back = lax.dot_general(
        scaled, codes.astype(g.dtype), (((g.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return back.astype(g.dtype), None, None, None


_integer_product.defvjp(_integer_product_forward, _integer_product_backward)
