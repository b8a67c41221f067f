"""Texts with other words, other places of words, and typing errors, that mean the same."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from jaxcost.data.augmentation.config import AugmentConfig, Thesaurus
from jaxcost.data.augmentation.tables import NEIGHBOURS, SHAPES
from jaxcost.data.augmentation.thesaurus import check_installed, synonyms

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


@dataclasses.dataclass(frozen=True)
class AugmentText(grain.transforms.RandomMap):
    """Changes the `text` of an example as its config says; whatever else it holds stays."""

    config: AugmentConfig

    def __post_init__(self):
        """ValueError if words are to come from a WordNet that is not there."""
        if self.config.synonyms or self.config.insert:
            check_installed(self.config.thesaurus)

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The example with its text changed, or as it is."""
        if rng.random() < self.config.untouched:
            return example
        return example | {"text": changed(self.config, example["text"], rng)}


def changed(config: AugmentConfig, text: str, rng: np.random.Generator) -> str:
    """One changed copy of a text; the same generator state gives the same copy. At least one word is left."""
    pieces = _Pieces(text, frozenset(config.protected), config.thesaurus)
    pieces.synonyms(config.synonyms, rng)
    pieces.insert(config.insert, rng)
    pieces.swap(config.swap, rng)
    pieces.delete(config.delete, rng)
    pieces.misspell(config.keyboard, NEIGHBOURS, rng)
    pieces.misspell(config.recognition, SHAPES, rng)
    return "".join(pieces.pieces)


class _Pieces:
    """A text as words, at odd places, and what stands between, before and behind them, at even ones."""

    def __init__(self, text: str, protected: frozenset[str], thesaurus: Thesaurus):
        self.pieces: list[str] = []
        self._protected, self._thesaurus = protected, thesaurus
        end = 0
        for found in _WORD.finditer(text):
            self.pieces += [text[end : found.start()], found[0]]
            end = found.end()
        self.pieces.append(text[end:])

    def _drawn(self, share: float, rng: np.random.Generator) -> list[int]:
        """Places of words that are not protected, each with a probability."""
        if share <= 0:
            return []
        places = [i for i in range(1, len(self.pieces), 2) if self.pieces[i].lower() not in self._protected]
        return [i for i, chosen in zip(places, rng.random(len(places)) < share, strict=True) if chosen]

    def synonyms(self, share: float, rng: np.random.Generator) -> None:
        for i in self._drawn(share, rng):
            self.pieces[i] = self._synonym(self.pieces[i], rng) or self.pieces[i]

    def insert(self, share: float, rng: np.random.Generator) -> None:
        new = [word for i in self._drawn(share, rng) if (word := self._synonym(self.pieces[i], rng))]
        for word in new:
            place = 2 * int(rng.integers(len(self.pieces) // 2)) + 1
            self.pieces[place:place] = [word, " "]

    def swap(self, share: float, rng: np.random.Generator) -> None:
        places = self._drawn(share, rng)
        free = self._drawn(1.0, rng) if places else []
        for i in places:
            other = free[int(rng.integers(len(free)))]
            self.pieces[i], self.pieces[other] = self.pieces[other], self.pieces[i]

    def delete(self, share: float, rng: np.random.Generator) -> None:
        places = self._drawn(share, rng)
        words = len(self.pieces) // 2
        # Backwards, so that places before stay; the space behind a word goes with it, or that before the last.
        for i in reversed(places[1:] if len(places) == words else places):
            first = i if i + 2 < len(self.pieces) else i - 1
            del self.pieces[first : first + 2]

    def misspell(self, share: float, table: Mapping[str, str], rng: np.random.Generator) -> None:
        if share <= 0:
            return
        for i in self._drawn(1.0, rng):
            word = self.pieces[i]
            wrong = rng.random(len(word)) < share
            letters = [_other(letter, table, rng) if bad else letter for letter, bad in zip(word, wrong, strict=True)]
            self.pieces[i] = "".join(letters)

    def _synonym(self, word: str, rng: np.random.Generator) -> str | None:
        """Another word of the same meaning, with a capital where the word has one; None if none is known."""
        others = synonyms(self._thesaurus, word.lower())
        if not others:
            return None
        other = others[int(rng.integers(len(others)))]
        return other.capitalize() if word[0].isupper() else other


def _other(letter: str, table: Mapping[str, str], rng: np.random.Generator) -> str:
    """What a letter is mistaken for; the letter where the table knows nothing."""
    others = table.get(letter) or table.get(letter.lower())
    return others[int(rng.integers(len(others)))] if others else letter
