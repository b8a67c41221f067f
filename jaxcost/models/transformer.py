"""A decoder transformer in Flax Linen, put together from a frozen config.

Parameters (D width, V vocabulary, H and K query and key heads, h head size, F MLP width), blocks stacked over L:

    embed/table                             (V, D)
    positions/table                         (max_length, D), learned positions only
    layers/attention_norm/scale             (L, D), and `bias` with LayerNorm
    layers/attention/{query,key,value}/kernel    (L, D, H·h) or (L, D, K·h)
    layers/attention/output/kernel          (L, H·h, D)
    layers/mlp_norm/scale                   (L, D)
    layers/mlp/{gate,up,down}/kernel        (L, D, F), (L, D, F), (L, F, D)
    final_norm/scale                        (D,)
    unembed/kernel                          (D, V), untied only

A tree may also hold `frozen_layers`, a stack that runs before `layers` (the `freeze` transform makes it), and what
`optional` names. Any leaf may be a kind of weight. Shapes in names: B batch, T tokens, S cache slots, D H K h F V as
above.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax

from jaxcost import weights
from jaxcost.models import attention, optional
from jaxcost.models import cache as caches
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig, named
from jaxcost.sharding import constrain

STACKS = ("frozen_layers", "layers")
"""The stacks of blocks a tree may hold, in the order in which they run."""


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, for every layer and row."""

    key: Any
    """(L, B, S, K, h), compute dtype, or the `Codes` of as many."""
    value: Any
    """As the keys."""
    length: jax.Array
    """(B,) int32: tokens in each row, virtual ones included."""
    virtual: int = struct.field(pytree_node=False, default=0)
    """Virtual tokens that it was started with."""


class Linear(nn.Module):
    """x (..., in) times a kernel (in, features) of any kind of weight: (..., features)."""

    features: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x, key=None):
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
        else:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), shape)
        return weights.contract(x, kernel, key)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        y = x.astype(jnp.float32)
        if self.config.norm == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.config.norm_epsilon)
        y = y * _vector(self, "scale", nn.initializers.ones, x.shape[-1])
        if self.config.norm == "layer":
            y = y + _vector(self, "bias", nn.initializers.zeros, x.shape[-1])
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention with an optional cache."""

    config: ModelConfig
    implementation: attention.Implementation = "auto"

    @nn.compact
    def __call__(self, x_BTD, positions_BT, cache, key):
        c = self.config
        keys = _keys(key, 4)
        heads_axes, kv_axes = ("embed", "heads"), ("embed", "kv_heads")
        q = Linear(c.num_heads * c.head_dim, heads_axes, name="query")(x_BTD, keys[0])
        k = Linear(c.num_kv_heads * c.head_dim, kv_axes, name="key")(x_BTD, keys[1])
        v = Linear(c.num_kv_heads * c.head_dim, kv_axes, name="value")(x_BTD, keys[2])
        q_BTHh = constrain(_heads(q, c.head_dim), "batch", "length", "heads", "head_dim")
        k_BTKh = constrain(_heads(k, c.head_dim), "batch", "length", "kv_heads", "head_dim")
        v_BTKh = constrain(_heads(v, c.head_dim), "batch", "length", "kv_heads", "head_dim")
        if c.position == "rope":
            q_BTHh = rotate(q_BTHh, positions_BT, c.rope_theta)
            k_BTKh = rotate(k_BTKh, positions_BT, c.rope_theta)
        q_BTHh = named(q_BTHh, "query")
        k_BTKh = named(k_BTKh, "key")
        v_BTKh = named(v_BTKh, "value")
        if cache is None:
            length = q_BTHh.shape[1]
            q_BTHh, k_BTKh, v_BTKh = optional.with_prefix(self, q_BTHh, k_BTKh, v_BTKh)
            out_BTHh = attention.causal_attention(q_BTHh, k_BTKh, v_BTKh, self.implementation)[:, -length:]
        else:
            new = (k_BTKh, v_BTKh)
            cache = tuple(caches.write(held, one, positions_BT) for held, one in zip(cache, new, strict=True))
            keys_BSKh, values_BSKh = (caches.read(held, q_BTHh.dtype) for held in cache)
            slots = jnp.arange(keys_BSKh.shape[1])
            mask_B1TS = (slots <= positions_BT[:, :, None])[:, None]
            out_BTHh = jax.nn.dot_product_attention(q_BTHh, keys_BSKh, values_BSKh, mask=mask_B1TS)
        out = named(out_BTHh.reshape(*x_BTD.shape[:2], -1), "attention_output")
        return Linear(c.width, ("heads", "embed"), name="output")(out, keys[3]), cache


class Mlp(nn.Module):
    """The feed-forward block, gated or plain."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, key):
        c = self.config
        keys = _keys(key, 3)
        activation = getattr(jax.nn, c.activation)
        up_BTF = named(Linear(c.mlp_width, ("embed", "mlp"), name="up")(x_BTD, keys[0]), "mlp_up")
        if c.gated:
            gate_BTF = named(Linear(c.mlp_width, ("embed", "mlp"), name="gate")(x_BTD, keys[1]), "mlp_gate")
            hidden_BTF = activation(gate_BTF) * up_BTF
        else:
            hidden_BTF = activation(up_BTF)
        hidden_BTF = constrain(hidden_BTF, "batch", "length", "mlp")
        return Linear(c.width, ("mlp", "embed"), name="down")(hidden_BTF, keys[2])


class Block(nn.Module):
    """One pre-norm transformer block."""

    config: ModelConfig
    implementation: attention.Implementation = "auto"

    @nn.compact
    def __call__(self, x_BTD, positions_BT, cache=None, key=None):
        key_attention, key_mlp = _keys(key, 2)
        x_BTD = named(x_BTD, "layer_input")
        normed = Norm(self.config, name="attention_norm")(x_BTD)
        attend = Attention(self.config, self.implementation, name="attention")
        update, cache = attend(normed, positions_BT, cache, key_attention)
        activation = getattr(jax.nn, self.config.activation)
        update = named(update, "attention_projection")
        x_BTD = x_BTD + optional.adapted(self, "attention_adapter", update, activation)
        normed = Norm(self.config, name="mlp_norm")(x_BTD)
        update = named(Mlp(self.config, name="mlp")(normed, key_mlp), "mlp_down")
        x_BTD = x_BTD + optional.adapted(self, "mlp_adapter", update, activation)
        return constrain(x_BTD, "batch", "length", "residual"), cache


class Transformer(nn.Module):
    """Tokens (B, T) to hidden states (B, T, D). Logits are `weights.contract(hidden, unembedding(params))`."""

    config: ModelConfig
    execution: ExecutionConfig = ExecutionConfig()

    @nn.compact
    def __call__(self, tokens_BT, cache: Cache | None = None, key=None) -> tuple[jax.Array, Cache | None]:
        """Tokens may be embeddings (B, T, D) too. With a cache, row b's tokens start at cache.length[b].

        `key` feeds weights whose arithmetic is random. Raises ValueError where virtual tokens leave too little of
        `max_length`, or where the cache was started without them.
        """
        c = self.config
        params = self.variables.get("params", {})
        length = tokens_BT.shape[1]
        _check_virtual(c, params, length, cache)
        table = _Table(c.vocab_size, c.width, "vocab", name="embed")()
        x_BTD = tokens_BT if tokens_BT.ndim == 3 else jnp.take(table, tokens_BT, axis=0)
        x_BTD = x_BTD.astype(self.execution.dtype)
        if cache is None:
            x_BTD = optional.with_prompt(params, x_BTD)
        positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        positions_BT += optional.prefix_tokens(params) if cache is None else cache.length[:, None]
        if c.position == "learned":
            table = _Table(c.max_length, c.width, "position", name="positions")()
            x_BTD = x_BTD + jnp.take(table, positions_BT, axis=0).astype(x_BTD.dtype)
        x_BTD = constrain(x_BTD, "batch", "length", "residual")
        x_BTD, kv = self._blocks(x_BTD, positions_BT, None if cache is None else (cache.key, cache.value), key)
        hidden_BTD = Norm(c, name="final_norm")(x_BTD[:, -length:])
        if not c.tie_embeddings and self.is_initializing():
            Linear(c.vocab_size, ("embed", "vocab"), name="unembed")(hidden_BTD)
        if cache is None:
            return hidden_BTD, None
        return hidden_BTD, cache.replace(key=kv[0], value=kv[1], length=cache.length + length)

    def _blocks(self, x_BTD, positions_BT, kv, key):
        # One token is enough to make the parameters, and no kernel takes so few.
        implementation = "reference" if self.is_initializing() else self.execution.attention
        block = Block(self.config, implementation, parent=None)
        if self.is_initializing():
            self.param("layers", lambda rng: _stacked_init(block, rng, x_BTD, positions_BT, self.config.num_layers))
        stacks = [
            nn.meta.unbox(self.get_variable("params", name)) for name in STACKS if self.has_variable("params", name)
        ]

        def step(x, layer):
            params, cache, index = layer
            layer_key = None if key is None else jax.random.fold_in(key, index)
            return block.apply({"params": params}, x, positions_BT, cache, layer_key)

        start, written = 0, []
        for stack in stacks:
            depth = jax.tree.leaves(stack)[0].shape[0]
            cache = None if kv is None else jax.tree.map(lambda a: a[start : start + depth], kv)  # noqa: B023
            layers = (stack, cache, jnp.arange(start, start + depth))
            wrapped = self.execution.rematerialize(step, depth)
            x_BTD, cache = lax.scan(wrapped, x_BTD, layers, unroll=self.execution.unrolled(depth))
            start, written = start + depth, [*written, cache]
        if kv is not None:
            kv = jax.tree.map(lambda *parts: jnp.concatenate(parts) if len(parts) > 1 else parts[0], *written)
        return x_BTD, kv


def initialize(model: Transformer, key: jax.Array) -> tuple[weights.Params, weights.Params]:
    """The parameters (in the execution's dtype of weights) and a tree of their logical axis names."""
    boxed = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda a: a.astype(model.execution.weights), nn.meta.unbox(boxed))
    return params, nn.get_partition_spec(boxed)


def abstract(model: Transformer) -> tuple[weights.Params, weights.Params]:
    """`initialize` without computing anything: ShapeDtypeStructs, and the logical axis names."""
    axes = []

    def make():
        params, names = initialize(model, jax.random.key(0))
        axes.append(names)
        return params

    return jax.eval_shape(make), axes[0]


def axes_of(model: Transformer, params: weights.Params) -> weights.Params:
    """The logical axis names of the dense weight behind every weight of `params`, whatever transforms made it."""
    known = dict(optional.AXES)
    weights.map_weights(lambda path, names: known.update({path: names}), abstract(model)[1])
    return weights.map_weights(lambda path, _: known[path.removeprefix("frozen_")], params)


def unembedding(params: weights.Params) -> Any:
    """The weight (D, V) that turns hidden states into logits: a matrix of its own, or the embedding transposed."""
    if "unembed" in params:
        return params["unembed"]["kernel"]
    return weights.materialize(params["embed"]["table"]).T


def init_cache(config: ModelConfig, batch_size: int, slots: int, dtype) -> Cache:
    """An empty cache for `slots` tokens a row; a dtype of int8 makes one of `Codes`."""
    shape = (config.num_layers, batch_size, slots, config.num_kv_heads, config.head_dim)
    return Cache(caches.empty(shape, dtype), caches.empty(shape, dtype), jnp.zeros((batch_size,), jnp.int32))


def start_cache(model: Transformer, params: weights.Params, batch_size: int, slots: int) -> Cache:
    """A cache for `slots` tokens a row that holds the virtual tokens of `params` already, in slots of their own."""
    prefix, prompt = optional.prefix_tokens(params), optional.prompt_tokens(params)
    c = model.config
    if prefix + prompt == 0:
        return init_cache(c, batch_size, slots, model.execution.cache_dtype)
    cache = init_cache(c, 1, prefix + prompt + slots, model.execution.cache_dtype)
    if prefix:
        stacks = [params[name]["attention"]["prefix"] for name in STACKS if name in params]

        def filled(held, name):
            tables_LPN = jnp.concatenate([weights.materialize(stack[name]) for stack in stacks])
            new_L1PKh = _heads(tables_LPN, c.head_dim)[:, None]
            return jax.vmap(caches.write, (0, 0, None))(held, new_L1PKh, jnp.zeros((1, 1), jnp.int32))

        cache = Cache(filled(cache.key, "key"), filled(cache.value, "value"), cache.length + prefix, prefix)
    if prompt:
        rest = {name: tree for name, tree in params.items() if name != "prompt"}
        table_1PD = weights.materialize(params["prompt"]["table"])[None]
        _, cache = model.apply({"params": rest}, table_1PD, cache)

    key, value = jax.tree.map(lambda a: jnp.repeat(a, batch_size, axis=1), (cache.key, cache.value))
    return Cache(key, value, jnp.repeat(cache.length, batch_size), prefix + prompt)


def rotate(x_BTHh: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding on the two halves of the head. Source: Su et al. 2021, arXiv:2104.09864."""
    half = x_BTHh.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHh.dtype)


class _Table(nn.Module):
    """An embedding table (rows, D), read whole so that a lookup or a transpose can follow."""

    rows: int
    width: int
    axis: str

    @nn.compact
    def __call__(self):
        if self.has_variable("params", "table"):
            return weights.materialize(self.get_variable("params", "table"))
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (self.axis, "embed"))
        return self.param("table", init, (self.rows, self.width))


def _vector(module: nn.Module, name: str, init, size: int):
    if module.has_variable("params", name):
        return weights.materialize(module.get_variable("params", name))
    return module.param(name, nn.with_logical_partitioning(init, (None,)), (size,))


def _check_virtual(config: ModelConfig, params: weights.Params, length: int, cache: Cache | None) -> None:
    virtual = optional.virtual_tokens(params)
    if virtual and virtual + length > config.max_length:
        raise ValueError(
            f"{virtual} virtual tokens and {length} tokens are longer than model.max_length ({config.max_length}); "
            f"use at most {max(0, config.max_length - length)} virtual tokens or shorten the sequence."
        )
    if cache is not None and cache.virtual != virtual:
        raise ValueError(
            f"The weights have {virtual} virtual tokens, but the cache was started with {cache.virtual}; make it with "
            "start_cache and the same weights."
        )


def _stacked_init(block: Block, rng, x_BTD, positions_BT, depth: int):
    stacked = jax.vmap(lambda key: block.init(key, x_BTD, positions_BT)["params"])(jax.random.split(rng, depth))
    return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})


def _heads(x_BTN, head_dim: int):
    return x_BTN.reshape(*x_BTN.shape[:2], -1, head_dim)


def _keys(key, n: int):
    return (None,) * n if key is None else jax.random.split(key, n)
