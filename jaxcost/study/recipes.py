"""What a study compares: recipes, each a chain of transforms with a recovery, and the budgets that they must fit."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxcost.study.space import Space
from jaxcost.training.distill import DistillConfig
from jaxcost.transforms import Transform, chain


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Transforms of the base model, a short training to recover, and transforms of what came out."""

    name: str
    """Short name, used for folders too."""
    transforms: tuple[Transform, ...] = ()
    """Applied to the base model's weights before the recovery."""
    finish: tuple[Transform, ...] = ()
    """Applied after the recovery, such as rounding to integers."""
    task: Literal["base", "shifted"] = "base"
    """Train and score on the base model's data, or on the shifted domain's."""
    learning_rate: float | None = None
    """Peak learning rate of the recovery; None takes the study's."""
    recovery_steps: int | None = None
    """Steps of the recovery; None takes the study's. Recipes are compared with a control of as many."""
    distill: DistillConfig | None = None
    """What the recovery learns from the base model beside the text; None for the text alone."""

    def __post_init__(self):
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"A recipe's name is {self.name!r}; use letters, digits, - and _ only.")
        if self.recovery_steps is not None and self.recovery_steps < 1:
            raise ValueError(f"The recipe {self.name!r} recovers for {self.recovery_steps} steps; give at least 1.")
        if self.distill is not None and (not self.distill.active or self.distill.teacher or self.distill.from_layers):
            raise ValueError(
                f"The recipe {self.name!r} is taught by the base model: give it losses to learn from, and "
                "neither a teacher nor from_layers."
            )

    def describe(self) -> str:
        """What is done to the base model, in a few words."""
        what = chain(*self.transforms).describe() if self.transforms else "none"
        taught = " → taught by the base" if self.distill else ""
        then = f" → {chain(*self.finish).describe()}" if self.finish else ""
        return (what + taught + then).removeprefix("none → ")


Metric = Literal[
    "checkpoint_bytes",
    "weight_bytes",
    "step_flops",
    "inference_flops_per_token",
    "decode_seconds_per_token",
    "usd_per_million_tokens",
    "kwh_per_million_tokens",
    "inference_flops_per_request",
    "seconds_per_request",
    "usd_per_million_requests",
    "kwh_per_million_requests",
    "usd",
    "hours",
    "kwh",
    "flops",
]
"""The costs that a budget can limit: those of tokens where text is written, of requests where labels are given. The
last four are of training; `flops` are those of the compiled steps."""

TRAINING_METRICS = ("usd", "hours", "kwh", "flops")
"""The costs of training, which a whole study has too."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on one cost, of each recipe or of the whole study: an amount, or a share."""

    name: str
    """What the budget stands for, in words."""
    metric: Metric
    """The cost that is limited."""
    share: float | None = None
    """The most a recipe may cost, where the control of its task is 1; of a study, the base's cost and this share of
    what the rest would cost if every recipe were trained to the end."""
    at_most: float | None = None
    """The most it may cost in the metric's own unit: bytes, FLOPs, seconds, USD, hours or kWh."""
    of: Literal["recipe", "study"] = "recipe"
    """Whose cost: that of a recipe (of training, its recovery's steps alone), or all that the study pays."""

    def __post_init__(self):
        if (self.share is None) == (self.at_most is None):
            raise ValueError(f"The budget {self.name!r} wants either a share or an at_most.")
        for field in ("share", "at_most"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ValueError(f"The budget {self.name!r} allows {field}={value}; it must be positive.")
        if self.of == "study" and self.metric not in TRAINING_METRICS:
            raise ValueError(
                f"The budget {self.name!r} limits the study's {self.metric}; a study pays {', '.join(TRAINING_METRICS)}"
                "; leave out `of` to limit each recipe's."
            )

    def limit(self, whole: float | None, beside: float = 0.0) -> float | None:
        """The amount that is allowed; None for a share of what is unknown.

        Args:
          whole: what a share is of, in the metric's unit.
          beside: what is allowed on top of a share.
        """
        if self.at_most is not None:
            return self.at_most
        return None if whole is None else beside + self.share * whole


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How a space is searched: by successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943)."""

    rungs: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of a recovery's steps after which recipes are scored and the worse ones stopped; the last is 1."""
    keep: float = 0.4
    """Share of a rung's recipes that goes on to the next."""
    finalists: int = 2
    """Recipes that are trained again with further seeds, beside the control."""
    seeds: int = 3
    """Seeds of each finalist, the study's own among them."""
    surrogate: bool = True
    """Choose what to try next by what is known so far; otherwise in the order that spreads over the space."""
    parallel: int = 1
    """Trials at once, each on so large a part of the devices; what the surrogate learns, it learns from all of them
    together. Virtual devices of a CPU share its cores, and so gain little and measure each other."""

    def __post_init__(self):
        ascending = all(a < b for a, b in zip(self.rungs, self.rungs[1:], strict=False))
        if not self.rungs or self.rungs[0] <= 0 or self.rungs[-1] != 1 or not ascending:
            raise ValueError(f"study.search.rungs is {self.rungs}; give ascending shares above 0, the last of them 1.")
        if not 0 < self.keep < 1:
            raise ValueError(f"study.search.keep is {self.keep}; it must lie between 0 and 1.")
        for field in ("finalists", "seeds", "parallel"):
            if getattr(self, field) < 1:
                raise ValueError(f"study.search.{field} is {getattr(self, field)}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """How the finalist is compared with the control on held-out data, and what counts as harm."""

    on: bool = True
    """Whether it is."""
    harm: float = 0.05
    """A part of the data is harmed if its loss rises by so much more than that of all data, as shares of the control's,
    or its accuracy falls by so much more, and chance does not explain it."""
    significance: float = 0.05
    """The most that chance may explain, all parts together."""
    resamples: int = 2000
    """Of the bootstrap and of the permutation tests; more where there are so many parts that none could be significant
    otherwise."""
    least: int = 8
    """Examples below which a part of the data is not judged."""
    exemplars: int = 10
    """Examples shown, those that changed most."""
    bins: int = 10
    """Of the calibration error."""
    safety: str = ""
    """JSON file that takes the place of `jaxcost/study/safety.json`: words, prompts, probes and signs of refusal."""
    safety_tokens: int = 24
    """Tokens written for each prompt of the safety list; 0 leaves it out."""

    def __post_init__(self):
        if not 0 < self.significance < 1:
            raise ValueError(f"study.verify.significance is {self.significance}; it must lie between 0 and 1.")
        for field, least in (("resamples", 100), ("least", 2), ("exemplars", 0), ("bins", 2), ("safety_tokens", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"study.verify.{field} is {getattr(self, field)}; it must be at least {least}.")
        if self.harm < 0:
            raise ValueError(f"study.verify.harm is {self.harm}; it cannot be negative.")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The recipes of a study, or the spaces that are searched for them, the same recovery for each, and the budgets."""

    recipes: tuple[Recipe, ...] = ()
    """The recipes, as Python; the untouched control of each task is added where it is missing."""
    spaces: tuple[Space, ...] = ()
    """Choices and ranges of recipes to search, as Python; what is in `recipes` is tried beside them."""
    search: SearchConfig = SearchConfig()
    """How they are searched; of no effect without spaces."""
    verify: VerifyConfig = VerifyConfig()
    """How the recommended recipe is compared with the control."""
    recovery_steps: int = 50
    """Steps of recovery, the same for every recipe and for the control."""
    recovery_learning_rate: float = 1e-3
    """Peak learning rate of the recovery."""
    shifted_data: str = "python_text/reference"
    """Dataset of the shifted domain."""
    budgets: tuple[Budget, ...] = (
        Budget("the control's price, give or take a tenth", "usd", 1.1),
        Budget("a third of the bytes on disk", "checkpoint_bytes", 1 / 3),
    )
    """The budgets for which the best recipe is named, as Python; of a search, which must meet all of them, together."""
    topology: str = "v5e:2x2"
    """TPU slice that the base's train step is compiled for, where libtpu is installed."""
    decode_tokens: int = 64
    """Tokens decoded when the decoding speed is measured; of no effect where labels are given."""
    decode_batch_size: int = 8
    """Rows decoded, or requests answered, at once when that speed is measured."""
    only: tuple[str, ...] = ()
    """Names of recipes to run; all if none is given. Controls always run."""

    def __post_init__(self):
        for field in ("recovery_steps", "decode_tokens", "decode_batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"study.{field} is {getattr(self, field)}; it must be at least 1.")
        names = [recipe.name for recipe in self.recipes]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"Two recipes of the study are called {twice.pop()!r}; give each its own name.")
        for name in self.only:
            if name not in names:
                raise ValueError(f"study.only names {name!r}, but the recipes are {', '.join(names) or 'none'}.")
        whole = [budget.name for budget in self.budgets if budget.of == "study"]
        if whole and not self.spaces:
            raise ValueError(
                f"The budget {whole[0]!r} is of the study, and a list of recipes is tried whole; give "
                "study.spaces to search, or leave the budget out."
            )
        if self.spaces and any(recipe.task != "base" for recipe in self.recipes):
            raise ValueError("A search is on the base model's data; leave out recipes of another task, or the spaces.")

    def complete(self) -> tuple[Recipe, ...]:
        """The chosen recipes, each preceded by the untouched control of its task and its number of steps.

        Raises:
          ValueError: a space is empty, or two recipes have one name.
        """
        listed = [r for r in self.recipes if not self.only or r.name in self.only]
        found = {name: Recipe(name, **settings) for space in self.spaces for name, settings in space.settings().items()}
        taken = [r.name for r in listed if r.name in found]
        if taken:
            raise ValueError(f"The recipe {taken[0]!r} has the name of one of the space; give it another.")
        chosen = [*listed, *found.values()]
        rows: list[Recipe] = []
        for task, steps in dict.fromkeys((r.task, self.steps_of(r)) for r in chosen or [Recipe("control")]):
            alike = [r for r in chosen if (r.task, self.steps_of(r)) == (task, steps)]
            given = [r for r in self.recipes if is_control(r) and (r.task, self.steps_of(r)) == (task, steps)]
            rows += [given[0] if given else self._control(task, steps)]
            rows += [r for r in alike if r not in rows]
        return tuple(rows)

    def steps_of(self, recipe: Recipe) -> int:
        """Steps of a recipe's recovery."""
        return self.recovery_steps if recipe.recovery_steps is None else recipe.recovery_steps

    def _control(self, task: str, steps: int) -> Recipe:
        name = "control" if task == "base" else f"control_{task}"
        own = steps != self.recovery_steps
        return Recipe(f"{name}-steps_{steps}" if own else name, task=task, recovery_steps=steps if own else None)


def is_control(recipe: Recipe) -> bool:
    """Whether a recipe only trains on, without any transform or teacher."""
    return not recipe.transforms and not recipe.finish and recipe.distill is None
