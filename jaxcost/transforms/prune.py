"""Pruning: masks over weights, chosen by magnitude, at once or gradually while training."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcost import weights
from jaxcost.transforms.base import Transform, matrix_shape
from jaxcost.weights import Frozen, Lora, LowRank, Masked, QuantAware, Quantized


@dataclasses.dataclass(frozen=True)
class Gradual:
    """A cubic rise of the sparsity while training. Source: Zhu and Gupta 2017, arXiv:1710.01878, equation 1."""

    end_step: int
    """The step at which the final sparsity is reached."""
    begin_step: int = 0
    """The step at which pruning begins."""
    every_steps: int = 10
    """Steps between two updates of the mask."""
    initial_sparsity: float = 0.0
    """Share pruned at `begin_step`."""

    def __post_init__(self):
        if not 0 <= self.begin_step < self.end_step:
            raise ValueError(f"prune: end_step ({self.end_step}) must come after begin_step ({self.begin_step}).")
        if self.every_steps < 1:
            raise ValueError(f"prune: every_steps is {self.every_steps}; it must be at least 1.")
        _check_sparsity("initial_sparsity", self.initial_sparsity)

    def sparsity(self, step: jax.Array, final: float) -> jax.Array:
        """The share that is pruned after `step`: s_f + (s_i - s_f)(1 - progress)^3."""
        progress = jnp.clip((step - self.begin_step) / (self.end_step - self.begin_step), 0.0, 1.0)
        return final + (self.initial_sparsity - final) * (1.0 - progress) ** 3

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether the mask moves after `step`."""
        inside = (step >= self.begin_step) & (step <= self.end_step)
        return inside & (((step - self.begin_step) % self.every_steps == 0) | (step == self.end_step))


@dataclasses.dataclass(frozen=True)
class prune(Transform):
    """Masks the weights of smallest magnitude, each matrix of a stack for itself.

    Pruned weights stay pruned: a later, sparser mask is a part of the earlier one. A mask saves neither FLOPs nor
    memory while it is a mask.
    """

    sparsity: float = 0.5
    """Share of each matrix that is pruned, in [0, 1); the number is rounded to the nearest. Unused by N:M patterns."""
    pattern: str = "unstructured"
    """`unstructured`, or N:M as in `2:4`: the N largest of every M neighbours along the contracted axis are kept."""
    gradual: Gradual | None = None
    """Raise the sparsity while training instead of at once; unstructured only."""

    def __post_init__(self):
        _check_sparsity("sparsity", self.sparsity)
        if self.pattern != "unstructured":
            n, m = self._n_of_m()
            if not 0 < n < m:
                raise ValueError(f"prune: the pattern {self.pattern} must keep fewer than it has, as 2:4 does.")
            if self.gradual is not None:
                raise ValueError("prune: a gradual schedule needs pattern='unstructured'; N:M masks are made at once.")

    def apply(self, path: str, w: Any, key: jax.Array) -> Any:
        if isinstance(w, Lora):
            return w.replace(base=self.apply(path, w.base, key))
        if isinstance(w, LowRank):
            return w.replace(u=self.apply(f"{path}/u", w.u, key), v=self.apply(f"{path}/v", w.v, key))
        if isinstance(w, QuantAware | Frozen):
            return w.replace(weight=self.apply(path, w.weight, key))
        if isinstance(w.weight if isinstance(w, Masked) else w, Quantized):
            raise ValueError(f"prune: {path} is quantised already; prune before quantising.")
        shape = matrix_shape(path, w)
        dense, kept = (w.weight, w.mask) if isinstance(w, Masked) else (w, jnp.ones(shape, bool))
        if self.pattern != "unstructured":
            n, m = self._n_of_m()
            if shape[-2] % m:
                raise ValueError(
                    f"prune: the contracted axis of {path} has size {shape[-2]}, which {m} does not divide."
                )
            return Masked(dense, kept & _largest_of_group(weights.materialize(w), n, m))
        first = self.sparsity if self.gradual is None else self.gradual.initial_sparsity
        return Masked(dense, _magnitude_mask(weights.materialize(dense), kept, first))

    def update(self, params, step):
        if self.gradual is None:
            return params

        def tighten(params):
            return weights.map_weights(lambda path, w: self._tightened(path, w, step), params)

        return lax.cond(self.gradual.is_due(step), tighten, lambda params: params, params)

    def last_step(self):
        return -1 if self.gradual is None else self.gradual.end_step

    def describe(self):
        if self.pattern != "unstructured":
            return f"prune {self.pattern}"
        return f"prune {self.sparsity:.0%}{' gradually' if self.gradual else ''}"

    def _n_of_m(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not found:
            raise ValueError(f"prune: the pattern {self.pattern!r} is neither 'unstructured' nor N:M such as '2:4'.")
        return int(found[1]), int(found[2])

    def _tightened(self, path: str, w: Any, step: jax.Array) -> Any:
        settings = self._settings(path)
        if settings is None:
            return w

        def one(node):
            if not isinstance(node, Masked):
                return node
            sparsity = settings.gradual.sparsity(step, settings.sparsity)
            return node.replace(mask=_magnitude_mask(weights.materialize(node.weight), node.mask, sparsity))

        return jax.tree.map(one, w, is_leaf=lambda node: isinstance(node, Masked))


def _check_sparsity(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"prune: {name} is {value}; it must be at least 0 and less than 1.")


def _magnitude_mask(dense: jax.Array, kept: jax.Array, sparsity) -> jax.Array:
    """`kept` without the round(sparsity · n) entries of smallest magnitude of each matrix (..., in, out)."""
    magnitude = jnp.where(kept, jnp.abs(dense.astype(jnp.float32)), 0.0)
    size = dense.shape[-1] * dense.shape[-2]
    number = jnp.minimum(jnp.round(jnp.asarray(sparsity, jnp.float32) * size).astype(jnp.int32), size - 1)
    return kept & (magnitude >= _order_statistic(magnitude, number))


def _order_statistic(values: jax.Array, rank: jax.Array) -> jax.Array:
    """The `rank`-th smallest (from 0) of each matrix of non-negative floats, as (..., 1, 1), exactly.

    Non-negative floats are ordered as their bit patterns are, so 31 halvings of the patterns find it. Every step is
    a count, which a sharded matrix answers with a scalar all-reduce where a sort would gather it.
    """
    bits = lax.bitcast_convert_type(values, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle, axis=(-2, -1), keepdims=True) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    start = jnp.zeros((*values.shape[:-2], 1, 1), jnp.int32)
    _, found = lax.fori_loop(0, 31, halve, (start, jnp.full_like(start, jnp.iinfo(jnp.int32).max)))
    return lax.bitcast_convert_type(found, jnp.float32)


def _largest_of_group(dense: jax.Array, n: int, m: int) -> jax.Array:
    """True for the n largest magnitudes of every m neighbours along axis -2; of equals, the first."""
    *stack, inward, outward = dense.shape
    groups = jnp.abs(dense.astype(jnp.float32)).reshape(*stack, inward // m, m, outward)
    mine, other = groups[..., :, None, :], groups[..., None, :, :]
    earlier = (jnp.arange(m)[None, :] < jnp.arange(m)[:, None])[:, :, None]
    beaten_by = jnp.sum((other > mine) | ((other == mine) & earlier), axis=-2)
    return (beaten_by < n).reshape(dense.shape)
