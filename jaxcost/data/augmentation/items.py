"""Changed histories of items: `items`, int (length,), of which none is padding.

Source: Xie et al. 2020 (CL4SRec), arXiv:2010.14395, section 3.3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np


@dataclasses.dataclass(frozen=True)
class CropItems(grain.transforms.RandomMap):
    """Keeps a stretch of the history."""

    kept: float = 0.6
    """Share of the items that stay; at least one does."""

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        first, behind = _stretch(len(example["items"]), self.kept, rng)
        return example | {"items": example["items"][first:behind]}


@dataclasses.dataclass(frozen=True)
class MaskItems(grain.transforms.RandomMap):
    """Puts an id that is no item in the place of some."""

    mask_id: int
    """The id."""
    hidden: float = 0.3
    """Share of the items, drawn without repetition."""

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        items = example["items"].copy()
        items[rng.choice(len(items), int(self.hidden * len(items)), replace=False)] = self.mask_id
        return example | {"items": items}


@dataclasses.dataclass(frozen=True)
class ReorderItems(grain.transforms.RandomMap):
    """Shuffles a stretch of the history."""

    moved: float = 0.6
    """Share of the items that the stretch has."""

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        items = example["items"].copy()
        first, behind = _stretch(len(items), self.moved, rng)
        items[first:behind] = rng.permutation(items[first:behind])
        return example | {"items": items}


def _stretch(length: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    size = max(1, int(share * length))
    first = int(rng.integers(0, length - size + 1))
    return first, first + size
