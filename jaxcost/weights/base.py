"""What every kind of weight offers, and the contraction of a plain array."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec


class Weight:
    """What every kind offers. Subclasses are `flax.struct` dataclasses."""

    def contract(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        raise TypeError(f"{type(self).__name__} cannot be contracted.")

    def materialize(self) -> jax.Array:
        raise TypeError(f"{type(self).__name__} cannot be materialised.")

    def logical_axes(self, axes: PartitionSpec) -> Weight:
        raise TypeError(f"{type(self).__name__} names no axes.")

    def trainable(self) -> Weight:
        raise TypeError(f"{type(self).__name__} does not say what trains.")


def contract(x: jax.Array, w: Any, key: jax.Array | None = None) -> jax.Array:
    """The activation x (..., in) times the weight w (in, out): (..., out), in x's dtype, accumulated in float32.

    `key` is a random key for kinds whose arithmetic is random (stochastic rounding); others ignore it.
    """
    if isinstance(w, Weight):
        return w.contract(x, key)
    return _dot(x, w)


def contract_all(x: jax.Array, ws: Sequence[Any], keys: Sequence[jax.Array | None], ways: int) -> list[jax.Array]:
    """x (..., in) times each weight (in, out), whose outputs devices split `ways`: what `contract` makes of each.

    The gradient by x is that of one product with all dense weights: the devices sum it once, where XLA (0.10.2) would
    have them sum that of each product by itself.
    """
    if ways > 1 and len(ws) > 1 and not any(is_weight(w) or w.shape[1] % ways for w in ws):
        return list(_dots(ways, x, tuple(ws)))
    return [contract(x, w, key) for w, key in zip(ws, keys, strict=True)]


def materialize(w: Any) -> jax.Array:
    """The dense array that a weight means, (..., in, out); a plain array is itself."""
    return w.materialize() if isinstance(w, Weight) else w


def logical_axes(w: Any, axes: PartitionSpec) -> Any:
    """The logical axis names of every array in w, as a tree of w's structure whose leaves are PartitionSpecs.

    `axes` names the axes of the matrix that w stands for, such as ('layers', 'embed', 'mlp').
    """
    return w.logical_axes(axes) if isinstance(w, Weight) else axes


def trainable(w: Any) -> Any:
    """Which arrays of w train, as a tree of w's structure whose leaves are bools."""
    if isinstance(w, Weight):
        return w.trainable()
    return bool(jnp.issubdtype(w.dtype, jnp.inexact))


def is_weight(node: Any) -> bool:
    """Whether a node of a tree is one of the kinds; the `is_leaf` of every walk over weights."""
    return isinstance(node, Weight)


def split_keys(key: jax.Array | None, n: int = 2) -> tuple[jax.Array | None, ...]:
    """n keys from one; n times None from None."""
    return (None,) * n if key is None else tuple(jax.random.split(key, n))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b over the last two axes, accumulated in float32, in a's dtype."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def full(axes: PartitionSpec, array: jax.Array) -> PartitionSpec:
    """The axes' names with None for those of the array that have no name."""
    return PartitionSpec(*axes, *(None,) * (array.ndim - len(axes)))


def factor_axes(axes: PartitionSpec) -> tuple[PartitionSpec, PartitionSpec]:
    """The names of the axes of a product's two factors, (..., in, rank) and (..., rank, out)."""
    *stack, inward, outward = axes
    return PartitionSpec(*stack, inward, "rank"), PartitionSpec(*stack, "rank", outward)


def nothing(w: Any) -> Any:
    """What `trainable` says of a weight that does not train."""
    return jax.tree.map(lambda _: False, w)


@jax.custom_vjp
def _dot(x, w):
    # Operands in the activation's dtype and an accumulator in float32 keep bfloat16 on the fast kernels of every
    # platform. JAX's own transpose would contract a float32 cotangent with them; the rule below casts it first.
    return _product(x, w.astype(x.dtype), (x.ndim - 1,), (0,)).astype(x.dtype)


def _dot_forward(x, w):
    return _dot(x, w), (x, w)


def _dot_backward(residuals, g):
    x, w = residuals
    return _product(g, w.astype(g.dtype), (g.ndim - 1,), (1,)).astype(x.dtype), _gradient(x, w, g)


def _gradient(x, w, g):
    batch = tuple(range(x.ndim - 1))
    # A weight in bfloat16 asks for its gradient in bfloat16, also where that is a sum over devices.
    return lax.dot_general(x, g, ((batch, batch), ((), ())), preferred_element_type=w.dtype).astype(w.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dots(ways, x, ws):
    return tuple(_dot(x, w) for w in ws)


def _dots_forward(ways, x, ws):
    return _dots(ways, x, ws), (x, ws)


def _dots_backward(ways, residuals, gs):
    x, ws = residuals
    # Side by side on every device, each with the same part of every weight.
    g = jnp.concatenate([g.reshape(*g.shape[:-1], ways, -1) for g in gs], -1)
    w = jnp.concatenate([w.astype(g.dtype).reshape(w.shape[0], ways, -1) for w in ws], -1)
    dx = _product(g, w, (g.ndim - 2, g.ndim - 1), (1, 2)).astype(x.dtype)
    return dx, tuple(_gradient(x, w, g) for w, g in zip(ws, gs, strict=True))


_dots.defvjp(_dots_forward, _dots_backward)


def _product(a, b, axes_a, axes_b):
    return lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=jnp.float32)
