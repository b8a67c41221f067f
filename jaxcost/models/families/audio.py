"""The families of audio: encoders of waveforms, and that of spectrograms which Whisper's decoder answers to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxcost.models.config import AudioConfig, HeadConfig, ModelConfig
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
    plain_encoder,
    positive,
)

# ---- Configs ----


def whisper_encoder(fields: Fields) -> ModelConfig:
    """The encoder of a Whisper model, whatever answers to it."""
    width = needed(fields, "d_model")
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": needed(fields, "encoder_layers"),
        "num_attention_heads": needed(fields, "encoder_attention_heads"),
        "intermediate_size": needed(fields, "encoder_ffn_dim"),
        "hidden_act": fields.get("activation_function", "gelu"),
        "layer_norm_eps": 1e-5,
    }
    mels = positive("num_mel_bins", fields.get("num_mel_bins", 80))
    return ModelConfig(
        **plain_encoder(sizes),
        key_bias=False,
        vocab_size=0,
        max_length=positive("max_source_positions", fields.get("max_source_positions", 1500)),
        audio=AudioConfig(mels, (width, width), (3, 3), (1, 2), padded=True),
        # The transformer cannot be made without saying what it gives; the family's head takes its place.
        head=HeadConfig(embed=True),
    )


def _wav2vec2(fields: Fields) -> ModelConfig:
    if fields.get("add_adapter"):
        raise UnsupportedModel("add_adapter is on, but only models without convolutions behind the blocks can be read.")
    if fields.get("adapter_attn_dim") is not None:
        raise UnsupportedModel("adapter_attn_dim is set, but only models without adapters in the blocks can be read.")
    if fields.get("conv_pos_batch_norm"):
        raise UnsupportedModel("conv_pos_batch_norm is on, but only positions with weight normalisation can be read.")
    # Other fields than these, such as those of masks, are for training alone.
    stable = fields.get("do_stable_layer_norm", False)
    options = plain_encoder({"layer_norm_eps": 1e-5} | dict(fields) | {"qkv_bias": True}) | {"position": "none"}
    return ModelConfig(
        **options,
        norm_placement="pre" if stable else "sum",
        embedding_norm=not stable,
        vocab_size=0,
        max_length=LONGEST,
        audio=AudioConfig(
            channels=1,
            widths=_sizes(fields, "conv_dim", (512,) * 7),
            kernels=_sizes(fields, "conv_kernel", (10, 3, 3, 3, 3, 2, 2)),
            strides=_sizes(fields, "conv_stride", (5, 2, 2, 2, 2, 2, 2)),
            bias=fields.get("conv_bias", False),
            activation=activation(fields.get("feat_extract_activation", "gelu")),
            norm=_convolution_norm(fields.get("feat_extract_norm", "group")),
            projection="normed" if fields.get("feat_proj_layer_norm", True) else "linear",
            position_kernel=positive("num_conv_pos_embeddings", fields.get("num_conv_pos_embeddings", 128)),
            position_groups=positive("num_conv_pos_embedding_groups", fields.get("num_conv_pos_embedding_groups", 16)),
        ),
        head=HeadConfig(embed=True),
    )


LONGEST = 3000
"""Frames of the longest recording, a minute; a checkpoint names none, and no weight depends on it."""


def _sizes(fields: Fields, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    sizes = fields.get(name, default)
    if not isinstance(sizes, list | tuple):
        raise UnsupportedModel(f"{name} is {sizes!r}; it must list a number for each convolution.")
    return tuple(positive(name, size) for size in sizes)


def _convolution_norm(kind: Any) -> Any:
    if kind not in ("group", "layer"):
        raise UnsupportedModel(f"feat_extract_norm is {kind!r}, but only group and layer can be read.")
    return "first" if kind == "group" else "each"


# ---- Tensors ----


def whisper_encoder_tensors(name: str) -> Tensors:
    """The tensors of Whisper's encoder, whose names start with `name`, as those of a model without a decoder."""
    layer = f"{name}.layers.{{layer}}"
    return {
        **linear(f"{name}.conv1", "audio/convolution_0"),
        **linear(f"{name}.conv2", "audio/convolution_1"),
        f"{name}.embed_positions.weight": ("positions/table",),
        **norm(f"{layer}.self_attn_layer_norm", "layers/attention_norm"),
        **linear(f"{layer}.self_attn.q_proj", "layers/attention/query"),
        **linear(f"{layer}.self_attn.k_proj", "layers/attention/key"),
        **linear(f"{layer}.self_attn.v_proj", "layers/attention/value"),
        **linear(f"{layer}.self_attn.out_proj", "layers/attention/output"),
        **norm(f"{layer}.final_layer_norm", "layers/mlp_norm"),
        **linear(f"{layer}.fc1", "layers/mlp/up"),
        **linear(f"{layer}.fc2", "layers/mlp/down"),
        **norm(f"{name}.layer_norm", "final_norm"),
    }


def _wav2vec2_tensors(name: str) -> Tensors:
    layer, positions = f"{name}.encoder.layers.{{layer}}", f"{name}.encoder.pos_conv_embed.conv"
    return {
        **norm(f"{name}.feature_projection.layer_norm", "audio/projection_norm"),
        **linear(f"{name}.feature_projection.projection", "audio/projection"),
        f"{positions}{_SCALE}": ("audio/positions/scale",),
        f"{positions}{_DIRECTION}": ("audio/positions/kernel",),
        f"{positions}.bias": ("audio/positions/bias",),
        **linear(f"{layer}.attention.q_proj", "layers/attention/query"),
        **linear(f"{layer}.attention.k_proj", "layers/attention/key"),
        **linear(f"{layer}.attention.v_proj", "layers/attention/value"),
        **linear(f"{layer}.attention.out_proj", "layers/attention/output"),
        **linear(f"{layer}.feed_forward.intermediate_dense", "layers/mlp/up"),
        **linear(f"{layer}.feed_forward.output_dense", "layers/mlp/down"),
    }


_SCALE, _DIRECTION = ".parametrizations.weight.original0", ".parametrizations.weight.original1"


def _wav2vec2_further(name: str):
    """The convolutions, and the norms, which stand before or behind the sums."""
    layer = f"{name}.encoder.layers.{{layer}}"

    def further(c: ModelConfig) -> Tensors:
        post = c.norm_placement == "sum"
        found = {
            **norm(f"{name}.encoder.layer_norm", "embedding_norm" if post else "final_norm"),
            **norm(f"{layer}.layer_norm", "layers/attention_post_norm" if post else "layers/attention_norm"),
            **norm(f"{layer}.final_layer_norm", "layers/mlp_post_norm" if post else "layers/mlp_norm"),
        }
        for i, theirs in enumerate(_convolutions(name, c)):
            found |= linear(f"{theirs}.conv", f"audio/convolution_{i}")
            found |= norm(f"{theirs}.layer_norm", f"audio/norm_{i}")
        return found

    return further


def _convolutions(name: str, c: ModelConfig) -> list[str]:
    return [f"{name}.feature_extractor.conv_layers.{i}" for i in range(len(c.audio.widths))]


def _wav2vec2_stored(name: str):
    def stored(c: ModelConfig) -> dict[str, tuple[int, ...]]:
        positions, times = f"{name}.encoder.pos_conv_embed.conv", c.audio.position_kernel
        return {
            **convolution_shapes([f"{theirs}.conv" for theirs in _convolutions(name, c)], c.audio),
            f"{positions}{_SCALE}": (1, 1, times),
            f"{positions}{_DIRECTION}": (c.width, c.width // c.audio.position_groups, times),
        }

    return stored


def convolution_shapes(names: list[str], audio: AudioConfig) -> dict[str, tuple[int, ...]]:
    """The shapes (width, channels, times) that checkpoints hold the kernels of the convolutions of these names in."""
    shapes = zip(audio.widths, (audio.channels, *audio.widths), audio.kernels, strict=False)
    return {f"{name}.weight": shape for name, shape in zip(names, shapes, strict=True)}


# ---- Heads ----


def _labels(fields: Fields) -> HeadConfig:
    """A projection of each frame, their mean, and labels of it: a projection of the mean, which is the same."""
    if fields.get("use_weighted_layer_sum"):
        raise UnsupportedModel("use_weighted_layer_sum is on, but only labels of the last layer's output can be read.")
    width = positive("classifier_proj_size", fields.get("classifier_proj_size", 256))
    return HeadConfig(labels(fields), "mean", "linear", hidden_width=width, bias=True)


LABELS = Head(_labels, {**linear("projector", "head/hidden"), **linear("classifier", "head/output")})


def _characters(fields: Fields) -> HeadConfig:
    """Logits of characters and the blank between them, for each frame; their loss is `losses.ctc`."""
    return HeadConfig(needed(fields, "vocab_size"), bias=True)


_CODES = ("quantizer.codevectors", *linear("quantizer.weight_proj", ""))
_PRETRAINING = (*_CODES, *linear("project_hid", ""), *linear("project_q", ""))
"""What the first training alone needs."""


def _wav2vec2_family(prefix: str, name: str, heads: Mapping[str, Head]) -> Family:
    # The vector that stands for masked frames, in training.
    masked = f"{prefix}.masked_spec_embed"
    heads = {end: dataclasses.replace(head, unused=(*head.unused, masked)) for end, head in heads.items()}
    older = {".weight_g": _SCALE, ".weight_v": _DIRECTION}
    tensors, further = _wav2vec2_tensors(prefix), _wav2vec2_further(prefix)
    stored = _wav2vec2_stored(prefix)
    return Family(_wav2vec2, tensors, heads, name, stored, further=further, renamed=older)


_WAV2VEC2_HEADS = {
    "ForCTC": Head(_characters, linear("lm_head", "head/output")),
    "ForSequenceClassification": LABELS,
    **hidden_states(),
}
AUDIO: Mapping[str, Family] = {
    "wav2vec2": _wav2vec2_family(
        "wav2vec2",
        "Wav2Vec2",
        _WAV2VEC2_HEADS | {"ForPreTraining": dataclasses.replace(hidden_states()["Model"], unused=_PRETRAINING)},
    ),
    "hubert": _wav2vec2_family("hubert", "Hubert", _WAV2VEC2_HEADS),
}
"""A checkpoint's `model_type` → its family."""
