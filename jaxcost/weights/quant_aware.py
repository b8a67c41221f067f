"""Weights that are quantised each time they are used while training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxcost.weights.base import Weight, logical_axes, materialize, trainable
from jaxcost.weights.quantized import Quantized, integer_limit, quantization_scale, quantized


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a weight and the activation it meets are quantised while training, whichever library does it."""

    bits: int = 8
    """Bits of a weight in the forward pass; symmetric, scaled by the absolute maximum over the contracted axis."""
    activations: bool = True
    """Quantise the activation to as many bits, token by token; if not, gradients pass straight through floats."""
    group: int | None = None
    """Neighbours along the contracted axis that share a scale, where activations stay as they are; None for all."""
    backward_bits: int | None = 8
    """Bits of both operands of the activation's gradient; None leaves it in floating point."""
    stochastic_rounding: bool = False
    """Round the gradient at random in the backward pass (unbiased), which asks for a key in `contract`."""
    backend: Literal["aqt", "reference"] = "aqt"
    """`aqt` computes through AQT, backward pass included; `reference` passes gradients straight through, in floats."""

    def served(self, dense: jax.Array) -> Quantized:
        """The dense array (..., in, out) as it is served after training: the very arithmetic of the forward pass."""
        return quantized(dense, f"int{self.bits}", self.group, self.bits if self.activations else None)


@struct.dataclass
class QuantAware(Weight):
    """A float weight that is quantised, with its activation or alone, every time it is used (quantised training).

    Its forward pass has the bits of `spec.served` of what it holds, whichever backend computes it.
    """

    weight: Any
    spec: QuantSpec = struct.field(pytree_node=False, default=QuantSpec())

    def contract(self, x, key):
        dense = materialize(self.weight)
        if self.spec.backend == "reference" or not self.spec.activations:
            return _straight_through(self.spec, x, dense)
        if self.spec.stochastic_rounding and key is None:
            return _without_gradient(_through_aqt(self.spec, x, dense, None))
        return _through_aqt(self.spec, x, dense, key if self.spec.stochastic_rounding else None)

    def materialize(self):
        dense = materialize(self.weight)
        return dense + lax.stop_gradient(self.spec.served(dense).materialize().astype(dense.dtype) - dense)

    def logical_axes(self, axes):
        return self.replace(weight=logical_axes(self.weight, axes))

    def trainable(self):
        return self.replace(weight=trainable(self.weight))


def fake_quantize(x: jax.Array, bits: int, axis: int) -> jax.Array:
    """x rounded to a symmetric grid of 2**bits - 1 values along `axis`, in x's dtype; the gradient passes through."""
    scale = quantization_scale(lax.stop_gradient(x), bits, axis)
    limit = integer_limit(bits)
    rounded = jnp.clip(jnp.round(x.astype(jnp.float32) * (1.0 / scale)), -limit, limit) * scale
    return x + lax.stop_gradient(rounded.astype(x.dtype) - x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(spec, x, dense):
    """What is served, with the gradients of x·w at what x and w were rounded to."""
    return spec.served(dense).contract(x, None)


def _straight_through_forward(spec, x, dense):
    return _straight_through(spec, x, dense), (x, dense)


def _straight_through_backward(spec, residuals, g):
    x, dense = residuals
    rounded = fake_quantize(x, spec.bits, axis=-1) if spec.activations else x
    used = spec.served(dense).materialize().astype(x.dtype)
    _, back = jax.vjp(lambda x, w: lax.dot_general(x, w, _contracted(x), preferred_element_type=x.dtype), rounded, used)
    to_x, to_w = back(g)
    return to_x, to_w.astype(dense.dtype)


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through_aqt(spec, x, dense, key):
    # AQT rounds a weight in the activation's dtype, so bfloat16 would choose its codes. It is given the codes of the
    # float weight instead, which stand on its grid already, and activations in float32.
    served = spec.served(dense)
    y = _aqt_dot(x.astype(jnp.float32), served.codes.astype(jnp.float32), spec, key)
    return (y * served.scale[0]).astype(x.dtype)


def _through_aqt_forward(spec, x, dense, key):
    return _through_aqt(spec, x, dense, key), (x, dense, key)


def _through_aqt_backward(spec, residuals, g):
    x, dense, key = residuals
    _, back = jax.vjp(lambda x, w: _aqt_dot(x, w.astype(x.dtype), spec, key), x, dense)
    return *back(g), None


_through_aqt.defvjp(_through_aqt_forward, _through_aqt_backward)


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
    return config(x, w, dimension_numbers=_contracted(x)).astype(x.dtype)


def _contracted(x):
    return ((x.ndim - 1,), (0,)), ((), ())


@jax.custom_vjp
def _without_gradient(y):
    return y


def _without_gradient_forward(y):
    raise ValueError("The gradient of stochastic rounding needs a random key: pass key= to contract.")


_without_gradient.defvjp(_without_gradient_forward, lambda _, g: (g,))
