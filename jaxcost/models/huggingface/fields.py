"""The `config.json` of a config: the inverse of what `families` reads, and the family that can say it.

A family can say a config if what it writes reads back as the same model. So nothing is decided here about options: what
a family's reader does not read is found missing, and named.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxcost import serialization
from jaxcost.models import families
from jaxcost.models.config import ModelConfig, RopeScaling

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "relu": "relu"}
_KINDS = {"local": "sliding_attention", "global": "full_attention"}


def fields_of(config: ModelConfig, model_type: str | None = None) -> dict[str, Any]:
    """What `config.json` must hold for transformers to make this model.

    Args:
      config: the model.
      model_type: the family to write it as, such as `llama`; the first that can if it is not given.

    Raises:
      UnsupportedModel: no family, or not this one, has an option of the model; the sentence names it.
    """
    if model_type is not None and model_type not in _WRITERS:
        raise families.UnsupportedModel(f"The model_type {model_type!r} is not one of {', '.join(_WRITERS)}.")
    tried = [model_type] if model_type else list(_WRITERS)
    missed = {name: _missed(config, name) for name in tried}
    best = min(missed, key=lambda name: len(missed[name]))
    if not missed[best]:
        return _written(config, best)
    who = f"{best} does not have" if model_type else f"No family of transformers is like this model: {best} comes near"
    options = ", ".join(f"model.{name} = {value}" for name, value in missed[best].items())
    raise families.UnsupportedModel(f"{who}{'' if model_type else ', but does not have'} {options}.")


def _written(config: ModelConfig, name: str) -> dict[str, Any]:
    architecture, writer = _WRITERS[name]
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {"architectures": [architecture], "model_type": name, **tokens, **writer(config)}


def _missed(config: ModelConfig, name: str) -> dict[str, Any]:
    """The options, with their values, that a family loses or changes."""
    try:
        read = _effective(families.config_of(_written(config, name)))
    except (families.UnsupportedModel, ValueError) as error:
        return {f.name: error for f in dataclasses.fields(config)}
    meant = _effective(config)
    found = {}
    for path in serialization.differences(meant, read):
        value = meant
        for part in path.split("."):
            value = getattr(value, part)
        found[path] = value
    return found


def _effective(c: ModelConfig) -> ModelConfig:
    """The config without what has no effect in it, so that two are equal if they compute the same."""
    default = ModelConfig()
    unused = ["capacity_factor"]
    unused += [] if "local" in c.layer_kinds else ["window", "local_rope_theta"]
    unused += [] if c.position == "rope" else ["rope_theta", "rope_scaling", "rotary_fraction", "local_rope_theta"]
    unused += [] if c.experts else ["experts_per_token", "normalize_experts"]
    changes = {name: getattr(default, name) for name in unused}
    changes["pattern"] = families.shortest_pattern(c.layer_kinds)
    scale = c.attention_scale or c.head_dim**-0.5
    changes["attention_scale"] = float(f"{scale:.12g}")
    if c.rope_scaling.kind != "llama3":
        changes.setdefault("rope_scaling", RopeScaling(c.rope_scaling.kind, c.rope_scaling.factor))
    return dataclasses.replace(c, **changes)


# ---- Writers ----


def _decoder(c: ModelConfig) -> dict[str, Any]:
    """What all families after GPT-2 share."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_width,
        "hidden_act": _ACTIVATIONS[c.activation],
        "rms_norm_eps": c.norm_epsilon,
        "rope_parameters": _rope(c),
        "max_position_embeddings": c.max_length,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.output_bias,
        "mlp_bias": c.mlp_bias,
    }


def _rope(c: ModelConfig) -> dict[str, Any]:
    s = c.rope_scaling
    found: dict[str, Any] = {"rope_type": "default" if s.kind == "none" else s.kind, "rope_theta": c.rope_theta}
    if s.kind != "none":
        found["factor"] = s.factor
    if s.kind == "llama3":
        found |= {"low_freq_factor": s.low_frequency_factor, "high_freq_factor": s.high_frequency_factor}
        found["original_max_position_embeddings"] = s.original_length
    return found


def _windowed(c: ModelConfig) -> dict[str, Any]:
    return _decoder(c) | {"sliding_window": c.window or None}


def _mixtral(c: ModelConfig) -> dict[str, Any]:
    return _windowed(c) | {"num_local_experts": c.experts or None, "num_experts_per_tok": c.experts_per_token}


def _qwen(c: ModelConfig) -> dict[str, Any]:
    windows = {"use_sliding_window": c.window > 0, "sliding_window": c.window or None, "max_window_layers": 0}
    return _decoder(c) | windows | {"layer_types": _layer_types(c)}


def _qwen3_moe(c: ModelConfig) -> dict[str, Any]:
    return _qwen(c) | {
        "moe_intermediate_size": c.mlp_width,
        "num_experts": c.experts or None,
        "num_experts_per_tok": c.experts_per_token,
        "norm_topk_prob": c.normalize_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(c: ModelConfig) -> dict[str, Any]:
    return _decoder(c) | {"hidden_activation": _ACTIVATIONS[c.activation]}


def _gemma2(c: ModelConfig) -> dict[str, Any]:
    squared = (c.attention_scale or c.head_dim**-0.5) ** -2
    whole = math.isclose(squared, round(squared), rel_tol=1e-12)
    return _gemma(c) | {
        "query_pre_attn_scalar": round(squared) if whole else squared,
        "attn_logit_softcapping": c.attention_soft_cap or None,
        "final_logit_softcapping": c.logit_soft_cap or None,
        "sliding_window": c.window or None,
        "layer_types": _layer_types(c),
    }


def _gemma3(c: ModelConfig) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": c.local_rope_theta or c.rope_theta}
    return _gemma2(c) | {"rope_parameters": {"full_attention": _rope(c), "sliding_attention": local}}


def _phi3(c: ModelConfig) -> dict[str, Any]:
    rope = _rope(c) | ({"partial_rotary_factor": c.rotary_fraction} if c.rotary_fraction < 1 else {})
    return _windowed(c) | {"rope_parameters": rope}


def _gpt2(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_embd": c.width,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": c.mlp_width,
        "n_positions": c.max_length,
        "activation_function": "gelu_new" if c.activation == "gelu" else c.activation,
        "layer_norm_epsilon": c.norm_epsilon,
        "tie_word_embeddings": c.tie_embeddings,
    }


def _layer_types(c: ModelConfig) -> list[str]:
    return [_KINDS[kind] for kind in c.layer_kinds]


_WRITERS: Mapping[str, tuple[str, Callable[[ModelConfig], dict[str, Any]]]] = {
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "llama": ("LlamaForCausalLM", _decoder),
    "mistral": ("MistralForCausalLM", _windowed),
    "mixtral": ("MixtralForCausalLM", _mixtral),
    "qwen2": ("Qwen2ForCausalLM", _qwen),
    "qwen3": ("Qwen3ForCausalLM", _qwen),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
    "gemma": ("GemmaForCausalLM", _gemma),
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3_text": ("Gemma3ForCausalLM", _gemma3),
    "phi3": ("Phi3ForCausalLM", _phi3),
    "olmo2": ("Olmo2ForCausalLM", _decoder),
}
"""A family's `model_type` → the class of transformers, and what writes its fields; in order of preference."""
