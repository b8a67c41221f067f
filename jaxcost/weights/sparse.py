"""Weights with pruned entries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxcost.weights.base import Weight, contract, logical_axes, materialize, trainable
from jaxcost.weights.quantized import Quantized


@struct.dataclass
class Masked(Weight):
    """A weight times a fixed 0/1 mask of its shape. Computes as a dense weight: a mask alone saves no work."""

    weight: Any
    mask: jax.Array
    """Boolean, (..., in, out); False is pruned."""

    def contract(self, x, key):
        # Zero is on every grid, so what is quantised stays so.
        held = self.weight.masked(self.mask) if isinstance(self.weight, Quantized) else self.materialize()
        return contract(x, held)

    def materialize(self):
        dense = materialize(self.weight)
        return jnp.where(self.mask, dense, jnp.zeros((), dense.dtype))

    def logical_axes(self, axes):
        return self.replace(weight=logical_axes(self.weight, axes), mask=axes)

    def trainable(self):
        return self.replace(weight=trainable(self.weight), mask=False)
