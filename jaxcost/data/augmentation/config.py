"""The frozen description of how texts are changed while they are learned from."""

from __future__ import annotations

import dataclasses
from typing import Literal

Thesaurus = Literal["table", "wordnet"]

NEGATIONS = tuple(
    [
        "not",
        "no",
        "never",
        "none",
        "nobody",
        "nothing",
        "neither",
        "nor",
        "cannot",
        "without",
        "hardly",
        "barely",
        "scarcely",
        "fail",
        "fails",
        "failed",
        "lack",
        "lacks",
        "don",
        "don't",
        "doesn",
        "doesn't",
        "didn",
        "didn't",
        "isn",
        "isn't",
        "wasn",
        "wasn't",
        "won",
        "won't",
        "can't",
        "couldn",
        "couldn't",
        "shouldn",
        "wouldn",
        "t",
    ]
)
"""Words that turn what a text says round."""
HEDGES = ("may", "might", "could", "would", "perhaps", "maybe", "possibly", "probably", "expected", "likely", "if")
"""Words that say that something is not known."""
DIRECTIONS = ("left", "right", "up", "down", "above", "below", "under", "over", "north", "south", "east", "west")
"""Words that tell one side from the other."""

STRENGTHS = ("synonyms", "insert", "swap", "delete", "keyboard", "recognition")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How texts with labels are changed, anew every time that they are learned from; not at all by default.

    The first four are those of Wei and Zou 2019 (EDA), arXiv:1901.11196.
    """

    synonyms: float = 0.0
    """Share of the words that another of the same meaning takes the place of, where one is known."""
    thesaurus: Thesaurus = "table"
    """Where others of the same meaning are known from: a small table of ours, or the English WordNet that the package
    `wn` has on this machine."""
    insert: float = 0.0
    """Words that are put in at random places, over those that are there: others of the same meaning as one of them."""
    swap: float = 0.0
    """Share of the words that change places with another at random."""
    delete: float = 0.0
    """Share of the words that are left out."""
    keyboard: float = 0.0
    """Share of the letters that a neighbour on the keyboard takes the place of."""
    recognition: float = 0.0
    """Share of the letters and digits that are read as others of a like shape, as a scanner does."""
    untouched: float = 0.25
    """Share of the texts that stay as they are."""
    protected: tuple[str, ...] = (*NEGATIONS, *HEDGES)
    """Words that are never changed, moved or left out, as the label may hang on them."""

    def __post_init__(self):
        if self.thesaurus not in ("table", "wordnet"):
            raise ValueError(f"data.augment.thesaurus is '{self.thesaurus}'; use 'table' or 'wordnet'.")
        for name in (*STRENGTHS, "untouched"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.augment.{name} is {getattr(self, name)}; it must lie between 0 and 1.")

    @property
    def active(self) -> bool:
        """Whether any text is changed."""
        return self.untouched < 1 and any(getattr(self, name) > 0 for name in STRENGTHS)
