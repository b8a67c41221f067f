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

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu", "relu": "relu"}
_KINDS = {"local": "sliding_attention", "global": "full_attention"}


_ENCODER = ("num_layers", "num_heads", "num_kv_heads", "mlp_width", "max_length")
"""Options of an encoder that stand for the decoder's where they are 0."""


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
    found = {(name, end): _missed(config, name, end) for name in tried for end in families.FAMILIES[name].heads}
    missed = {pair: lost for pair, lost in found.items() if not isinstance(lost, ValueError)}
    best = min(missed, key=lambda pair: len(missed[pair]), default=None)
    if best and not missed[best]:
        return _written(config, *best)
    refused = [lost for lost in found.values() if isinstance(lost, ValueError)]
    # Of a family that refuses the model, a class that answers something else says nothing about it.
    if model_type and refused and not (best and _answers_alike(missed[best])):
        error = str(refused[0]).removesuffix(".")
        raise families.UnsupportedModel(f"{model_type} does not have a model with such fields ({error}).")
    near = best[0]
    who = f"{near} does not have" if model_type else f"No family of transformers is like this model: {near} comes near"
    options = ", ".join(f"model.{name} = {value}" for name, value in missed[best].items())
    raise families.UnsupportedModel(f"{who}{'' if model_type else ', but does not have'} {options}.")


def _written(config: ModelConfig, name: str, end: str) -> dict[str, Any]:
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    found = {"architectures": [families.FAMILIES[name].name + end], "model_type": name, **tokens}
    if config.head.outputs:
        names = [f"LABEL_{i}" for i in range(config.head.labels)]
        found |= {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
    return found | _WRITERS[name](config)


def _answers_alike(missed: Mapping[str, Any]) -> bool:
    """Whether a class that loses these options answers as the model does."""
    return not any(path == "causal" or path.startswith("head.") for path in missed)


def _missed(config: ModelConfig, name: str, end: str) -> dict[str, Any] | ValueError:
    """The options, with their values, that a class of a family loses or changes; the error if it refuses all."""
    try:
        read = _effective(families.config_of(_written(config, name, end)))
    except ValueError as error:
        return error
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
    unused += [] if c.norm == "layer" else ["norm_bias"]
    unused += [] if c.qkv_bias else ["key_bias"]
    unused += [] if c.position == "relative" else ["relative_buckets", "relative_distance"]
    # Without a table of positions, and without tokens to plan for, nothing depends on it.
    unused += [] if c.of_tokens or c.position == "learned" else ["max_length"]
    changes = {name: getattr(default, name) for name in unused}
    if c.head.hidden_width == c.width:
        changes["head"] = dataclasses.replace(c.head, hidden_width=0)
    changes["pattern"] = families.shortest_pattern(c.layer_kinds)
    scale = c.attention_scale or c.head_dim**-0.5
    changes["attention_scale"] = float(f"{scale:.12g}")
    if c.encoder.num_layers:
        sizes = {name: getattr(c.source, name) for name in _ENCODER}
        changes["encoder"] = dataclasses.replace(c.encoder, **sizes)
    if c.rope_scaling.kind != "llama3":
        changes.setdefault("rope_scaling", RopeScaling(c.rope_scaling.kind, c.rope_scaling.factor))
    return dataclasses.replace(c, **changes)


# ---- Writers ----


def _sizes(c: ModelConfig) -> dict[str, int]:
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.mlp_width,
    }


def _decoder(c: ModelConfig) -> dict[str, Any]:
    """What all families after GPT-2 share."""
    return {
        "vocab_size": c.vocab_size,
        **_sizes(c),
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
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
        "activation_function": "gelu_new" if c.activation == "gelu" else _ACTIVATIONS[c.activation],
        "layer_norm_epsilon": c.norm_epsilon,
        "tie_word_embeddings": c.tie_embeddings,
    }


def _bert(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        **_sizes(c),
        "hidden_act": _ACTIVATIONS[c.activation],
        "layer_norm_eps": c.norm_epsilon,
        "max_position_embeddings": c.max_length + c.position_offset,
        "type_vocab_size": c.token_types,
        "tie_word_embeddings": c.tie_embeddings or not c.head.of_vocabulary,
    }


def _roberta(c: ModelConfig) -> dict[str, Any]:
    return _bert(c) | {"pad_token_id": c.position_offset - 1}


def _modernbert(c: ModelConfig) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": c.local_rope_theta or c.rope_theta}
    return {
        "vocab_size": c.vocab_size,
        **_sizes(c),
        "hidden_activation": _ACTIVATIONS[c.activation],
        "norm_eps": c.norm_epsilon,
        "norm_bias": c.norm_bias,
        "rope_parameters": {"full_attention": _rope(c), "sliding_attention": local},
        "layer_types": _layer_types(c),
        "local_attention": 2 * (c.window - 1) if c.window else 128,
        "max_position_embeddings": c.max_length,
        "tie_word_embeddings": c.tie_embeddings or not c.head.of_vocabulary,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "decoder_bias": c.head.bias,
        "classifier_bias": c.head.hidden_bias,
        "classifier_activation": _ACTIVATIONS.get(c.head.hidden, c.head.hidden),
        "classifier_pooling": "mean" if c.head.pooling == "mean" else "cls",
    }


def _t5(c: ModelConfig) -> dict[str, Any]:
    activation = "gelu_new" if c.activation == "gelu" else _ACTIVATIONS[c.activation]
    return {
        "vocab_size": c.vocab_size,
        "d_model": c.width,
        "d_kv": c.head_dim,
        "d_ff": c.mlp_width,
        # A decoder alone is none of theirs.
        "num_layers": c.encoder.num_layers or (None if c.causal else c.num_layers),
        "num_decoder_layers": c.num_layers,
        "num_heads": c.num_heads,
        "feed_forward_proj": f"gated-{activation}" if c.gated else activation,
        "relative_attention_num_buckets": c.relative_buckets,
        "relative_attention_max_distance": c.relative_distance,
        "layer_norm_epsilon": c.norm_epsilon,
        "n_positions": c.max_length,
        "tie_word_embeddings": c.tie_embeddings,
        "scale_decoder_outputs": c.scale_outputs,
        "is_encoder_decoder": c.encoder.num_layers > 0,
        "pad_token_id": 0,
        "decoder_start_token_id": c.encoder.start,
    }


def _vision(c: ModelConfig) -> dict[str, Any]:
    images = c.images
    return {
        **_sizes(c),
        "hidden_act": _ACTIVATIONS[c.activation],
        "layer_norm_eps": c.norm_epsilon,
        "image_size": images.height if images.height == images.width else [images.height, images.width],
        "patch_size": images.patch,
        "num_channels": images.channels,
        "qkv_bias": c.qkv_bias,
    }


def _yolos(c: ModelConfig) -> dict[str, Any]:
    images = c.images
    return _vision(c) | {
        "image_size": [images.height, images.width],
        "num_detection_tokens": images.detection_tokens,
        "use_mid_position_embeddings": c.layer_positions,
    }


def _siglip_vision(c: ModelConfig) -> dict[str, Any]:
    return _vision(c) | {"vision_use_head": False}


def _siglip(c: ModelConfig) -> dict[str, Any]:
    return {"vision_config": _siglip_vision(c) | {"model_type": "siglip_vision_model"}}


def _whisper(c: ModelConfig) -> dict[str, Any]:
    encoder = c.source if c.encoder.num_layers else c
    decoder = {
        "vocab_size": c.vocab_size,
        "decoder_layers": c.num_layers,
        "decoder_attention_heads": c.num_heads,
        "decoder_ffn_dim": c.mlp_width,
        "max_target_positions": c.max_length,
        "decoder_start_token_id": c.encoder.start,
        "tie_word_embeddings": c.tie_embeddings,
        "is_encoder_decoder": True,
    }
    return {
        "d_model": c.width,
        "encoder_layers": encoder.num_layers,
        "encoder_attention_heads": encoder.num_heads,
        "encoder_ffn_dim": encoder.mlp_width,
        "activation_function": _ACTIVATIONS[c.activation],
        "num_mel_bins": c.audio.channels,
        "max_source_positions": encoder.max_length,
        "classifier_proj_size": c.head.hidden_width or c.width,
        **(decoder if c.encoder.num_layers else {}),
    }


def _wav2vec2(c: ModelConfig) -> dict[str, Any]:
    audio = c.audio
    return {
        **_sizes(c),
        "vocab_size": c.head.outputs or 32,
        "hidden_act": _ACTIVATIONS[c.activation],
        "layer_norm_eps": c.norm_epsilon,
        "do_stable_layer_norm": c.norm_placement == "pre",
        "conv_dim": list(audio.widths),
        "conv_kernel": list(audio.kernels),
        "conv_stride": list(audio.strides),
        "conv_bias": audio.bias,
        "feat_extract_activation": _ACTIVATIONS[audio.activation],
        "feat_extract_norm": {"first": "group", "each": "layer"}.get(audio.norm),
        "num_conv_pos_embeddings": audio.position_kernel,
        "num_conv_pos_embedding_groups": audio.position_groups,
        "classifier_proj_size": c.head.hidden_width or c.width,
        # The blank, which transformers' loss looks up there.
        "pad_token_id": 0,
        # Without masks in training there is no vector of masked frames.
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    }


def _hubert(c: ModelConfig) -> dict[str, Any]:
    return _wav2vec2(c) | {"feat_proj_layer_norm": c.audio.projection == "normed"}


def _layer_types(c: ModelConfig) -> list[str]:
    return [_KINDS[kind] for kind in c.layer_kinds]


_WRITERS: Mapping[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _decoder,
    "mistral": _windowed,
    "mixtral": _mixtral,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "olmo2": _decoder,
    "bert": _bert,
    "roberta": _roberta,
    "modernbert": _modernbert,
    "t5": _t5,
    "mt5": _t5,
    "vit": _vision,
    "deit": _vision,
    "yolos": _yolos,
    "siglip": _siglip,
    "siglip_vision_model": _siglip_vision,
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
    "hubert": _hubert,
}
"""A family's `model_type` → what writes its fields; in order of preference."""
