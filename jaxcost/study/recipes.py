"""What a study compares: recipes, each a chain of transforms with a recovery, and the budgets that they must fit."""

from __future__ import annotations

import dataclasses
from typing import Literal

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
    distill: DistillConfig | None = None
    """What the recovery learns from the base model beside the text; None for the text alone."""

    def __post_init__(self):
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"A recipe's name is {self.name!r}; use letters, digits, - and _ only.")
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


Metric = Literal["checkpoint_bytes", "weight_bytes", "step_flops", "inference_flops_per_token", "usd", "kwh"]
"""The costs that a budget can limit."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on one cost, as a share of what the untouched control costs."""

    name: str
    """What the budget stands for, in words."""
    metric: Metric
    """The cost that is limited."""
    share: float
    """The most a recipe may cost, where the control is 1."""

    def __post_init__(self):
        if self.share <= 0:
            raise ValueError(f"The budget {self.name!r} allows a share of {self.share}; it must be positive.")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The recipes of a study, the same recovery for each, and the budgets."""

    recipes: tuple[Recipe, ...] = ()
    """The recipes, as Python; the untouched control of each task is added where it is missing."""
    recovery_steps: int = 50
    """Steps of recovery, the same for every recipe and for the control."""
    recovery_learning_rate: float = 1e-3
    """Peak learning rate of the recovery."""
    shifted_data: str = "python_text/reference"
    """Dataset of the shifted domain."""
    budgets: tuple[Budget, ...] = (
        Budget("the control's price, give or take a tenth", "usd", 1.1),
        Budget("a third of the bytes on disk", "checkpoint_bytes", 1 / 3),
        Budget("60 % of the FLOPs of a decoded token", "inference_flops_per_token", 0.6),
    )
    """The budgets for which the best recipe is named, as Python."""
    topology: str = "v5e:2x2"
    """TPU slice that the base's train step is compiled for, where libtpu is installed."""
    decode_tokens: int = 64
    """Tokens decoded when the decoding speed is measured."""
    decode_batch_size: int = 8
    """Rows decoded at once when the decoding speed is measured."""
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

    def complete(self) -> tuple[Recipe, ...]:
        """The chosen recipes, each task's untouched control first."""
        chosen = [r for r in self.recipes if not self.only or r.name in self.only]
        rows = []
        for task in dict.fromkeys(r.task for r in chosen or [Recipe("control")]):
            control = next((r for r in self.recipes if r.task == task and is_control(r)), None)
            rows += [control or Recipe("control" if task == "base" else f"control_{task}", task=task)]
            rows += [r for r in chosen if r.task == task and r not in rows]
        return tuple(rows)


def is_control(recipe: Recipe) -> bool:
    """Whether a recipe only trains on, without any transform or teacher."""
    return not recipe.transforms and not recipe.finish and recipe.distill is None
