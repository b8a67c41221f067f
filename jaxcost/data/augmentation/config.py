"""The frozen description of how texts and images are changed while they are learned from."""

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

OPERATIONS = ("autocontrast", "equalize", "rotate", "solarize", "color", "posterize", "contrast", "brightness")
OPERATIONS += ("sharpness", "shear_x", "shear_y", "translate_x", "translate_y")
"""What RandAugment draws from."""


@dataclasses.dataclass(frozen=True)
class AugmentImagesConfig:
    """How images with labels are changed in the size that the model takes; not at all by default."""

    flip: float = 0.0
    """Share of the images whose left and right are turned round; 0 where labels tell them apart, as of road signs."""
    crop: int = 0
    """Pixels that an image is moved by to each side, at most; what comes in is black."""
    operations: int = 0
    """Changes of an image, one behind the other, drawn from RandAugment's (Cubuk et al. 2019, arXiv:1909.13719)."""
    magnitude: float = 0.3
    """Strength of these changes, from 0 to 1."""
    protected: tuple[str, ...] = ()
    """Those of RandAugment's changes that are left out, such as `rotate`, as the label may hang on them."""
    mixup: float = 0.0
    """Alpha of the beta distribution that the shares of two mixed images, and of their labels, are drawn from (Zhang et
    al. 2017, arXiv:1710.09412, who use 0.2); none are mixed with 0."""
    cutmix: float = 0.0
    """The same of a rectangle of each image in which another is seen (Yun et al. 2019, arXiv:1905.04899, who use 1);
    with both, each batch is mixed in one of the two ways."""

    def __post_init__(self):
        for name in ("flip", "magnitude"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.augment.images.{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        for name in ("crop", "operations", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.augment.images.{name} is {getattr(self, name)}; it cannot be negative.")
        check_protected("data.augment.images.protected", self.protected)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, so that each has shares of two labels."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def active(self) -> bool:
        """Whether any image is changed."""
        return self.flip > 0 or self.crop > 0 or self.operations > 0 or self.mixes


def check_protected(name: str, protected: tuple[str, ...]) -> None:
    """ValueError if what is left out of RandAugment's changes is none of them, or all."""
    unknown = sorted({*protected} - {*OPERATIONS})
    if unknown:
        raise ValueError(f"{name} has {unknown[0]!r}, which is no change of RandAugment's: {', '.join(OPERATIONS)}.")
    if {*protected} == {*OPERATIONS}:
        raise ValueError(f"{name} has all changes of RandAugment's; leave out at least one.")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How texts with labels, or images, are changed, anew every time that they are learned from; not at all by default.

    The first four strengths are those of Wei and Zou 2019 (EDA), arXiv:1901.11196.
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
    images: AugmentImagesConfig = AugmentImagesConfig()
    """How images are changed; all else here is for texts."""

    def __post_init__(self):
        if self.thesaurus not in ("table", "wordnet"):
            raise ValueError(f"data.augment.thesaurus is '{self.thesaurus}'; use 'table' or 'wordnet'.")
        for name in (*STRENGTHS, "untouched"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.augment.{name} is {getattr(self, name)}; it must lie between 0 and 1.")

    @property
    def active(self) -> bool:
        """Whether any text or image is changed."""
        return self.changes_texts or self.images.active

    @property
    def changes_texts(self) -> bool:
        """Whether any text is changed."""
        return self.untouched < 1 and any(getattr(self, name) > 0 for name in STRENGTHS)
