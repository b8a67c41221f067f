"""The kinds of weight: what stands where a dense matrix stood.

A kernel is a matrix of shape (..., in, out): the last two axes are the matrix, and whatever stands before them is a
stack (layers, experts). In a tree of parameters it is a plain array, or one of the kinds below: a frozen dataclass,
registered as a pytree, whose own weights may again be of any kind. Each kind knows how to

* `contract` with an activation, the path that computes;
* `materialize` as a dense array, which is what it means;
* name the logical axes of its arrays, given those of the matrix that it stands for;
* say which of its arrays train.

One law holds for every kind and every nesting: `contract(x, w) == x @ materialize(w)` to the arithmetic's tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

Params = Any
"""A nested dict whose leaves are arrays or kinds of weight."""


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


@struct.dataclass
class Masked(Weight):
    """A weight times a fixed 0/1 mask of its shape. Computes as a dense weight: a mask alone saves no work."""

    weight: Any
    mask: jax.Array
    """Boolean, (..., in, out); False is pruned."""

    def contract(self, x, key):
        return contract(x, self.materialize())

    def materialize(self):
        dense = materialize(self.weight)
        return jnp.where(self.mask, dense, jnp.zeros((), dense.dtype))

    def logical_axes(self, axes):
        return self.replace(weight=logical_axes(self.weight, axes), mask=axes)

    def trainable(self):
        return self.replace(weight=trainable(self.weight), mask=False)


@struct.dataclass
class LowRank(Weight):
    """The product u @ v of rank r, contracted from the left so that the product never exists."""

    u: Any
    """(..., in, r)."""
    v: Any
    """(..., r, out)."""

    def contract(self, x, key):
        key_u, key_v = _split(key)
        return contract(contract(x, self.u, key_u), self.v, key_v)

    def materialize(self):
        return _matmul(materialize(self.u), materialize(self.v))

    def logical_axes(self, axes):
        axes_u, axes_v = _factor_axes(axes)
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

    def contract(self, x, key):
        key_base, key_a, key_b = _split(key, 3)
        update = contract(contract(x, self.a, key_a), self.b, key_b)
        return contract(x, lax.stop_gradient(self.base), key_base) + jnp.asarray(self.scale, x.dtype) * update

    def materialize(self):
        base = lax.stop_gradient(materialize(self.base))
        return base + (self.scale * _matmul(materialize(self.a), materialize(self.b))).astype(base.dtype)

    def logical_axes(self, axes):
        axes_a, axes_b = _factor_axes(axes)
        return self.replace(
            base=logical_axes(self.base, axes), a=logical_axes(self.a, axes_a), b=logical_axes(self.b, axes_b)
        )

    def trainable(self):
        return self.replace(base=_nothing(self.base), a=trainable(self.a), b=trainable(self.b))


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
        axes = _full(axes, self.codes)
        return self.replace(codes=axes, scale=PartitionSpec(*axes[:-2], None, axes[-1]))

    def trainable(self):
        return _nothing(self)


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
        return _nothing(self)


def contract(x: jax.Array, w: Any, key: jax.Array | None = None) -> jax.Array:
    """The activation x (..., in) times the weight w (in, out): (..., out), in x's dtype, accumulated in float32.

    `key` is a random key for kinds whose arithmetic is random (stochastic rounding); others ignore it.
    """
    if isinstance(w, Weight):
        return w.contract(x, key)
    return _dot(x, w)


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


def map_weights(f: Callable[..., Any], params: Params, *rest: Params) -> Params:
    """Maps f(path, weight, *rest) over the weights of a tree; path is 'layers/mlp/up/kernel'."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w, *more: f(path_name(path), w, *more), params, *rest, is_leaf=is_weight
    )


def path_name(path: tuple) -> str:
    """The keys of a tree path joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def merge(params: Params) -> Params:
    """A copy of the tree in which every weight is the dense array that it means. There is no way back."""
    return map_weights(lambda _, w: materialize(w), params)


def trainable_tree(params: Params) -> Params:
    """`trainable` over a whole tree."""
    return map_weights(lambda _, w: trainable(w), params)


def partition(params: Params) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The arrays that train and those that do not, each as a flat dict from path to array.

    Differentiate and optimise the first alone: a gradient or a moment of a frozen array is a saving thrown away.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    trains = jax.tree.leaves(trainable_tree(params))
    named = [(path_name(path), leaf) for path, leaf in flat]
    chosen = {name: leaf for (name, leaf), train in zip(named, trains, strict=True) if train}
    return chosen, {name: leaf for name, leaf in named if name not in chosen}


def combine(structure: Params, *parts: dict[str, jax.Array]) -> Params:
    """The inverse of `partition`: a tree of `structure`'s shape with its arrays taken from the flat dicts."""
    arrays = {name: leaf for part in parts for name, leaf in part.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[path_name(path)], structure)


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


@jax.custom_vjp
def _dot(x, w):
    # Operands in the activation's dtype and an accumulator in float32 keep bfloat16 on the fast kernels of every
    # platform. JAX's own transpose would contract a float32 cotangent with them; the rule below casts it first.
    return _product(x, w.astype(x.dtype), (x.ndim - 1,), (0,)).astype(x.dtype)


def _dot_forward(x, w):
    return _dot(x, w), (x, w)


def _dot_backward(residuals, g):
    x, w = residuals
    dx = _product(g, w.astype(g.dtype), (g.ndim - 1,), (1,)).astype(x.dtype)
    batch = tuple(range(x.ndim - 1))
    # A weight in bfloat16 asks for its gradient in bfloat16, also where that is a sum over devices.
    return dx, lax.dot_general(x, g, ((batch, batch), ((), ())), preferred_element_type=w.dtype).astype(w.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


def _product(a, b, axes_a, axes_b):
    return lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=jnp.float32)


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


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


def _split(key, n: int = 2):
    return (None,) * n if key is None else tuple(jax.random.split(key, n))


def _full(axes, array) -> PartitionSpec:
    return PartitionSpec(*axes, *(None,) * (array.ndim - len(axes)))


def _factor_axes(axes) -> tuple[PartitionSpec, PartitionSpec]:
    *stack, inward, outward = axes
    return PartitionSpec(*stack, inward, "rank"), PartitionSpec(*stack, "rank", outward)


def _nothing(w):
    return jax.tree.map(lambda _: False, w)
