"""The search of a space of recipes: successive halving, each trial's price known before it is started.

Every recipe that is tried is scored after a part of its recovery, the better ones go on from their checkpoint, and so
on to the end; a surrogate over the scores so far says what to try next. The untouched control is trained as long as any
recipe. The best are trained again with further seeds, and the control with them. What a trial would cost beyond what
the study may spend is not started; one that fails is written down, and the search goes on.

Source: Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification and Hyperparameter Optimization,
arXiv:1502.07943.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats

from jaxcost import weights
from jaxcost.cost.hardware import Hardware
from jaxcost.hosts import LostHostError, Preempted
from jaxcost.session import Session
from jaxcost.study import surrogate
from jaxcost.study.accounts import Accounts, Price
from jaxcost.study.estimates import Counted, Estimator, count
from jaxcost.study.recipes import TRAINING_METRICS, Budget, Recipe, is_control
from jaxcost.study.space import features
from jaxcost.study.trials import Trials
from jaxcost.training.checkpoints import CheckpointError

_DECODING = (
    "inference_flops_per_token",
    "decode_seconds_per_token",
    "usd_per_million_tokens",
    "kwh_per_million_tokens",
)
_SLACK = 1.05
"""How far above a limit what is measured before a recovery may lie: bytes then compress otherwise, and seconds vary."""


@dataclasses.dataclass
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


class Search:
    """The search of one study: what it would cost, then the search itself."""

    def __init__(self, base: Session, dense: weights.Params, estimator: Estimator):
        """Counts every recipe; `dense` are the shapes of the base's weights.

        Raises:
          ValueError: there is nothing to search, no recipe can be done or meets the budget, the budget rests on a
            price that is unknown, or it does not pay for the least that a search takes; the message says how much that
            is.
        """
        self._study, self._hardware = base.experiment.study, base.hardware
        self._estimator = estimator
        self._limits = [b for b in self._study.budgets if b.of == "recipe"]
        _check_known(self._study.budgets, self._hardware)
        self.candidates = [self._counted(base, recipe, dense) for recipe in self._study.complete()]
        controls = [one for one in self.candidates if is_control(one.recipe)]
        self.controls = list({one.rungs[-1]: one for one in reversed(controls)}.values())[::-1]
        self._table = features([one.recipe for one in self.candidates])
        for one in self._others():
            self._check_counted(one)
        self._check_any_left()
        self.starts, self.estimated = self._plan()

    # ---- Before anything is spent ----

    def _counted(self, base: Session, recipe: Recipe, dense: weights.Params) -> Candidate:
        steps = self._study.steps_of(recipe)
        one = Candidate(recipe, tuple(max(1, round(share * steps)) for share in self._study.search.rungs))
        try:
            one.counted = count(base, recipe, dense)
        except ValueError as error:
            if is_control(recipe):
                raise
            one.stop("failed", str(error))
            return one
        before = (0, *one.rungs[:-1])
        prices = [
            self._estimator.stage(one.counted, recipe, now - then) for then, now in zip(before, one.rungs, strict=True)
        ]
        one.prices = (*prices[:-1], prices[-1] + self._estimator.measuring())
        return one

    def _others(self) -> list[Candidate]:
        """The candidates that nothing has stopped, without the controls."""
        return [one for one in self.candidates if one.going and one not in self.controls]

    def control_of(self, one: Candidate) -> Candidate:
        """The untouched recipe of as many steps."""
        return next(control for control in self.controls if control.rungs[-1] == one.rungs[-1])

    def _check_counted(self, one: Candidate) -> None:
        """Stops a candidate that its counts or estimates alone put above a limit."""
        control = self.control_of(one)
        for budget in self._limits:
            own, whole = (self._count(each, budget.metric) for each in (one, control))
            if own is not None:
                self._hold(one, budget, own, whole, "is" if budget.metric == "weight_bytes" else "is estimated at")

    def _count(self, one: Candidate, metric: str) -> float | None:
        if metric == "weight_bytes":
            return one.counted.weight_bytes
        if metric == "step_flops":
            return self._estimator.steps(one.counted, 1).flops
        if metric in TRAINING_METRICS:
            return self._estimator.steps(one.counted, one.rungs[-1]).of(metric, self._hardware)
        return None

    def _hold(
        self, one: Candidate, budget: Budget, own: float, whole: float | None, says: str, slack: float = 1.0
    ) -> None:
        limit = budget.limit(whole)
        if one.going and limit is not None and own > limit * slack:
            one.stop("over_budget", f"Its {budget.metric} {says} {own:.4g}, above {limit:.4g} ({budget.name}).")

    def _check_any_left(self) -> None:
        if self._others():
            return
        stopped = [one for one in self.candidates if one not in self.controls]
        for budget in self._limits:
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
        others, study = self._others(), self._study.search
        fixed = {
            "data": Price(),
            "base": self._estimator.base(),
            "control": sum((one.price for one in self.controls), Price()),
            "verification": self._estimator.verification() if self._study.verify.on else Price(),
        }
        # Recipes that differ in their finish alone share a training, which a study pays once.
        trained = {dataclasses.replace(one.recipe, name="shared", finish=()): one for one in (*self.controls, *others)}
        whole = sum((one.price for one in trained.values()), Price())
        self._purse = [(b, self._allowed(b, whole)) for b in self._study.budgets if b.of == "study"]
        mean = [sum((one.prices[r] for one in others), Price()) * (1 / len(others)) for r in range(len(study.rungs))]
        dearest = max((one.price for one in (*others, *self.controls)), key=lambda price: price.seconds)

        def counts(starts):
            found = [starts]
            for _ in study.rungs[1:]:
                found.append(max(min(study.finalists, found[-1]), math.ceil(found[-1] * study.keep)))
            return found

        def parts(starts):
            seeds = (min(study.finalists, starts) + 1) * (study.seeds - 1)
            tried = sum((price * n for price, n in zip(mean, counts(starts), strict=True)), Price())
            return fixed | {"search": tried, "finalists": dearest * seeds}

        cheapest = min((one.price for one in others), key=lambda price: price.seconds)
        least = fixed | {"search": cheapest, "finalists": dearest * 2 * (study.seeds - 1)}
        short = self._short(sum(least.values(), Price()))
        if short is not None:
            budget, limit = short
            said = ", ".join(f"{name} {price.of(budget.metric, self._hardware):.4g}" for name, price in least.items())
            total = sum(least.values(), Price()).of(budget.metric, self._hardware)
            raise ValueError(
                f"The budget {budget.name!r} allows {limit:.4g} {budget.metric}, and the least that this search takes "
                f"is estimated at {total:.4g} ({said}); raise it, or lower study.search.seeds, training.steps or "
                "study.recovery_steps."
            )
        affordable = [n for n in range(1, len(others) + 1) if not self._short(sum(parts(n).values(), Price()))]
        starts = max(affordable, default=1)
        self._mean = mean
        return counts(starts), parts(starts)

    def _allowed(self, budget: Budget, whole: Price) -> float:
        return budget.limit(
            whole.of(budget.metric, self._hardware), self._estimator.base().of(budget.metric, self._hardware)
        )

    def _short(self, price: Price) -> tuple[Budget, float] | None:
        """The first limit of the study that a price exceeds, and its amount."""
        return next(((b, limit) for b, limit in self._purse if price.of(b.metric, self._hardware) > limit), None)

    # ---- The search ----

    def run(self, trials: Trials, accounts: Accounts, shown: Callable[[str], None]) -> None:
        """Tries recipes until the last rung is done, then the finalists' further seeds.

        Raises what trying the control raises, and what ends a study: CheckpointError, Preempted, LostHostError.
        """
        self._trials, self._accounts, self._shown, self._lines = trials, accounts, shown, 0
        for rung in range(len(self._study.search.rungs)):
            for control in self.controls:
                self._beforehand(control)
                self._advance(control, rung)
            self._first_rung() if rung == 0 else self._later_rung(rung)
        for one in (*self.controls, *self._finished()):
            self._measure(one)
        self._seeds()

    def finalists(self) -> list[Candidate]:
        """The recipes with further seeds that meet the budget, the best mean first."""
        found = [one for one in self.candidates if one.status == "finalist" and one not in self.controls]
        return sorted(found, key=lambda one: float(np.mean(one.seeds)))

    def compared(self) -> dict[str, Any] | None:
        """How the surrogate's predictions, each made before its trial, rank beside what they came to."""
        known = [one for one in self.candidates if one.predicted is not None and one.stages]
        if not self._study.search.surrogate:
            return None
        said, came = [one.predicted[0] for one in known], [one.score_at(0) for one in known]
        told = len(known) > 2 and np.ptp(said) > 0 and np.ptp(came) > 0
        return {"trials": len(known), "rank_correlation": float(scipy.stats.spearmanr(said, came)[0]) if told else None}

    def limits(self, answer: Candidate | None) -> list[dict[str, Any]]:
        """The `result.Limit` of each budget."""
        found = []
        for budget in self._limits:
            control = self.control_of(answer) if answer else self.controls[0]
            used = answer.row[budget.metric] if answer else None
            found.append(_limit(budget, budget.limit(control.row[budget.metric]), used))
        spent = self._accounts.spent
        return found + [_limit(b, limit, spent.of(b.metric, self._hardware)) for b, limit in self._purse]

    def nothing_meets(self) -> str:
        """What the cheapest recipe would cost, for a budget that none of those tried meets."""
        tried = [one for one in self.candidates if one not in self.controls and (one.row or one.beforehand)]
        for budget in self._limits:
            costs = {one.recipe.name: (one.row or one.beforehand).get(budget.metric) for one in tried}
            costs = {name: cost for name, cost in costs.items() if cost is not None}
            limit = budget.limit(self.controls[0].row[budget.metric])
            if costs and min(costs.values()) > limit:
                cheapest = min(costs, key=costs.get)
                return (
                    f"No recipe meets the budget {budget.name!r}, {limit:.4g} {budget.metric}: the cheapest that was "
                    f"tried, {cheapest}, takes {costs[cheapest]:.4g}."
                )
        why = next((f" {one.recipe.name}: {one.why}" for one in self.candidates if one.status == "failed"), "")
        return f"No recipe meets all of the budget together.{why}"

    def _first_rung(self) -> None:
        queue = [self.candidates.index(one) for one in self._others()]
        start = self.candidates.index(self.controls[0])
        spread = surrogate.spread_order(self._table, start, queue)
        while spread:
            chosen, predicted = self._next(spread)
            spread.remove(chosen)
            one = self.candidates[chosen]
            one.predicted = predicted
            if self._affords(one, 0) and self._beforehand(one):
                self._advance(one, 0)

    def _next(self, spread: list[int]) -> tuple[int, tuple[float, float] | None]:
        """The candidate to start next, and what the surrogate says of it, with its standard deviation.

        The first few spread over the space. Then it is the lowest of mean less standard deviation: what may be best.
        """
        tried = [i for i, one in enumerate(self.candidates) if one.stages]
        scores = [self.candidates[i].score_at(0) for i in tried]
        mean, error = surrogate.predict(self._table, tried, scores)
        if not self._study.search.surrogate or mean is None:
            return spread[0], None
        few = len(tried) <= max(3, self.starts[0] // 3)
        chosen = spread[0] if few else min(spread, key=lambda i: mean[i] - error[i])
        return chosen, (float(mean[chosen]), float(error[chosen]))

    def _later_rung(self, rung: int) -> None:
        going = [one for one in self._others() if len(one.stages) == rung]
        ranked = sorted(going, key=lambda one: one.score_at(rung - 1))
        for one in ranked[: self.starts[rung]]:
            if self._affords(one, rung):
                self._advance(one, rung)
        for one in ranked[self.starts[rung] :]:
            one.stop("stopped", None)

    def _finished(self) -> list[Candidate]:
        return [one for one in self._others() if len(one.stages) == len(one.rungs)]

    def _affords(self, one: Candidate, rung: int) -> bool:
        """Whether a candidate's next rung, and what is planned after it, can be paid; it is stopped if not."""
        price, kept = self._price(one, rung), self._kept_for(rung)
        short = self._short(self._accounts.spent + price + kept)
        if short is not None:
            budget, limit = short
            left = limit - (self._accounts.spent + kept).of(budget.metric, self._hardware)
            one.stop(
                "unaffordable",
                f"It was estimated to take {price.of(budget.metric, self._hardware):.4g} {budget.metric}, and "
                f"{max(0.0, left):.4g} were left ({budget.name}).",
            )
        return short is None

    def _price(self, one: Candidate, rung: int) -> Price:
        """Of a rung; of scoring alone where another recipe's training has come as far."""
        data = self._trials.session(one.recipe).experiment.data
        tokens = one.rungs[rung] * data.batch_size * data.sequence_length
        if self._accounts.has_paid(self._trials.training_of(one.recipe), tokens):
            return self._estimator.scoring()
        return one.prices[rung]

    def _kept_for(self, rung: int) -> Price:
        """What the later rungs, the finalists and the verification are estimated to take."""
        later = range(rung + 1, len(self._mean))
        kept = sum((self._mean[r] * self.starts[r] for r in later), Price())
        kept += sum((control.prices[r] for control in self.controls for r in later), Price())
        return kept + self.estimated["finalists"] + self.estimated["verification"]

    def _beforehand(self, one: Candidate) -> bool:
        """Whether the transformed base meets the limits that can be measured on it."""
        decoding = any(budget.metric in _DECODING for budget in self._limits)
        if decoding or any(budget.metric == "checkpoint_bytes" for budget in self._limits):
            found = self._attempt(one, "beforehand", lambda: self._trials.beforehand(one.recipe, decoding))
            if found is None:
                return False
            one.beforehand = found
            self._accounts.pay(self._part(one), seconds=found["scoring_seconds"])
            control = self.control_of(one)
            for budget in self._limits:
                if one is not control and budget.metric in found:
                    self._hold(one, budget, found[budget.metric], control.beforehand[budget.metric], "is", _SLACK)
        return one.going

    def _advance(self, one: Candidate, rung: int) -> None:
        price = self._price(one, rung)
        self._shown(f"{one.recipe.name}: {one.rungs[rung]} steps")
        found = self._stage(one, one.rungs[rung])
        if found is not None:
            one.stages.append(self._paid(one, found, price, self._part(one)))
            if rung == len(one.rungs) - 1:
                one.stop("finished", None)

    def _measure(self, one: Candidate) -> None:
        """The row of a candidate whose recovery is over, and whether it meets every limit."""
        row = self._attempt(one, "row", lambda: self._trials.row(one.recipe))
        if row is None:
            return
        one.row = row
        self._accounts.pay_training(self._part(one), row["recovery"], row["recovery_totals"])
        self._accounts.pay(self._part(one), seconds=row["scoring_seconds"])
        for budget in self._limits:
            if one not in self.controls and row[budget.metric] is not None:
                self._hold(one, budget, row[budget.metric], self.control_of(one).row[budget.metric], "is")

    def _seeds(self) -> None:
        """Trains the best that meet the budget, and their controls, with further seeds."""
        best = sorted(self._finished(), key=lambda one: one.score_at(-1))[: self._study.search.finalists]
        controls = [control for control in self.controls if any(self.control_of(one) is control for one in best)]
        for one in (*controls, *best):
            one.stop("finalist", None)
            one.seeds = [one.score_at(-1)]
        for seed in range(1, self._study.search.seeds):
            for one in (*controls, *best):
                price = self._estimator.stage(one.counted, one.recipe, one.rungs[-1]) if one.going else Price()
                if self._short(self._accounts.spent + price + self.estimated["verification"]):
                    one.why = f"Nothing was left for seed {seed}."
                elif one.going:
                    self._shown(f"{one.recipe.name}: seed {seed}")
                    found = self._stage(one, one.rungs[-1], seed)
                    if found is not None:
                        one.stages.append(self._paid(one, found, price, "finalists"))
                        one.seeds.append(found["score"])

    def _stage(self, one: Candidate, steps: int, seed: int = 0) -> dict[str, Any] | None:
        return self._attempt(one, f"steps_{steps}-seed_{seed}", lambda: self._trials.stage(one.recipe, steps, seed))

    def _paid(self, one: Candidate, found: dict[str, Any], price: Price, part: str) -> dict[str, Any]:
        """Charges what a stage took, and returns its `result.Stage`."""
        paid = self._accounts.pay_training(part, found["recovery"], found["recovery_totals"])
        paid += self._accounts.pay(part, seconds=found["scoring_seconds"])
        self._lines += 1
        said = {"recipe": one.recipe.name, "recovery_steps": found["steps"], "seed": found["seed"]}
        self._accounts.record(self._lines, **said, score=found["score"])
        return {
            **{name: found[name] for name in ("steps", "seed", "score")},
            **{f"estimated_{name}": value for name, value in self._said(price).items()},
            **self._said(paid),
        }

    def _said(self, price: Price) -> dict[str, float | None]:
        return {"usd": self._hardware.usd(price.seconds), **dataclasses.asdict(price)}

    def _part(self, one: Candidate) -> str:
        return "control" if one in self.controls else "search"

    def _attempt(self, one: Candidate, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What `make` returns; None if it fails, which the candidate then says. A control must not fail."""
        before = self._trials.failure(one.recipe, what)
        started = time.perf_counter()
        if before is None:
            try:
                return make()
            except (Preempted, LostHostError, CheckpointError):
                raise
            except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
                if one in self.controls:
                    raise
                why = f"{type(error).__name__}: {' '.join(str(error).split())}"
                before = self._trials.write_failure(one.recipe, what, why, time.perf_counter() - started)
        self._accounts.pay(self._part(one), seconds=before["seconds"])
        self._shown(f"{one.recipe.name} failed: {before['why']}")
        one.stop("failed", before["why"])
        return None


def interval(values: Sequence[float]) -> dict[str, Any]:
    """The `result.Interval` of a mean, by Student's t."""
    mean, n = float(np.mean(values)), len(values)
    half = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def trial_of(one: Candidate, control: bool, hardware: Hardware) -> dict[str, Any]:
    """The `result.Trial` of a candidate."""
    predicted = one.predicted or (None, None)
    return {
        "name": one.recipe.name,
        "description": one.recipe.describe(),
        "transforms": [repr(t) for t in (*one.recipe.transforms, *one.recipe.finish)],
        "control": control,
        "status": one.status,
        "why": one.why,
        "predicted_score": predicted[0],
        "predicted_error": predicted[1],
        "stages": one.stages,
        "estimated_usd": hardware.usd(one.price.seconds),
        "estimated_seconds": one.price.seconds,
        "estimated_flops": one.price.flops,
        "weight_bytes": one.counted and one.counted.weight_bytes,
    }


def _limit(budget: Budget, limit: float | None, used: float | None) -> dict[str, Any]:
    said = {"name": budget.name, "of": budget.of, "metric": budget.metric, "limit": limit, "used": used}
    return said | {"why": None if limit is not None else f"{budget.metric} is unknown"}


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
