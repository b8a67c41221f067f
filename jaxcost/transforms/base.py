"""What a transform is: a pure function from weights to weights that picks them by ordered path rules.

A transform is to parameters what an Optax transform is to gradients, and is written like one: a lower-case name, called
with its options, that can be chained.

    sparse = chain(prune(sparsity=0.5), lora(rank=8))
    params = sparse(params, key)

It is a frozen dataclass, so it can stand in a config, be compared and hashed, and prints as what one would type.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from typing import Any, ClassVar

import jax

from jaxcost import weights
from jaxcost.weights import Params


class RuleError(ValueError):
    """A rule that is no regular expression, or that picks no weight."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A regular expression searched for in a weight's path, and the options it changes for what it picks."""

    pattern: str
    """Searched for in paths such as 'layers/mlp/up/kernel'; the first rule of a transform that matches decides."""
    skip: bool = False
    """Leave what matches as it is."""
    options: tuple[tuple[str, Any], ...] = ()
    """The transform's own options by name, as changed for what matches: (('sparsity', 0.7),)."""

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RuleError(f"The rule {self.pattern!r} is not a regular expression: {error}.") from None


def rule(pattern: str, /, *, skip: bool = False, **options: Any) -> Rule:
    """A `Rule`, its options as keywords: rule('mlp/', sparsity=0.7)."""
    return Rule(pattern, skip, tuple(sorted(options.items())))


@dataclasses.dataclass(frozen=True)
class Covered:
    """One row of a coverage table."""

    path: str
    """Path of a weight."""
    shape: tuple[int, ...]
    """Shape of the dense array that it means."""
    rule: str | None
    """The rule that picked it, or None where none did."""
    action: str
    """What the transform does to it, in words."""


BLOCK_KERNELS = (Rule("layers/.*kernel$"),)
"""The matrices of the blocks, which most transforms act on unless told otherwise."""

ALL_KERNELS = (Rule("kernel$"),)
"""The matrices of the blocks and the unembedding."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """The base of all transforms. A subclass gives `apply` and, if masks or grids move while training, `update`."""

    rules: tuple[Rule, ...] = BLOCK_KERNELS
    """Which weights, and with which options: the first rule whose pattern is found in the path decides."""

    freezes_the_rest: ClassVar[bool] = False
    """Whether what no rule picks is frozen, so that only what the transform adds trains."""

    def __call__(self, params: Params, key: jax.Array | None = None) -> Params:
        """The transformed tree. `key` seeds random initial values; each weight derives its own from its path."""
        self.coverage(params)
        key = jax.random.key(0) if key is None else key

        def one(path, w):
            settings = self._settings(path)
            if settings is not None:
                return settings.apply(path, w, jax.random.fold_in(key, zlib.crc32(path.encode())))
            return self.rest(path, w)

        return weights.map_weights(one, params)

    def apply(self, path: str, w: Any, key: jax.Array) -> Any:
        """The new weight for one that a rule picked."""
        raise TypeError(f"{type(self).__name__} does not say what it does to a weight.")

    def rest(self, path: str, w: Any) -> Any:
        """The new weight for one that no rule picked."""
        return freeze_weight(w) if self.freezes_the_rest else w

    def update(self, params: Params, step: jax.Array) -> Params:
        """What happens to the weights after optimizer step `step` (from 0), inside the jitted train step."""
        return params

    def last_step(self) -> int:
        """The last step in which `update` does anything; training shorter than this would stop half-way."""
        return -1

    def describe(self) -> str:
        """A few words for tables: what is done to a weight that is picked."""
        return type(self).__name__

    def coverage(self, params: Params) -> list[Covered]:
        """One row a weight: what picks it and what happens to it. RuleError if a rule picks nothing."""
        rows: list[Covered] = []

        def one(path, w):
            found = self._match(path)
            settings = self._settings(path)
            rest = "frozen" if self.freezes_the_rest else "-"
            action = rest if settings is None else settings.describe()
            shape = jax.eval_shape(weights.materialize, w).shape
            rows.append(Covered(path, tuple(shape), found.pattern if found else None, action))

        weights.map_weights(one, params)
        picked = {row.rule for row in rows}
        for r in self.rules:
            if r.pattern not in picked:
                hidden = any(re.search(r.pattern, row.path) for row in rows)
                why = "only matches weights that earlier rules took" if hidden else "matches no weight"
                paths = ", ".join(row.path for row in rows[:40])
                raise RuleError(f"{type(self).__name__}: the rule {r.pattern!r} {why}; the weights are {paths}.")
        return rows

    def _match(self, path: str) -> Rule | None:
        return next((r for r in self.rules if re.search(r.pattern, path)), None)

    def _settings(self, path: str) -> Transform | None:
        found = self._match(path)
        if found is None or found.skip:
            return None
        try:
            return dataclasses.replace(self, **dict(found.options)) if found.options else self
        except TypeError:
            known = ", ".join(f.name for f in dataclasses.fields(self) if f.name != "rules")
            names = ", ".join(name for name, _ in found.options)
            raise RuleError(
                f"{type(self).__name__}: the rule {found.pattern!r} sets {names}, but the options are {known}."
            ) from None


@dataclasses.dataclass(frozen=True)
class Chain(Transform):
    """Transforms one after the other; make one with `chain`."""

    rules: tuple[Rule, ...] = ()
    transforms: tuple[Transform, ...] = ()

    def __call__(self, params, key=None):
        key = jax.random.key(0) if key is None else key
        for index, transform in enumerate(self.transforms):
            params = transform(params, jax.random.fold_in(key, index))
        return params

    def update(self, params, step):
        for transform in self.transforms:
            params = transform.update(params, step)
        return params

    def last_step(self):
        return max((transform.last_step() for transform in self.transforms), default=-1)

    def describe(self):
        return " → ".join(transform.describe() for transform in self.transforms) or "none"

    def coverage(self, params):
        rows = []
        for transform in self.transforms:
            rows += transform.coverage(params)
            params = jax.eval_shape(transform, params)
        return rows


def chain(*transforms: Transform) -> Chain:
    """The transforms one after the other, as one."""
    return Chain(transforms=transforms)


def freeze_weight(w: Any) -> Any:
    """The weight as one that does not train; one of which nothing trains anyway stays as it is."""
    return weights.Frozen(w) if any(jax.tree.leaves(weights.trainable(w))) else w


def matrix_shape(path: str, w: Any) -> tuple[int, ...]:
    """Shape (..., in, out) of the matrix that a weight means; ValueError where it is a vector or a scalar."""
    shape = jax.eval_shape(weights.materialize, w).shape
    if len(shape) - bool(re.match(r"(frozen_)?layers/", path)) < 2:
        raise ValueError(f"{path} has shape {tuple(shape)}, which is no matrix; skip it with a rule.")
    return tuple(shape)
