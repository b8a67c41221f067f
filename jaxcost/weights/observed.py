"""Weights that watch what they are multiplied with, for the transforms that need to know.

The statistics of a weight's input come out of a backward pass: they are what `Observed` returns as the "gradient" of
its probe. So any model that contracts its weights can be calibrated as it stands, under jit, scan, vmap and a mesh, and
what the statistics do not need of the backward pass is never computed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxcost.weights.base import Weight, contract, logical_axes, materialize, nothing


@struct.dataclass
class Inputs:
    """What is known of the activations x (rows, in) that each matrix of a weight (..., in, out) meets; float32."""

    count: jax.Array
    """(...): rows seen that are not all zeros."""
    squares: jax.Array
    """(..., in): sum of x² over the rows."""
    largest: jax.Array
    """(..., in): largest |x|."""
    gram: jax.Array | None = None
    """(..., in, in): sum of the outer products of the rows, xᵀx; None where it was not asked for."""

    def root_mean_squares(self) -> jax.Array:
        """(..., in): of each input; ones for a matrix that has met no rows."""
        met = self.count[..., None]
        return jnp.where(met > 0, jnp.sqrt(self.squares / jnp.maximum(met, 1.0)), 1.0)

    def scaled(self, scale: jax.Array) -> Inputs:
        """Those of the inputs multiplied with a factor (..., in) for each channel."""
        gram = None if self.gram is None else self.gram * scale[..., :, None] * scale[..., None, :]
        return Inputs(self.count, self.squares * scale**2, self.largest * jnp.abs(scale), gram)

    def __add__(self, other: Inputs) -> Inputs:
        """The statistics of both sets of rows."""
        return Inputs(
            self.count + other.count,
            self.squares + other.squares,
            jnp.maximum(self.largest, other.largest),
            None if self.gram is None else self.gram + other.gram,
        )


def blank_inputs(shape: tuple[int, ...], gram: bool) -> Inputs:
    """The statistics of no rows, for a matrix (..., in, out)."""
    *stack, inward, _ = shape
    features = jnp.zeros((*stack, inward), jnp.float32)
    products = jnp.zeros((*stack, inward, inward), jnp.float32) if gram else None
    return Inputs(jnp.zeros(tuple(stack), jnp.float32), features, features, products)


@struct.dataclass
class Observed(Weight):
    """A weight whose input's statistics are the cotangent of `inputs`; otherwise the weight itself."""

    weight: Any
    inputs: Inputs

    def contract(self, x, key):
        return contract(_watched(x, self.inputs), self.weight, key)

    def materialize(self):
        return materialize(self.weight)

    def logical_axes(self, axes):
        *stack, inward, _ = axes
        features = PartitionSpec(*stack, inward)
        products = None if self.inputs.gram is None else PartitionSpec(*stack, inward, inward)
        places = Inputs(PartitionSpec(*stack), features, features, products)
        return self.replace(weight=logical_axes(self.weight, axes), inputs=places)

    def trainable(self):
        return nothing(self)


@jax.custom_vjp
def _watched(x, inputs):
    return x


def _watched_forward(x, inputs):
    return x, (x, inputs)


def _watched_backward(residuals, g):
    x, inputs = residuals
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    gram = None if inputs.gram is None else jnp.matmul(rows.T, rows, preferred_element_type=jnp.float32)
    # An expert's empty places hold zeros, which are no rows.
    count = jnp.sum(jnp.any(rows != 0, axis=-1), dtype=jnp.float32)
    return g, Inputs(count, jnp.sum(jnp.square(rows), axis=0), jnp.max(jnp.abs(rows), axis=0, initial=0.0), gram)


_watched.defvjp(_watched_forward, _watched_backward)
