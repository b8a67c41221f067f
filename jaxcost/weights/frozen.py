"""Weights that do not train."""

from __future__ import annotations

from typing import Any

from flax import struct
from jax import lax

from jaxcost.weights.base import Weight, contract, logical_axes, materialize, nothing


@struct.dataclass
class Frozen(Weight):
    """A weight, or any other parameter, that does not train."""

    weight: Any

    def contract(self, x, key):
        return contract(x, lax.stop_gradient(self.weight), key)

    def materialize(self):
        return lax.stop_gradient(materialize(self.weight))

    def logical_axes(self, axes):
        return self.replace(weight=logical_axes(self.weight, axes))

    def trainable(self):
        return nothing(self)
