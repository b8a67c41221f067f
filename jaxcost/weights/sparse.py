"""Weights with pruned entries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxcost.weights.base import Weight, contract, logical_axes, materialize, trainable
from jaxcost.weights.quantized import Quantized
from jaxcost.weights.tree import Params, path_name


@struct.dataclass
class Masked(Weight):
    """A weight times a fixed 0/1 mask of its shape. Computes as a dense weight: a mask alone saves no work."""

    weight: Any
    mask: jax.Array
    """Boolean, (..., in, out); False is pruned."""
    dense_gradient: bool = struct.field(pytree_node=False, default=False)
    """Whether pruned entries get the gradient that they would have at zero, to tell which of them should grow."""

    def contract(self, x, key):
        # Zero is on every grid, so what is quantised stays so.
        held = self.weight.masked(self.mask) if isinstance(self.weight, Quantized) else self.materialize()
        return contract(x, held)

    def materialize(self):
        dense = materialize(self.weight)
        zero = jnp.zeros((), dense.dtype)
        if self.dense_gradient:
            return dense - lax.stop_gradient(jnp.where(self.mask, zero, dense))
        return jnp.where(self.mask, dense, zero)

    def logical_axes(self, axes):
        return self.replace(weight=logical_axes(self.weight, axes), mask=axes)

    def trainable(self):
        return self.replace(weight=trainable(self.weight), mask=False)


@struct.dataclass
class Scored(Masked):
    """A masked weight with a learned score for each entry, by which its mask is made anew while training.

    A score's gradient is what a change of the mask's entry would do to the loss, straight through the threshold:
    weight times gradient, for pruned entries too. Source: Sanh et al. 2020, arXiv:2005.07683, equations 2 and 3.
    """

    scores: jax.Array = struct.field(kw_only=True)
    """float32, (..., in, out)."""

    def contract(self, x, key):
        # Always through the gate, where the scores' gradient comes from.
        return contract(x, self.materialize())

    def materialize(self):
        dense = materialize(self.weight)
        gate = self.mask + (self.scores - lax.stop_gradient(self.scores))
        return dense * gate.astype(dense.dtype)

    def logical_axes(self, axes):
        return super().logical_axes(axes).replace(scores=axes)

    def trainable(self):
        return super().trainable().replace(scores=True)


def kept_gradients(params: Params, gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The gradients, by path, without those of pruned entries that are only computed to tell which should grow."""
    found = dict(gradients)

    def one(path, node):
        name = f"{path_name(path)}/weight"
        if isinstance(node, Masked) and node.dense_gradient and name in gradients:
            found[name] = jnp.where(node.mask, gradients[name], 0.0)

    jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda node: isinstance(node, Masked))
    return found


def forget_pruned(params: Params, state: Any) -> Any:
    """An optimizer's state with zeros where entries are pruned, so that one that grows again starts as a new one.

    The state's arrays are known by the last key of their path, which is that of the array they belong to. Source: the
    authors' code of Evci et al. 2020, arXiv:1911.11134, which resets the momentum of what grows.
    """
    masks = {}

    def one(path, node):
        if isinstance(node, Masked):
            masks[f"{path_name(path)}/weight"] = node.mask

    jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda node: isinstance(node, Masked))

    def kept(path, leaf):
        mask = masks.get(getattr(path[-1], "key", None))
        return leaf if mask is None else jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree_util.tree_map_with_path(kept, state)
