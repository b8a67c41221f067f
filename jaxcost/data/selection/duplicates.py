"""Documents that are the same, or nearly: found by MinHash signatures, and made sure of by what the texts hold.

Sources: Broder 1997, On the resemblance and containment of documents; locality-sensitive hashing in bands as in
Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3; both by the library `datasketch`.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

_SHINGLE = 5
_PERMUTATIONS = 128
_BELOW = 0.2
"""How far below the likeness asked for the signatures look, so that their errors lose few pairs."""
_MARKS = re.compile(r"[\W_]+")


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Which documents are like earlier ones."""

    of: dict[int, int]
    """The document that each is like, of those that are kept; by index."""
    exact: frozenset[int]
    """Those whose text is the same but for case, marks and spaces."""
    documents: int
    """Documents looked at."""

    @property
    def kept(self) -> np.ndarray:
        """int64: the documents that are like no earlier one."""
        return np.setdiff1d(np.arange(self.documents), np.fromiter(self.of, np.int64, len(self.of)))


class Index:
    """Documents to which others can be found that are alike."""

    def __init__(self, likeness: float):
        """`likeness` is the Jaccard index from which on documents are alike, above 0 and at most 1."""
        from datasketch import MinHashLSH

        self._likeness = likeness
        self._documents: list[str] = []
        self._whole: dict[int, int] = {}
        self._near = MinHashLSH(threshold=max(0.1, likeness - _BELOW), num_perm=_PERMUTATIONS)

    def find(self, text: str, add: bool = False) -> tuple[int, bool] | None:
        """The number of a document that a text is like, and whether it is the same; None if there is none.

        Where there is none, and it is asked for, the text becomes the next document; they are numbered from 0.
        """
        plain = normalized(text)
        key = zlib.crc32(plain.encode()) << 32 | zlib.adler32(plain.encode())
        found = self._whole.get(key)
        if found is not None and self._documents[found] == plain:
            return found, True
        shingles = _shingles(plain)
        signature = _signature(shingles)
        for other in sorted(self._near.query(signature)):
            if _jaccard(shingles, _shingles(self._documents[other])) >= self._likeness:
                return other, False
        if add:
            self._documents.append(plain)
            self._whole[key] = len(self._documents) - 1
            self._near.insert(len(self._documents) - 1, signature, check_duplication=False)
        return None


def find_duplicates(documents: Iterable[str], likeness: float = 0.7) -> Duplicates:
    """Finds the documents that are like an earlier one that is kept.

    Args:
      documents: texts, read once and in order.
      likeness: Jaccard index of the sets of five letters in a row, from which on two are alike.
    """
    index, kept = Index(likeness), []
    of, exact, number = {}, set(), -1
    for number, text in enumerate(documents):
        found = index.find(text, add=True)
        if found is None:
            kept.append(number)
            continue
        of[number] = kept[found[0]]
        exact |= {number} if found[1] else set()
    return Duplicates(of, frozenset(exact), number + 1)


def find_contaminated(train: Iterable[str], held_out: Sequence[str], likeness: float = 0.7) -> dict[int, int]:
    """The documents to learn from that are like one to score on: that one's index by theirs."""
    index, numbers = Index(likeness), []
    for number, text in enumerate(held_out):
        if index.find(text, add=True) is None:
            numbers.append(number)
    found = ((number, index.find(text)) for number, text in enumerate(train))
    return {number: numbers[like[0]] for number, like in found if like is not None}


def normalized(text: str) -> str:
    """A text in small letters, with one space in the place of all marks and spaces in a row."""
    return _MARKS.sub(" ", text.lower()).strip()


def likeness(one: str, other: str) -> float:
    """The Jaccard index of the sets of five letters in a row of two texts; 1 of two that have no letters."""
    return _jaccard(_shingles(normalized(one)), _shingles(normalized(other)))


def _shingles(plain: str) -> frozenset[bytes]:
    content = plain.encode()
    return frozenset(content[i : i + _SHINGLE] for i in range(max(1, len(content) - _SHINGLE + 1)))


def _signature(shingles: frozenset[bytes]):
    from datasketch import MinHash

    made = MinHash(_PERMUTATIONS, hashfunc=zlib.crc32)
    made.update_batch(shingles)
    return made


def _jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
