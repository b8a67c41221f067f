"""The text of tokens as they come: piece by piece, and no further than a stop string may have begun."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_UNFINISHED = "\ufffd"
"""What the bytes of a character that is not whole yet read as."""
_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8 at most: behind so many tokens an unfinished one is a broken one."""


class TextStream:
    """The text of one sequence. What was given out is never taken back."""

    def __init__(self, decode: Callable[[np.ndarray], str], stop: Sequence[str] = ()):
        """`decode` gives the text of ids (tokens,); `stop` are strings that end the text and are not part of it."""
        self._decode, self._stop = decode, tuple(stop)
        self._tokens: list[int] = []
        # The tokens before `_read` are text already; those from `_prefix` on are decoded with the next, because a
        # token's text may depend on what stands before it.
        self._prefix = self._read = 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that a further token sets free; `stopped` is set where it completes a stop string."""
        self._tokens.append(token)
        before = self._decode(np.array(self._tokens[self._prefix : self._read], np.int32))
        text = self._decode(np.array(self._tokens[self._prefix :], np.int32))
        if text.endswith(_UNFINISHED) and len(self._tokens) - self._read < _LONGEST_CHARACTER:
            return ""
        self._prefix, self._read = self._read, len(self._tokens)
        return self._released(text[len(before) :])

    def finish(self) -> str:
        """The rest, at the end of the sequence."""
        before = self._decode(np.array(self._tokens[self._prefix : self._read], np.int32))
        text = self._released(self._decode(np.array(self._tokens[self._prefix :], np.int32))[len(before) :])
        if self.stopped:
            return text
        rest, self._held = text + self._held, ""
        return rest

    def _released(self, new: str) -> str:
        text = self._held + new
        places = [text.find(string) for string in self._stop if string in text]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, string: str) -> int:
    """Characters at the end of a text with which a string may have begun."""
    most = min(len(text), len(string) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(string[:n])), 0)
