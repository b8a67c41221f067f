"""What a transform is: a pure function from weights to weights that picks them by ordered path rules.

A transform is to parameters what an Optax transform is to gradients, and is written like one: a lower-case name, called
with its options, that can be chained.

    sparse = chain(prune(sparsity=0.5), lora(rank=8))
    params = sparse(params, key)

It is a frozen dataclass, so it can stand in a config, be compared and hashed, and prints as what one would type.

Some need to know what a weight is multiplied with; `calibration` gathers that, and `statistics` says how much of it.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax

from jaxcost import weights
from jaxcost.transforms.manifest import INVARIANTS, Manifest, check, manifest
from jaxcost.weights import Inputs, Params

Statistics = Literal["none", "norms", "gram"]
"""What a transform must know of a weight's inputs: nothing, their norms and largest values, or their products too."""

Calibration = Mapping[str, Inputs]
"""Statistics of the inputs of weights, by the weight's path."""

Stage = Literal["factorize", "prune", "adapt", "quantize"]

STAGES: tuple[Stage, ...] = ("factorize", "prune", "adapt", "quantize")
"""The order in which transforms keep what those before them did; the recovery stands between adapting and quantising.

Adapters may also come last: on a quantised base they are trained and served beside it (QLoRA).
"""

Gradients = Mapping[str, jax.Array]
"""The gradient of the mean loss with respect to each array that trains, by its path."""


class CalibrationError(ValueError):
    """A transform lacks the statistics that it needs, or they are of no use."""


class RuleError(ValueError):
    """A rule that is no regular expression, or that picks no weight."""


class OrderError(ValueError):
    """Transforms in an order in which a later one undoes an earlier one."""


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


_ORDER = "order"

BLOCK_KERNELS = (Rule("layers/(?!.*router/).*kernel$"),)
"""The matrices of the blocks, which most transforms act on unless told otherwise; an experts' router is small and
sensitive, and is left alone."""

ALL_KERNELS = (Rule("^(?!.*router/|audio/(convolution|positions)).*kernel$"),)
"""The matrices of the blocks and the unembedding. Convolutions of audio are left alone: the ten samples of a waveform
that the first one meets fill no group of a scale."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """The base of all transforms. A subclass gives `apply` and, if masks or grids move while training, `update`."""

    rules: tuple[Rule, ...] = BLOCK_KERNELS
    """Which weights, and with which options: the first rule whose pattern is found in the path decides."""

    stage: ClassVar[Stage | None] = None
    """Its place in a chain; None may stand anywhere."""
    freezes_the_rest: ClassVar[bool] = False
    """Whether what no rule picks is frozen, so that only what the transform adds trains."""

    def __call__(self, params: Params, key: jax.Array | None = None, calibration: Calibration | None = None) -> Params:
        """The transformed tree.

        Args:
          params: the weights.
          key: seeds random initial values; each weight derives its own from its path.
          calibration: statistics of what the picked weights are multiplied with, for transforms that ask for them.

        Raises:
          RuleError: a rule picks nothing.
          CalibrationError: the statistics of a weight are needed and not given.
          ValueError: a picked weight cannot be transformed so.
        """
        return self.over_picked(lambda settings, *arguments: settings.apply(*arguments), params, key, calibration)

    def over_picked(
        self,
        f: Callable[..., Any],
        params: Params,
        key: jax.Array | None = None,
        calibration: Calibration | None = None,
    ) -> Params:
        """f(the options for it, path, weight, key, inputs) in place of each picked weight; raises as a call does."""
        self.coverage(params)
        key = jax.random.key(0) if key is None else key

        def one(path, w):
            settings = self._settings(path)
            if settings is None:
                return self.rest(path, w)
            inputs = (calibration or {}).get(path)
            if settings.statistics() != "none" and inputs is None:
                raise CalibrationError(
                    f"{type(self).__name__}: nothing is known of the inputs of {path}, which {settings.describe()} "
                    "needs; calibrate on some data first."
                )
            return f(settings, path, w, jax.random.fold_in(key, zlib.crc32(path.encode())), inputs)

        return weights.map_weights(one, params)

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        """The new weight for one that a rule picked; `inputs` is given where `statistics` asks for it."""
        raise TypeError(f"{type(self).__name__} does not say what it does to a weight.")

    def statistics(self) -> Statistics:
        """What `apply` must know of a weight's inputs."""
        return "none"

    def picked(self, params: Params) -> dict[str, Transform]:
        """The path of every weight that a rule picks → the transform with the options for it."""
        found: dict[str, Transform] = {}

        def one(path, _):
            settings = self._settings(path)
            if settings is not None:
                found[path] = settings

        weights.map_weights(one, params)
        return found

    def abstract(self, params: Params) -> Params:
        """The shapes of the transformed tree as ShapeDtypeStructs; needs no calibration and computes nothing."""

        def blank(params):
            wanted = {path: one.statistics() for path, one in self.picked(params).items()}
            calibration = {}

            def one(path, w):
                if wanted.get(path, "none") != "none":
                    shape = weights.materialize(w).shape
                    calibration[path] = weights.blank_inputs(shape, gram=wanted[path] == "gram")

            weights.map_weights(one, params)
            return self(params, None, calibration)

        return jax.eval_shape(blank, params)

    def rest(self, path: str, w: Any) -> Any:
        """The new weight for one that no rule picked."""
        return freeze_weight(w) if self.freezes_the_rest else w

    def update(self, params: Params, step: jax.Array, gradients: Gradients) -> Params:
        """What happens to the weights after optimizer step `step` (from 0), inside the jitted train step.

        `gradients` are those that the step was taken with, by the path of each array that trains.
        """
        return params

    def last_step(self) -> int:
        """The last step in which `update` does anything; training shorter than this would stop half-way."""
        return -1

    def waived(self) -> tuple[str, ...]:
        """Names of the invariants of the manifest that it, and the training after it, may break."""
        return ()

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
    waive: tuple[str, ...] = ()
    """What is not insisted on: `order`, or invariants of the manifest (`sparsity`, `pattern`, `rank`, `grid`)."""

    def __post_init__(self):
        for name in self.waive:
            if name not in (_ORDER, *INVARIANTS):
                raise ValueError(
                    f"chain: there is no {name!r} to waive; choose from {_ORDER}, {', '.join(INVARIANTS)}."
                )
        if _ORDER not in self.waive:
            _check_order(self._flat())

    def __call__(self, params, key=None, calibration=None):
        """One after the other; a calibration is of the weights as they come in, whatever the earlier ones change.

        `calibration.calibrated` gathers new statistics before each that asks for them.

        Raises:
          BrokenError: a transform takes from a weight what an earlier one had made true of it; see `manifest`.
        """
        promised = manifest(params)
        for one, one_key in self.steps(key):
            params = one(params, one_key, calibration)
            promised = self.check(promised, params, one)
        return params

    def check(self, promised: Manifest, params: Params, step: Transform) -> Manifest:
        """The manifest after a step; BrokenError where it broke what neither it nor the chain waives."""
        waive = tuple(name for name in (*self.waive, *step.waived()) if name != _ORDER)
        return check(promised, params, waive, step.describe())

    def steps(self, key: jax.Array | None = None) -> list[tuple[Transform, jax.Array]]:
        """The transforms, each with its key."""
        key = jax.random.key(0) if key is None else key
        return [(one, jax.random.fold_in(key, index)) for index, one in enumerate(self.transforms)]

    def abstract(self, params):
        promised = manifest(params)
        for one in self.transforms:
            params = one.abstract(params)
            promised = self.check(promised, params, one)
        return params

    def update(self, params, step, gradients):
        for transform in self.transforms:
            params = transform.update(params, step, gradients)
        return params

    def last_step(self):
        return max((transform.last_step() for transform in self.transforms), default=-1)

    def waived(self):
        inner = (name for one in self.transforms for name in one.waived())
        return tuple(name for name in dict.fromkeys((*self.waive, *inner)) if name != _ORDER)

    def _flat(self) -> list[Transform]:
        """The transforms with those of inner chains in their places, but for chains that waive the order."""
        found: list[Transform] = []
        for one in self.transforms:
            if not isinstance(one, Chain):
                found.append(one)
            elif _ORDER not in one.waive:
                found += one._flat()
        return found

    def describe(self):
        return " → ".join(transform.describe() for transform in self.transforms) or "none"

    def coverage(self, params):
        rows = []
        for transform in self.transforms:
            rows += transform.coverage(params)
            params = transform.abstract(params)
        return rows


def chain(*transforms: Transform, waive: tuple[str, ...] = ()) -> Chain:
    """The transforms one after the other, as one: factorize → prune → adapt → quantize, and adapters also last.

    Args:
      *transforms: in the order in which they are applied.
      waive: what is not insisted on: `order`, or invariants that a step may break (see `manifest`).

    Raises:
      OrderError: a transform comes after one that it would undo, and `order` is not waived.
      ValueError: there is nothing of a name in `waive`.
    """
    return Chain(transforms=transforms, waive=tuple(waive))


def _check_order(transforms: list[Transform]) -> None:
    staged = [one for one in transforms if one.stage is not None]
    for index, later in enumerate(staged):
        for earlier in staged[:index]:
            adapts_codes = (earlier.stage, later.stage) == ("quantize", "adapt")
            if STAGES.index(later.stage) < STAGES.index(earlier.stage) and not adapts_codes:
                raise OrderError(
                    f"chain: {type(later).__name__} comes before {type(earlier).__name__} "
                    f"({' → '.join(STAGES)}, and adapters also last); swap them, or allow it with waive=('order',)."
                )


@dataclasses.dataclass(frozen=True)
class Adapting(Transform):
    """The base of transforms that train something small beside or within weights, and freeze everything else."""

    train: str = ""
    """Regular expression for the paths of other parameters that train whole, such as 'norm/'; nothing by default."""

    stage: ClassVar[Stage] = "adapt"
    freezes_the_rest: ClassVar[bool] = True

    def rest(self, path: str, w: Any) -> Any:
        return w if self.train and re.search(self.train, path) else super().rest(path, w)


def freeze_weight(w: Any) -> Any:
    """The weight as one that does not train; one of which nothing trains anyway stays as it is."""
    return weights.Frozen(w) if any(jax.tree.leaves(weights.trainable(w))) else w


def matrix_shape(path: str, w: Any) -> tuple[int, ...]:
    """Shape (..., in, out) of the matrix that a weight means; ValueError where it is a vector or a scalar."""
    shape = jax.eval_shape(weights.materialize, w).shape
    if len(shape) - bool(re.match(r"(encoder/)?(frozen_)?layers/", path)) < 2:
        raise ValueError(f"{path} has shape {tuple(shape)}, which is no matrix; skip it with a rule.")
    return tuple(shape)
