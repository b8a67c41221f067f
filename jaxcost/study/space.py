"""What a search may try: choices and ranges for each part of a recipe, and the recipes that they come to.

    Space(
        transforms=(Choice((None, *each(prune, sparsity=Range(0.3, 0.7, 3)))),),
        finish=(Choice((None, quantize())),),
        learning_rate=Range(3e-4, 3e-3, 3, log=True),
    )

is 4 x 2 x 3 recipes. A name tells what is in a recipe, and stays the same whatever else is in the space.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcost.transforms import Transform, chain

if TYPE_CHECKING:
    from jaxcost.study.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    def __post_init__(self):
        if not self.values:
            raise ValueError("A Choice of a space is empty; give it at least one value, or leave it out.")


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, at equal distances or at equal ratios."""

    low: float
    high: float
    points: int = 3
    log: bool = False
    """Equal ratios; numbers are rounded to three digits."""

    def __post_init__(self):
        if self.points < 1 or self.low > self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"{self} is no range; give at least one point, a low that is not above high, and positive ends for log."
            )

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers, ascending."""
        spread = np.geomspace if self.log else np.linspace
        return tuple(dict.fromkeys(float(f"{value:.3g}") for value in spread(self.low, self.high, self.points)))


def each(make: Callable[..., Transform], **options: Any) -> tuple[Transform, ...]:
    """The transforms of every combination of the options that are a Choice or a Range; others are as they are."""
    values = [one.values if isinstance(one, Choice | Range) else (one,) for one in options.values()]
    return tuple(make(**dict(zip(options, picked, strict=True))) for picked in itertools.product(*values))


@dataclasses.dataclass(frozen=True)
class Space:
    """All combinations of what may stand in each place of a recipe."""

    transforms: tuple[Choice, ...] = ()
    """What is done to the base before the recovery, in order: each a choice of a transform, or None for none."""
    finish: tuple[Choice, ...] = ()
    """What is done after it, likewise."""
    learning_rate: Choice | Range = Choice((None,))
    """Peak learning rate of the recovery; None is the study's."""
    recovery_steps: Choice | Range = Choice((None,))
    """Steps of the recovery; None is the study's. Each number has a control of its own."""

    def settings(self) -> dict[str, dict[str, Any]]:
        """The arguments of every recipe but the untouched one, by its name.

        Raises:
          ValueError: something in a place is no transform, or there is nothing but the untouched model.
        """
        before, after = (list(_chains(choices)) for choices in (self.transforms, self.finish))
        found = []
        for transforms, finish, rate, steps in itertools.product(
            before, after, self.learning_rate.values, self.recovery_steps.values
        ):
            if transforms or finish:
                steps = None if steps is None else round(steps)
                found.append(
                    {"transforms": transforms, "finish": finish, "learning_rate": rate, "recovery_steps": steps}
                )
        if not found:
            raise ValueError(
                "The space of the study is empty but for the untouched model; give it choices of transforms or of a "
                "finish, as study.spaces."
            )
        names = [_name(one) for one in found]
        # What a description leaves out tells those of one name apart.
        return {
            name if names.count(name) == 1 else f"{name}-{_digest(one)}": one
            for name, one in zip(names, found, strict=True)
        }


def features(recipes: Sequence[Recipe]) -> np.ndarray:
    """float64 (recipes, features): what a surrogate knows of them, each feature over its whole range from 0 to 1.

    A number among a transform's options is a feature, and so is the presence of any other value. Learning rates and
    steps count by their logarithm.
    """
    said = [dict(_said(recipe)) for recipe in recipes]
    names = sorted({name for one in said for name in one})
    table = np.array([[one.get(name, 0.0) for name in names] for one in said]).reshape(len(said), len(names))
    spans = np.ptp(table, axis=0)
    scaled = (table - table.min(axis=0))[:, spans > 0] / spans[spans > 0]
    # Options that always come together are one feature, or they would count for many.
    return np.unique(scaled, axis=1)


def _said(recipe: Recipe) -> Iterator[tuple[str, float]]:
    for place, steps in (("transforms", recipe.transforms), ("finish", recipe.finish)):
        for step in steps:
            name = f"{place} {type(step).__name__}"
            yield name, 1.0
            for field in dataclasses.fields(step):
                value = getattr(step, field.name)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    yield f"{name} {field.name}", float(value)
                else:
                    yield f"{name} {field.name} {value!r}", 1.0
    if recipe.learning_rate is not None:
        yield "learning rate", float(np.log(recipe.learning_rate))
    if recipe.recovery_steps is not None:
        yield "recovery steps", float(np.log(recipe.recovery_steps))


def _chains(choices: Sequence[Choice]) -> Iterator[tuple[Transform, ...]]:
    for picked in itertools.product(*(choice.values for choice in choices)):
        wrong = next((one for one in picked if one is not None and not isinstance(one, Transform)), None)
        if wrong is not None:
            raise ValueError(f"A space has {wrong!r} where a transform is wanted; give a transform, or None for none.")
        yield tuple(one for one in picked if one is not None)


def _name(settings: dict[str, Any]) -> str:
    parts = [_slug(chain(one).describe()) for one in (*settings["transforms"], *settings["finish"])]
    if settings["learning_rate"] is not None:
        parts.append(_slug(f"lr {settings['learning_rate']:g}"))
    if settings["recovery_steps"] is not None:
        parts.append(f"steps_{settings['recovery_steps']}")
    return "-".join(parts)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:6]
