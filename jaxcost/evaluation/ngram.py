"""What n-gram models score on the same bytes: the marks that a small language model has to beat.

The model is interpolated modified Kneser-Ney (Chen and Goodman, "An empirical study of smoothing techniques for
language modeling", Harvard TR-10-98, 1998), the best of the smoothings that they compare. On `python_text/library` of
Python 3.11.7 it needs 1.605 bits a byte at order 5, where Witten-Bell needs 1.675 and one discount an order 1.623.
"""

from __future__ import annotations

import dataclasses

import numpy as np

NUM_SYMBOLS = 257
"""256 bytes and the separator between documents (symbol 256)."""

MAX_ORDER = 7
"""An n-gram is packed into one 64-bit integer, 9 bits a symbol."""

_BITS = 9
# Discounts of counts 1, 2, and 3 and more where there are too few n-grams to estimate them; KenLM's fallback.
_FALLBACK_DISCOUNTS = np.array([0.0, 0.5, 1.0, 1.5])


@dataclasses.dataclass(frozen=True)
class _Level:
    """One order k of the model, n-grams (K of them) and their contexts (C of them) as sorted packed integers."""

    order: int
    ngrams: np.ndarray
    """int64 (K,)."""
    counts: np.ndarray
    """int64 (K,): occurrences at the highest order, distinct symbols to the left at the lower ones."""
    contexts: np.ndarray
    """int64 (C,)."""
    totals: np.ndarray
    """int64 (C,): sum of the counts of the context's n-grams."""
    discounted: np.ndarray
    """float64 (C,): what the discounts took from those counts, which the order below shares out."""
    discounts: np.ndarray
    """float64 (4,): discount of an n-gram by its count, 0, 1, 2, and 3 or more."""


@dataclasses.dataclass(frozen=True)
class NgramModel:
    """An interpolated modified Kneser-Ney model of a stream of symbols."""

    levels: tuple[_Level, ...]
    """Orders 1 to n."""

    @classmethod
    def fit(cls, symbols: np.ndarray, order: int) -> NgramModel:
        """Counts n-grams.

        Args:
          symbols: integers 0 to 256 (N,), a split's bytes with a separator before every document.
          order: n, 1 to 7; a symbol is predicted from the n - 1 before it.

        Raises:
          ValueError: the order is out of range, the stream is shorter than it, or a symbol is out of range.
        """
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"The n-gram order is {order}; choose 1 to {MAX_ORDER}.")
        symbols = _checked(symbols)
        if len(symbols) < order:
            raise ValueError(f"The training stream holds {len(symbols)} symbols; order {order} needs at least {order}.")
        levels = [_level(order, *np.unique(_pack(symbols, order), return_counts=True))]
        for k in range(order - 1, 0, -1):
            # Each distinct (k+1)-gram is one more symbol that was seen to the left of its last k symbols.
            suffixes = levels[-1].ngrams & ((1 << _BITS * k) - 1)
            levels.append(_level(k, *np.unique(suffixes, return_counts=True)))
        return cls(tuple(reversed(levels)))

    def probabilities(self, symbols: np.ndarray) -> np.ndarray:
        """Returns the probability of every symbol but the first, given those before it.

        With c the count of the n-gram hw, p(w|h) = (c - D(c) + discounted(h) p(w|h')) / total(h), where h' is h
        without its first symbol and the empty context falls back to 1/257; an unseen h gives p(w|h').

        Args:
          symbols: integers 0 to 256 (N,); the first is only context.

        Returns:
          float64 (N - 1,), all above 0; over the 257 symbols that could stand in a place they sum to 1.
        """
        symbols = _checked(symbols)
        probability = np.full(max(len(symbols) - 1, 0), 1 / NUM_SYMBOLS)
        for level in self.levels:
            # Places near the start have too short a past for the higher orders, and keep the lower ones' answer.
            ngrams = _pack(symbols, level.order)
            ngrams = ngrams[1:] if level.order == 1 else ngrams
            lower = probability[len(probability) - len(ngrams) :]
            count = _lookup(level.ngrams, level.counts, ngrams)
            total = _lookup(level.contexts, level.totals, ngrams >> _BITS)
            discounted = _lookup(level.contexts, level.discounted, ngrams >> _BITS)
            kept = count - level.discounts[np.minimum(count, 3)]
            lower[:] = np.where(total > 0, (kept + discounted * lower) / np.maximum(total, 1), lower)
        return probability


def ngram_bits_per_byte(train_symbols: np.ndarray, validation_symbols: np.ndarray, order: int) -> float:
    """Returns the bits per byte of an n-gram model, with a separator counted as a byte.

    It scores every symbol but the first, as a language model does whose stream begins with a separator, and sees the
    n - 1 symbols before each, across separators. For the bytes that a model with any tokeniser was scored on, give
    `tokenizer.symbols(tokens[: max_tokens + 1])`.

    Args:
      train_symbols: integers 0 to 256 (N,), such as `tokenizer.symbols(tokens)` of the train split.
      validation_symbols: integers 0 to 256 (M,).
      order: n, 1 to 7.

    Raises:
      ValueError: see `NgramModel.fit`; or there is no symbol to score.
    """
    if len(validation_symbols) < 2:
        raise ValueError(f"The validation stream holds {len(validation_symbols)} symbols; give at least 2.")
    probability = NgramModel.fit(train_symbols, order).probabilities(validation_symbols)
    return float(-np.log2(probability).mean())


def _checked(symbols: np.ndarray) -> np.ndarray:
    symbols = np.asarray(symbols)
    if symbols.ndim != 1 or symbols.dtype.kind not in "iu":
        raise ValueError(f"Symbols came as {symbols.dtype}{list(symbols.shape)}; give one row of integers 0 to 256.")
    if len(symbols) and (symbols.min() < 0 or symbols.max() >= NUM_SYMBOLS):
        raise ValueError(
            f"Symbols run from {symbols.min()} to {symbols.max()}; turn tokens into symbols 0 to 256 with "
            "tokenizer.symbols()."
        )
    return symbols


def _pack(symbols: np.ndarray, order: int) -> np.ndarray:
    """Returns every n-gram as one int64, first symbol highest: (N - order + 1,)."""
    count = max(len(symbols) - order + 1, 0)
    packed = np.zeros(count, np.int64)
    for offset in range(order):
        packed <<= _BITS
        packed |= symbols[offset : offset + count]
    return packed


def _level(order: int, ngrams: np.ndarray, counts: np.ndarray) -> _Level:
    """Makes an order's tables from its distinct n-grams, sorted, and their counts."""
    discounts = _discounts(counts)
    contexts, starts = np.unique(ngrams >> _BITS, return_index=True)
    return _Level(
        order=order,
        ngrams=ngrams,
        counts=counts,
        contexts=contexts,
        totals=np.add.reduceat(counts, starts),
        discounted=np.add.reduceat(discounts[np.minimum(counts, 3)], starts),
        discounts=discounts,
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Returns D(0) = 0, D(1), D(2) and D(3+) of Chen and Goodman, from how many counts are 1 to 4."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == i)) for i in range(1, 5))
    if not (n1 and n2 and n3):
        return _FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimate = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    usable = (estimate > 0) & (estimate <= np.arange(4))
    return np.where(usable, estimate, _FALLBACK_DISCOUNTS)


def _lookup(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Returns the value of each query among sorted keys, 0 where it isn't one."""
    position = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[position] == queries, values[position], 0)
