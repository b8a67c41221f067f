"""The families of checkpoints that people have: a config from `config.json`, and where each tensor goes.

A family is a function from the fields of transformers' `config.json` to a `ModelConfig`, and a table from the names of
its tensors to the paths of our parameters; its heads are such pairs too. A tensor that joins several of our matrices
lists them in its order; `{layer}`, `{expert}` and `{token}` stand for the stacks that our parameters have in front. A
table may name what a config does not ask for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxcost.models.config import ModelConfig
from jaxcost.models.families.audio import AUDIO
from jaxcost.models.families.base import TOKENS, Family, Fields, Head, Tensors, UnsupportedModel, shortest_pattern
from jaxcost.models.families.decoders import DECODERS
from jaxcost.models.families.encoder_decoders import ENCODER_DECODERS
from jaxcost.models.families.encoders import ENCODERS
from jaxcost.models.families.vision import VISION

__all__ = [
    "FAMILIES",
    "TOKENS",
    "Family",
    "Fields",
    "Head",
    "Tensors",
    "UnsupportedModel",
    "config_of",
    "family_of",
    "shortest_pattern",
]

FAMILIES: Mapping[str, Family] = {**DECODERS, **ENCODERS, **ENCODER_DECODERS, **VISION, **AUDIO}
"""A checkpoint's `model_type` → its family."""


def config_of(fields: Fields) -> ModelConfig:
    """The config of a checkpoint, from its `config.json`.

    Raises:
        UnsupportedModel: the family or an option of it is not one of ours, named in the sentence.
    """
    family = family_of(fields)
    config, head = family.config(fields), family.head_of(fields).config(fields)
    # Hidden states that are the answer are neither unembedded nor scaled for it.
    both = ("tie_embeddings", "scale_outputs")
    return dataclasses.replace(
        config, head=head, **{name: getattr(config, name) and head.of_vocabulary for name in both}
    )


def family_of(fields: Fields) -> Family:
    """The family of a checkpoint, by the `model_type` of its `config.json`; UnsupportedModel if there is none."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedModel(f"The model_type {kind!r} is not one of {', '.join(FAMILIES)}.")
    return FAMILIES[kind]
