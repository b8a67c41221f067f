"""What the server runs on the device: requests in slots of one cache, each program compiled before the first of them.

A slot holds one request. Prompts are read in pieces of a few sizes, one slot at a time; a decode step is one program
for the first slots, whoever is in them, and for the first tokens of each, so that few requests, or short ones, do not
pay for all the room there is. How a prompt is cut depends on the prompt alone and no row of a program depends on its
neighbours; what differs between two decode programs is what they leave out, which is masked in the larger one. So a
request gets the same tokens in any company. Shapes in names: B slots, C tokens of a piece, V vocabulary, N likeliest
tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcost import sharding, weights
from jaxcost.models import optional
from jaxcost.models.config import ModelConfig
from jaxcost.models.stacks import STACKS, apart, on_one_cpu
from jaxcost.models.transformer import Cache, Transformer, logits, start_cache
from jaxcost.serving.programs import compiled
from jaxcost.serving.sampling import GREEDY, Rows, Sampling, choose


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
    """Tokens that every slot decodes between two looks by the host."""
    decode_slots: tuple[int, ...] = ()
    """Slots that a decode program is for, rising up to `slots`; by default 2, and all. On a CPU, a program
    for 1 has other kernels than those for more, whose last bits may differ."""
    decode_lengths: tuple[int, ...] = ()
    """Tokens of each slot that a decode program is for, rising, besides all of them; by default 128, 512, 2048 ... up
    to half of them. One program is compiled for each of these and each number of slots."""
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


@struct.dataclass
class State:
    """What lives on the device between two programs, each of which takes it and gives it back."""

    cache: Cache
    logits: jax.Array
    """(B, V) float32: of each slot's next token."""
    rows: Rows
    """Settings of each slot, all of them arrays."""
    adapter: jax.Array
    """(B,) int32: adapter of each slot, -1 for none."""


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


class Slots:
    """The cache of all slots, and the programs that fill it."""

    def __init__(self, model: Transformer, params: weights.Params, config: SlotsConfig = SlotsConfig()):
        """Compiles everything; ValueError if the model does not continue texts, or is shorter than asked for."""
        self._check_kind(model.config)
        limit = model.config.max_length - optional.virtual_tokens(params)
        if config.max_length > limit:
            raise ValueError(
                f"engine.max_length is {config.max_length}, more than the {limit} tokens that the model takes; cut it."
            )
        self.model, self.config = model, config
        self.max_length = config.max_length or limit
        self.vocab_size = model.config.vocab_size
        self.top = min(config.top_logprobs, self.vocab_size)
        self.virtual = optional.virtual_tokens(params)
        # A scan wants stacks; where layers are unrolled anyway, each is better off by itself.
        self._apart = all(map(on_one_cpu, jax.tree.leaves(params))) and model.execution.unrolled(2) > 1
        if self._apart:
            params = params | {name: apart(params[name]) for name in STACKS if name in params}
        self.params = params
        self.adapters = _adapters_in(params)
        # A piece may end in padding and a dispatch in tokens that nobody asked for.
        room = self.max_length + max(config.prefill_tokens[-1], config.tokens_per_dispatch)
        whole = room + self.virtual
        self._sizes = config.decode_slots or tuple(sorted({min(2, config.slots), config.slots}))
        lengths = config.decode_lengths or [2**i for i in range(7, whole.bit_length() - 1, 2)]
        self._lengths = (*(length for length in lengths if length < whole), whole)
        self._held = np.zeros((config.slots,), np.int64)
        start = functools.partial(self._start, room=room)
        self.places = _places(params, jax.eval_shape(start, params))
        self.state = jax.jit(start, out_shardings=self.places)(params)
        self._compile()
        self._warm_up()

    def _check_kind(self, config: ModelConfig) -> None:
        if not config.language_model:
            raise ValueError(
                "Slots take a causal model with logits of the vocabulary and no encoder; score other models by "
                "themselves."
            )

    # ---- Programs ----

    def _cache(self, params, room: int) -> Cache:
        """The cache of all slots with nothing in it."""
        return start_cache(self.model, params, self.config.slots, room)

    def _start(self, params, *, room: int) -> State:
        b, v = self.config.slots, self.vocab_size
        base = self._with_adapters(params, jnp.full((b,), -1, jnp.int32))
        rows = Rows(
            temperature_B=jnp.zeros((b,), jnp.float32),
            seed_B=jnp.zeros((b,), jnp.uint32),
            count_B=jnp.zeros((b,), jnp.int32),
            top_k_B=jnp.zeros((b,), jnp.int32),
            top_p_B=jnp.ones((b,), jnp.float32),
            min_p_B=jnp.zeros((b,), jnp.float32),
            penalty_B=jnp.ones((b,), jnp.float32),
            seen_BV=jnp.zeros((b, v), bool),
        )
        none = jnp.full((b,), -1, jnp.int32)
        cache = self._cache(base, room)
        if self._apart:
            cache = cache.replace(key=apart(cache.key), value=apart(cache.value))
        return State(cache, jnp.zeros((b, v), jnp.float32), rows, none)

    def _with_adapters(self, params, adapter_B):
        return weights.choose(params, adapter_B) if self.adapters else params

    def _admit(self, state: State, slot, settings: dict[str, jax.Array], adapter) -> State:
        """The state with a new request's settings in its slot; `settings` has an entry of each array of `Rows`."""
        new = {name: getattr(state.rows, name).at[slot].set(value) for name, value in settings.items()}
        return state.replace(rows=state.rows.replace(**new), adapter=state.adapter.at[slot].set(adapter))

    def _prefill(self, params, state: State, slot, tokens_C, start, count, following_C, *, scored: bool):
        """The state after `count` tokens of a piece from `start` on, and what the model says of those that follow."""
        cut = lambda a: lax.dynamic_slice_in_dim(a, slot, 1, axis=1)  # noqa: E731
        key, value = jax.tree.map(cut, (state.cache.key, state.cache.value))
        row = state.cache.replace(key=key, value=value, length=jnp.reshape(start, (1,)))
        params = self._with_adapters(params, lax.dynamic_slice_in_dim(state.adapter, slot, 1))
        hidden_1CD, row = self.model.apply({"params": params}, tokens_C[None], row)
        last_1D = lax.dynamic_index_in_dim(hidden_1CD, count - 1, axis=1, keepdims=False)
        put = lambda a, new: lax.dynamic_update_slice_in_dim(a, new, slot, axis=1)  # noqa: E731
        key, value = jax.tree.map(put, (state.cache.key, state.cache.value), (row.key, row.value))
        # What padding wrote beyond the row's length is masked, and overwritten as the row grows.
        cache = state.cache.replace(key=key, value=value, length=state.cache.length.at[slot].set(start + count))
        last_1V = logits(self.model.config, params, last_1D)
        state = state.replace(cache=cache, logits=state.logits.at[slot].set(last_1V[0]))
        if not scored:
            return state
        return state, self._scores(logits(self.model.config, params, hidden_1CD[0]), following_C)

    def _decode(self, params, state: State, active_B, scored, *, slots: int, length: int):
        """The state after some tokens of the first slots, and these, (steps, slots), with their log-probabilities if
        `scored`; `length` is how much of the cache they may fill."""
        whole, active_B = state, active_B[:slots]
        cut = lambda a: a[:, :slots, :length]  # noqa: E731
        key, value = jax.tree.map(cut, (state.cache.key, state.cache.value))
        first = lambda a: a[:slots]  # noqa: E731
        cache = state.cache.replace(key=key, value=value, length=first(state.cache.length))
        logits_BV, rows, adapter_B = jax.tree.map(first, (state.logits, state.rows, state.adapter))
        params = self._with_adapters(params, adapter_B)

        def one(state: State, _):
            tokens_B = _chosen(state.rows, state.logits, active_B)
            none = (jnp.zeros(tokens_B.shape, jnp.float32), *self._no_top(tokens_B.shape))
            scores = lax.cond(scored, lambda: self._scores(state.logits, tokens_B), lambda: none)
            hidden_B1D, cache = self.model.apply({"params": params}, tokens_B[:, None], state.cache)
            # Who is not active (free, or its prompt half read) stays where it is.
            cache = cache.replace(length=jnp.where(active_B, cache.length, state.cache.length))
            new_BV = logits(self.model.config, params, hidden_B1D[:, 0])
            new_BV = jnp.where(active_B[:, None], new_BV, state.logits)
            rows = state.rows.saw(tokens_B, active_B)
            return state.replace(cache=cache, logits=new_BV, rows=rows), (tokens_B, scores)

        steps = self.config.tokens_per_dispatch
        state, made = lax.scan(one, State(cache, logits_BV, rows, adapter_B), length=steps)
        # What was written for who is not active, which may hold more than `length`, is left out.
        keep = lambda old, new: jnp.where(active_B.reshape(1, slots, 1, 1, 1), new, old)  # noqa: E731
        key, value = jax.tree.map(keep, (key, value), (state.cache.key, state.cache.value))
        state = state.replace(cache=state.cache.replace(key=key, value=value))
        put = lambda a, new: lax.dynamic_update_slice(a, new, (0,) * a.ndim)  # noqa: E731
        return jax.tree.map(put, whole, state), made

    def _scores(self, logits_BV, tokens_B):
        """Log-probabilities of tokens, (B,), and the N likeliest, (B, N), with their ids."""
        logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
        own_B = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]
        top_BN, ids_BN = lax.top_k(logprobs_BV, self.top)
        return own_B, top_BN, ids_BN.astype(jnp.int32)

    def _no_top(self, shape):
        return jnp.zeros((*shape, self.top), jnp.float32), jnp.zeros((*shape, self.top), jnp.int32)

    def _compile(self) -> None:
        """Makes every program that serving runs."""
        number, piece = np.int32(0), lambda size: np.zeros((size,), np.int32)
        rows = self.state.rows
        settings = {f.name: np.zeros((a := getattr(rows, f.name)).shape[1:], a.dtype) for f in dataclasses.fields(Rows)}
        self._admit_program = compiled(self._admit, 0, self.places, self.state, number, settings, number)
        self._prefill_programs, self._scoring_programs = {}, {}
        for size in self.config.prefill_tokens:
            where = (number, piece(size), number, number, piece(size))
            for scored, programs in ((False, self._prefill_programs), (True, self._scoring_programs)):
                prefill, made = functools.partial(self._prefill, scored=scored), (self.places, None)
                programs[size] = compiled(prefill, 1, made if scored else self.places, self.params, self.state, *where)
        active = np.zeros((self.config.slots,), bool)
        self._decode_programs = {}
        for slots, length in itertools.product(self._sizes, self._lengths):
            decode = functools.partial(self._decode, slots=slots, length=length)
            self._decode_programs[slots, length] = compiled(
                decode, 1, (self.places, None), self.params, self.state, active, np.bool_(False)
            )

    def _warm_up(self) -> None:
        """Runs every program once: a jitted function that stands in for one compiles when first called (`compiled`).

        No slot is taken, and what is written is overwritten.
        """
        for size in self.config.prefill_tokens:
            for scored in (False, True):
                self.admit(0, GREEDY, np.zeros(1, np.int32))
                self.prefill(0, np.zeros(size, np.int32), 0, size, scored)
        nobody = np.zeros(self.config.slots, bool)
        for program in self._decode_programs.values():
            self.state, _ = program(self.params, self.state, nobody, np.bool_(False))

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
        where = (np.int32(slot), piece, np.int32(start + self.virtual), np.int32(count), following)
        self._held[slot] = start + self.virtual + count
        if not scored:
            self.state = self._prefill_programs[size](self.params, self.state, *where)
            jax.block_until_ready(self.state.logits)
            return None
        self.state, scores = self._scoring_programs[size](self.params, self.state, *where)
        return Scored(following[:count], *(np.asarray(a)[:count] for a in scores))

    def decode(self, active: np.ndarray, scored: bool = False) -> Scored:
        """The next tokens of the first slots, (n, steps), of which the last active one is.

        `active` is bool (B,), and what others get means nothing.
        """
        [places] = np.nonzero(active)
        self._held[places] += self.config.tokens_per_dispatch
        slots = next(size for size in self._sizes if size > places.max(initial=0))
        length = next(size for size in self._lengths if size >= self._held[places].max(initial=0))
        program = self._decode_programs[slots, length]
        self.state, (tokens, scores) = program(self.params, self.state, active, np.bool_(scored))
        return Scored(*(np.swapaxes(np.asarray(a), 0, 1) for a in (tokens, *scores)))


def _chosen(rows: Rows, logits_BV: jax.Array, active_B: jax.Array) -> jax.Array:
    """As `choose`, int32 (B,), by the cheapest of three ways that does what the active rows ask for."""
    sorts = jnp.any(active_B & ((rows.top_k_B > 0) | (rows.top_p_B < 1)))
    bends = jnp.any(active_B & ((rows.temperature_B > 0) | (rows.penalty_B != 1)))
    ways = [Rows(), rows.replace(top_k_B=None, top_p_B=None), rows]
    branches = [lambda way=way: choose(way, logits_BV)[0] for way in ways]
    return lax.switch(jnp.where(sorts, 2, bends.astype(jnp.int32)), branches)


def _places(params: weights.Params, state: State) -> Any:
    """Where the state of sharded weights lives: heads of the cache like those of the weights, all else everywhere.

    None on one device.
    """
    found = jax.tree.leaves(params)[0].sharding
    if not isinstance(found, NamedSharding) or found.mesh.size == 1:
        return None

    def of_cache(a):
        spec = sharding.mesh_spec(PartitionSpec(None, None, None, "kv_heads", None), found.mesh.shape)
        ways = found.mesh.shape.get(spec[3], 1)
        return NamedSharding(found.mesh, spec if a.shape[3] % ways == 0 else PartitionSpec())

    places = jax.tree.map(lambda _: sharding.replicated(found.mesh), state)
    key, value = jax.tree.map(of_cache, (state.cache.key, state.cache.value))
    return places.replace(cache=places.cache.replace(key=key, value=value))


def _adapters_in(params: weights.Params) -> int:
    """How many adapters a row may choose from; 0 without `Adapters` in the tree."""
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, weights.Adapters))
    counts = [node.a.shape[-3] for node in nodes if isinstance(node, weights.Adapters)]
    return min(counts, default=0)
