"""The families of audio: encoders of spectrograms, and of waveforms."""

from __future__ import annotations

from collections.abc import Mapping

from jaxcost.models.config import AudioConfig, HeadConfig, ModelConfig
from jaxcost.models.families.base import (
    Family,
    Fields,
    Head,
    Tensors,
    UnsupportedModel,
    labels,
    linear,
    needed,
    norm,
    plain_encoder,
    positive,
)

# ---- Configs ----


def whisper_encoder(fields: Fields) -> ModelConfig:
    """The encoder of a Whisper model, whatever its decoder is."""
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


# ---- Tensors ----


def whisper_encoder_tensors(name: str) -> Tensors:
    """The tensors of Whisper's encoder, whose names start with `name`."""
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


_LABELS = Head(_labels, {**linear("projector", "head/hidden"), **linear("classifier", "head/output")})


AUDIO: Mapping[str, Family] = {
    "whisper": Family(
        whisper_encoder,
        whisper_encoder_tensors("encoder"),
        {"ForAudioClassification": _LABELS},
        "Whisper",
        lambda c: convolution_shapes(["encoder.conv1", "encoder.conv2"], c.audio),
    ),
}
"""A checkpoint's `model_type` → its family."""
