"""When a sequence ends: at an id, or where its text has come to hold a string."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Collection

import numpy as np


@dataclasses.dataclass(frozen=True)
class Stop:
    """What ends a sequence."""

    ids: Collection[int] = ()
    """Ids that end it; they are not part of it."""
    strings: Collection[str] = ()
    """Strings that end it; the token that completes one is its last, as a token may hold more than the string."""
    decode: Callable[[np.ndarray], str] | None = None
    """Text of ids (tokens,), needed for strings."""

    def __post_init__(self):
        if self.strings and self.decode is None:
            raise ValueError("Stop strings need the tokenizer's decode.")
        if not all(self.strings):
            raise ValueError("A stop string is empty; leave it out.")

    def length(self, tokens: np.ndarray) -> int | None:
        """How many of a sequence's new tokens (n,) it keeps, None if it goes on."""
        ends = np.flatnonzero(np.isin(tokens, list(self.ids)))
        until = int(ends[0]) if len(ends) else None
        if self._holds_string(tokens[:until]):
            return bisect.bisect_left(range(len(tokens)), True, key=lambda n: self._holds_string(tokens[:n]))
        return until

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        ends = [text.find(string) for string in self.strings if string in text]
        return text[: min(ends)] if ends else text

    def _holds_string(self, tokens: np.ndarray) -> bool:
        return bool(self.strings) and any(string in self.decode(tokens) for string in self.strings)


NEVER = Stop()
"""Nothing ends a sequence but its length."""
