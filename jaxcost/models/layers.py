"""The parts that blocks are put together from: linear layers, norms, tables, and a bound on logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxcost import sharding, weights
from jaxcost.models.config import ModelConfig


class Linear(nn.Module):
    """x (..., in) times a kernel (in, features) of any kind of weight, plus a bias if asked for: (..., features)."""

    features: int
    axes: tuple[str, str]
    bias: bool = False

    @nn.compact
    def __call__(self, x, key=None, product=None):
        y = product
        if product is None:
            y = weights.contract(x, kernel(self, (x.shape[-1], self.features), self.axes), key)
        if self.bias:
            y = y + vector(self, "bias", nn.initializers.zeros, self.features, self.axes[1]).astype(y.dtype)
        return y


def of_one_input(layers: Sequence[Linear], x, keys) -> list[jax.Array]:
    """What each layer makes of x (..., in), (..., features), as `weights.contract_all` does it."""
    keys = keys[: len(layers)]
    products = [None] * len(layers)
    if all(layer.has_variable("params", "kernel") for layer in layers):
        kernels = [layer.get_variable("params", "kernel") for layer in layers]
        products = weights.contract_all(x, kernels, keys, sharding.ways(layers[0].axes[1]))
    return [layer(x, key, product) for layer, key, product in zip(layers, keys, products, strict=True)]


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32.

    Sources: Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        y = x.astype(jnp.float32)
        if c.norm == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + c.norm_epsilon)
        init = nn.initializers.zeros if c.norm_unit_offset else nn.initializers.ones
        scale = vector(self, "scale", init, x.shape[-1])
        y = y * (1 + scale if c.norm_unit_offset else scale)
        if c.norm == "layer" and c.norm_bias:
            y = y + vector(self, "bias", nn.initializers.zeros, x.shape[-1])
        return y.astype(x.dtype)


class Table(nn.Module):
    """An embedding table (rows, D), read whole so that a lookup or a transpose can follow; or a stack of them."""

    rows: int
    width: int
    axis: str
    stack: tuple[int, ...] = ()
    """(layers,) of a table for each."""

    @nn.compact
    def __call__(self):
        if self.has_variable("params", "table"):
            return weights.materialize(self.get_variable("params", "table"))
        axes = ("layers", self.axis, "embed")[-2 - len(self.stack) :]
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
        return self.param("table", init, (*self.stack, self.rows, self.width))


def kernel(module: nn.Module, shape: tuple[int, ...], axes: tuple[str, ...]):
    """The module's kernel (..., in, out), of whatever kind, made where there is none yet."""
    if module.has_variable("params", "kernel"):
        return module.get_variable("params", "kernel")
    stack = tuple(range(len(shape) - 2))
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=stack)
    return module.param("kernel", nn.with_logical_partitioning(init, axes), shape)


def vector(module: nn.Module, name: str, init, size: int, axis: str | None = None):
    """A vector parameter (size,) of the module, made where there is none yet."""
    if module.has_variable("params", name):
        return weights.materialize(module.get_variable("params", name))
    return module.param(name, nn.with_logical_partitioning(init, (axis,)), (size,))


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The non-linearity of a config's name."""
    return _ACTIVATIONS[name]


_ACTIVATIONS = {
    "linear": lambda x: x,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


def soft_capped(x: jax.Array, cap: float) -> jax.Array:
    """x bent to stay within ±cap, cap·tanh(x / cap); x itself where cap is 0. Source: Gemma 2, arXiv:2408.00118."""
    return cap * jnp.tanh(x / cap) if cap else x
