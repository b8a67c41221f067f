"""How the next token of each sequence is chosen from its logits.

The processors and their order are those of transformers: repetition penalty, temperature, top-k, top-p, min-p. Each
row has settings and a seed of its own, and its n-th draw depends on them alone, never on the rows beside it. Shapes in
names: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

_T = TypeVar("_T")
_SMALLEST, _LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one sequence goes on. The default takes the likeliest token each time."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens are drawn from; 0 is all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability. Source: Holtzman et al. 2019, arXiv:1904.09751."""
    min_p: float = 0.0
    """Only tokens with this share of the likeliest one's probability. Source: Nguyen et al. 2024, arXiv:2407.01082."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that were there are divided by it, negative ones multiplied. Source: Keskar et al.
    2019, arXiv:1909.05858."""
    seed: int = 0
    """Of the sequence's draws; the same prompt, settings and seed give the same tokens in any batch."""

    def __post_init__(self):
        if not 0 <= self.temperature <= _LARGEST:
            raise ValueError(f"The temperature is {self.temperature}; it must be 0 or a positive number.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must lie between 0 and 1.")
        if not _SMALLEST <= self.repetition_penalty <= _LARGEST:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be a positive number.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"The seed is {self.seed}; it must lie between 0 and 2**32 - 1.")


GREEDY = Sampling()
"""The likeliest token each time."""


@struct.dataclass
class Rows:
    """The settings of a batch as arrays, None where no row asks for them, so that nobody pays for what nobody uses."""

    temperature_B: jax.Array | None = None
    seed_B: jax.Array | None = None
    """uint32, where any row draws."""
    count_B: jax.Array | None = None
    """int32: tokens chosen so far, where any row draws."""
    top_k_B: jax.Array | None = None
    top_p_B: jax.Array | None = None
    min_p_B: jax.Array | None = None
    penalty_B: jax.Array | None = None
    seen_BV: jax.Array | None = None
    """bool: tokens of the prompt and of what was chosen, where any row has a penalty."""

    def saw(self, tokens_B: jax.Array, counts: jax.Array | bool = True) -> Rows:
        """After the next token of each row (of those that `counts`, bool (B,), names)."""
        rows = self
        if self.count_B is not None:
            rows = rows.replace(count_B=self.count_B + jnp.asarray(counts, jnp.int32))
        if self.seen_BV is not None:
            new_BV = jax.nn.one_hot(tokens_B, self.seen_BV.shape[-1], dtype=bool)
            rows = rows.replace(seen_BV=self.seen_BV | (new_BV & jnp.reshape(counts, (-1, 1))))
        return rows

    def keys(self) -> jax.Array:
        """The random key of each row's next token, (B,)."""
        return jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(self.seed_B, self.count_B)


def rows_of(samplings: Sequence[Sampling], prompts: Sequence[np.ndarray], vocab_size: int) -> Rows:
    """The settings of each row; `prompts` are its tokens so far, int (T,)."""

    def column(name, dtype, used, most=np.inf):
        values = [min(getattr(s, name), most) for s in samplings]
        return jnp.asarray(np.array(values, dtype)) if any(map(used, values)) else None

    rows = Rows(penalty_B=column("repetition_penalty", np.float32, lambda x: x != 1))
    if rows.penalty_B is not None:
        seen = np.zeros((len(samplings), vocab_size), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
        rows = rows.replace(seen_BV=jnp.asarray(seen))
    if not any(s.temperature > 0 for s in samplings):
        return rows
    return rows.replace(
        temperature_B=column("temperature", np.float32, bool),
        seed_B=jnp.asarray(np.array([s.seed for s in samplings], np.uint32)),
        count_B=jnp.zeros((len(samplings),), jnp.int32),
        top_k_B=column("top_k", np.int32, bool, most=vocab_size),
        top_p_B=column("top_p", np.float32, lambda x: x < 1),
        min_p_B=column("min_p", np.float32, bool),
    )


def choose(rows: Rows, logits_BV: jax.Array) -> tuple[jax.Array, Rows]:
    """The next token of each row, int32 (B,), and the rows after it."""
    processed_BV = processed(rows, logits_BV)
    tokens_B = jnp.argmax(processed_BV, axis=-1)
    if rows.temperature_B is not None:
        drawn_B = jax.vmap(jax.random.categorical)(rows.keys(), processed_BV)
        tokens_B = jnp.where(rows.temperature_B > 0, drawn_B, tokens_B)
    tokens_B = tokens_B.astype(jnp.int32)
    return tokens_B, rows.saw(tokens_B)


def probabilities(rows: Rows, logits_BV: jax.Array) -> jax.Array:
    """What `choose` draws from, float32 (B, V); all on one token where it takes the likeliest."""
    processed_BV = processed(rows, logits_BV)
    likeliest_BV = jax.nn.one_hot(jnp.argmax(processed_BV, axis=-1), logits_BV.shape[-1], dtype=jnp.float32)
    if rows.temperature_B is None:
        return likeliest_BV
    return jnp.where(rows.temperature_B[:, None] > 0, jax.nn.softmax(processed_BV, axis=-1), likeliest_BV)


def by_need(rows: Rows, active_B: jax.Array, function: Callable[[Rows], _T]) -> _T:
    """A function of the rows, by the cheapest of three ways that does what the active ones, bool (B,), ask for.

    The function gets rows without what nobody asks for, and must give the same for a row that does not ask either way.
    """

    def asked(values_B: jax.Array | None, default: float) -> jax.Array | bool:
        return False if values_B is None else jnp.any(active_B & (values_B != default))

    sorts = asked(rows.top_k_B, 0) | asked(rows.top_p_B, 1)
    bends = asked(rows.temperature_B, 0) | asked(rows.penalty_B, 1)
    ways = [Rows(), rows.replace(top_k_B=None, top_p_B=None), rows]
    branches = [lambda way=way: function(way) for way in ways]
    return lax.switch(jnp.where(sorts, 2, jnp.asarray(bends, jnp.int32)), branches)


def processed(rows: Rows, logits_BV: jax.Array) -> jax.Array:
    """Float32 logits (B, V) after all processors; -inf for tokens that are not drawn from."""
    x = logits_BV.astype(jnp.float32)
    if rows.penalty_B is not None:
        penalty_B1 = rows.penalty_B[:, None]
        x = jnp.where(rows.seen_BV, jnp.where(x < 0, x * penalty_B1, x / penalty_B1), x)
    if rows.temperature_B is not None:
        x = x / jnp.where(rows.temperature_B > 0, rows.temperature_B, 1.0)[:, None]
    if rows.top_k_B is None and rows.top_p_B is None:
        return x if rows.min_p_B is None else _min_p(x, rows.min_p_B)
    # One sort serves both: what falls out of the first k stands last in it.
    ordered_BV = -jnp.sort(-x, axis=-1)
    if rows.top_k_B is not None:
        all_B = jnp.where(rows.top_k_B > 0, rows.top_k_B, x.shape[-1])
        floor_B1 = jnp.take_along_axis(ordered_BV, jnp.minimum(all_B, x.shape[-1])[:, None] - 1, axis=-1)
        x, ordered_BV = (jnp.where(a < floor_B1, -jnp.inf, a) for a in (x, ordered_BV))
    if rows.top_p_B is not None:
        shares_BV = jax.nn.softmax(ordered_BV, axis=-1)
        before_BV = jnp.cumsum(shares_BV, axis=-1) - shares_BV
        # The likeliest is always kept, and where p is 1 all are, whatever the sum and p round to.
        kept_BV = (before_BV < rows.top_p_B[:, None]) | (rows.top_p_B[:, None] >= 1)
        kept_BV = kept_BV.at[:, 0].set(True)
        floor_B1 = jnp.min(jnp.where(kept_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
        x = jnp.where(x < floor_B1, -jnp.inf, x)
    return x if rows.min_p_B is None else _min_p(x, rows.min_p_B)


def _min_p(x_BV: jax.Array, min_p_B: jax.Array) -> jax.Array:
    shares_BV = jax.nn.softmax(x_BV, axis=-1)
    floor_B1 = min_p_B[:, None] * jnp.max(shares_BV, axis=-1, keepdims=True)
    return jnp.where(shares_BV < floor_B1, -jnp.inf, x_BV)
