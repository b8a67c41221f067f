"""The frozen description of which documents of the train split are learned from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """What is left out of the train split before it is learned from; nothing by default.

    Likeness is the Jaccard index of the sets of five letters in a row, without regard to case, marks and spaces: 1 of
    the same text.
    """

    duplicates: float = 0.0
    """Likeness to an earlier document from which on one is left out; 0 leaves out none."""
    contamination: float = 0.0
    """Likeness to a document of the validation split from which on one is left out; 0 leaves out none."""

    def __post_init__(self):
        for name in ("duplicates", "contamination"):
            value = getattr(self, name)
            if value and not 0.3 <= value <= 1:
                raise ValueError(f"data.select.{name} is {value}; use 0 for none, or a likeness from 0.3 to 1.")

    @property
    def active(self) -> bool:
        """Whether anything may be left out."""
        return self.duplicates > 0 or self.contamination > 0
