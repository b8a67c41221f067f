"""The n-gram marks: a proper distribution, equal to a slow reading of the formula, and a clear word when misused."""

import collections

import numpy as np
import pytest

from jaxcost.evaluation.ngram import NUM_SYMBOLS, NgramModel, ngram_bits_per_byte

TEXT = (
    b"def add(x, y):\n    return x + y\n\ndef sub(x, y):\n    return x - y\n" * 3
    + b"class A:\n    def add(self): pass\n"
)


def _stream(text: bytes) -> np.ndarray:
    return np.concatenate([[256], np.frombuffer(text, np.uint8)]).astype(np.uint16)


def _random_stream(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([256, 97, 98, 99, 10], size=length, p=[0.02, 0.5, 0.3, 0.1, 0.08])


def _reference_probability(train: list[int], history: list[int], symbol: int, order: int) -> float:
    """Interpolated modified Kneser-Ney from dictionaries, one symbol at a time."""
    probability = 1 / NUM_SYMBOLS
    for k in range(1, min(order, len(history) + 1) + 1):
        if k == order:
            counts = collections.Counter(tuple(train[i : i + k]) for i in range(len(train) - k + 1))
        else:
            longer = {tuple(train[i : i + order]) for i in range(len(train) - order + 1)}
            for _ in range(order - k):
                left = collections.defaultdict(set)
                for gram in longer:
                    left[gram[1:]].add(gram[0])
                longer = set(left)
            counts = {gram: len(symbols) for gram, symbols in left.items()}
        n = [sum(1 for c in counts.values() if c == i) for i in range(5)]
        discounts = [0.0, 0.5, 1.0, 1.5]
        if n[1] and n[2] and n[3]:
            y = n[1] / (n[1] + 2 * n[2])
            for i in (1, 2, 3):
                estimate = i - (i + 1) * y * n[i + 1] / n[i]
                if 0 < estimate <= i:
                    discounts[i] = estimate
        context = tuple(history[len(history) - k + 1 :])
        followers = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == context}
        if followers:
            total = sum(followers.values())
            count = followers.get(symbol, 0)
            taken = sum(discounts[min(c, 3)] for c in followers.values())
            probability = (count - discounts[min(count, 3)] + taken * probability) / total
    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_a_slow_reading_of_the_formula(order):
    train, validation = _stream(TEXT), _stream(b"def mul(x, y): return x * y\n\xff")
    expected = [
        _reference_probability(train.tolist(), validation[:i].tolist(), int(validation[i]), order)
        for i in range(1, len(validation))
    ]
    np.testing.assert_allclose(NgramModel.fit(train, order).probabilities(validation), expected, rtol=1e-12)
    assert ngram_bits_per_byte(train, validation, order) == pytest.approx(-np.mean(np.log2(expected)), rel=1e-12)


@pytest.mark.parametrize("train", [_stream(TEXT), _random_stream(4000, seed=1), _random_stream(9, seed=2)])
@pytest.mark.parametrize("order", [1, 3, 5, 7])
def test_sums_to_one_over_the_symbols_in_any_context(train, order):
    rng = np.random.default_rng(0)
    model = NgramModel.fit(train, order)
    places = rng.integers(0, max(len(train) - 8, 1), size=4)
    contexts = [train[i : i + length] for i, length in zip(places, (1, 3, 6, 8), strict=True)]
    contexts += [rng.integers(0, NUM_SYMBOLS, size=6), np.array([256])]
    for context in contexts:
        every = [model.probabilities(np.append(context, symbol))[-1] for symbol in range(NUM_SYMBOLS)]
        assert min(every) > 0
        assert sum(every) == pytest.approx(1, abs=1e-12)


def test_longer_contexts_help_on_text_and_not_on_noise():
    train, validation = _stream(TEXT * 3), _stream(TEXT)
    bits = [ngram_bits_per_byte(train, validation, order) for order in (1, 3, 5)]
    assert bits[0] > bits[1] > bits[2]
    noise = np.random.default_rng(0).integers(0, 256, size=100_000)
    assert ngram_bits_per_byte(noise[:80_000], noise[80_000:], 1) == pytest.approx(8, abs=0.01)


def test_streams_stay_as_they_were():
    train, validation = _stream(TEXT), _stream(TEXT)
    ngram_bits_per_byte(train, validation, 3)
    np.testing.assert_array_equal(train, _stream(TEXT))
    np.testing.assert_array_equal(validation, _stream(TEXT))


@pytest.mark.parametrize(
    ("train", "validation", "order", "message"),
    [
        (_stream(TEXT), _stream(TEXT), 8, "choose 1 to 7"),
        (_stream(b"ab"), _stream(TEXT), 5, "needs at least 5"),
        (_stream(TEXT), np.array([256]), 3, "give at least 2"),
        (np.array([1, 257, 3]), _stream(TEXT), 2, "tokenizer.symbols"),
        (np.array([0.5, 1.5]), _stream(TEXT), 1, "integers 0 to 256"),
    ],
)
def test_misuse_says_what_to_change(train, validation, order, message):
    with pytest.raises(ValueError, match=message):
        ngram_bits_per_byte(train, validation, order)
