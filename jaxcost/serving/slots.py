"""What the server runs on the device: requests in slots of one cache, each program compiled before the first of them.

A slot holds one request. Prompts are read in pieces of a few sizes, one slot at a time; a decode step is one program
for the first slots, whoever is in them, and for the first tokens of each, so that few requests, or short ones, do not
pay for all the room there is. How a prompt is cut depends on the prompt alone, and no row of a program depends on its
neighbours. What differs between two decode programs is what they leave out, which is masked in the larger one, and how
the compiler has them round: those that round otherwise than the largest are not used (`SlotsConfig.exact`). So a
request gets the same tokens in any company. With a draft, a decode step is a round of `speculative.play_round`, and
both models read a prompt. Shapes in names: B slots, C tokens of a piece, V vocabulary, N likeliest tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcost import weights
from jaxcost.models import optional
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Cache, Transformer, logits, start_cache
from jaxcost.serving.programs import compiled
from jaxcost.serving.sampling import GREEDY, Rows, Sampling, by_need, choose
from jaxcost.serving.speculative import Draft, check_draft, play_round
from jaxcost.serving.state import State, as_served, beside, cache_as_served, empty_state, places_of

_LOGGER = logging.getLogger(__name__)
_PROBED_TOKENS = 16
"""By which decode programs are told apart: where they round differently, some of these tokens' numbers are others."""


@dataclasses.dataclass(frozen=True)
class SlotsConfig:
    """How many requests run at once, and in what pieces."""

    slots: int = 8
    """Requests that run at once; others wait."""
    max_length: int = 0
    """Tokens of prompt and output that a slot has room for; 0 is the model's own `max_length`."""
    prefill_tokens: tuple[int, ...] = (32, 128)
    """Sizes of the pieces in which prompts are read: as many of the largest as fit, and the smallest that takes the
    rest. One program is compiled for each."""
    tokens_per_dispatch: int = 4
    """Tokens that every slot decodes between two looks by the host; with a draft it looks after each round."""
    decode_slots: tuple[int, ...] = ()
    """Slots that a decode program is for, rising up to `slots`; by default 2, and all."""
    decode_lengths: tuple[int, ...] = ()
    """Tokens of each slot that a decode program is for, rising, besides all of them; by default 128, 512, 2048 ... up
    to half of them. One program is compiled for each of these and each number of slots."""
    exact: bool = True
    """Use only those decode programs whose numbers have the bits of the largest one's, which is found out at the start,
    so that an answer does not depend on how many others there are or how long they are. Without it, few or short
    requests are always decoded faster, and where two tokens are as likely but for rounding, another may be taken."""
    top_logprobs: int = 20
    """Likeliest tokens that a request may ask the log-probabilities of."""

    def __post_init__(self):
        for field in ("slots", "tokens_per_dispatch"):
            if getattr(self, field) < 1:
                raise ValueError(f"engine.{field} is {getattr(self, field)}; it must be at least 1.")
        for field in ("max_length", "top_logprobs"):
            if getattr(self, field) < 0:
                raise ValueError(f"engine.{field} is {getattr(self, field)}; it cannot be negative.")
        for field in ("prefill_tokens", "decode_slots", "decode_lengths"):
            sizes = getattr(self, field)
            if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
                raise ValueError(f"engine.{field} is {sizes}; give rising positive numbers, such as 32 128.")
        if not self.prefill_tokens:
            raise ValueError("engine.prefill_tokens is empty; give at least one size, such as 128.")
        if self.decode_slots and self.decode_slots[-1] != self.slots:
            raise ValueError(f"engine.decode_slots is {self.decode_slots}; end it with engine.slots ({self.slots}).")


@dataclasses.dataclass(frozen=True)
class Scored:
    """Tokens with their log-probabilities under the model, before temperature and the rest; numpy arrays."""

    tokens: np.ndarray
    """(..., n) int32."""
    logprobs: np.ndarray
    """(..., n) float32: of the tokens themselves."""
    top_logprobs: np.ndarray
    """(..., n, N) float32, falling."""
    top_tokens: np.ndarray
    """(..., n, N) int32."""

    def at(self, place: Any) -> Scored:
        """Those at a place of the first axis, or at several."""
        return Scored(*(getattr(self, field.name)[place] for field in dataclasses.fields(Scored)))


class Slots:
    """The cache of all slots, and the programs that fill it."""

    def __init__(
        self,
        model: Transformer,
        params: weights.Params,
        config: SlotsConfig = SlotsConfig(),
        draft: Draft | None = None,
    ):
        """Compiles everything.

        Raises:
          ValueError: the model does not continue texts, it or the draft is shorter than asked for, or the draft does
            not fit it.
        """
        self._check_kind(model.config)
        limit = _limit(model, params)
        if config.max_length > limit:
            raise ValueError(
                f"engine.max_length is {config.max_length}, more than the {limit} tokens that the model takes; cut it."
            )
        self.model, self.config, self.draft = model, config, draft
        self.max_length = config.max_length or limit
        self.vocab_size = model.config.vocab_size
        self.top = min(config.top_logprobs, self.vocab_size)
        self.params = as_served(model, params)
        self.adapters = _adapters_in(params)
        self._models, self._all_params, self._ahead = (model,), (self.params,), config.tokens_per_dispatch
        if draft is not None:
            self._check_draft()
            self._models, self._ahead = (model, draft.model), draft.tokens + 1
            self._all_params = (self.params, as_served(draft.model, beside(params, draft.params)))
        # A piece may end in padding and a dispatch in tokens that nobody asked for.
        room = self.max_length + max(config.prefill_tokens[-1], self._ahead)
        self._virtual = max(map(optional.virtual_tokens, self._all_params))
        whole = room + self._virtual
        self._sizes = config.decode_slots or tuple(sorted({min(2, config.slots), config.slots}))
        lengths = config.decode_lengths or [2**i for i in range(7, whole.bit_length() - 1, 2)]
        # One that takes no more than virtual tokens and a dispatch is of no use to any prompt.
        self._lengths = (*(length for length in lengths if self._virtual + self._ahead < length < whole), whole)
        self._held = np.zeros((config.slots,), np.int64)
        start = functools.partial(self._start, room=room)
        self.places = places_of(params, jax.eval_shape(start, self._all_params))
        self.state = jax.jit(start, out_shardings=self.places)(self._all_params)
        self._compile()
        self._warm_up()
        self._compile_decode()

    def _check_kind(self, config: ModelConfig) -> None:
        if not config.language_model:
            raise ValueError(
                "Slots take a causal model with logits of the vocabulary and no encoder; score other models by "
                "themselves."
            )

    def _check_draft(self) -> None:
        check_draft(self.model, self.draft.model, self.draft.tokens)
        limit = _limit(self.draft.model, self.draft.params)
        if limit < self.max_length:
            raise ValueError(
                f"The draft takes {limit} tokens, fewer than the {self.max_length} of a slot; set engine.max_length to "
                "so many, or take a longer draft."
            )

    # ---- Programs ----

    def _cache(self, params, room: int) -> Cache:
        """The cache of all slots with nothing in it."""
        return start_cache(self.model, params, self.config.slots, room)

    def _start(self, params, *, room: int) -> State:
        own, *rest = params = self._with_adapters(params, jnp.full((self.config.slots,), -1, jnp.int32))
        caches = [self._cache(own, room)]
        caches += [start_cache(self.draft.model, one, self.config.slots, room) for one in rest]
        return empty_state(map(cache_as_served, params, caches), self.config.slots, self.vocab_size)

    def _with_adapters(self, params, adapter_B):
        """The weights of the model, whose rows choose an adapter, and of the draft, which has none."""
        own, *rest = params
        return (weights.choose(own, adapter_B) if self.adapters else own, *rest)

    def _admit(self, state: State, slot, settings: dict[str, jax.Array], adapter) -> State:
        """The state with a new request's settings in its slot; `settings` has an entry of each array of `Rows`."""
        new = {name: getattr(state.rows, name).at[slot].set(value) for name, value in settings.items()}
        return state.replace(rows=state.rows.replace(**new), adapter=state.adapter.at[slot].set(adapter))

    def _prefill(self, params, state: State, slot, tokens_C, start, count, following_C, *, scored: bool):
        """The state after `count` tokens of a piece from `start` on, and what the model says of those that follow."""
        params = self._with_adapters(params, lax.dynamic_slice_in_dim(state.adapter, slot, 1))
        each = zip(self._models, params, state.caches, strict=True)
        read = [_read(model, own, cache, slot, tokens_C, start) for model, own, cache in each]
        hidden_1CD = read[0][0]
        # What padding wrote beyond the row's length is masked, and overwritten as the row grows.
        state = state.with_kv(tuple(kv for _, kv in read)).with_length(slot, start + count)
        last_1D = lax.dynamic_index_in_dim(hidden_1CD, count - 1, axis=1, keepdims=False)
        own, *_ = params
        last_1V = logits(self.model.config, own, last_1D)
        state = state.replace(logits=state.logits.at[slot].set(last_1V[0]))
        if self.draft is not None:
            state = state.replace(last=state.last.at[slot].set(-1))
        if not scored:
            return state
        return state, self._scores(logits(self.model.config, own, hidden_1CD[0]), following_C)

    def _decode(self, params, state: State, active_B, scored, *, slots: int, length: int):
        """The state after some tokens of the first slots, and these, (slots, steps), with their log-probabilities if
        `scored`; `length` is how much of the cache they may fill."""
        active_B, before = active_B[:slots], state.first(slots, length)
        params = self._with_adapters(params, before.adapter)
        step = self._one_by_one if self.draft is None else self._round
        after, made = step(params, before, active_B, scored)
        # What was written for who is not active, which may hold more than `length`, is left out.
        keep = lambda old, new: jnp.where(active_B.reshape(1, slots, 1, 1, 1), new, old)  # noqa: E731
        return state.put_first(after.with_kv(jax.tree.map(keep, before.kv, after.kv))), made

    def _one_by_one(self, params, state: State, active_B, scored):
        """Each token from the logits after the one before it."""
        [own] = params

        def one(state: State, _):
            tokens_B = self._chosen(state, active_B)
            scores = self._scores_if(scored, state.logits, tokens_B)
            hidden_B1D, cache = self.model.apply({"params": own}, tokens_B[:, None], state.cache)
            # Who is not active (free, or its prompt half read) stays where it is.
            cache = cache.replace(length=jnp.where(active_B, cache.length, state.cache.length))
            new_BV = logits(self.model.config, own, hidden_B1D[:, 0])
            new_BV = jnp.where(active_B[:, None], new_BV, state.logits)
            rows = state.rows.saw(tokens_B, active_B)
            return state.replace(cache=cache, logits=new_BV, rows=rows), (tokens_B, *scores)

        state, made = lax.scan(one, state, length=self.config.tokens_per_dispatch)
        return state, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), made)

    def _round(self, params, state: State, active_B, scored):
        """The first token from the logits after the prompt, if there is none yet, and a round with the draft; -1 where
        there is no token."""
        first_B = active_B & (state.last < 0)
        chosen_B = self._chosen(state, first_B)
        last_B = jnp.where(state.last < 0, chosen_B, state.last)
        rows = state.rows.saw(chosen_B, first_B)
        made = play_round(self._models, params, state.caches, last_B, rows, active_B, self.draft.tokens)
        tokens_BT = jnp.concatenate([jnp.where(first_B, chosen_B, -1)[:, None], made.tokens_BT], axis=1)
        logits_BTV = jnp.concatenate([state.logits[:, None], made.logits_BTV], axis=1)
        scores = self._scores_if(scored, logits_BTV, jnp.maximum(tokens_BT, 0))
        last_B = jnp.where(active_B, made.last_B, state.last)
        return state.with_caches(made.caches).replace(rows=made.rows, last=last_B), (tokens_BT, *scores)

    def _chosen(self, state: State, active_B):
        """The next token of each slot, int32 (B,), which means something where it is active."""
        return by_need(state.rows, active_B, lambda rows: choose(rows, state.logits)[0])

    def _scores(self, logits, tokens):
        """Log-probabilities of tokens (...) after logits (..., V), and the N likeliest, (..., N), with their ids."""
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        own = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
        top, ids = lax.top_k(logprobs, self.top)
        return own, top, ids.astype(jnp.int32)

    def _scores_if(self, scored, logits, tokens):
        """The same where they are asked for, or zeros."""
        shape = (*tokens.shape, self.top)
        none = (jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32))
        return lax.cond(scored, lambda: self._scores(logits, tokens), lambda: none)

    def _compile(self) -> None:
        """Makes every program that serving runs but those that decode."""
        number, piece = np.int32(0), lambda size: np.zeros((size,), np.int32)
        rows = self.state.rows
        settings = {f.name: np.zeros((a := getattr(rows, f.name)).shape[1:], a.dtype) for f in dataclasses.fields(Rows)}
        self._admit_program = compiled(self._admit, 0, self.places, self.state, number, settings, number)
        self._prefill_programs, self._scoring_programs = {}, {}
        for size in self.config.prefill_tokens:
            where = (number, piece(size), number, number, piece(size))
            for scored, programs in ((False, self._prefill_programs), (True, self._scoring_programs)):
                prefill, made = functools.partial(self._prefill, scored=scored), (self.places, None)
                places = made if scored else self.places
                programs[size] = compiled(prefill, 1, places, self._all_params, self.state, *where)

    def _warm_up(self) -> None:
        """Runs each of them once: a jitted function that stands in for one compiles when first called (`compiled`).

        No slot is taken, and what is written is overwritten.
        """
        for size in self.config.prefill_tokens:
            for scored in (False, True):
                self.admit(0, GREEDY, np.zeros(1, np.int32))
                self.prefill(0, np.zeros(size, np.int32), 0, size, scored)

    def _compile_decode(self) -> None:
        """Makes the programs that decode; if they are to be exact, without those that round otherwise than the largest.

        Where one does, shorter ones for as many slots are not tried.
        """
        largest = (self._sizes[-1], self._lengths[-1])
        self._decode_programs = {largest: self._decode_program(*largest)}
        wanted, left = self._probed(*largest), []
        for slots in self._sizes:
            for length in reversed(self._lengths):
                if (slots, length) == largest:
                    continue
                self._decode_programs[slots, length] = self._decode_program(slots, length)
                if not np.array_equal(self._probed(slots, length), wanted) and self.config.exact:
                    del self._decode_programs[slots, length]
                    left.append(f"{slots} slots of {length} tokens")
                    break
        if left:
            _LOGGER.info(
                "Decode programs for %s or fewer round otherwise than the largest and are not used; with "
                "--engine.no-exact they are, and answers may depend on their company.", ", ".join(left)
            )  # fmt: skip

    def _decode_program(self, slots: int, length: int):
        decode = functools.partial(self._decode, slots=slots, length=length)
        active = np.zeros((self.config.slots,), bool)
        return compiled(decode, 1, (self.places, None), self._all_params, self.state, active, np.bool_(False))

    def _probed(self, slots: int, length: int) -> np.ndarray:
        """What a decode program says of some tokens of its first slots, as bits."""
        rows, room = self._sizes[0], self._lengths[0] - self._virtual
        tokens = max(1, min(self.config.prefill_tokens[0], (room - self._ahead) // 2))
        prompts = np.arange(rows * tokens, dtype=np.int32).reshape(rows, tokens) * 7919 % self.vocab_size
        for slot, prompt in enumerate(prompts):
            self.admit(slot, GREEDY, prompt)
            for start, count in self.pieces(tokens):
                self.prefill(slot, prompt, start, count)
        active = np.arange(self.config.slots) < rows
        found = []
        for _ in range(max(1, min(_PROBED_TOKENS, room - tokens) // self._ahead)):
            self.state, made = self._decode_programs[slots, length](
                self._all_params, self.state, active, np.bool_(True)
            )
            found += [np.asarray(a)[:rows].view(np.int32).ravel() for a in made]
        return np.concatenate([*found, np.asarray(self.state.logits[:rows]).view(np.int32).ravel()])

    # ---- What the scheduler calls ----

    def pieces(self, length: int, start: int = 0) -> list[tuple[int, int]]:
        """How a prompt is read: the start and the tokens of each piece, from a multiple of the largest size on."""
        largest = self.config.prefill_tokens[-1]
        return [(i, min(largest, length - i)) for i in range(start, length, largest)]

    def admit(self, slot: int, sampling: Sampling, prompt: np.ndarray, adapter: int = -1) -> None:
        """Gives a slot to a request; its prompt is yet to be read."""
        draws = sampling.temperature > 0
        seen_V = np.zeros((self.vocab_size,), bool)
        if sampling.repetition_penalty != 1:
            seen_V[prompt] = True
        settings = {
            "temperature_B": np.float32(sampling.temperature),
            "seed_B": np.uint32(sampling.seed),
            "count_B": np.int32(0),
            "top_k_B": np.int32(min(sampling.top_k, self.vocab_size) if draws else 0),
            "top_p_B": np.float32(sampling.top_p if draws else 1),
            "min_p_B": np.float32(sampling.min_p if draws else 0),
            "penalty_B": np.float32(sampling.repetition_penalty),
            "seen_BV": seen_V,
        }
        self.state = self._admit_program(self.state, np.int32(slot), settings, np.int32(adapter))

    def prefill(self, slot: int, prompt: np.ndarray, start: int, count: int, scored: bool = False) -> Scored | None:
        """Reads `count` tokens of a slot's prompt from `start` on.

        Returns:
          If asked for, what the model says of the tokens behind those, (count,), of which the last of a prompt has
          none and is scored as if it were 0.
        """
        size = next(size for size in self.config.prefill_tokens if size >= count)
        piece, following = np.zeros((2, size), np.int32)
        piece[:count] = prompt[start : start + count]
        behind = prompt[start + 1 : start + count + 1]
        following[: len(behind)] = behind
        where = (np.int32(slot), piece, np.int32(start), np.int32(count), following)
        self._held[slot] = self._virtual + start + count
        if not scored:
            self.state = self._prefill_programs[size](self._all_params, self.state, *where)
            jax.block_until_ready(self.state.logits)
            return None
        self.state, scores = self._scoring_programs[size](self._all_params, self.state, *where)
        return Scored(following[:count], *(np.asarray(a)[:count] for a in scores))

    def decode(self, active: np.ndarray, scored: bool = False) -> Scored:
        """The next tokens of the first slots, (n, steps), of which the last active one is.

        `active` is bool (B,), and what others get means nothing. With a draft, a slot has -1 where there is no token:
        before all but its first round, and behind what the round gave.
        """
        [places] = np.nonzero(active)
        needed = self._held[places].max(initial=0) + self._ahead
        last = places.max(initial=0)
        fitting = (each for each in self._decode_programs if each[0] > last and each[1] >= needed)
        program = self._decode_programs[min(fitting, key=math.prod)]
        self.state, made = program(self._all_params, self.state, active, np.bool_(scored))
        made = Scored(*map(np.asarray, made))
        self._held[places] += np.sum(made.tokens[places] >= 0, axis=1)
        return made

    def kept(self, tokens: np.ndarray) -> int:
        """How many of the draft's proposals are among a slot's tokens of a round, (steps,) of `decode`."""
        return int(np.sum(tokens[1:] >= 0)) - 1


def _read(model: Transformer, params: weights.Params, cache: Cache, slot, tokens_C, start):
    """Hidden states (1, C, D) of a slot's tokens from `start` on, and the keys and values of all slots after them."""
    cut = lambda a: lax.dynamic_slice_in_dim(a, slot, 1, axis=1)  # noqa: E731
    key, value = jax.tree.map(cut, (cache.key, cache.value))
    row = cache.replace(key=key, value=value, length=jnp.reshape(start + cache.virtual, (1,)))
    hidden_1CD, row = model.apply({"params": params}, tokens_C[None], row)
    put = lambda a, new: lax.dynamic_update_slice_in_dim(a, new, slot, axis=1)  # noqa: E731
    return hidden_1CD, jax.tree.map(put, (cache.key, cache.value), (row.key, row.value))


def _limit(model: Transformer, params: weights.Params) -> int:
    """Tokens that a model takes beside its virtual ones."""
    return model.config.max_length - optional.virtual_tokens(params)


def _adapters_in(params: weights.Params) -> int:
    """How many adapters a row may choose from; 0 without `Adapters` in the tree."""
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, weights.Adapters))
    counts = [node.a.shape[-3] for node in nodes if isinstance(node, weights.Adapters)]
    return min(counts, default=0)
