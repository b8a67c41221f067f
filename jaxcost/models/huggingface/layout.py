"""Where each tensor of a checkpoint stands in our stacked parameters."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcost.models.config import ModelConfig
from jaxcost.models.families import TOKENS, Family, Head

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class BadCheckpoint(ValueError):
    """A folder that is no checkpoint, or whose tensors are not those of its config."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor of a checkpoint, and the parameters that it holds side by side along their last axis."""

    name: str
    paths: tuple[str, ...]
    index: tuple[int, ...]
    """Layer and expert, or token, in front of each parameter; empty for one that is not stacked."""
    shapes: tuple[tuple[int, ...], ...]
    """Of each parameter, without what the index takes."""
    transposed: bool
    """Stored as (out, in)."""
    folded: tuple[int, ...] = ()
    """Shape that the tensor is stored in, where that has more axes than `shape`."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the stored tensor."""
        return self.folded or self.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor with the axes of the parameters that it holds."""
        joined = (*self.shapes[0][:-1], sum(shape[-1] for shape in self.shapes))
        return joined[::-1] if self.transposed else joined

    def flattened(self, stored: np.ndarray) -> np.ndarray:
        """The stored tensor with the axes of the parameters that it holds."""
        return (stored.swapaxes(1, 2) if self._over_time else stored).reshape(self.shape)

    def refolded(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `flattened`."""
        if not self._over_time:
            return value.reshape(self.stored_shape)
        outward, channels, times = self.folded
        return np.ascontiguousarray(value.reshape(outward, times, channels).swapaxes(1, 2))

    @property
    def _over_time(self) -> bool:
        """Whether it is the kernel of a convolution over time (out, channels, times), whose rows here are in the order
        of time and channel."""
        return self.transposed and len(self.folded) == 3

    @property
    def module(self) -> str:
        """The name without what the tensor is of its module."""
        return self.name.rpartition(".")[0]


def places(family: Family, head: Head, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The place of every tensor that a model of the config has, by name; `shapes` are those of its dense parameters."""
    found, folded = {}, family.stored(config)
    untied = {} if config.tie_embeddings else head.untied
    # In this order: of two tensors for one parameter, the last one is its own.
    for template, paths in {**family.tensors, **family.further(config), **head.tensors, **untied}.items():
        if not set(paths) <= set(shapes):
            continue
        transposed = paths[0].endswith("/kernel") and (family.transposed or template in head.tensors)
        axes = [axis for axis in ("layer", "expert", "token") if f"{{{axis}}}" in template]
        for index in itertools.product(*map(range, shapes[paths[0]][: len(axes)])):
            if not config.first_norm and "layers/attention_norm" in paths[0] and index == (0,):
                continue
            named = {axis: TOKENS[i] if axis == "token" else i for axis, i in zip(axes, index, strict=True)}
            name = template.format(**named)
            parts = tuple(tuple(shapes[path][len(index) :]) for path in paths)
            found[name] = Place(name, paths, index, parts, transposed, folded.get(name, ()))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; BadCheckpoint if it holds none."""
    if not path.is_file():
        raise BadCheckpoint(f"There is no {path}.")
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} is JSON, but not an object.")
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n")
