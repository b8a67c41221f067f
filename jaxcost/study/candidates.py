"""Which recipes a search may try, counted and priced before anything is spent, and how many of them it can pay for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxcost import weights
from jaxcost.cost.hardware import Hardware
from jaxcost.session import Session
from jaxcost.study import quality
from jaxcost.study.accounts import Price
from jaxcost.study.estimates import Counted, Estimator, count
from jaxcost.study.recipes import TRAINING_METRICS, Budget, Recipe, is_control


@dataclasses.dataclass(eq=False)
class Candidate:
    """A recipe of the space and how far it came; see `result.Trial`."""

    recipe: Recipe
    rungs: tuple[int, ...]
    counted: Counted | None = None
    prices: tuple[Price, ...] = ()
    """Estimated, of what each rung adds to the one before."""
    status: str = "not_started"
    why: str | None = None
    predicted: tuple[float, float] | None = None
    beforehand: dict[str, Any] = dataclasses.field(default_factory=dict)
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    row: dict[str, Any] | None = None
    seeds: list[float] = dataclasses.field(default_factory=list)

    @property
    def price(self) -> Price:
        """Estimated, of its whole recovery."""
        return sum(self.prices, Price())

    @property
    def going(self) -> bool:
        """Whether nothing has stopped it."""
        return self.status in ("not_started", "finished", "finalist")

    def stop(self, status: str, why: str | None) -> None:
        """It goes no further."""
        self.status, self.why = status, why

    def score_at(self, rung: int) -> float:
        """Its score there, with the study's own seed."""
        return self.stages[rung]["score"]


class Plan:
    """The candidates of one study, those that a limit or an impossibility stops among them, and what they may cost."""

    def __init__(self, base: Session, dense: weights.Params, estimator: Estimator):
        """Counts every recipe; `dense` are the shapes of the base's weights.

        Raises:
          ValueError: there is nothing to search, no recipe can be done or meets the budget, the budget rests on a
            price that is unknown, or it does not pay for the least that a search takes; the message says how much that
            is.
        """
        self.study, self.hardware = base.experiment.study, base.hardware
        self.quality = quality.of(base.experiment.data.objective)
        self.estimator = estimator
        self.limits = [b for b in self.study.budgets if b.of == "recipe"]
        _check_known(self.study.budgets, self.hardware)
        counts: dict[Recipe, Counted | ValueError] = {}
        self.candidates = [self._candidate(base, recipe, dense, counts) for recipe in self.study.complete()]
        controls = [one for one in self.candidates if is_control(one.recipe)]
        self.controls = list({one.rungs[-1]: one for one in reversed(controls)}.values())[::-1]
        for one in self.others():
            self._check_counted(one)
        self._check_any_left()
        self.starts, self.estimated = self._plan()

    def _candidate(
        self, base: Session, recipe: Recipe, dense: weights.Params, counts: dict[Recipe, Counted | ValueError]
    ) -> Candidate:
        steps = self.study.steps_of(recipe)
        one = Candidate(recipe, tuple(max(1, round(share * steps)) for share in self.study.search.rungs))
        # Neither the rate nor the steps change a count, and tracing takes a tenth of a second.
        alike = dataclasses.replace(recipe, name="alike", learning_rate=None, recovery_steps=None)
        if alike not in counts:
            try:
                counts[alike] = count(base, recipe, dense)
            except ValueError as error:
                counts[alike] = error
        counted = counts[alike]
        if isinstance(counted, ValueError):
            if is_control(recipe):
                raise counted
            one.stop("failed", str(counted))
            return one
        one.counted = counted
        before = (0, *one.rungs[:-1])
        prices = [
            self.estimator.stage(one.counted, recipe, now - then) for then, now in zip(before, one.rungs, strict=True)
        ]
        one.prices = (*prices[:-1], prices[-1] + self.estimator.measuring())
        return one

    def others(self) -> list[Candidate]:
        """The candidates that nothing has stopped, without the controls."""
        return [one for one in self.candidates if one.going and one not in self.controls]

    def control_of(self, one: Candidate) -> Candidate:
        """The untouched recipe of as many steps."""
        return next(control for control in self.controls if control.rungs[-1] == one.rungs[-1])

    def _check_counted(self, one: Candidate) -> None:
        """Stops a candidate that its counts or estimates alone put above a limit."""
        control = self.control_of(one)
        for budget in self.limits:
            own, whole = (self._count(each, budget.metric) for each in (one, control))
            if own is not None:
                self.hold(one, budget, own, whole, "is" if budget.metric == "weight_bytes" else "is estimated at")

    def _count(self, one: Candidate, metric: str) -> float | None:
        if metric == "weight_bytes":
            return one.counted.weight_bytes
        if metric == "step_flops":
            return self.estimator.steps(one.counted, 1).flops
        if metric in TRAINING_METRICS:
            cost = self.estimator.steps(one.counted, one.rungs[-1]).of(metric, self.hardware)
            # A recipe's hours are those of its part of the devices.
            return cost * self.study.search.parallel if metric == "hours" else cost
        return None

    def hold(
        self, one: Candidate, budget: Budget, own: float, whole: float | None, says: str, slack: float = 1.0
    ) -> None:
        """Stops a candidate whose cost is above a limit of recipes.

        Args:
          one: the candidate.
          budget: the limit.
          own: its cost.
          whole: its control's, which a share is of.
          says: how the cost is known, for the sentence that says why.
          slack: how far above the limit the cost may be, as a factor.
        """
        limit = budget.limit(whole)
        if one.going and limit is not None and own > limit * slack:
            one.stop("over_budget", f"Its {budget.metric} {says} {own:.4g}, above {limit:.4g} ({budget.name}).")

    def _check_any_left(self) -> None:
        if self.others():
            return
        stopped = [one for one in self.candidates if one not in self.controls]
        for budget in self.limits:
            known = {one.recipe.name: self._count(one, budget.metric) for one in stopped if one.counted}
            known = {name: cost for name, cost in known.items() if cost is not None}
            if known and all(one.status == "over_budget" for one in stopped if one.counted):
                cheapest = min(known, key=known.get)
                limit = budget.limit(self._count(self.controls[0], budget.metric))
                if known[cheapest] > limit:
                    raise ValueError(
                        f"No recipe meets the budget {budget.name!r}, {limit:.4g} {budget.metric}: the cheapest, "
                        f"{cheapest}, takes {known[cheapest]:.4g}. Raise the budget or widen study.spaces."
                    )
        raise ValueError(f"No recipe of the space can be tried; the first of them: {stopped[0].why}")

    def _plan(self) -> tuple[list[int], dict[str, Price]]:
        """How many recipes each rung has, and what the study's parts are estimated to cost."""
        others, study = self.others(), self.study.search
        fixed = {
            "data": Price(),
            "base": self.estimator.base(),
            "control": sum((one.price for one in self.controls), Price()),
            "verification": self.estimator.verification() if self.study.verify.on else Price(),
        }
        mean = [sum((one.prices[r] for one in others), Price()) * (1 / len(others)) for r in range(len(study.rungs))]
        dearest = max((one.price for one in (*others, *self.controls)), key=lambda price: price.seconds)

        def seeds(finalists):
            return dearest * ((finalists + 1) * (study.seeds - 1))

        # Recipes that differ in their finish alone share a training, which a study pays once.
        trained = {dataclasses.replace(one.recipe, name="shared", finish=()): one for one in (*self.controls, *others)}
        whole = sum((one.price for one in trained.values()), seeds(min(study.finalists, len(others))))
        whole += fixed["verification"]
        self.purse = [(b, self._allowed(b, whole)) for b in self.study.budgets if b.of == "study"]

        def counts(starts):
            found = [starts]
            for _ in study.rungs[1:]:
                found.append(max(min(study.finalists, found[-1]), math.ceil(found[-1] * study.keep)))
            return found

        def parts(starts):
            tried = sum((price * n for price, n in zip(mean, counts(starts), strict=True)), Price())
            return fixed | {"search": tried, "finalists": seeds(min(study.finalists, starts))}

        cheapest = min((one.price for one in others), key=lambda price: price.seconds)
        least = fixed | {"search": cheapest, "finalists": seeds(1)}
        short = self.short(sum(least.values(), Price()))
        if short is not None:
            budget, limit = short
            said = ", ".join(f"{name} {price.of(budget.metric, self.hardware):.4g}" for name, price in least.items())
            total = sum(least.values(), Price()).of(budget.metric, self.hardware)
            raise ValueError(
                f"The budget {budget.name!r} allows {limit:.4g} {budget.metric}, and the least that this search takes "
                f"is estimated at {total:.4g} ({said}); raise it, or lower study.search.seeds, training.steps or "
                "study.recovery_steps."
            )
        affordable = [n for n in range(1, len(others) + 1) if not self.short(sum(parts(n).values(), Price()))]
        starts = max(affordable, default=1)
        self._mean = mean
        return counts(starts), parts(starts)

    def _allowed(self, budget: Budget, whole: Price) -> float:
        return budget.limit(
            whole.of(budget.metric, self.hardware), self.estimator.base().of(budget.metric, self.hardware)
        )

    def short(self, price: Price) -> tuple[Budget, float] | None:
        """The first limit of the study that a price exceeds, and its amount."""
        return next(((b, limit) for b, limit in self.purse if price.of(b.metric, self.hardware) > limit), None)

    def kept_for(self, rung: int) -> Price:
        """What the later rungs, the finalists and the verification are estimated to take."""
        later = range(rung + 1, len(self._mean))
        kept = sum((self._mean[r] * self.starts[r] for r in later), Price())
        kept += sum((control.prices[r] for control in self.controls for r in later), Price())
        return kept + self.estimated["finalists"] + self.estimated["verification"]


def _check_known(budgets: Sequence[Budget], hardware: Hardware) -> None:
    """ValueError for a budget of money or energy where the chip's price or power is unknown."""
    for budget in budgets:
        for kind, known, flag in (
            ("usd", hardware.usd(1.0), "usd_per_chip_hour"),
            ("kwh", hardware.kwh(1.0), "watts_per_chip"),
        ):
            if budget.metric.startswith(kind) and known is None:
                raise ValueError(
                    f"The budget {budget.name!r} limits {budget.metric}, which is unknown of this chip; give "
                    f"hardware.{flag}."
                )
