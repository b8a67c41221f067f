"""What lives on the device between two programs of the slots: caches, logits and settings, with a row for each slot.

Shapes in names: B slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxcost import sharding, weights
from jaxcost.models.stacks import STACKS, apart, on_one_cpu
from jaxcost.models.transformer import Cache, Transformer
from jaxcost.serving.sampling import Rows


@struct.dataclass
class State:
    """Each program takes it and gives it back."""

    cache: Cache
    """The model's."""
    logits: jax.Array
    """(B, V) float32: of each slot's next token, with a draft those of the first alone."""
    rows: Rows
    """Settings of each slot, all of them arrays."""
    adapter: jax.Array
    """(B,) int32: adapter of each slot, -1 for none."""
    draft: Cache | None = None
    """That of the draft, if there is one."""
    last: jax.Array | None = None
    """(B,) int32, with a draft: the last token of each slot, which is in no cache yet; -1 before the first."""

    @property
    def caches(self) -> tuple[Cache, ...]:
        """The model's, and the draft's behind it."""
        return (self.cache,) if self.draft is None else (self.cache, self.draft)

    def with_caches(self, caches: Iterable[Cache]) -> State:
        """The same with others."""
        cache, *draft = caches
        return self.replace(cache=cache, draft=draft[0] if draft else None)

    @property
    def kv(self) -> tuple:
        """Keys and values of every cache, whose arrays are (L, B, S, ...)."""
        return tuple((cache.key, cache.value) for cache in self.caches)

    def with_kv(self, kv: tuple) -> State:
        """The same with others."""
        both = zip(self.caches, kv, strict=True)
        return self.with_caches(cache.replace(key=key, value=value) for cache, (key, value) in both)

    def with_length(self, slot: jax.Array, length: jax.Array) -> State:
        """The same where a slot holds so many tokens, virtual ones not counted, in every cache."""

        def held(cache: Cache) -> Cache:
            return cache.replace(length=cache.length.at[slot].set(length + cache.virtual))

        return self.with_caches(map(held, self.caches))

    def first(self, slots: int, length: int) -> State:
        """The first slots alone, and of each the first `length` tokens."""

        def of_cache(cache: Cache) -> Cache:
            key, value = jax.tree.map(lambda a: a[:, :slots, :length], (cache.key, cache.value))
            return cache.replace(key=key, value=value, length=cache.length[:slots])

        rest = jax.tree.map(lambda a: a[:slots], self.replace(cache=None, draft=None))
        return rest.with_caches(map(of_cache, self.caches))

    def put_first(self, part: State) -> State:
        """The same with another state of its first slots, as `first` gives it."""
        return jax.tree.map(lambda a, new: lax.dynamic_update_slice(a, new, (0,) * a.ndim), self, part)


def empty_state(caches: Iterable[Cache], slots: int, vocab_size: int) -> State:
    """So many slots that hold nothing but what their caches do: the model's, and a draft's if there is one."""
    b, v = slots, vocab_size
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
    state = State(None, jnp.zeros((b, v), jnp.float32), rows, none).with_caches(caches)
    return state if state.draft is None else state.replace(last=none)


def cache_as_served(params: weights.Params, cache: Cache) -> Cache:
    """A cache as the layers of weights that `as_served` gave take it."""
    if any(isinstance(params.get(name), tuple) for name in STACKS):
        return cache.replace(key=apart(cache.key), value=apart(cache.value))
    return cache


def as_served(model: Transformer, params: weights.Params) -> weights.Params:
    """The weights as programs of the slots take them.

    A scan wants stacks; where layers are unrolled anyway, each is better off by itself.
    """
    if not all(map(on_one_cpu, jax.tree.leaves(params))) or model.execution.unrolled(2) == 1:
        return params
    return params | {name: apart(params[name]) for name in STACKS if name in params}


def beside(params: weights.Params, draft_params: weights.Params) -> weights.Params:
    """A draft's weights where the model's are: whole on each of their devices."""
    place = jax.tree.leaves(params)[0].sharding
    if isinstance(place, NamedSharding):
        place = sharding.replicated(place.mesh)
    return jax.device_put(draft_params, place)


def places_of(params: weights.Params, state: State) -> Any:
    """Where the state of sharded weights lives: heads of the model's cache like those of the weights, all else
    everywhere.

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
    own, *rest = places.kv
    return places.with_kv((jax.tree.map(of_cache, (state.cache.key, state.cache.value)), *rest))
