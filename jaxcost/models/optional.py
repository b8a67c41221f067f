"""Parameters that a model reads where they are present: what parameter-efficient tuning adds to it.

The transforms `prompt_tuning`, `prefix_tuning` and `bottleneck` put them into the tree (P virtual tokens, r the width
of a bottleneck, otherwise as in `transformer`):

    prompt/table                                   (P, D): embeddings that stand before every sequence
    layers/attention/prefix/{key,value}            (L, P, K·h): keys and values that stand before every sequence's
    layers/{attention,mlp}_adapter/down/kernel     (L, D, r), applied to what the attention or the MLP adds
    layers/{attention,mlp}_adapter/up/kernel       (L, r, D)

Virtual tokens take the first positions, those of a prefix before those of a prompt, and the text comes after them.
With a cache they are its first slots, which `transformer.start_cache` fills, so that nothing but the start knows them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxcost import weights

AXES = {
    "prompt/table": PartitionSpec("position", "embed"),
    "layers/attention/prefix/key": PartitionSpec("layers", "position", "kv_heads"),
    "layers/attention/prefix/value": PartitionSpec("layers", "position", "kv_heads"),
    "layers/attention_adapter/down/kernel": PartitionSpec("layers", "embed", "rank"),
    "layers/attention_adapter/up/kernel": PartitionSpec("layers", "rank", "embed"),
    "layers/mlp_adapter/down/kernel": PartitionSpec("layers", "embed", "rank"),
    "layers/mlp_adapter/up/kernel": PartitionSpec("layers", "rank", "embed"),
}
"""Path → logical axes of the optional parameters."""


def prompt_tokens(params: weights.Params) -> int:
    """Virtual tokens of the prompt, 0 without one."""
    return _length(params["prompt"]["table"]) if "prompt" in params else 0


def prefix_tokens(params: weights.Params) -> int:
    """Virtual tokens of the prefix, 0 without one."""
    layers = params.get("layers", {})
    found = (layers[0] if isinstance(layers, tuple) else layers).get("attention", {}).get("prefix")
    return 0 if found is None else _length(found["key"])


def virtual_tokens(params: weights.Params) -> int:
    """Virtual tokens before every sequence, of a prefix and of a prompt."""
    return prefix_tokens(params) + prompt_tokens(params)


def with_prompt(params: weights.Params, x_BTD: jax.Array) -> jax.Array:
    """The embeddings with the prompt's before them, (B, P + T, D)."""
    if not prompt_tokens(params):
        return x_BTD
    table_PD = weights.materialize(params["prompt"]["table"]).astype(x_BTD.dtype)
    return jnp.concatenate([jnp.broadcast_to(table_PD, (x_BTD.shape[0], *table_PD.shape)), x_BTD], axis=1)


def with_virtual(valid_BT: jax.Array | None, tokens: int) -> jax.Array | None:
    """Which tokens are valid, with so many virtual ones before them, which all are."""
    return None if valid_BT is None else jnp.pad(valid_BT, ((0, 0), (tokens, 0)), constant_values=True)


def with_prefix(
    module: nn.Module, q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, valid_BT: jax.Array | None
) -> tuple[jax.Array | None, ...]:
    """Queries, keys, values and which are valid, the prefix's before them: any attention then gives P rows too many.

    The prefix's own queries are zeros, so that there are as many queries as keys, which is what kernels take.
    """
    if not module.has_variable("params", "prefix"):
        return q_BTHh, k_BTKh, v_BTKh, valid_BT
    prefix = module.get_variable("params", "prefix")

    def before(x, table):
        rows = jnp.broadcast_to(table, (x.shape[0], *table.shape)).astype(x.dtype)
        return jnp.concatenate([rows.reshape(x.shape[0], -1, *x.shape[2:]), x], axis=1)

    key, value = (weights.materialize(prefix[name]) for name in ("key", "value"))
    return (
        jnp.pad(q_BTHh, ((0, 0), (key.shape[0], 0), (0, 0), (0, 0))),
        before(k_BTKh, key),
        before(v_BTKh, value),
        with_virtual(valid_BT, key.shape[0]),
    )


def adapted(module: nn.Module, name: str, x_BTD: jax.Array, activation: Any) -> jax.Array:
    """x + activation(x·down)·up with the bottleneck of that name, or x without one. Source: see `bottleneck`."""
    if not module.has_variable("params", name):
        return x_BTD
    adapter = module.get_variable("params", name)
    hidden_BTr = activation(weights.contract(x_BTD, adapter["down"]["kernel"]))
    return x_BTD + weights.contract(hidden_BTr, adapter["up"]["kernel"])


def _length(w: Any) -> int:
    """The size of the second axis from the end of what a weight means."""
    return jax.eval_shape(weights.materialize, w).shape[-2]
