"""Weights that are, or are changed by, products of two thin factors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from jaxcost.weights.base import (
    Weight,
    contract,
    factor_axes,
    logical_axes,
    materialize,
    matmul,
    nothing,
    split_keys,
    trainable,
)


@struct.dataclass
class LowRank(Weight):
    """The product u @ v of rank r, contracted from the left so that the product never exists."""

    u: Any
    """(..., in, r)."""
    v: Any
    """(..., r, out)."""

    def contract(self, x, key):
        key_u, key_v = split_keys(key)
        return contract(contract(x, self.u, key_u), self.v, key_v)

    def materialize(self):
        return matmul(materialize(self.u), materialize(self.v))

    def logical_axes(self, axes):
        axes_u, axes_v = factor_axes(axes)
        return self.replace(u=logical_axes(self.u, axes_u), v=logical_axes(self.v, axes_v))

    def trainable(self):
        return self.replace(u=trainable(self.u), v=trainable(self.v))


@struct.dataclass
class Lora(Weight):
    """A frozen base plus a trained update of rank r, applied on the activation: x·base + scale·(x·a)·b.

    Materialising base + scale·a·b in the forward pass would cost a full fine-tune's FLOPs. Source: Hu et al. 2021,
    arXiv:2106.09685.
    """

    base: Any
    a: Any
    """(..., in, r)."""
    b: Any
    """(..., r, out)."""
    scale: float = struct.field(pytree_node=False, default=1.0)
    own_base: bool = struct.field(pytree_node=False, default=False)
    """Whether the base is what the update left of another, and so must be kept with it (PiSSA)."""

    def contract(self, x, key):
        key_base, key_a, key_b = split_keys(key, 3)
        update = contract(contract(x, self.a, key_a), self.b, key_b)
        return contract(x, lax.stop_gradient(self.base), key_base) + jnp.asarray(self.scale, x.dtype) * update

    def materialize(self):
        base = lax.stop_gradient(materialize(self.base))
        return base + (self.scale * matmul(materialize(self.a), materialize(self.b))).astype(base.dtype)

    def logical_axes(self, axes):
        axes_a, axes_b = factor_axes(axes)
        return self.replace(
            base=logical_axes(self.base, axes), a=logical_axes(self.a, axes_a), b=logical_axes(self.b, axes_b)
        )

    def trainable(self):
        return self.replace(base=nothing(self.base), a=trainable(self.a), b=trainable(self.b))


@struct.dataclass
class Dora(Weight):
    """A weight whose columns have trained lengths: magnitude · W / ‖W‖, the norm that of each output's column.

    W is a `Lora`, so that direction and magnitude train apart; both act on the activation. The norm is a constant of
    the backward pass, as section 4.3 of the paper has it. It is made anew at each use, from the dense array that W
    means: 2·in·r·out FLOPs a step, whatever the number of tokens. Source: Liu et al. 2024, arXiv:2402.09353.
    """

    weight: Any
    magnitude: jax.Array
    """float32, (..., out)."""

    def contract(self, x, key):
        return (contract(x, self.weight, key).astype(jnp.float32) * self._factor()).astype(x.dtype)

    def materialize(self):
        dense = materialize(self.weight)
        return (dense.astype(jnp.float32) * self._factor()[..., None, :]).astype(dense.dtype)

    def logical_axes(self, axes):
        *stack, _, outward = axes
        return self.replace(weight=logical_axes(self.weight, axes), magnitude=PartitionSpec(*stack, outward))

    def trainable(self):
        return self.replace(weight=trainable(self.weight), magnitude=True)

    def _factor(self):
        norm = column_norm(lax.stop_gradient(self.weight))
        return self.magnitude / jnp.where(norm > 0, norm, 1.0)


def column_norm(w: Any) -> jax.Array:
    """The length of each output's column of the dense array that w means: float32, (..., out)."""
    return jnp.linalg.norm(materialize(w).astype(jnp.float32), axis=-2)
