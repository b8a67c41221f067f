"""Other words of the same meaning: by a small table of ours, or by the WordNet that `wn` has on this machine."""

from __future__ import annotations

import functools
from typing import Any

from jaxcost.data.augmentation.config import Thesaurus
from jaxcost.data.augmentation.tables import SYNONYMS


def synonyms(thesaurus: Thesaurus, word: str) -> tuple[str, ...]:
    """Single words that mean what a word, in small letters, may mean, without itself; none if none are known.

    Raises:
      ValueError: WordNet is asked for and is not there.
    """
    return _of_wordnet(word) if thesaurus == "wordnet" else tuple(SYNONYMS.get(word, ()))


def check_installed(thesaurus: Thesaurus) -> None:
    """ValueError if the package, or its data, are not there."""
    if thesaurus == "wordnet":
        _wordnet()


@functools.lru_cache(maxsize=100_000)
def _of_wordnet(word: str) -> tuple[str, ...]:
    # In the order of the alphabet, so that what is drawn does not depend on that of the database.
    found = {lemma.lower() for synset in _wordnet().synsets(word) for lemma in synset.lemmas()}
    return tuple(sorted(other for other in found if other.isalpha() and other != word))


@functools.cache
def _wordnet() -> Any:
    """The English WordNet of this process."""
    try:
        import wn
    except ImportError:
        raise ValueError(
            "data.augment.thesaurus is 'wordnet', which takes wn; `pip install 'jaxcost[wordnet]'`, or use 'table'."
        ) from None
    wn.config.allow_multithreading = True  # batches are prepared by a thread
    try:
        # What another language's words mean is of no use here, so it is not followed.
        return wn.Wordnet(lang="en", expand="")
    except wn.Error as error:
        raise ValueError(
            "data.augment.thesaurus is 'wordnet', and wn has no English one on this machine; `python -m wn download "
            "oewn:2024`, or use 'table'."
        ) from error
