"""Weights on integer grids: stored as codes, or quantised each time they are used while training."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from jaxcost.weights.base import Weight, contract, full, logical_axes, materialize, nothing, trainable


@struct.dataclass
class Quantized(Weight):
    """Integer codes with a scale for each output channel: codes * scale. Nothing in it trains."""

    codes: jax.Array
    """int8, (..., in, out), symmetric: -127..127."""
    scale: jax.Array
    """float32, (..., 1, out)."""

    def contract(self, x, key):
        # The scale belongs to the output channel, so it is applied after the contraction: `in` times fewer products.
        y = contract(x, self.codes.astype(x.dtype)).astype(jnp.float32) * self.scale[..., 0, :]
        return y.astype(x.dtype)

    def materialize(self):
        return self.codes.astype(self.scale.dtype) * self.scale

    def logical_axes(self, axes):
        axes = full(axes, self.codes)
        return self.replace(codes=axes, scale=PartitionSpec(*axes[:-2], None, axes[-1]))

    def trainable(self):
        return nothing(self)


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a weight and the activation it meets are quantised while training, whichever library does it."""

    bits: int = 8
    """Bits of both operands in the forward pass; symmetric, scaled by the absolute maximum over the contracted axis."""
    backward_bits: int | None = 8
    """Bits of both operands of the activation's gradient; None leaves it in floating point."""
    stochastic_rounding: bool = False
    """Round the gradient at random in the backward pass (unbiased), which asks for a key in `contract`."""
    backend: Literal["aqt", "reference"] = "aqt"
    """`aqt` computes with integers through AQT; `reference` fakes them in floats (straight-through gradients)."""


@struct.dataclass
class QuantAware(Weight):
    """A float weight that is quantised, with its activation, every time it is used (quantised training)."""

    weight: Any
    spec: QuantSpec = struct.field(pytree_node=False, default=QuantSpec())

    def contract(self, x, key):
        dense = materialize(self.weight)
        if self.spec.backend == "reference":
            return contract(fake_quantize(x, self.spec.bits, axis=-1), self.materialize())
        if self.spec.stochastic_rounding and key is None:
            return _without_gradient(_aqt_dot(x, dense, self.spec, None))
        return _aqt_dot(x, dense, self.spec, key if self.spec.stochastic_rounding else None)

    def materialize(self):
        return fake_quantize(materialize(self.weight), self.spec.bits, axis=-2)

    def logical_axes(self, axes):
        return self.replace(weight=logical_axes(self.weight, axes))

    def trainable(self):
        return self.replace(weight=trainable(self.weight))


def integer_limit(bits: int) -> int:
    """The largest code of a symmetric signed grid: 127 for 8 bits."""
    return 2 ** (bits - 1) - 1


def quantization_scale(x: jax.Array, bits: int, axis: int) -> jax.Array:
    """The scale, keeping `axis` as 1, that maps the largest absolute value along it onto the largest code."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True).astype(jnp.float32)
    return jnp.where(largest > 0, largest, 1.0) / integer_limit(bits)


def fake_quantize(x: jax.Array, bits: int, axis: int) -> jax.Array:
    """x rounded to a symmetric grid of 2**bits - 1 values along `axis`, in x's dtype; the gradient passes through."""
    scale = quantization_scale(lax.stop_gradient(x), bits, axis)
    limit = integer_limit(bits)
    rounded = (jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -limit, limit) * scale).astype(x.dtype)
    return x + lax.stop_gradient(rounded - x)


def _aqt_dot(x, w, spec: QuantSpec, key):
    from aqt.jax.v2 import config as aqt_config

    config = aqt_config.config_v4(fwd_bits=spec.bits, dlhs_bits=spec.backward_bits, drhs_bits=None)
    if not spec.stochastic_rounding:
        aqt_config.set_stochastic_rounding(
            config, vjp_lhs_stochastic_rounding=False, vjp_rhs_stochastic_rounding=False, implementation="jax.uniform"
        )
    products = [config.fwd] if spec.backward_bits is None else [config.fwd, config.dlhs]
    for operand in (side for p in products for side in (p.dg_quantizer.lhs, p.dg_quantizer.rhs)):
        # The largest value on the largest code: forward, so that AQT's grid is ours and what it trains is what we
        # store; backward, so that no value is clipped, which would bias stochastic rounding.
        operand.numerics.preserve_max_val = True
    config = aqt_config.set_context(config, key=key, train_step=None)
    y = config(x, w.astype(x.dtype), dimension_numbers=(((x.ndim - 1,), (0,)), ((), ())))
    return y.astype(x.dtype)


@jax.custom_vjp
def _without_gradient(y):
    return y


def _without_gradient_forward(y):
    raise ValueError("The gradient of stochastic rounding needs a random key: pass key= to contract.")


_without_gradient.defvjp(_without_gradient_forward, lambda _, g: (g,))
