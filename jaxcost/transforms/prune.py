"""Pruning: masks over weights, chosen by magnitude, at once or gradually while training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxcost import weights
from jaxcost.transforms.base import Stage, Transform, matrix_shape
from jaxcost.weights import Frozen, Inputs, Lora, LowRank, Masked, QuantAware, Quantized


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

    stage: ClassVar[Stage] = "prune"

    def __post_init__(self):
        _check_sparsity("sparsity", self.sparsity)
        if self.pattern != "unstructured":
            n, m = self._n_of_m()
            if not 0 < n < m:
                raise ValueError(f"prune: the pattern {self.pattern} must keep fewer than it has, as 2:4 does.")
            if self.gradual is not None:
                raise ValueError("prune: a gradual schedule needs pattern='unstructured'; N:M masks are made at once.")

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        if isinstance(w, Lora):
            return w.replace(base=self.apply(path, w.base, key, inputs))
        if isinstance(w, LowRank):
            return w.replace(u=self.apply(f"{path}/u", w.u, key), v=self.apply(f"{path}/v", w.v, key))
        if isinstance(w, QuantAware | Frozen):
            return w.replace(weight=self.apply(path, w.weight, key, inputs))
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
        return Masked(dense, _magnitude_mask(weights.materialize(dense), kept, _pruned(first, shape)))

    def update(self, params, step):
        return weights.map_weights(lambda path, w: self._updated(path, w, step), params)

    def last_step(self):
        schedules = [dict(r.options).get("gradual", self.gradual) for r in self.rules if not r.skip]
        return max((schedule.end_step for schedule in schedules if schedule is not None), default=-1)

    def describe(self):
        if self.pattern != "unstructured":
            return f"prune {self.pattern}"
        return f"prune {self.sparsity:.0%}{' gradually' if self.gradual else ''}"

    def _n_of_m(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not found:
            raise ValueError(f"prune: the pattern {self.pattern!r} is neither 'unstructured' nor N:M such as '2:4'.")
        return int(found[1]), int(found[2])

    def _updated(self, path: str, w: Any, step: jax.Array) -> Any:
        settings = self._settings(path)
        if settings is None or settings.gradual is None:
            return w
        schedule, final = settings.gradual, settings.sparsity

        def one(node):
            if not isinstance(node, Masked):
                return node

            def tightened():
                shape = node.mask.shape
                share = schedule.sparsity(step, final) * (shape[-2] * shape[-1])
                # The last number is not left to float32, which cannot count the entries of a large matrix.
                number = jnp.where(step >= schedule.end_step, _pruned(final, shape), jnp.round(share).astype(jnp.int32))
                return _magnitude_mask(weights.materialize(node.weight), node.mask, number)

            return node.replace(mask=lax.cond(schedule.is_due(step), tightened, lambda: node.mask))

        return jax.tree.map(one, w, is_leaf=lambda node: isinstance(node, Masked))


def _check_sparsity(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"prune: {name} is {value}; it must be at least 0 and less than 1.")


def _pruned(sparsity: float, shape: tuple[int, ...]) -> int:
    """How many entries of each matrix (..., in, out) go; one always stays."""
    size = shape[-2] * shape[-1]
    return min(round(sparsity * size), size - 1)


@jax.jit
def _magnitude_mask(dense: jax.Array, kept: jax.Array, number: jax.Array | int) -> jax.Array:
    """`kept` without the `number` entries of smallest magnitude of each matrix (..., in, out); of equals, the first.

    What is pruned already is counted first. Thresholds are found by bisection: every step of it is a count, which a
    sharded matrix answers with a scalar all-reduce where a sort would gather it.
    """
    # Non-negative floats are ordered as their bit patterns are.
    magnitude = lax.bitcast_convert_type(jnp.abs(dense.astype(jnp.float32)), jnp.int32)
    order = jnp.where(kept, magnitude + 1, 0)
    threshold = _first(lambda bound: _count(order <= bound) >= number, dense.shape, jnp.iinfo(jnp.int32).max)
    below, tied = order < threshold, order == threshold
    rest = number - _count(below)
    position = lax.broadcasted_iota(jnp.int32, dense.shape, dense.ndim - 2) * dense.shape[-1]
    position = position + lax.broadcasted_iota(jnp.int32, dense.shape, dense.ndim - 1)
    end = _first(
        lambda bound: _count(tied & (position < bound)) >= rest, dense.shape, dense.shape[-2] * dense.shape[-1]
    )
    return kept & ~(below | (tied & (position < end)))


def _count(chosen: jax.Array) -> jax.Array:
    return jnp.sum(chosen, axis=(-2, -1), keepdims=True, dtype=jnp.int32)


def _first(reached: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], largest: int) -> jax.Array:
    """For each matrix of a stack, as (..., 1, 1), the first of the integers 0..largest that `reached` holds for."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = reached(middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    start = jnp.zeros((*shape[:-2], 1, 1), jnp.int32)
    low, _ = lax.fori_loop(0, int(largest).bit_length(), halve, (start, jnp.full_like(start, largest)))
    return low


def _largest_of_group(dense: jax.Array, n: int, m: int) -> jax.Array:
    """True for the n largest magnitudes of every m neighbours along axis -2; of equals, the first."""
    *stack, inward, outward = dense.shape
    groups = jnp.abs(dense.astype(jnp.float32)).reshape(*stack, inward // m, m, outward)
    mine, other = groups[..., :, None, :], groups[..., None, :, :]
    earlier = (jnp.arange(m)[None, :] < jnp.arange(m)[:, None])[:, :, None]
    beaten_by = jnp.sum((other > mine) | ((other == mine) & earlier), axis=-2)
    return (beaten_by < n).reshape(dense.shape)
