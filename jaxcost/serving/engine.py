"""Generation: prefill and decode over one cache, for weights of any kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcost import weights
from jaxcost.models import optional
from jaxcost.models.transformer import Cache, Transformer, logits, start_cache


class Engine:
    """Prefill and decode, jitted, for one model. Rows of a batch may have prompts of different lengths."""

    def __init__(self, model: Transformer):
        self.model = model
        self.start = jax.jit(functools.partial(start_cache, model), static_argnames=("batch_size", "slots"))
        self.prefill = jax.jit(self._prefill)
        self.decode = jax.jit(self._decode, static_argnames="steps", donate_argnames="cache")

    def _prefill(self, params: weights.Params, prompts_BT, lengths_B, cache: Cache):
        """Logits (B, V) after each row's last prompt token, and the cache. Prompts are padded on the right."""
        start_B = cache.length
        hidden_BTD, cache = self.model.apply({"params": params}, prompts_BT, cache)
        last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        # What padding wrote beyond a row's length is masked, and overwritten as the row grows.
        return logits(self.model.config, params, last_BD), cache.replace(length=start_B + lengths_B)

    def _decode(self, params: weights.Params, logits_BV, cache: Cache, key, temperature, *, steps: int):
        """`steps` tokens (B, steps) in one dispatch, the logits after them and the cache."""

        def one(carry, step):
            logits_BV, cache = carry
            tokens_B = _sample(logits_BV, jax.random.fold_in(key, step), temperature)
            hidden_B1D, cache = self.model.apply({"params": params}, tokens_B[:, None], cache)
            return (logits(self.model.config, params, hidden_B1D[:, 0]), cache), tokens_B

        (logits_BV, cache), tokens = lax.scan(one, (logits_BV, cache), jnp.arange(steps))
        return tokens.T, logits_BV, cache

    def generate(
        self,
        params: weights.Params,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop_id: int | None = None,
        tokens_per_dispatch: int = 16,
        on_tokens: Callable[[np.ndarray], None] | None = None,
    ) -> list[np.ndarray]:
        """Continues each prompt.

        Args:
          params: weights of any kinds.
          prompts: int arrays (T,) of at least one token each.
          max_new_tokens: tokens to add at most.
          temperature: 0 takes the likeliest token.
          seed: of the sampling.
          stop_id: ends a row; it is not part of the result.
          tokens_per_dispatch: tokens decoded between two looks by the host.
          on_tokens: called with each new piece (B, n) as it comes.

        Returns:
          The new tokens of each prompt, int32.

        Raises:
          ValueError: an empty prompt or ids outside the vocabulary, a temperature or a number of tokens that makes no
            sense, or prompt and output longer than the model's `max_length`.
        """
        limit = self.model.config.max_length - optional.virtual_tokens(params)
        vocab_size = self.model.config.vocab_size
        if not prompts or min(len(prompt) for prompt in prompts) < 1:
            raise ValueError("A prompt is empty; give at least one token.")
        if not all(np.min(prompt) >= 0 and np.max(prompt) < vocab_size for prompt in prompts):
            raise ValueError(f"A prompt has ids outside 0 to {vocab_size - 1}; encode it with the model's tokenizer.")
        if max_new_tokens < 1:
            raise ValueError(f"{max_new_tokens} new tokens were asked for; ask for at least 1.")
        if not 0 <= temperature < np.inf:
            raise ValueError(f"The temperature is {temperature}; it must be 0 or a positive number.")
        longest = max(len(prompt) for prompt in prompts)
        if longest + max_new_tokens > limit:
            raise ValueError(
                f"The prompt ({longest} tokens) and {max_new_tokens} new tokens are longer than the {limit} that the "
                f"model's max_length leaves; ask for at most {max(0, limit - longest)} or shorten the prompt."
            )
        padded = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        # Whole dispatches may write past the last token asked for.
        slots = longest + -(-max_new_tokens // tokens_per_dispatch) * tokens_per_dispatch
        cache = self.start(params, batch_size=len(prompts), slots=slots)
        logits_BV, cache = self.prefill(params, padded, np.array([len(p) for p in prompts], np.int32), cache)
        pieces: list[np.ndarray] = []
        key = jax.random.key(seed)
        for index in range(0, max_new_tokens, tokens_per_dispatch):
            step_key = jax.random.fold_in(key, index)
            tokens, logits_BV, cache = self.decode(
                params, logits_BV, cache, step_key, jnp.float32(temperature), steps=tokens_per_dispatch
            )
            pieces.append(np.asarray(tokens)[:, : max_new_tokens - index])
            if on_tokens is not None:
                on_tokens(pieces[-1])
            if stop_id is not None and (np.concatenate(pieces, axis=1) == stop_id).any(axis=1).all():
                break
        rows = np.concatenate(pieces, axis=1)
        return [_until(row, stop_id) for row in rows]


def _sample(logits_BV, key, temperature):
    drawn = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def _until(row: np.ndarray, stop_id: int | None) -> np.ndarray:
    ends = np.flatnonzero(row == stop_id) if stop_id is not None else ()
    return row[: ends[0]] if len(ends) else row
