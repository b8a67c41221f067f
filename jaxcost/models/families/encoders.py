"""The families of encoders."""

from __future__ import annotations

from collections.abc import Mapping
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
    norm,
    pattern,
    plain_encoder,
    positive,
    rope,
    rope_fields,
    sizes,
)

# ---- Configs ----


def _bert(fields: Fields, **options: Any) -> ModelConfig:
    if fields.get("is_decoder") or fields.get("add_cross_attention"):
        raise UnsupportedModel("is_decoder is on, but only encoders of this family can be read.")
    kind = fields.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise UnsupportedModel(f"position_embedding_type is {kind!r}, but only absolute positions can be read.")
    common = {
        **plain_encoder(fields),
        "vocab_size": needed(fields, "vocab_size"),
        "norm_placement": "sum",
        "embedding_norm": True,
        "max_length": fields.get("max_position_embeddings", 512),
        "token_types": fields.get("type_vocab_size", 2),
        "tie_embeddings": fields.get("tie_word_embeddings", True),
    }
    return ModelConfig(**(common | options))


def _roberta(fields: Fields) -> ModelConfig:
    # Positions are counted from the one behind the padding token's id.
    padding = fields.get("pad_token_id", 1)
    if type(padding) is not int or padding < 0:
        raise UnsupportedModel(f"pad_token_id is {padding!r}; it must be a token's number.")
    offset = padding + 1
    longest = fields.get("max_position_embeddings", 512) - offset
    return _bert(fields, max_length=longest, position_offset=offset)


def _modernbert(fields: Fields) -> ModelConfig:
    layers = needed(fields, "num_hidden_layers")
    every = positive("global_attn_every_n_layers", fields.get("global_attn_every_n_layers", 3))
    cycle = ["full_attention"] + ["sliding_attention"] * (every - 1)
    kinds = fields.get("layer_types") or [cycle[i % every] for i in range(layers)]
    theta, scaling, _ = rope(rope_fields(fields, "full_attention"))
    local = rope_fields(fields, "sliding_attention").get("rope_theta", 10_000.0)
    if "rope_parameters" not in fields:
        theta, local = fields.get("global_rope_theta", 160_000.0), fields.get("local_rope_theta", 10_000.0)
    bias = fields.get("attention_bias", False)
    return ModelConfig(
        vocab_size=needed(fields, "vocab_size"),
        **sizes(fields),
        activation=activation(fields.get("hidden_activation", "gelu")),
        norm="layer",
        norm_epsilon=fields.get("norm_eps", 1e-5),
        norm_bias=fields.get("norm_bias", False),
        embedding_norm=True,
        first_norm=False,
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local if "sliding_attention" in kinds else 0.0,
        max_length=fields.get("max_position_embeddings", 8192),
        tie_embeddings=fields.get("tie_word_embeddings", True),
        causal=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.get("mlp_bias", False),
        # What a token sees on either side, and itself.
        **pattern(kinds, positive("local_attention", fields.get("local_attention", 128)) // 2 + 1, layers),
    )


# ---- Tensors ----


def _bert_tensors(name: str) -> Tensors:
    embeddings, layer = f"{name}.embeddings", f"{name}.encoder.layer.{{layer}}"
    return {
        f"{embeddings}.word_embeddings.weight": ("embed/table",),
        f"{embeddings}.position_embeddings.weight": ("positions/table",),
        f"{embeddings}.token_type_embeddings.weight": ("token_types/table",),
        **norm(f"{embeddings}.LayerNorm", "embedding_norm"),
        **linear(f"{layer}.attention.self.query", "layers/attention/query"),
        **linear(f"{layer}.attention.self.key", "layers/attention/key"),
        **linear(f"{layer}.attention.self.value", "layers/attention/value"),
        **linear(f"{layer}.attention.output.dense", "layers/attention/output"),
        **norm(f"{layer}.attention.output.LayerNorm", "layers/attention_post_norm"),
        **linear(f"{layer}.intermediate.dense", "layers/mlp/up"),
        **linear(f"{layer}.output.dense", "layers/mlp/down"),
        **norm(f"{layer}.output.LayerNorm", "layers/mlp_post_norm"),
    }


_QKV = tuple(f"layers/attention/{name}" for name in ("query", "key", "value"))
_GATE_UP = ("layers/mlp/gate", "layers/mlp/up")
_MODERNBERT: Tensors = {
    "model.embeddings.tok_embeddings.weight": ("embed/table",),
    **norm("model.embeddings.norm", "embedding_norm"),
    **norm("model.layers.{layer}.attn_norm", "layers/attention_norm"),
    "model.layers.{layer}.attn.Wqkv.weight": tuple(f"{path}/kernel" for path in _QKV),
    "model.layers.{layer}.attn.Wqkv.bias": tuple(f"{path}/bias" for path in _QKV),
    **linear("model.layers.{layer}.attn.Wo", "layers/attention/output"),
    **norm("model.layers.{layer}.mlp_norm", "layers/mlp_norm"),
    "model.layers.{layer}.mlp.Wi.weight": tuple(f"{path}/kernel" for path in _GATE_UP),
    "model.layers.{layer}.mlp.Wi.bias": tuple(f"{path}/bias" for path in _GATE_UP),
    **linear("model.layers.{layer}.mlp.Wo", "layers/mlp/down"),
    **norm("model.final_norm", "final_norm"),
}


# ---- Heads ----


def _pooler(name: str) -> tuple[str, ...]:
    return tuple(linear(f"{name}.pooler.dense", ""))


def _masked_words(layer: str, normed: str, bias: str, decoder: str, name: str) -> Head:
    """A further layer as wide as the model, a norm, and the embedding transposed with a bias."""
    return Head(
        lambda fields: HeadConfig(hidden=_activation(fields), hidden_norm=True, bias=True),
        {
            **linear(layer, "head/hidden"),
            **norm(normed, "head/norm"),
            bias: ("unembed/bias",),
            f"{decoder}.weight": ("unembed/kernel",),
        },
        tied=(f"{decoder}.weight",),
        unused=(f"{decoder}.bias", *_pooler(name)),
        # The class has two biases then, and adds this one.
        untied={f"{decoder}.bias": ("unembed/bias",)},
    )


def _activation(fields: Fields) -> Any:
    return activation(fields.get("hidden_act", "gelu"))


def _sentences(layer: str, output: str) -> Head:
    return Head(
        lambda fields: HeadConfig(outputs=labels(fields), pooling="first", hidden="tanh", bias=True),
        {**linear(layer, "head/hidden"), **linear(output, "head/output")},
    )


def _tokens(name: str) -> Head:
    return Head(
        lambda fields: HeadConfig(outputs=labels(fields), bias=True),
        linear("classifier", "head/output"),
        unused=_pooler(name),
    )


def _modernbert_head(fields: Fields, **options: Any) -> HeadConfig:
    hidden = activation(fields.get("classifier_activation", "gelu"))
    bias = fields.get("classifier_bias", False)
    return HeadConfig(hidden=hidden, hidden_bias=bias, hidden_norm=True, **options)


def _modernbert_pooling(fields: Fields) -> Any:
    kind = fields.get("classifier_pooling", "cls")
    if kind not in ("cls", "mean"):
        raise UnsupportedModel(f"classifier_pooling is {kind!r}, but only cls and mean can be read.")
    return "first" if kind == "cls" else "mean"


_MODERNBERT_HEAD = {**linear("head.dense", "head/hidden"), **norm("head.norm", "head/norm")}
_MODERNBERT_LABELS = _MODERNBERT_HEAD | linear("classifier", "head/output")
_MODERNBERT_HEADS = {
    "ForMaskedLM": Head(
        lambda fields: _modernbert_head(fields, bias=fields.get("decoder_bias", True)),
        _MODERNBERT_HEAD | {"decoder.weight": ("unembed/kernel",), "decoder.bias": ("unembed/bias",)},
        tied=("decoder.weight",),
    ),
    "ForSequenceClassification": Head(
        lambda fields: _modernbert_head(fields, outputs=labels(fields), pooling=_modernbert_pooling(fields), bias=True),
        _MODERNBERT_LABELS,
    ),
    "ForTokenClassification": Head(
        lambda fields: _modernbert_head(fields, outputs=labels(fields), bias=True), _MODERNBERT_LABELS
    ),
    **hidden_states(),
}

ENCODERS: Mapping[str, Family] = {
    "bert": Family(
        _bert,
        _bert_tensors("bert"),
        {
            "ForMaskedLM": _masked_words(
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.bias",
                "cls.predictions.decoder",
                "bert",
            ),
            "ForSequenceClassification": _sentences("bert.pooler.dense", "classifier"),
            "ForTokenClassification": _tokens("bert"),
            **hidden_states(*_pooler("bert")),
        },
        "Bert",
    ),
    "roberta": Family(
        _roberta,
        _bert_tensors("roberta"),
        {
            "ForMaskedLM": _masked_words(
                "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder", "roberta"
            ),
            "ForSequenceClassification": _sentences("classifier.dense", "classifier.out_proj"),
            "ForTokenClassification": _tokens("roberta"),
            **hidden_states(*_pooler("roberta")),
        },
        "Roberta",
    ),
    "modernbert": Family(_modernbert, _MODERNBERT, _MODERNBERT_HEADS, "ModernBert"),
}
"""A checkpoint's `model_type` → its family."""
