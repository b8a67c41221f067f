"""Batches of examples of like lengths, so that little of them is padding and few shapes are compiled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from jaxcost.data.examples import Examples
from jaxcost.data.files import atomic_write
from jaxcost.data.tokenizers import Tokenizer

_POOL_BATCHES = 32
"""Batches whose examples are sorted by length together, at most; fewer where an epoch has no more."""


class Buckets:
    """Which examples each batch holds, found from its number alone.

    The shuffled order of the examples, epoch after epoch, is cut into pools. Those of a pool are sorted by length and
    cut into batches, whose order is drawn. So every epoch holds every example once, whatever its length, and a pool
    may span two, as a batch may without buckets.
    """

    def __init__(self, order: Sequence[int], lengths: np.ndarray, batch_size: int, seed: int):
        """`order` is endless and gives the example at each place of it, `lengths` those of examples in tokens (N,)."""
        self._order, self._lengths, self._batch_size, self._seed = order, lengths, batch_size, seed
        self._batches = max(1, min(_POOL_BATCHES, len(lengths) // batch_size))
        self._last: tuple[int, np.ndarray] | None = None

    def places(self, step: int) -> np.ndarray:
        """The places in the order of the examples of a batch, int64 (B,)."""
        pool, within = divmod(step, self._batches)
        last = self._last
        if last is None or last[0] != pool:
            last = self._last = (pool, self._pool(pool))
        return last[1][within]

    def _pool(self, pool: int) -> np.ndarray:
        size = self._batches * self._batch_size
        places = np.arange(pool * size, (pool + 1) * size)
        lengths = self._lengths[[self._order[int(place)] for place in places]]
        batches = places[np.argsort(lengths, kind="stable")].reshape(self._batches, self._batch_size)
        return batches[np.random.default_rng((self._seed, pool)).permutation(self._batches)]


def cut(batch: dict[str, np.ndarray], buckets: Sequence[int]) -> dict[str, np.ndarray]:
    """A batch of rows of S places, of which `valid` says which hold tokens, cut to the shortest bucket that holds all.

    Args:
      batch: arrays (B, S), and others, which stay as they are.
      buckets: lengths in ascending order, the last of which is S.
    """
    valid = batch["valid"]
    longest = int(valid.sum(axis=1).max())
    length = next(size for size in buckets if size >= longest)
    return {name: array[:, :length] if array.shape == valid.shape else array for name, array in batch.items()}


def token_counts(examples: Examples, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of the text of each example as an encoder reads it, int64 (N,); counted once, kept on disk."""
    source = examples.source
    said = f"{source.identity} {tokenizer.fingerprint} {hashlib.sha256(examples.chosen.tobytes()).hexdigest()}"
    path = source.cache_dir / f"lengths-{hashlib.sha256(said.encode()).hexdigest()[:16]}.npy"
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError):
        counts = (len(tokenizer.encode_source(example["text"])) for example in examples)
        found = np.fromiter(counts, np.int64, len(examples))
        with atomic_write(path) as file:
            np.save(file, found)
    return found
