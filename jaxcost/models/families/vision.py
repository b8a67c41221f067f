"""The families of vision: encoders of images, of one square size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxcost.models.config import HeadConfig, ImageConfig, ModelConfig
from jaxcost.models.families.base import (
    TOKENS,
    Family,
    Fields,
    Head,
    Tensors,
    hidden_states,
    labels,
    linear,
    norm,
    plain_encoder,
    positive,
)

# ---- Configs ----


def _vision(fields: Fields, class_tokens: int, detection_tokens: int = 0) -> ModelConfig:
    height, across = _pair(fields.get("image_size", 224))
    patch, channels = (positive(name, fields.get(name, n)) for name, n in (("patch_size", 16), ("num_channels", 3)))
    # Some are published with sizes that patches do not fill; what these leave over, they never see.
    height, across = height // patch * patch, across // patch * patch
    images = ImageConfig(patch, height, across, channels, class_tokens, detection_tokens)
    # The transformer cannot be made without saying what it gives; the family's head takes its place.
    head = HeadConfig(embed=True)
    return ModelConfig(**plain_encoder(fields), vocab_size=0, images=images, max_length=images.tokens, head=head)


def _pair(size: Any) -> tuple[int, int]:
    height, across = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    return positive("image_size", height), positive("image_size", across)


def _siglip(fields: Fields) -> ModelConfig:
    inner = fields.get("vision_config") or fields
    gelu = {"hidden_act": inner.get("hidden_act", "gelu_pytorch_tanh"), "layer_norm_eps": 1e-6, "qkv_bias": True}
    return _vision(gelu | dict(inner), class_tokens=0)


def _yolos(fields: Fields) -> ModelConfig:
    sizes = {"image_size": (512, 864)} | dict(fields)
    config = _vision(sizes, 1, positive("num_detection_tokens", fields.get("num_detection_tokens", 100)))
    return dataclasses.replace(config, layer_positions=fields.get("use_mid_position_embeddings", True))


# ---- Tensors ----


def _vit(name: str) -> Tensors:
    embeddings, layer = f"{name}.embeddings", f"{name}.encoder.layer.{{layer}}"
    return {
        # In the order of `TOKENS`.
        f"{embeddings}.{{token}}_token": ("images/class_tokens/table",),
        f"{embeddings}.detection_tokens": ("images/detection_tokens/table",),
        f"{embeddings}.position_embeddings": ("positions/table",),
        f"{name}.encoder.mid_position_embeddings": ("layer_positions/table",),
        **linear(f"{embeddings}.patch_embeddings.projection", "images/patches"),
        **norm(f"{layer}.layernorm_before", "layers/attention_norm"),
        **linear(f"{layer}.attention.attention.query", "layers/attention/query"),
        **linear(f"{layer}.attention.attention.key", "layers/attention/key"),
        **linear(f"{layer}.attention.attention.value", "layers/attention/value"),
        **linear(f"{layer}.attention.output.dense", "layers/attention/output"),
        **norm(f"{layer}.layernorm_after", "layers/mlp_norm"),
        **linear(f"{layer}.intermediate.dense", "layers/mlp/up"),
        **linear(f"{layer}.output.dense", "layers/mlp/down"),
        **norm(f"{name}.layernorm", "final_norm"),
    }


_LAYER = "vision_model.encoder.layers.{layer}"
_SIGLIP: Tensors = {
    "vision_model.embeddings.position_embedding.weight": ("positions/table",),
    **linear("vision_model.embeddings.patch_embedding", "images/patches"),
    **norm(f"{_LAYER}.layer_norm1", "layers/attention_norm"),
    **linear(f"{_LAYER}.self_attn.q_proj", "layers/attention/query"),
    **linear(f"{_LAYER}.self_attn.k_proj", "layers/attention/key"),
    **linear(f"{_LAYER}.self_attn.v_proj", "layers/attention/value"),
    **linear(f"{_LAYER}.self_attn.out_proj", "layers/attention/output"),
    **norm(f"{_LAYER}.layer_norm2", "layers/mlp_norm"),
    **linear(f"{_LAYER}.mlp.fc1", "layers/mlp/up"),
    **linear(f"{_LAYER}.mlp.fc2", "layers/mlp/down"),
    **norm("vision_model.post_layernorm", "final_norm"),
}


def _vit_stored(name: str):
    def stored(c: ModelConfig) -> dict[str, tuple[int, ...]]:
        embeddings = f"{name}.embeddings"
        return {
            **{f"{embeddings}.{token}_token": (1, 1, c.width) for token in TOKENS[: c.images.class_tokens]},
            f"{embeddings}.detection_tokens": (1, c.images.detection_tokens, c.width),
            f"{embeddings}.position_embeddings": (1, c.max_length, c.width),
            f"{name}.encoder.mid_position_embeddings": (c.num_layers - 1, 1, c.max_length, c.width),
            f"{embeddings}.patch_embeddings.projection.weight": _convolution(c),
        }

    return stored


def _convolution(c: ModelConfig) -> tuple[int, ...]:
    return (c.width, c.images.channels, c.images.patch, c.images.patch)


# ---- Heads ----


def _labels(pooling: Any, *unused: str) -> dict[str, Head]:
    return {
        "ForImageClassification": Head(
            lambda fields: HeadConfig(outputs=labels(fields), pooling=pooling, bias=True),
            linear("classifier", "head/output"),
            unused=unused,
        )
    }


_FURTHER = ("hidden", "hidden_2", "output")
_ANSWERS = {"class_labels_classifier": "head", "bbox_predictor": "head/boxes"}
_OBJECTS = Head(
    lambda fields: HeadConfig(outputs=labels(fields) + 1, hidden="relu", hidden_layers=2, bias=True, boxes=True),
    {
        name: paths
        for theirs, ours in _ANSWERS.items()
        for i, layer in enumerate(_FURTHER)
        for name, paths in linear(f"{theirs}.layers.{i}", f"{ours}/{layer}").items()
    },
)

_POOLER = ("probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight")
_POOLER += ("attention.out_proj.bias", "layernorm.weight", "layernorm.bias")
_POOLER += tuple(f"mlp.{layer}.{end}" for layer in ("fc1", "fc2") for end in ("weight", "bias"))
_SIGLIP_POOLER = tuple(f"vision_model.head.{name}" for name in _POOLER)


def _vit_family(prefix: str, name: str, config: Callable[[Fields], ModelConfig], heads: Mapping[str, Head]) -> Family:
    heads = heads | hidden_states(*linear(f"{prefix}.pooler.dense", ""))
    return Family(config, _vit(prefix), heads, name, _vit_stored(prefix))


def _siglip_family(name: str, heads: Mapping[str, Head]) -> Family:
    def stored(c: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {"vision_model.embeddings.patch_embedding.weight": _convolution(c)}

    return Family(_siglip, _SIGLIP, heads, name, stored)


VISION: Mapping[str, Family] = {
    "vit": _vit_family("vit", "ViT", lambda fields: _vision(fields, class_tokens=1), _labels("first")),
    "deit": _vit_family("deit", "DeiT", lambda fields: _vision(fields, class_tokens=2), _labels("first")),
    "yolos": _vit_family("vit", "Yolos", _yolos, {"ForObjectDetection": _OBJECTS}),
    "siglip": _siglip_family("Siglip", _labels("mean", *_SIGLIP_POOLER)),
    "siglip_vision_model": _siglip_family("SiglipVision", hidden_states(*_SIGLIP_POOLER)),
}
"""A checkpoint's `model_type` → its family."""
