"""Stacks of blocks, each one tree of parameters with the layers along the first axis: their sizes and their groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from jaxcost import weights
from jaxcost.models.block import Block
from jaxcost.models.config import ModelConfig

STACKS = ("frozen_layers", "layers")
"""The stacks of blocks a tree may hold, in the order in which they run."""


def stacks_of(params: weights.Params) -> list:
    """The stacks of a tree in the order in which they run, each of them a tree (L, ...); see `apart`."""
    held = [params[name] for name in STACKS if name in params]
    return [stack for one in held for stack in (one if isinstance(one, tuple) else (one,))]


def apart(layers: Any) -> tuple:
    """A tree (L, ...) as L trees (1, ...): weights, in place of a stack, or what a cache keeps.

    XLA on a CPU copies a layer out of a stack before it multiplies with it, and a stack of caches whole for each token;
    a layer by itself is read, and written, where it is. Arrays that one CPU holds are not copied.
    """

    def cut(a):
        if isinstance(a, jax.core.Tracer) or not on_one_cpu(a):
            return [a[i : i + 1] for i in range(a.shape[0])]
        held = np.asarray(a)  # whose parts stay in its memory
        return jax.device_put([held[i : i + 1] for i in range(len(held))], a.sharding)

    leaves, structure = jax.tree.flatten(layers)
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*map(cut, leaves), strict=True))


def on_one_cpu(a: jax.Array) -> bool:
    """Whether an array lies in the memory of a CPU, whole and once."""
    return [device.platform for device in a.devices()] == ["cpu"]


def part(layers: Any, start: int, depth: int):
    """So many layers of a tree (L, ...); of layers that are `apart`, one."""
    if isinstance(layers, tuple):
        [one] = layers[start : start + depth]
        return one
    return jax.tree.map(lambda a: a[start : start + depth], layers)


def joined(parts: list, like: Any):
    """The layers of several trees (L, ...) behind one another, `apart` if those of `like` are."""
    if isinstance(like, tuple):
        return tuple(parts)
    return jax.tree.map(lambda *each: jnp.concatenate(each) if len(each) > 1 else each[0], *parts)


def initialize_stack(block: Block, rng, x_BTD, positions_BT, depth: int, **options):
    """The parameters of so many layers, which start from keys of their own, with the names of their axes."""
    one = lambda key: block.init(key, x_BTD, positions_BT, **options)["params"]  # noqa: E731
    stacked = jax.vmap(one)(jax.random.split(rng, depth))
    return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})


def resized(config: ModelConfig, params: weights.Params) -> ModelConfig:
    """The config with the sizes that the weights have: layers of both stacks, heads, widths of MLPs, experts.

    Raises:
      ValueError: layers were dropped from a pattern of several kinds or from between positions, heads were cut in two,
        or fewer experts are left than a token is sent to.
    """
    stacks = stacks_of(params)
    attend, mlp = stacks[-1]["attention"], stacks[-1]["mlp"]
    query, key, up = (_shape(part["kernel"]) for part in (attend["query"], attend["key"], mlp["up"]))
    num_layers = sum(_shape(stack["attention"]["query"]["kernel"])[0] for stack in stacks)
    if num_layers != config.num_layers and config.layer_positions:
        raise ValueError(
            f"The weights have {num_layers} layers of the model's {config.num_layers}, and which positions "
            "(model.layer_positions) stand behind each of them cannot be told; keep all layers."
        )
    if num_layers != config.num_layers and len(set(config.pattern)) > 1:
        raise ValueError(
            f"The weights have {num_layers} layers of the model's {config.num_layers}, and which of the pattern "
            f"{' '.join(config.pattern)} each of them is cannot be told; keep all layers."
        )
    if query[-1] % config.head_dim or key[-1] % config.head_dim:
        raise ValueError(
            f"The projections to queries and keys have {query[-1]} and {key[-1]} outputs, which heads of "
            f"model.head_dim ({config.head_dim}) do not fill; drop whole heads."
        )
    sizes = {"num_layers": num_layers, "num_heads": query[-1] // config.head_dim}
    sizes |= {"num_kv_heads": key[-1] // config.head_dim, "mlp_width": up[-1]}
    if config.experts:
        sizes["experts"] = up[1]
    if config.shared_width:
        sizes["shared_width"] = _shape(mlp["shared"]["up"]["kernel"])[-1]
    made = dataclasses.replace(config, **sizes)
    if "encoder" in params:
        encoder = resized(config.source, params["encoder"])
        if encoder != made.source:
            own = {name: getattr(encoder, name) for name in ("num_layers", "num_heads", "num_kv_heads", "mlp_width")}
            made = dataclasses.replace(made, encoder=dataclasses.replace(config.encoder, **own))
    return made


def _shape(w: Any) -> tuple[int, ...]:
    return jax.eval_shape(weights.materialize, w).shape


def grouped(layers, start: int, groups: int, period: int):
    """The layers from `start` on, (L, ...), as groups (groups, period, ...); those of one layer have no second axis."""

    def cut(a):
        a = a if a.shape[0] == groups * period else a[start : start + groups * period]
        return a if period == 1 else a.reshape(groups, period, *a.shape[1:])

    return jax.tree.map(cut, layers)


def ungrouped(layers, period: int):
    """The layers of groups, (groups, period, ...), behind one another again."""
    return layers if period == 1 else jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), layers)


def unstacked(group, period: int):
    """The layers of a group, one tree each. The gradient of a split joins; that of indexing adds to zeros each time."""
    if period == 1:
        return [group]
    leaves, structure = jax.tree.flatten(group)
    parts = [[part[0] for part in lax.split(leaf, [1] * period)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]


def restacked(layers: list):
    """The layers of a group, one tree each, as one tree; the inverse of `unstacked`."""
    return layers[0] if len(layers) == 1 else jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
