"""The families of checkpoints that people have: a config from `config.json`, and where each tensor goes.

A family is a function from the fields of transformers' `config.json` to a `ModelConfig`, and a table from the names of
its tensors to the paths of our parameters. A tensor that joins several of our matrices lists them in its order;
`{layer}` and `{expert}` stand for the stacks that our parameters have in front. A table may name what a config does not
ask for. Both forms of rotary fields are read: `rope_parameters` of transformers 5, and those of the releases before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcost.models.config import LayerKind, ModelConfig, RopeScaling

Fields = Mapping[str, Any]
"""What a `config.json` holds."""

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "relu": "relu"}
_KINDS: Mapping[str, LayerKind] = {"sliding_attention": "local", "full_attention": "global"}


class UnsupportedModel(ValueError):
    """A checkpoint of a family, or with an option, that the transformer does not have."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of one model type are read."""

    config: Callable[[Fields], ModelConfig]
    """The config that the fields of a `config.json` describe."""
    tensors: Mapping[str, tuple[str, ...]]
    """Name of a tensor → the parameters that it holds, side by side along their last axis."""
    transposed: bool = True
    """Matrices of the blocks are (out, in), as torch's linear layers keep them; ours are (in, out)."""


def config_of(fields: Fields) -> ModelConfig:
    """The config of a checkpoint, from its `config.json`.

    Raises:
        UnsupportedModel: the family or an option of it is not one of ours, named in the sentence.
    """
    return family_of(fields).config(fields)


def family_of(fields: Fields) -> Family:
    """The family of a checkpoint, by the `model_type` of its `config.json`; UnsupportedModel if there is none."""
    kind = fields.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedModel(f"The model_type {kind!r} is not one of {', '.join(FAMILIES)}.")
    return FAMILIES[kind]


# ---- Configs ----


def _decoder(fields: Fields, **options: Any) -> ModelConfig:
    """What all families after GPT-2 share; `options` are ModelConfig's own fields, which go before."""
    heads, width = _needed(fields, "num_attention_heads"), _needed(fields, "hidden_size")
    theta, scaling, fraction = _rope(_rope_fields(fields, "full_attention"))
    activation = fields.get("hidden_activation") or fields.get("hidden_act", "silu")
    common = {
        "vocab_size": _needed(fields, "vocab_size"),
        "width": width,
        "num_layers": _needed(fields, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or width // heads,
        "mlp_width": _needed(fields, "intermediate_size"),
        "norm_epsilon": fields.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_fraction": fraction,
        "max_length": fields.get("max_position_embeddings", 2048),
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }
    if "activation" not in options:
        common["activation"] = _activation(activation)
    return ModelConfig(**(common | options))


def _llama(fields: Fields) -> ModelConfig:
    bias = fields.get("attention_bias", False)
    return _decoder(fields, qkv_bias=bias, output_bias=bias, mlp_bias=fields.get("mlp_bias", False))


def _windowed(fields: Fields, **options: Any) -> ModelConfig:
    """A family in which all layers are local if there is a window."""
    window = fields.get("sliding_window")
    return _decoder(fields, **options, **({"window": window, "pattern": ("local",)} if window else {}))


def _mixtral(fields: Fields) -> ModelConfig:
    return _windowed(
        fields,
        experts=_needed(fields, "num_local_experts"),
        experts_per_token=_needed(fields, "num_experts_per_tok"),
    )


def _qwen2(fields: Fields) -> ModelConfig:
    return _decoder(fields, qkv_bias=True, **_qwen_windows(fields))


def _qwen3(fields: Fields, **options: Any) -> ModelConfig:
    bias = fields.get("attention_bias", False)
    windows = _qwen_windows(fields)
    return _decoder(fields, qkv_bias=bias, output_bias=bias, query_key_norm="head", **windows, **options)


def _qwen3_moe(fields: Fields) -> ModelConfig:
    if fields.get("decoder_sparse_step", 1) != 1 or fields.get("mlp_only_layers"):
        raise UnsupportedModel(
            "Some layers have experts and others have not (decoder_sparse_step, mlp_only_layers); only models whose "
            "layers all have them can be read."
        )
    return _qwen3(
        fields,
        mlp_width=_needed(fields, "moe_intermediate_size"),
        experts=fields.get("num_experts") or _needed(fields, "num_local_experts"),
        experts_per_token=_needed(fields, "num_experts_per_tok"),
        normalize_experts=fields.get("norm_topk_prob", False),
    )


def _qwen_windows(fields: Fields) -> dict[str, Any]:
    """Windows in the layers from `max_window_layers` on, where they are switched on at all."""
    if not (fields.get("use_sliding_window") and fields.get("sliding_window")):
        return {}
    layers, first = _needed(fields, "num_hidden_layers"), fields.get("max_window_layers", 0)
    kinds = fields.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    return _pattern(kinds[:layers], fields["sliding_window"])


def _gemma(fields: Fields, **options: Any) -> ModelConfig:
    # The first checkpoints name the exact gelu and were trained with its tanh approximation.
    activation = _activation(fields.get("hidden_activation") or "gelu_pytorch_tanh")
    tied = fields.get("tie_word_embeddings", True)
    bias = fields.get("attention_bias", False)
    common = {"activation": activation, "tie_embeddings": tied, "qkv_bias": bias, "output_bias": bias}
    return _decoder(fields, norm_unit_offset=True, scale_embeddings=True, **common, **options)


def _gemma2(fields: Fields, local_layers: int = 1, **options: Any) -> ModelConfig:
    layers = _needed(fields, "num_hidden_layers")
    period = fields.get("sliding_window_pattern") or local_layers + 1
    cycle = ["sliding_attention"] * (period - 1) + ["full_attention"]
    kinds = fields.get("layer_types") or [cycle[i % period] for i in range(layers)]
    return _gemma(
        fields,
        norm_placement="both",
        attention_scale=fields.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_soft_cap=fields.get("attn_logit_softcapping") or 0.0,
        logit_soft_cap=fields.get("final_logit_softcapping") or 0.0,
        **_pattern(kinds, fields.get("sliding_window", 4096)),
        **options,
    )


def _gemma3(fields: Fields) -> ModelConfig:
    if fields.get("use_bidirectional_attention"):
        raise UnsupportedModel("use_bidirectional_attention is on, but only causal attention can be read.")
    local = _rope_fields(fields, "sliding_attention").get("rope_theta")
    theta = fields.get("rope_local_base_freq", 10_000.0) if "rope_parameters" not in fields else local
    return _gemma2(fields, local_layers=5, query_key_norm="head", local_rope_theta=theta)


def _olmo2(fields: Fields) -> ModelConfig:
    bias = fields.get("attention_bias", False)
    return _decoder(fields, norm_placement="post", query_key_norm="projection", qkv_bias=bias, output_bias=bias)


def _gpt2(fields: Fields) -> ModelConfig:
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if fields.get(option):
            raise UnsupportedModel(f"{option} is on, which the transformer does not have.")
    width, heads = _needed(fields, "n_embd"), _needed(fields, "n_head")
    return ModelConfig(
        vocab_size=_needed(fields, "vocab_size"),
        width=width,
        num_layers=_needed(fields, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=fields.get("n_inner") or 4 * width,
        gated=False,
        activation=_activation(fields.get("activation_function", "gelu_new")),
        norm="layer",
        norm_epsilon=fields.get("layer_norm_epsilon", 1e-5),
        position="learned",
        max_length=_needed(fields, "n_positions"),
        tie_embeddings=fields.get("tie_word_embeddings", True),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def _needed(fields: Fields, name: str) -> Any:
    if fields.get(name) is None:
        raise UnsupportedModel(f"config.json lacks {name}, which a {fields.get('model_type')} model needs.")
    return fields[name]


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"The activation {name!r} is not one of {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def _pattern(kinds: Sequence[str], window: int) -> dict[str, Any]:
    """The shortest pattern that repeats to the kinds of all layers, and its window."""
    unknown = sorted(set(kinds) - set(_KINDS))
    if unknown:
        raise UnsupportedModel(f"Layers of the type {', '.join(unknown)} are not among {', '.join(_KINDS)}.")
    pattern = tuple(_KINDS[kind] for kind in shortest_pattern(kinds))
    return {"pattern": pattern, "window": window if "local" in pattern else 0}


def shortest_pattern(kinds: Sequence[str]) -> Sequence[str]:
    """The shortest start of a sequence that repeats to the whole of it."""
    period = next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))
    return kinds[:period]


def _rope_fields(fields: Fields, kind: str) -> Fields:
    """The rotary fields of a kind of layer, in transformers 5's form."""
    if "rope_parameters" in fields:
        found = fields["rope_parameters"] or {}
        return found.get(kind, found)
    old = fields.get("rope_scaling") or {}
    rest = {name: fields[name] for name in ("rope_theta", "partial_rotary_factor") if name in fields}
    return {"rope_type": old.get("type", "default"), **old, **rest}


def _rope(found: Fields) -> tuple[float, RopeScaling, float]:
    theta, fraction = found.get("rope_theta", 10_000.0), found.get("partial_rotary_factor", 1.0)
    kind = found.get("rope_type", "default")
    if kind == "default":
        return theta, RopeScaling(), fraction
    if kind == "linear":
        return theta, RopeScaling("linear", found["factor"]), fraction
    if kind == "llama3":
        ramp = (found["low_freq_factor"], found["high_freq_factor"], found["original_max_position_embeddings"])
        return theta, RopeScaling("llama3", found["factor"], *ramp), fraction
    raise UnsupportedModel(f"The rope_type {kind!r} is not one of default, linear, llama3.")


# ---- Tensors ----


def _linear(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    return {f"{theirs}.weight": (f"{ours}/kernel",), f"{theirs}.bias": (f"{ours}/bias",)}


def _table(layers: Mapping[str, str], norms: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The table of a decoder from the names of a block's linear layers and norms."""
    table = {
        "model.embed_tokens.weight": ("embed/table",),
        "model.norm.weight": ("final_norm/scale",),
        "lm_head.weight": ("unembed/kernel",),
    }
    for theirs, ours in layers.items():
        table |= _linear(f"model.layers.{{layer}}.{theirs}", f"layers/{ours}")
    for theirs, ours in norms.items():
        table[f"model.layers.{{layer}}.{theirs}.weight"] = (f"layers/{ours}/scale",)
    return table


_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
_ATTENTION = {f"self_attn.{theirs}": f"attention/{ours}" for theirs, ours in _PROJECTIONS.items()}
_MLP = {f"mlp.{name}_proj": f"mlp/{name}" for name in ("gate", "up", "down")}
_HEAD_NORMS = {"self_attn.q_norm": "attention/query_norm", "self_attn.k_norm": "attention/key_norm"}
_PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_POST_NORMS = {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}
_BOTH_NORMS = _POST_NORMS | {"input_layernorm": "attention_norm", "pre_feedforward_layernorm": "mlp_norm"}
_MIXTRAL_NAMES = {"w1": "gate", "w2": "down", "w3": "up"}
_MIXTRAL_MLP = {"gate": "router"} | {f"experts.{{expert}}.{w}": name for w, name in _MIXTRAL_NAMES.items()}
_QWEN_MLP = {"gate": "router"} | {f"experts.{{expert}}.{n}_proj": n for n in ("gate", "up", "down")}

_LLAMA = _table(_ATTENTION | _MLP, _PRE_NORMS | _HEAD_NORMS)
_GEMMA2 = _table(_ATTENTION | _MLP, _BOTH_NORMS | _HEAD_NORMS)
_OLMO2 = _table(_ATTENTION | _MLP, _POST_NORMS | _HEAD_NORMS)
_MIXTRAL = _table(_ATTENTION | {f"block_sparse_moe.{k}": f"mlp/{v}" for k, v in _MIXTRAL_MLP.items()}, _PRE_NORMS)
_QWEN3_MOE = _table(_ATTENTION | {f"mlp.{k}": f"mlp/{v}" for k, v in _QWEN_MLP.items()}, _PRE_NORMS | _HEAD_NORMS)
_PHI3 = _table({"self_attn.o_proj": "attention/output", "mlp.down_proj": "mlp/down"}, _PRE_NORMS) | {
    "model.layers.{layer}.self_attn.qkv_proj.weight": tuple(
        f"layers/attention/{name}/kernel" for name in ("query", "key", "value")
    ),
    "model.layers.{layer}.mlp.gate_up_proj.weight": ("layers/mlp/gate/kernel", "layers/mlp/up/kernel"),
}
_GPT2_NORMS = {"h.{layer}.ln_1": "layers/attention_norm", "h.{layer}.ln_2": "layers/mlp_norm", "ln_f": "final_norm"}
_GPT2 = {
    "transformer.wte.weight": ("embed/table",),
    "transformer.wpe.weight": ("positions/table",),
    "lm_head.weight": ("unembed/kernel",),
    **{
        f"transformer.h.{{layer}}.attn.c_attn.{theirs}": tuple(
            f"layers/attention/{name}/{ours}" for name in ("query", "key", "value")
        )
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    },
    **_linear("transformer.h.{layer}.attn.c_proj", "layers/attention/output"),
    **_linear("transformer.h.{layer}.mlp.c_fc", "layers/mlp/up"),
    **_linear("transformer.h.{layer}.mlp.c_proj", "layers/mlp/down"),
    **{
        f"transformer.{theirs}.{end}": (f"{ours}/{name}",)
        for theirs, ours in _GPT2_NORMS.items()
        for end, name in (("weight", "scale"), ("bias", "bias"))
    },
}

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(_gpt2, _GPT2, transposed=False),
    "llama": Family(_llama, _LLAMA),
    "mistral": Family(_windowed, _LLAMA),
    "mixtral": Family(_mixtral, _MIXTRAL),
    "qwen2": Family(_qwen2, _LLAMA),
    "qwen3": Family(_qwen3, _LLAMA),
    "qwen3_moe": Family(_qwen3_moe, _QWEN3_MOE),
    "gemma": Family(_gemma, _LLAMA),
    "gemma2": Family(_gemma2, _GEMMA2),
    "gemma3_text": Family(_gemma3, _GEMMA2),
    "phi3": Family(_windowed, _PHI3),
    "olmo2": Family(_olmo2, _OLMO2),
}
"""A checkpoint's `model_type` → its family."""
