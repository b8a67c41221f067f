"""Continuous batching for models with an encoder: a slot also holds what the encoder made of its request's source.

A source is a text, padded to one of a few lengths, or a recording of a fixed length. It is read by one program before
the first token of the answer, for one slot at a time, so that an answer does not depend on its company either. Shapes
in names: S tokens or frames of a source, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcost import weights
from jaxcost.data.spectrogram import HOP, log_mel
from jaxcost.models import optional
from jaxcost.models.cache import Cache, Source
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, start_cache
from jaxcost.serving.batches import padded_lengths
from jaxcost.serving.programs import compiled
from jaxcost.serving.scheduler import Request, Scheduler, Ticket
from jaxcost.serving.slots import Slots, SlotsConfig
from jaxcost.serving.state import State, beside
from jaxcost.serving.worker import SchedulerConfig

_LIMITS, _SLOTS = SchedulerConfig(), SlotsConfig()
_NEVER = -1e9
"""What is added to the logit of a token that is never said; a finite number, of which no NaN can come."""


@dataclasses.dataclass(frozen=True)
class SourceRequest(Request):
    """One answer to a source; its `prompt` is what the answer begins with."""

    source: np.ndarray = dataclasses.field(kw_only=True)
    """int32 (S,), or a waveform, float32 (samples,), of the samples a second that the model hears."""

    @property
    def tokens(self) -> int:
        """Tokens of a text, or of what a recording's answer begins with."""
        return len(self.source) if np.issubdtype(self.source.dtype, np.integer) else len(self.prompt)


def never(params: weights.Params, tokens: Collection[int], vocab_size: int) -> weights.Params:
    """The weights with a bias of the unembedding by which some tokens are never said; ValueError if it has one."""
    if "bias" in params.get("unembed", {}):
        raise ValueError("The unembedding has a bias already, to which none can be added; give a model without one.")
    if not tokens:
        return params
    bias_V = np.zeros((vocab_size,), np.float32)
    bias_V[sorted(tokens)] = _NEVER
    return params | {"unembed": {**params.get("unembed", {}), "bias": beside(params, bias_V)}}


class SourceSlots(Slots):
    """Slots of a model with an encoder."""

    def __init__(
        self,
        model: Transformer,
        params: weights.Params,
        config: SlotsConfig = _SLOTS,
        *,
        lengths: tuple[int, ...] = (),
        prompt_tokens: tuple[int, ...] = (1,),
        not_first: Collection[int] = (),
    ):
        """Compiles everything.

        Args:
          model: an encoder of texts or of spectrograms, and its decoder.
          params: weights of any kinds.
          config: how many requests run at once; `max_length` is of the answers.
          lengths: tokens that texts are padded to, rising; by default powers of two, and the encoder's `max_length`.
          prompt_tokens: in place of those of `config`, sizes of the pieces of what answers begin with.
          not_first: tokens that no answer begins with.

        Raises:
          ValueError: the model does not answer to such sources, or is shorter than asked for.
        """
        self._check_kind(model.config)
        if optional.virtual_tokens(params):
            raise ValueError("The weights have virtual tokens beside an encoder, which slots do not hold; merge them.")
        self.source = model.config.source
        self.lengths = padded_lengths(lengths, self.source.max_length, "tokens that the encoder takes")
        self.source_length = self.lengths[-1] if self.of_texts else samples_of(self.source)
        self._not_first_V = np.zeros((model.config.vocab_size,), np.float32)
        self._not_first_V[list(not_first)] = _NEVER
        super().__init__(model, params, dataclasses.replace(config, prefill_tokens=prompt_tokens))

    def _check_kind(self, config: ModelConfig) -> None:
        source = config.source if config.encoder.num_layers else None
        if source is None or not config.generates or not (source.of_tokens or source.audio.channels > 1):
            raise ValueError(
                "The model does not answer to texts or recordings; give an encoder of tokens or spectrograms with a "
                "decoder that has logits of the vocabulary."
            )

    @property
    def of_texts(self) -> bool:
        """Whether sources are texts, not recordings."""
        return self.source.of_tokens

    # ---- Programs ----

    def _cache(self, params, room: int) -> Cache:
        slots = self.config.slots
        one = jax.eval_shape(lambda source_S: self._started(params, source_S, 1, room), self._empty(self.source_length))
        wide = lambda a: jnp.zeros((a.shape[0], slots, *a.shape[2:]), a.dtype)  # noqa: E731
        key, value, source = jax.tree.map(wide, (one.key, one.value, one.source.replace(valid=None)))
        # A slot that was never used has a source of zeros, all valid: a softmax of nothing would be no number.
        valid = jnp.ones((slots, self.source_length), bool) if self.of_texts else None
        return Cache(key, value, jnp.zeros((slots,), jnp.int32), source.replace(valid=valid))

    def _empty(self, length: int) -> np.ndarray:
        return np.zeros((length,), np.int32 if self.of_texts else np.float32)

    def _started(self, params, source_S, count, room: int) -> Cache:
        """A cache of one row that holds a source, of which `count` tokens are no padding."""
        if not self.of_texts:
            return start_cache(self.model, params, 1, room, log_mel(source_S[None], self.source.audio.channels))
        valid_S = jnp.arange(source_S.shape[0]) < count
        return start_cache(self.model, params, 1, room, source_S[None], valid_S[None])

    def _read(self, params, state: State, slot, source_S, count) -> State:
        """The state with a source in a slot."""
        made, held = self._started(params, source_S, count, 1).source, state.cache.source
        put = lambda a, new: lax.dynamic_update_slice(a, new, (0, slot, *(0,) * (a.ndim - 2)))  # noqa: E731
        key, value = jax.tree.map(put, (held.key, held.value), (made.key, made.value))
        valid = held.valid
        if valid is not None:
            valid = valid.at[slot].set(jnp.arange(valid.shape[1]) < count)
        return state.replace(cache=state.cache.replace(source=Source(key, value, valid=valid)))

    def _prefill(self, params, state: State, slot, *where, scored: bool):
        one = lambda a, axis: lax.dynamic_slice_in_dim(a, slot, 1, axis=axis)  # noqa: E731
        made = super()._prefill(params, _with_source(state, one), slot, *where, scored=scored)
        if scored:
            return _restored(state, made[0]), made[1]
        made = _restored(state, made)
        return made.replace(logits=made.logits.at[slot].add(self._not_first_V))

    def _decode(self, params, state: State, *who, slots: int, length: int):
        first = lambda a, axis: lax.slice_in_dim(a, 0, slots, axis=axis)  # noqa: E731
        new, made = super()._decode(params, _with_source(state, first), *who, slots=slots, length=length)
        return _restored(state, new), made

    def _compile(self) -> None:
        super()._compile()
        self._read_programs = {}
        for length in self.lengths if self.of_texts else (self.source_length,):
            where = (np.int32(0), self._empty(length), np.int32(0))
            self._read_programs[length] = compiled(self._read, 1, self.places, self.params, self.state, *where)

    def _warm_up(self) -> None:
        for length in self._read_programs:
            self.read(0, self._empty(length))
        super()._warm_up()

    # ---- What the scheduler calls ----

    def check_source(self, source: np.ndarray) -> None:
        """ValueError if a source is none that the model takes."""
        if not len(source):
            raise ValueError("A source is empty; give at least one token of a text, or one sample of a recording.")
        if len(source) > self.source_length:
            what = "tokens" if self.of_texts else "samples"
            raise ValueError(
                f"The prompt has {len(source)} {what}, more than the {self.source_length} that the model takes; "
                "shorten it."
            )
        if self.of_texts and (source.min() < 0 or source.max() >= self.vocab_size):
            raise ValueError(f"The prompt has ids outside 0 to {self.vocab_size - 1}; use the model's tokenizer.")

    def read(self, slot: int, source: np.ndarray) -> None:
        """Puts what the encoder makes of a source into a slot."""
        length = next(length for length in self._read_programs if length >= len(source))
        padded = self._empty(length)
        padded[: len(source)] = source
        self.state = self._read_programs[length](self.params, self.state, np.int32(slot), padded, np.int32(len(source)))


def samples_of(source: ModelConfig) -> int:
    """Samples of the recording whose spectrogram fills an encoder; ValueError where none does."""
    frames = source.max_length * math.prod(source.audio.strides)
    if source.audio.frames(frames) != source.max_length:
        raise ValueError(
            f"A spectrogram of {frames} frames does not fill the encoder's max_length ({source.max_length}); change it."
        )
    return frames * HOP


def _with_source(state: State, cut: Callable) -> State:
    """The state with some rows of the sources, which `cut` takes of an array and its axis of rows."""
    held = state.cache.source
    key, value = jax.tree.map(functools.partial(cut, axis=1), (held.key, held.value))
    valid = None if held.valid is None else cut(held.valid, axis=0)
    return state.replace(cache=state.cache.replace(source=Source(key, value, valid=valid)))


def _restored(before: State, after: State) -> State:
    """A state with the sources of another."""
    return after.replace(cache=after.cache.replace(source=before.cache.source))


class SourceScheduler(Scheduler):
    """Runs requests with sources."""

    slots: SourceSlots

    def __init__(self, slots: SourceSlots, decode: Callable[[np.ndarray], str], config: SchedulerConfig = _LIMITS):
        """As `Scheduler`; no prompt is kept, as what follows it depends on its source."""
        super().__init__(slots, decode, config)

    def _check(self, job: Ticket) -> None:
        self.slots.check_source(job.request.source)
        super()._check(job)

    def _begin(self, run) -> None:
        began = time.monotonic()
        super()._begin(run)
        self.slots.read(run.slot, run.ticket.request.source)
        run.ticket.device_seconds += time.monotonic() - began
