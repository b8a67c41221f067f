"""Keys and values of prompts that were read, kept for prompts that begin with the same tokens.

They are kept in pieces of the largest size in which prompts are read, as they came out of the very program that would
read them again, so that a hit gives the same bits. Source of the idea of keeping blocks by a hash of all that stands
before them: Kwon et al. 2023 (vLLM), arXiv:2309.06180.
"""

from __future__ import annotations

import collections
import functools
import hashlib

import jax
import numpy as np
from jax import lax

from jaxcost.serving.programs import compiled
from jaxcost.serving.slots import Slots
from jaxcost.serving.state import State


class PrefixCache:
    """Pieces of prompts by what they hold, the least recently used of which are dropped first."""

    def __init__(self, slots: Slots, limit_bytes: int):
        """Compiles the two programs; ValueError if there is no room for a single piece."""
        self._slots, self._size = slots, slots.config.prefill_tokens[-1]
        self._held: collections.OrderedDict[bytes, object] = collections.OrderedDict()
        self.queried_tokens = self.hit_tokens = 0
        state, number = slots.state, np.int32(0)
        self._read = compiled(self._cut, (), None, state, number, number)
        piece = self._read(state, number, number)
        self._write = compiled(self._paste, 0, slots.places, state, piece, number, number)
        piece_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(piece))
        self._limit = limit_bytes // piece_bytes
        if not self._limit:
            raise ValueError(
                f"A prefix cache of {limit_bytes} bytes does not hold a single piece of {piece_bytes}; give more, or 0 "
                "for none."
            )

    def _cut(self, state: State, slot, start):
        """Keys and values of a piece in every cache, (L, 1, size, K, ...)."""

        def cut(begin, a):
            row = lax.dynamic_slice_in_dim(a, slot, 1, axis=1)
            return lax.dynamic_slice_in_dim(row, begin, self._size, axis=2)

        each = zip(state.caches, state.kv, strict=True)
        return tuple(jax.tree.map(functools.partial(cut, start + cache.virtual), kv) for cache, kv in each)

    def _paste(self, state: State, piece, slot, start) -> State:
        def paste(begin, a, new):
            return lax.dynamic_update_slice(a, new, (0, slot, begin, *(0,) * (a.ndim - 3)))

        each = zip(state.caches, state.kv, piece, strict=True)
        kv = tuple(jax.tree.map(functools.partial(paste, start + cache.virtual), *both) for cache, *both in each)
        return state.with_kv(kv).with_length(slot, start + self._size)

    def load(self, slot: int, prompt: np.ndarray, adapter: int) -> int:
        """Puts the longest known beginning of a prompt into a slot and says how many tokens it has.

        At least one token is left to read, because what comes next is not kept.
        """
        self.queried_tokens += len(prompt)
        known = 0
        for key in self._keys(prompt[:-1], adapter):
            if key not in self._held:
                break
            self._held.move_to_end(key)
            self._slots.state = self._write(self._slots.state, self._held[key], np.int32(slot), np.int32(known))
            known += self._size
        self.hit_tokens += known
        return known

    def keep(self, slot: int, prompt: np.ndarray, start: int, count: int, adapter: int) -> None:
        """Keeps a piece that was just read, if it is a whole one."""
        if count < self._size:
            return
        key = self._keys(prompt[: start + count], adapter)[-1]
        if key not in self._held:
            self._held[key] = self._read(self._slots.state, np.int32(slot), np.int32(start))
        self._held.move_to_end(key)
        while len(self._held) > self._limit:
            self._held.popitem(last=False)

    def _keys(self, prompt: np.ndarray, adapter: int) -> list[bytes]:
        """A key for each whole piece of a prompt, of all the tokens up to its end."""
        digest, keys = hashlib.sha256(str(adapter).encode()), []
        for end in range(self._size, len(prompt) + 1, self._size):
            digest.update(np.asarray(prompt[end - self._size : end], np.int32).tobytes())
            keys.append(digest.digest())
        return keys
