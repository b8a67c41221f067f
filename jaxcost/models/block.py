"""The block of a transformer: attention, to an encoder's states too where there is one, and an MLP or experts.

Shapes in names: B batch, T tokens, S keys, cache slots or tokens of a source, D width, H and K query and key heads, h
head size, N entries of all heads.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxcost import weights
from jaxcost.models import attention, context, optional
from jaxcost.models import cache as caches
from jaxcost.models.cache import Source
from jaxcost.models.config import LayerKind, ModelConfig
from jaxcost.models.execution import named
from jaxcost.models.experts import Experts
from jaxcost.models.layers import Linear, Norm, activation, of_one_input
from jaxcost.models.mlp import Mlp
from jaxcost.models.positions import frequencies, rotate
from jaxcost.sharding import constrain

WATCHED, HEADS = "attention", "heads"
"""The collection, and the name in it, under which the last layer's `query`, `key` and `value` are sown."""


def attention_scores(config: ModelConfig, kind: LayerKind) -> attention.Scores:
    """How a layer of this kind makes the scores of its attention."""
    window = config.window if kind == "local" else 0
    return attention.Scores(window, config.attention_scale, config.attention_soft_cap, config.causal)


class Attention(nn.Module):
    """Grouped-query attention of one kind of layer, with an optional cache."""

    config: ModelConfig
    kind: LayerKind = "global"
    implementation: attention.Implementation = "auto"
    method: context.Method = "auto"

    @nn.compact
    def __call__(self, x_BTD, positions_BT, cache, key, valid_BT, bias, seen_BTD=None):
        """What is added to the stream, and the cache. Keys and values are of `seen_BTD`, or of x if it is None."""
        c = self.config
        keys = weights.split_keys(key, 4)
        heads_axes, kv_axes = ("embed", "heads"), ("embed", "kv_heads")
        query = Linear(c.num_heads * c.head_dim, heads_axes, c.qkv_bias, name="query")
        key_value = [
            Linear(c.num_kv_heads * c.head_dim, kv_axes, c.qkv_bias and c.key_bias, name="key"),
            Linear(c.num_kv_heads * c.head_dim, kv_axes, c.qkv_bias, name="value"),
        ]
        if seen_BTD is None:
            q, k, v = of_one_input([query, *key_value], x_BTD, keys)
        else:
            q, (k, v) = query(x_BTD, keys[0]), of_one_input(key_value, seen_BTD, keys[1:])
        if c.query_key_norm == "projection":
            q, k = Norm(c, name="query_norm")(q), Norm(c, name="key_norm")(k)
        q_BTHh = constrain(split_heads(q, c.head_dim), "batch", "length", "heads", "head_dim")
        k_BTKh = constrain(split_heads(k, c.head_dim), "batch", "length", "kv_heads", "head_dim")
        v_BTKh = constrain(split_heads(v, c.head_dim), "batch", "length", "kv_heads", "head_dim")
        if c.query_key_norm == "head":
            q_BTHh, k_BTKh = Norm(c, name="query_norm")(q_BTHh), Norm(c, name="key_norm")(k_BTKh)
        if c.position == "rope":
            turns = frequencies(c, self.kind)
            q_BTHh, k_BTKh = rotate(q_BTHh, positions_BT, turns), rotate(k_BTKh, positions_BT, turns)
        q_BTHh = named(q_BTHh, "query")
        k_BTKh = named(k_BTKh, "key")
        v_BTKh = named(v_BTKh, "value")
        sow(self, WATCHED, HEADS, {"query": q_BTHh, "key": k_BTKh, "value": v_BTKh})
        scores = attention_scores(c, self.kind)
        if cache is None:
            length = q_BTHh.shape[1]
            q_BTHh, k_BTKh, v_BTKh, valid_BT = optional.with_prefix(self, q_BTHh, k_BTKh, v_BTKh, valid_BT)
            how = (self.implementation, scores, self.method)
            out_BTHh = attention.self_attention(q_BTHh, k_BTKh, v_BTKh, *how, valid_BT, bias)
            out_BTHh = out_BTHh[:, -length:]
        else:
            new = (k_BTKh, v_BTKh)
            cache = tuple(caches.write(held, one, positions_BT) for held, one in zip(cache, new, strict=True))
            keys_BSKh, values_BSKh = (caches.read(held, q_BTHh.dtype) for held in cache)
            out_BTHh = attention.cached_attention(q_BTHh, keys_BSKh, values_BSKh, positions_BT, scores, bias)
        out = named(out_BTHh.reshape(*x_BTD.shape[:2], -1), "attention_output")
        return Linear(c.width, ("heads", "embed"), c.output_bias, name="output")(out, keys[3]), cache


class CrossAttention(nn.Module):
    """Grouped-query attention to what an encoder has read; each token sees all of it."""

    config: ModelConfig
    implementation: attention.Implementation = "auto"

    @nn.compact
    def __call__(self, x_BTD, source: Source, key):
        c = self.config
        key_query, key_source, key_output = weights.split_keys(key, 3)
        q = Linear(c.num_heads * c.head_dim, ("embed", "heads"), c.qkv_bias, name="query")(x_BTD, key_query)
        q_BTHh = named(constrain(split_heads(q, c.head_dim), "batch", "length", "heads", "head_dim"), "query")
        if source.states is None:
            k_BSKh, v_BSKh = (caches.read(held, q_BTHh.dtype) for held in (source.key, source.value))
        else:
            made = [layer(source.states, key_source) for layer in self.of_source(c)]
            k_BSKh, v_BSKh = (
                constrain(split_heads(x, c.head_dim), "batch", None, "kv_heads", "head_dim") for x in made
            )
            k_BSKh, v_BSKh = named(k_BSKh, "key"), named(v_BSKh, "value")
        scores = attention.Scores(scale=c.attention_scale, causal=False)
        out_BTHh = attention.cross_attention(q_BTHh, k_BSKh, v_BSKh, self.implementation, scores, source.valid)
        out = named(out_BTHh.reshape(*x_BTD.shape[:2], -1), "attention_output")
        return Linear(c.width, ("heads", "embed"), c.output_bias, name="output")(out, key_output)

    @staticmethod
    def of_source(c: ModelConfig) -> tuple[Linear, Linear]:
        """The layers that make keys and values of the source's states."""
        size, axes = c.num_kv_heads * c.head_dim, ("embed", "kv_heads")
        key_bias = c.qkv_bias and c.key_bias
        return Linear(size, axes, key_bias, name="key"), Linear(size, axes, c.qkv_bias, name="value")


class Block(nn.Module):
    """One transformer block of one kind: attention, with an encoder also to its states, then an MLP or experts, each
    added to the residual stream."""

    config: ModelConfig
    kind: LayerKind = "global"
    implementation: attention.Implementation = "auto"
    method: context.Method = "auto"

    @nn.compact
    def __call__(self, x_BTD, positions_BT, cache=None, key=None, valid_BT=None, first=False, bias=None, source=None):
        """The residual stream (B, T, D), the cache, and the router's losses by name (none without experts)."""
        c = self.config
        key_attention, key_mlp, *key_cross = weights.split_keys(key, 2 if source is None else 3)
        x_BTD = named(x_BTD, "layer_input")
        act = activation(c.activation)
        attend = Attention(c, self.kind, self.implementation, self.method, name="attention")
        normed = self._before(x_BTD, "attention")
        normed = normed if c.first_norm else jnp.where(first, x_BTD, normed)
        stream = c.norm_placement == "stream"
        update, cache = attend(normed, positions_BT, cache, key_attention, valid_BT, bias, x_BTD if stream else None)
        update = optional.adapted(self, "attention_adapter", named(update, "attention_projection"), act)
        x_BTD = self._added(normed if stream else x_BTD, update, "attention")
        if source is not None:
            attend = CrossAttention(c, self.implementation, name="cross_attention")
            normed = self._before(x_BTD, "cross_attention")
            update = named(attend(normed, source, *key_cross), "attention_projection")
            x_BTD = self._added(normed if stream else x_BTD, update, "cross_attention")
        normed, losses = self._before(x_BTD, "mlp"), {}
        if c.experts:
            # A dropped token would be missing from an answer: only training, and its scores, cut what overflows.
            update, losses = Experts(c, drops=cache is None, name="mlp")(normed, key_mlp)
        else:
            update = Mlp(c, c.mlp_width, name="mlp")(normed, key_mlp)
        update = optional.adapted(self, "mlp_adapter", named(update, "mlp_down"), act)
        x_BTD = self._added(normed if stream else x_BTD, update, "mlp")
        return constrain(x_BTD, "batch", "length", "residual"), cache, losses

    def _before(self, x_BTD, part: str):
        if self.config.norm_placement in ("post", "sum"):
            return x_BTD
        return Norm(self.config, name=f"{part}_norm")(x_BTD)

    def _added(self, x_BTD, update_BTD, part: str):
        placement = self.config.norm_placement
        if placement in ("pre", "stream"):
            return x_BTD + update_BTD
        norm = Norm(self.config, name=f"{part}_post_norm")
        return norm(x_BTD + update_BTD) if placement == "sum" else x_BTD + norm(update_BTD)


def sow(module: nn.Module, collection: str, name: str, value: Any) -> None:
    """Sows a value that is one and no tuple of them."""
    module.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def split_heads(x_BTN, head_dim: int):
    return x_BTN.reshape(*x_BTN.shape[:2], -1, head_dim)
