"""The families of encoder-decoders: a decoder that answers to what an encoder has read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxcost.models.config import EncoderConfig, HeadConfig, ModelConfig
from jaxcost.models.families.audio import LABELS, convolution_shapes, whisper_encoder, whisper_encoder_tensors
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
    positive,
)

# ---- Configs ----


def _t5(fields: Fields) -> ModelConfig:
    """The encoder alone where its states, or labels of tokens, are the answer."""
    whole = _t5_whole(fields)
    if _class_of(fields).endswith(("EncoderModel", "ForTokenClassification")):
        return dataclasses.replace(whole.source, vocab_size=whole.vocab_size)
    return whole


def _t5_whole(fields: Fields) -> ModelConfig:
    encoder_layers, decoder_layers = needed(fields, "num_layers"), fields.get("num_decoder_layers")
    tied = fields.get("tie_word_embeddings", True)
    named = fields.get("feed_forward_proj", "relu")
    gate, gated, name = str(named).rpartition("-")
    if gated and gate != "gated":
        raise UnsupportedModel(
            f"feed_forward_proj is {named!r}, but only an activation, or gated- before one, can be read."
        )
    # The first gated checkpoints name the exact gelu and were trained with its tanh approximation.
    name = "gelu_new" if (gate, name) == ("gated", "gelu") else name
    return ModelConfig(
        vocab_size=needed(fields, "vocab_size"),
        width=needed(fields, "d_model"),
        num_layers=encoder_layers if decoder_layers is None else positive("num_decoder_layers", decoder_layers),
        num_heads=needed(fields, "num_heads"),
        num_kv_heads=needed(fields, "num_heads"),
        head_dim=needed(fields, "d_kv"),
        mlp_width=needed(fields, "d_ff"),
        gated=bool(gated),
        activation=activation(name),
        norm_epsilon=fields.get("layer_norm_epsilon", 1e-6),
        position="relative",
        relative_buckets=positive("relative_attention_num_buckets", fields.get("relative_attention_num_buckets", 32)),
        relative_distance=positive(
            "relative_attention_max_distance", fields.get("relative_attention_max_distance", 128)
        ),
        # Relative positions know no bound; this is the length of the first training.
        max_length=positive("n_positions", fields.get("n_positions", 512)),
        attention_scale=1.0,
        tie_embeddings=tied,
        scale_outputs=fields.get("scale_decoder_outputs", tied),
        encoder=EncoderConfig(num_layers=encoder_layers, start=fields.get("decoder_start_token_id") or 0),
    )


def _mt5(fields: Fields) -> ModelConfig:
    """As T5 in its second release, whose outputs are not scaled."""
    return _t5({"feed_forward_proj": "gated-gelu"} | dict(fields) | {"scale_decoder_outputs": False})


def _class_of(fields: Fields) -> str:
    """The class that a `config.json` names; `Family.head_of` says what is wrong where it names none."""
    return str((fields.get("architectures") or [""])[0])


def _whisper(fields: Fields) -> ModelConfig:
    """The encoder alone where it is a recording that is classified."""
    encoder = whisper_encoder(fields)
    if _class_of(fields).endswith("ForAudioClassification"):
        return encoder
    heads = needed(fields, "decoder_attention_heads")
    if heads != encoder.num_heads:
        raise UnsupportedModel(
            f"encoder_attention_heads is {encoder.num_heads} and decoder_attention_heads {heads}, but only models with "
            "as many in both can be read."
        )
    return dataclasses.replace(
        encoder,
        vocab_size=needed(fields, "vocab_size"),
        num_layers=needed(fields, "decoder_layers"),
        mlp_width=needed(fields, "decoder_ffn_dim"),
        max_length=positive("max_target_positions", fields.get("max_target_positions", 448)),
        causal=True,
        tie_embeddings=fields.get("tie_word_embeddings", True),
        encoder=EncoderConfig(
            encoder.num_layers,
            mlp_width=encoder.mlp_width,
            max_length=encoder.max_length,
            start=fields.get("decoder_start_token_id", 50257) or 0,
        ),
        head=HeadConfig(),
    )


# ---- Tensors ----


def _t5_stack(theirs: str, ours: str, cross: bool, gated: bool) -> dict[str, tuple[str, ...]]:
    """A stack of blocks, each a list of layers: attention, that to the source if there is one, and the MLP, whose first
    matrix has another name where there is a gate."""
    parts = {"SelfAttention": "attention"} | ({"EncDecAttention": "cross_attention"} if cross else {})
    table: dict[str, tuple[str, ...]] = {}
    for i, (name, part) in enumerate(parts.items()):
        layer = f"{theirs}.block.{{layer}}.layer.{i}"
        for short, projection in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            table[f"{layer}.{name}.{short}.weight"] = (f"{ours}layers/{part}/{projection}/kernel",)
        table[f"{layer}.layer_norm.weight"] = (f"{ours}layers/{part}_norm/scale",)
    bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    table[bias] = (f"{ours}relative/table",)
    mlp = f"{theirs}.block.{{layer}}.layer.{len(parts)}"
    matrices = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
    for short, matrix in (matrices | {"wo": "down"}).items():
        table[f"{mlp}.DenseReluDense.{short}.weight"] = (f"{ours}layers/mlp/{matrix}/kernel",)
    table[f"{mlp}.layer_norm.weight"] = (f"{ours}layers/mlp_norm/scale",)
    table[f"{theirs}.final_layer_norm.weight"] = (f"{ours}final_norm/scale",)
    return table


def _t5_tensors(config: ModelConfig) -> Tensors:
    """Of both stacks, or of an encoder alone; in classes that tell labels, their names start with `transformer.`."""
    table = {"shared.weight": ("embed/table",)}
    if config.encoder.num_layers:
        table |= _t5_stack("encoder", "encoder/", False, config.gated)
        table |= _t5_stack("decoder", "", True, config.gated)
    else:
        table |= _t5_stack("encoder", "", False, config.gated)
    return {f"{_LABELLED}{name}" if config.head.outputs else name: paths for name, paths in table.items()}


_LABELLED = "transformer."
_T5_SPARE = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    # The first checkpoints have relative positions of the source, which nothing reads.
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)
_T5_LABELLED_SPARE = tuple(f"{_LABELLED}{name}" for name in _T5_SPARE)
_T5_HEADS = {
    "ForConditionalGeneration": Head(
        lambda fields: HeadConfig(),
        {"lm_head.weight": ("unembed/kernel",)},
        tied=("lm_head.weight",),
        unused=_T5_SPARE,
    ),
    # A text is labelled by what the decoder makes of the same text, a token later, at its last token.
    "ForSequenceClassification": Head(
        lambda fields: HeadConfig(outputs=labels(fields), pooling="last", hidden="tanh", bias=True),
        linear("classification_head.dense", "head/hidden") | linear("classification_head.out_proj", "head/output"),
        unused=_T5_LABELLED_SPARE,
    ),
    "ForTokenClassification": Head(
        lambda fields: HeadConfig(outputs=labels(fields), bias=True),
        linear("classifier", "head/output"),
        unused=_T5_LABELLED_SPARE,
    ),
    "EncoderModel": Head(lambda fields: HeadConfig(embed=True), {}, unused=_T5_SPARE),
    **hidden_states(*_T5_SPARE),
}


def _whisper_stack(name: str) -> Tensors:
    """The decoder's, whose blocks are the encoder's with attention to it between."""
    layer = f"{name}.layers.{{layer}}"
    theirs = whisper_encoder_tensors(name)
    cross = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
    table = {tensor: paths for tensor, paths in theirs.items() if not paths[0].startswith("audio/")}
    for short, projection in cross.items():
        table |= linear(f"{layer}.encoder_attn.{short}", f"layers/cross_attention/{projection}")
    return table | norm(f"{layer}.encoder_attn_layer_norm", "layers/cross_attention_norm")


def _whisper_further(config: ModelConfig) -> Tensors:
    """Names that start with `model.`, or without it those of an encoder alone."""
    if not config.encoder.num_layers:
        return whisper_encoder_tensors("encoder")
    encoder = whisper_encoder_tensors("model.encoder")
    return {
        **{tensor: tuple(f"encoder/{path}" for path in paths) for tensor, paths in encoder.items()},
        **_whisper_stack("model.decoder"),
    }


def _whisper_stored(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    root = "model.encoder" if config.encoder.num_layers else "encoder"
    return convolution_shapes([f"{root}.conv1", f"{root}.conv2"], config.audio)


_WHISPER_HEADS = {
    "ForConditionalGeneration": Head(
        lambda fields: HeadConfig(), {"proj_out.weight": ("unembed/kernel",)}, tied=("proj_out.weight",)
    ),
    "ForAudioClassification": LABELS,
    **hidden_states(),
}

ENCODER_DECODERS: Mapping[str, Family] = {
    "t5": Family(_t5, {}, _T5_HEADS, "T5", further=_t5_tensors),
    "mt5": Family(_mt5, {}, _T5_HEADS, "MT5", further=_t5_tensors),
    "whisper": Family(
        _whisper,
        {"model.decoder.embed_tokens.weight": ("embed/table",)},
        _WHISPER_HEADS,
        "Whisper",
        _whisper_stored,
        further=_whisper_further,
    ),
}
"""A checkpoint's `model_type` → its family."""
