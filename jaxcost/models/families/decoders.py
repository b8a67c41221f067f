"""The families of decoders. Both forms of rotary fields are read: `rope_parameters` of transformers 5, and those of the
releases before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxcost.models.config import HeadConfig, ModelConfig
from jaxcost.models.families.base import (
    Family,
    Fields,
    Head,
    Tensors,
    UnsupportedModel,
    activation,
    hidden_states,
    labels,
    linear,
    needed,
    pattern,
    positive,
    rope,
    rope_fields,
    sizes,
)

# ---- Configs ----


def _decoder(fields: Fields, **options: Any) -> ModelConfig:
    """What all families after GPT-2 share; `options` are ModelConfig's own fields, which go before."""
    theta, scaling, fraction = rope(rope_fields(fields, "full_attention"))
    chosen = fields.get("hidden_activation") or fields.get("hidden_act", "silu")
    common = {
        "vocab_size": needed(fields, "vocab_size"),
        **sizes(fields),
        "norm_epsilon": fields.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_fraction": fraction,
        "max_length": fields.get("max_position_embeddings", 2048),
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }
    if "activation" not in options:
        common["activation"] = activation(chosen)
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
        experts=needed(fields, "num_local_experts"),
        experts_per_token=needed(fields, "num_experts_per_tok"),
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
        mlp_width=needed(fields, "moe_intermediate_size"),
        experts=fields.get("num_experts") or needed(fields, "num_local_experts"),
        experts_per_token=needed(fields, "num_experts_per_tok"),
        normalize_experts=fields.get("norm_topk_prob", False),
    )


def _qwen_windows(fields: Fields) -> dict[str, Any]:
    """Windows in the layers from `max_window_layers` on, where they are switched on at all."""
    if not (fields.get("use_sliding_window") and fields.get("sliding_window")):
        return {}
    layers = needed(fields, "num_hidden_layers")
    # Releases write layers that are not there: all layers are then global.
    first = min(fields.get("max_window_layers") or 0, layers)
    kinds = fields.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    return pattern(kinds, positive("sliding_window", fields["sliding_window"]), layers)


def _gemma(fields: Fields, **options: Any) -> ModelConfig:
    # The first checkpoints name the exact gelu and were trained with its tanh approximation.
    trained = activation(fields.get("hidden_activation") or "gelu_pytorch_tanh")
    tied = fields.get("tie_word_embeddings", True)
    bias = fields.get("attention_bias", False)
    common = {"activation": trained, "tie_embeddings": tied, "qkv_bias": bias, "output_bias": bias}
    return _decoder(fields, norm_unit_offset=True, scale_embeddings=True, **common, **options)


def _gemma2(fields: Fields, local_layers: int = 1, **options: Any) -> ModelConfig:
    layers = needed(fields, "num_hidden_layers")
    period = positive("sliding_window_pattern", fields.get("sliding_window_pattern") or local_layers + 1)
    cycle = ["sliding_attention"] * (period - 1) + ["full_attention"]
    kinds = fields.get("layer_types") or [cycle[i % period] for i in range(layers)]
    return _gemma(
        fields,
        norm_placement="both",
        attention_scale=_positive_number(fields, "query_pre_attn_scalar", 256) ** -0.5,
        attention_soft_cap=fields.get("attn_logit_softcapping") or 0.0,
        logit_soft_cap=fields.get("final_logit_softcapping") or 0.0,
        **pattern(kinds, fields.get("sliding_window", 4096), layers),
        **options,
    )


def _positive_number(fields: Fields, name: str, default: float) -> float:
    value = fields.get(name, default)
    if type(value) not in (int, float) or not value > 0:
        raise UnsupportedModel(f"{name} is {value!r}; it must be a number above 0.")
    return value


def _gemma3(fields: Fields) -> ModelConfig:
    if fields.get("use_bidirectional_attention"):
        raise UnsupportedModel("use_bidirectional_attention is on, but only causal attention can be read.")
    local = rope_fields(fields, "sliding_attention").get("rope_theta")
    theta = fields.get("rope_local_base_freq", 10_000.0) if "rope_parameters" not in fields else local
    return _gemma2(fields, local_layers=5, query_key_norm="head", local_rope_theta=theta)


def _olmo2(fields: Fields) -> ModelConfig:
    bias = fields.get("attention_bias", False)
    return _decoder(fields, norm_placement="post", query_key_norm="projection", qkv_bias=bias, output_bias=bias)


def _gpt2(fields: Fields) -> ModelConfig:
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if fields.get(option):
            raise UnsupportedModel(f"{option} is on, which the transformer does not have.")
    width, heads = needed(fields, "n_embd"), needed(fields, "n_head")
    return ModelConfig(
        vocab_size=needed(fields, "vocab_size"),
        width=width,
        num_layers=needed(fields, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=fields.get("n_inner") or 4 * width,
        gated=False,
        activation=activation(fields.get("activation_function", "gelu_new")),
        norm="layer",
        norm_epsilon=fields.get("layer_norm_epsilon", 1e-5),
        position="learned",
        max_length=needed(fields, "n_positions"),
        tie_embeddings=fields.get("tie_word_embeddings", True),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


# ---- Tensors ----


def _table(layers: Mapping[str, str], norms: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The table of a decoder from the names of a block's linear layers and norms."""
    table = {
        "model.embed_tokens.weight": ("embed/table",),
        "model.norm.weight": ("final_norm/scale",),
    }
    for theirs, ours in layers.items():
        table |= linear(f"model.layers.{{layer}}.{theirs}", f"layers/{ours}")
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
    **{
        f"transformer.h.{{layer}}.attn.c_attn.{theirs}": tuple(
            f"layers/attention/{name}/{ours}" for name in ("query", "key", "value")
        )
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    },
    **linear("transformer.h.{layer}.attn.c_proj", "layers/attention/output"),
    **linear("transformer.h.{layer}.mlp.c_fc", "layers/mlp/up"),
    **linear("transformer.h.{layer}.mlp.c_proj", "layers/mlp/down"),
    **{
        f"transformer.{theirs}.{end}": (f"{ours}/{name}",)
        for theirs, ours in _GPT2_NORMS.items()
        for end, name in (("weight", "scale"), ("bias", "bias"))
    },
}


def _heads(language: str, of_tokens: str = "score") -> dict[str, Head]:
    """The heads of decoders: the end of the language model's class, and what the labels of tokens are made by."""
    unembedding = "lm_head.weight"
    return {
        language: Head(lambda fields: HeadConfig(), {unembedding: ("unembed/kernel",)}, tied=(unembedding,)),
        "ForSequenceClassification": Head(
            lambda fields: HeadConfig(outputs=labels(fields), pooling="last"), {"score.weight": ("head/output/kernel",)}
        ),
        "ForTokenClassification": Head(
            lambda fields: HeadConfig(outputs=labels(fields), bias=True), linear(of_tokens, "head/output")
        ),
        **hidden_states(),
    }


def _family(name: str, config: Callable[[Fields], ModelConfig], tensors: Tensors) -> Family:
    return Family(config, tensors, _heads("ForCausalLM"), name)


DECODERS: Mapping[str, Family] = {
    "gpt2": Family(_gpt2, _GPT2, _heads("LMHeadModel", "classifier"), "GPT2", transposed=False),
    "llama": _family("Llama", _llama, _LLAMA),
    "mistral": _family("Mistral", _windowed, _LLAMA),
    "mixtral": _family("Mixtral", _mixtral, _MIXTRAL),
    "qwen2": _family("Qwen2", _qwen2, _LLAMA),
    "qwen3": _family("Qwen3", _qwen3, _LLAMA),
    "qwen3_moe": _family("Qwen3Moe", _qwen3_moe, _QWEN3_MOE),
    "gemma": _family("Gemma", _gemma, _LLAMA),
    "gemma2": _family("Gemma2", _gemma2, _GEMMA2),
    "gemma3_text": _family("Gemma3", _gemma3, _GEMMA2),
    "phi3": _family("Phi3", _windowed, _PHI3),
    "olmo2": _family("Olmo2", _olmo2, _OLMO2),
}
"""A checkpoint's `model_type` → its family."""
