"""Weights whose inputs or outputs are scaled, a factor for each channel."""

from __future__ import annotations

from typing import Any, Literal

import jax
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from jaxcost.weights.base import Weight, contract, logical_axes, materialize, trainable


@struct.dataclass
class Scaled(Weight):
    """diag(scale) · weight, or weight · diag(scale), applied on the activation.

    What rescales the channels before quantisation (SmoothQuant, AWQ) keeps its factors here and does not train them;
    IA3 trains nothing else. Source: Xiao et al. 2022, arXiv:2211.10438; Liu et al. 2022, arXiv:2205.05638.
    """

    weight: Any
    scale: jax.Array
    """(..., in) or (..., out), by `side`."""
    side: Literal["in", "out"] = struct.field(pytree_node=False, default="in")
    """Whether the activation is scaled before the weight or after it."""
    trains: bool = struct.field(pytree_node=False, default=False)
    """Whether `scale` trains; whether the weight does is its own affair."""

    def contract(self, x, key):
        scale = self._scale()
        if self.side == "in":
            return contract((x * scale).astype(x.dtype), self.weight, key)
        return (contract(x, self.weight, key) * scale).astype(x.dtype)

    def materialize(self):
        dense, scale = materialize(self.weight), self._scale()
        channels = scale[..., :, None] if self.side == "in" else scale[..., None, :]
        return (dense * channels).astype(dense.dtype)

    def logical_axes(self, axes):
        *stack, inward, outward = axes
        channels = PartitionSpec(*stack, inward if self.side == "in" else outward)
        return self.replace(weight=logical_axes(self.weight, axes), scale=channels)

    def trainable(self):
        return self.replace(weight=trainable(self.weight), scale=self.trains)

    def _scale(self):
        return self.scale if self.trains else lax.stop_gradient(self.scale)
