"""Beam search: the likeliest continuation that is found by following several of them side by side.

A hypothesis that ends scores its log-probability over its length to a power. A row is done once it has as many ended
ones as beams, and none that runs would beat the worst of them if it ended now. Sources: Wu et al. 2016,
arXiv:1609.08144, section 7, for normalising by the length; the test compares with transformers' rules. Shapes in names:
B batch, K beams, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxcost import weights
from jaxcost.models.transformer import Cache, Transformer, logits
from jaxcost.serving.engine import Engine, padded_prompts, padded_sources

_NONE = -1e9
"""Score of a hypothesis that is not there."""


@struct.dataclass
class _Search:
    """All that a step reads and writes; `cache` and `logits` have a row for each beam, B·K of them."""

    step: jax.Array
    """int32 scalar: tokens of every running hypothesis."""
    cache: Cache
    logits: jax.Array
    """(B·K, V) of the next token."""
    tokens: jax.Array
    """(B, K, N) int32 of those that run; what is not there yet is 0."""
    scores: jax.Array
    """(B, K) float32: their log-probabilities."""
    ended: jax.Array
    """(B, K, N) int32 of those that ended, the best first."""
    ended_lengths: jax.Array
    """(B, K) int32, without the token that ended them."""
    ended_scores: jax.Array
    """(B, K) float32, normalised."""
    done: jax.Array
    """(B,) bool: nothing can become better."""


class BeamEngine:
    """Beam search by one model, a decoder or an encoder-decoder."""

    def __init__(self, model: Transformer, beams: int = 4, length_penalty: float = 1.0):
        """ValueError if the model gives anything but the next token, there is no beam, or the penalty is no number.

        Args:
          model: what scores the tokens.
          beams: hypotheses that are followed in each row.
          length_penalty: power of the length that log-probabilities are divided by; 0 favours short ones.
        """
        if beams < 1:
            raise ValueError(f"{beams} beams were asked for; ask for at least 1.")
        if not math.isfinite(length_penalty):
            raise ValueError(f"The length penalty is {length_penalty}; give a finite number, such as 1.")
        self.engine, self.beams, self.length_penalty = Engine(model), beams, length_penalty
        self.search = jax.jit(self._search, static_argnames=("end_ids", "length"))

    def generate(
        self,
        params: weights.Params,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        end_ids: Collection[int],
        sources: Sequence[np.ndarray] | None = None,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The best continuation of each prompt.

        Args:
          params: weights of any kinds.
          prompts: int arrays (T,) of at least one token each.
          max_new_tokens: tokens to add at most.
          end_ids: tokens that end a hypothesis; they are not part of it.
          sources: what the encoder reads, one for each prompt; see `Engine.generate`.

        Returns:
          The new tokens of each prompt, int32, and their normalised log-probabilities, float32 (B,).

        Raises:
          ValueError: as `Engine.generate`; more than half as many beams as tokens.
        """
        vocab_size = self.engine.model.config.vocab_size
        if 2 * self.beams > vocab_size:
            raise ValueError(f"{self.beams} beams are more than half of the vocabulary of {vocab_size}; ask for fewer.")
        if not all(0 <= i < vocab_size for i in end_ids):
            raise ValueError(f"An id that ends a sequence is outside 0 to {vocab_size - 1}; use the tokenizer's.")
        padded, lengths = padded_prompts(self.engine.model, params, prompts, max_new_tokens)
        read = padded_sources(self.engine.model, sources, len(prompts))
        cache = self.engine.start(params, *read, batch_size=len(prompts), slots=padded.shape[1] + max_new_tokens)
        logits_BV, cache = self.engine.prefill(params, padded, lengths, cache)
        found = self.search(params, logits_BV, cache, end_ids=tuple(sorted(end_ids)), length=max_new_tokens)
        tokens, lengths, scores = (np.asarray(a[:, 0]) for a in found)
        return [row[:length] for row, length in zip(tokens, lengths, strict=True)], scores

    def _search(self, params, logits_BV, cache: Cache, *, end_ids: tuple[int, ...], length: int):
        """The ended hypotheses: tokens (B, K, N), lengths and scores (B, K), the best first."""
        batch, beams = logits_BV.shape[0], self.beams
        none = jnp.zeros((batch, beams, length), jnp.int32)
        state = _Search(
            step=jnp.zeros((), jnp.int32),
            cache=_repeated(cache, beams),
            logits=jnp.repeat(logits_BV, beams, axis=0),
            tokens=none,
            # All beams start alike: but for the first, they are not there.
            scores=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, _NONE), (batch, 1)),
            ended=none,
            ended_lengths=jnp.zeros((batch, beams), jnp.int32),
            ended_scores=jnp.full((batch, beams), _NONE),
            done=jnp.zeros((batch,), bool),
        )
        goes_on = lambda s: (s.step < length) & ~jnp.all(s.done)  # noqa: E731
        state = lax.while_loop(goes_on, lambda s: self._step(params, s, end_ids), state)
        return state.ended, state.ended_lengths, state.ended_scores

    def _step(self, params, s: _Search, end_ids: tuple[int, ...]) -> _Search:
        batch, beams, length = s.tokens.shape
        log_probs_BKV = jax.nn.log_softmax(s.logits, axis=-1).reshape(batch, beams, -1)
        vocab_size = log_probs_BKV.shape[-1]
        total_BM = (s.scores[..., None] + log_probs_BKV).reshape(batch, -1)
        # Twice as many as beams, so that enough go on even if the best of all beams end.
        scores_BM, places_BM = lax.top_k(total_BM, 2 * beams)
        beam_BM, token_BM = places_BM // vocab_size, (places_BM % vocab_size).astype(jnp.int32)
        tokens_BMN = jnp.take_along_axis(s.tokens, beam_BM[..., None], axis=1)
        tokens_BMN = tokens_BMN.at[:, :, s.step].set(token_BM)
        ends_BM = jnp.isin(token_BM, jnp.array(end_ids, jnp.int32))
        grown = s.step + 1
        divisor = grown.astype(jnp.float32) ** self.length_penalty

        # Only the best may end here, so that an ended one was among the beams. What runs at the last step ends there.
        stops_BM = ((ends_BM | (grown == length)) & (jnp.arange(2 * beams) < beams)) & ~s.done[:, None]
        new_BM = jnp.where(stops_BM, scores_BM / divisor, _NONE)
        ended_scores, kept = lax.top_k(jnp.concatenate([s.ended_scores, new_BM], axis=1), beams)
        ended = _chosen(jnp.concatenate([s.ended, tokens_BMN], axis=1), kept)
        lengths_BM = jnp.where(ends_BM, s.step, grown)
        ended_lengths = _chosen(jnp.concatenate([s.ended_lengths, lengths_BM], axis=1), kept)

        scores, kept = lax.top_k(jnp.where(ends_BM, _NONE, scores_BM), beams)
        rows = (_chosen(beam_BM, kept) + jnp.arange(batch)[:, None] * beams).reshape(-1)
        tokens = _chosen(tokens_BMN, kept)
        hidden_B1D, cache = self.engine.model.apply(
            {"params": params}, _chosen(token_BM, kept).reshape(-1, 1), _reordered(s.cache, rows)
        )
        return s.replace(
            step=grown,
            cache=cache,
            logits=logits(self.engine.model.config, params, hidden_B1D[:, 0]),
            tokens=tokens,
            scores=scores,
            ended=ended,
            ended_lengths=ended_lengths,
            ended_scores=ended_scores,
            done=s.done | (scores[:, 0] / divisor <= ended_scores[:, -1]),
        )


def _chosen(x: jax.Array, kept_BK: jax.Array) -> jax.Array:
    """x (B, M, ...) at the places kept in each row, (B, K, ...)."""
    return jnp.take_along_axis(x, kept_BK.reshape(*kept_BK.shape, *(1,) * (x.ndim - 2)), axis=1)


def _repeated(cache: Cache, times: int) -> Cache:
    """The cache with every row so many times in a row, but for the source, which they share."""
    key, value = jax.tree.map(lambda a: jnp.repeat(a, times, axis=1), (cache.key, cache.value))
    return cache.replace(key=key, value=value, length=jnp.repeat(cache.length, times))


def _reordered(cache: Cache, rows: jax.Array) -> Cache:
    """The cache with its rows in another order; those of one prompt share their length and their source."""
    key, value = jax.tree.map(lambda a: jnp.take(a, rows, axis=1), (cache.key, cache.value))
    return cache.replace(key=key, value=value)
