"""Generation: prefill and decode over one cache, for weights of any kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcost import weights
from jaxcost.models import optional
from jaxcost.models.transformer import Cache, Transformer, logits, start_cache
from jaxcost.serving.sampling import GREEDY, Rows, Sampling, choose, rows_of
from jaxcost.serving.stopping import NEVER, Stop


class Engine:
    """Prefill and decode, jitted, for one model. Rows of a batch may have prompts of different lengths."""

    def __init__(self, model: Transformer):
        """ValueError if the model gives anything but the next token."""
        if not model.config.generates:
            raise ValueError(
                "Generation takes a causal model with logits of the vocabulary, and this one is an encoder or gives "
                "labels or embeddings; name another."
            )
        self.model = model
        self.start = jax.jit(self._start, static_argnames=("batch_size", "slots"))
        self.prefill = jax.jit(self._prefill)
        self.decode = jax.jit(self._decode, static_argnames="steps", donate_argnames="cache")

    def _start(self, params: weights.Params, source_BS=None, valid_BS=None, *, batch_size: int, slots: int) -> Cache:
        """An empty cache, or one that holds the source; see `start_cache`."""
        return start_cache(self.model, params, batch_size, slots, source_BS, valid_BS)

    def _prefill(self, params: weights.Params, prompts_BT, lengths_B, cache: Cache):
        """Logits (B, V) after each row's last prompt token, and the cache. Prompts are padded on the right."""
        start_B = cache.length
        hidden_BTD, cache = self.model.apply({"params": params}, prompts_BT, cache)
        last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        # What padding wrote beyond a row's length is masked, and overwritten as the row grows.
        return logits(self.model.config, params, last_BD), cache.replace(length=start_B + lengths_B)

    def _decode(self, params: weights.Params, logits_BV, cache: Cache, rows: Rows, *, steps: int):
        """`steps` tokens (B, steps) in one dispatch, the logits after them, the cache and the rows."""

        def one(carry, _):
            logits_BV, cache, rows = carry
            tokens_B, rows = choose(rows, logits_BV)
            hidden_B1D, cache = self.model.apply({"params": params}, tokens_B[:, None], cache)
            return (logits(self.model.config, params, hidden_B1D[:, 0]), cache, rows), tokens_B

        (logits_BV, cache, rows), tokens = lax.scan(one, (logits_BV, cache, rows), length=steps)
        return tokens.T, logits_BV, cache, rows

    def generate(
        self,
        params: weights.Params,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Stop = NEVER,
        tokens_per_dispatch: int = 16,
        on_tokens: Callable[[np.ndarray], None] | None = None,
        sources: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Continues each prompt, in answer to its source where the model has an encoder.

        Args:
          params: weights of any kinds.
          prompts: int arrays (T,) of at least one token each.
          max_new_tokens: tokens to add at most.
          sampling: how tokens are chosen, for all prompts (with one seed) or for each.
          stop: what ends a row before that.
          tokens_per_dispatch: tokens decoded between two looks by the host, at least 1.
          on_tokens: called with each new piece (B, n) as it comes.
          sources: what the encoder reads, one for each prompt: int arrays (S,), or what stands in the place of tokens,
            all of one shape.

        Returns:
          The new tokens of each prompt, int32.

        Raises:
          ValueError: an empty prompt or ids outside the vocabulary, a number of tokens or of settings that makes no
            sense, prompt and output longer than the model's `max_length`, or sources that are missing or of no use.
        """
        if tokens_per_dispatch < 1:
            raise ValueError(f"tokens_per_dispatch is {tokens_per_dispatch}; it must be at least 1.")
        padded, lengths = padded_prompts(self.model, params, prompts, max_new_tokens)
        rows = rows_for(sampling, prompts, self.model.config.vocab_size)
        # Whole dispatches may write past the last token asked for.
        slots = padded.shape[1] + -(-max_new_tokens // tokens_per_dispatch) * tokens_per_dispatch
        read = padded_sources(self.model, sources, len(prompts))
        cache = self.start(params, *read, batch_size=len(prompts), slots=slots)
        logits_BV, cache = self.prefill(params, padded, lengths, cache)
        new = np.zeros((len(prompts), 0), np.int32)
        while new.shape[1] < max_new_tokens:
            tokens, logits_BV, cache, rows = self.decode(params, logits_BV, cache, rows, steps=tokens_per_dispatch)
            piece = np.asarray(tokens)[:, : max_new_tokens - new.shape[1]]
            new = np.concatenate([new, piece], axis=1)
            if on_tokens is not None:
                on_tokens(piece)
            ends = [stop.length(row) for row in new]
            if all(end is not None for end in ends):
                break
        return [row[:end] for row, end in zip(new, ends, strict=True)]


def padded_prompts(
    model: Transformer, params: weights.Params, prompts: Sequence[np.ndarray], max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts padded on the right, int32 (B, T), and their lengths (B,); ValueError as `Engine.generate` says."""
    limit = model.config.max_length - optional.virtual_tokens(params)
    vocab_size = model.config.vocab_size
    if not prompts or min(len(prompt) for prompt in prompts) < 1:
        raise ValueError("A prompt is empty; give at least one token.")
    if not all(np.min(prompt) >= 0 and np.max(prompt) < vocab_size for prompt in prompts):
        raise ValueError(f"A prompt has ids outside 0 to {vocab_size - 1}; encode it with the model's tokenizer.")
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens} new tokens were asked for; ask for at least 1.")
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"The prompt ({longest} tokens) and {max_new_tokens} new tokens are longer than the {limit} that the "
            f"model's max_length leaves; ask for at most {max(0, limit - longest)} or shorten the prompt."
        )
    padded = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, np.array([len(prompt) for prompt in prompts], np.int32)


def padded_sources(
    model: Transformer, sources: Sequence[np.ndarray] | None, rows: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The sources, tokens padded on the right, and which of them are valid (B, S); ValueError as `Engine.generate`."""
    if not model.config.encoder.num_layers:
        if sources is not None:
            raise ValueError("The model has no encoder to read sources; leave them out.")
        return None, None
    if sources is None or len(sources) != rows:
        raise ValueError(f"model.encoder is on, which reads a source for each of the {rows} prompts; give as many.")
    sources, encoder = [np.asarray(source) for source in sources], model.config.source
    if min(source.size for source in sources) < 1:
        raise ValueError("A source is empty; give at least one token, or what stands in its place.")
    if not encoder.of_tokens or sources[0].ndim > 1:
        shapes = sorted({source.shape for source in sources})
        if len(shapes) > 1:
            raise ValueError(f"Sources have the shapes {shapes[0]} and {shapes[-1]}; pad or cut them to one.")
        return np.stack(sources), None
    if not all(source.ndim == 1 and np.issubdtype(source.dtype, np.integer) for source in sources):
        raise ValueError("A source is no int array (S,); give ids of tokens, or embeddings (S, D) for all prompts.")
    longest, limit = max(map(len, sources)), encoder.max_length
    if not all(np.min(source) >= 0 and np.max(source) < model.config.vocab_size for source in sources):
        raise ValueError(f"A source has ids outside 0 to {model.config.vocab_size - 1}; encode it with the tokenizer.")
    if longest > limit:
        raise ValueError(f"A source of {longest} tokens is longer than the encoder's max_length ({limit}); shorten it.")
    padded, valid = np.zeros((rows, longest), np.int32), np.zeros((rows, longest), bool)
    for i, source in enumerate(sources):
        padded[i, : len(source)], valid[i, : len(source)] = source, True
    return padded, valid


def rows_for(sampling: Sampling | Sequence[Sampling], prompts: Sequence[np.ndarray], vocab_size: int) -> Rows:
    """The settings of each prompt's row; ValueError if there are not as many as prompts."""
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(each) != len(prompts):
        raise ValueError(f"There are {len(prompts)} prompts and {len(each)} settings of the sampling; give one each.")
    return rows_of(each, prompts, vocab_size)
