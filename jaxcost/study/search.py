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

from jaxcost.cost.hardware import Hardware
from jaxcost.hosts import LostHostError, Preempted
from jaxcost.study import surrogate
from jaxcost.study.accounts import Accounts, Price
from jaxcost.study.candidates import Candidate, Plan
from jaxcost.study.recipes import Budget
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


class Search:
    """The search of one study."""

    def __init__(self, plan: Plan, trials: Trials, accounts: Accounts, shown: Callable[[str], None]):
        """`shown` is told what goes on, in lines for a person."""
        self._plan, self._trials, self._accounts, self._shown = plan, trials, accounts, shown
        self._search, self._lines = plan.study.search, 0
        self._table = features([one.recipe for one in plan.candidates])

    def run(self) -> None:
        """Tries recipes until the last rung is done, then the finalists' further seeds.

        Raises what trying the control raises, and what ends a study: CheckpointError, Preempted, LostHostError.
        """
        for control in self._plan.controls:
            self._beforehand(control)
        for rung in range(len(self._search.rungs)):
            for control in self._plan.controls:
                self._advance(control, rung)
            self._first_rung() if rung == 0 else self._later_rung(rung)
        for one in (*self._plan.controls, *self._finished()):
            self._measure(one)
        self._seeds()

    def finalists(self) -> list[Candidate]:
        """The recipes with further seeds that meet the budget, the best mean first."""
        found = [one for one in self._plan.candidates if one.status == "finalist" and one not in self._plan.controls]
        return sorted(found, key=lambda one: float(np.mean(one.seeds)))

    def compared(self) -> dict[str, Any] | None:
        """How the surrogate's predictions, each made before its trial, rank beside what they came to."""
        known = [one for one in self._plan.candidates if one.predicted is not None and one.stages]
        if not self._search.surrogate:
            return None
        said, came = [one.predicted[0] for one in known], [one.score_at(0) for one in known]
        told = len(known) > 2 and np.ptp(said) > 0 and np.ptp(came) > 0
        return {"trials": len(known), "rank_correlation": float(scipy.stats.spearmanr(said, came)[0]) if told else None}

    def limits(self, answer: Candidate | None) -> list[dict[str, Any]]:
        """The `result.Limit` of each budget."""
        found = []
        for budget in self._plan.limits:
            control = self._plan.control_of(answer) if answer else self._plan.controls[0]
            used = answer.row[budget.metric] if answer else None
            found.append(_limit(budget, budget.limit(control.row[budget.metric]), used))
        spent = self._accounts.spent
        return found + [_limit(b, limit, spent.of(b.metric, self._plan.hardware)) for b, limit in self._plan.purse]

    def nothing_meets(self) -> str:
        """What the cheapest recipe would cost, for a budget that none of those tried meets."""
        tried = [one for one in self._plan.candidates if one not in self._plan.controls and (one.row or one.beforehand)]
        for budget in self._plan.limits:
            costs = {one.recipe.name: (one.row or one.beforehand).get(budget.metric) for one in tried}
            costs = {name: cost for name, cost in costs.items() if cost is not None}
            limit = budget.limit(self._plan.controls[0].row[budget.metric])
            if costs and min(costs.values()) > limit:
                cheapest = min(costs, key=costs.get)
                return (
                    f"No recipe meets the budget {budget.name!r}, {limit:.4g} {budget.metric}: the cheapest that was "
                    f"tried, {cheapest}, takes {costs[cheapest]:.4g}."
                )
        why = next((f" {one.recipe.name}: {one.why}" for one in self._plan.candidates if one.status == "failed"), "")
        return f"No recipe meets all of the budget together.{why}"

    def _first_rung(self) -> None:
        queue = [self._plan.candidates.index(one) for one in self._plan.others()]
        start = self._plan.candidates.index(self._plan.controls[0])
        spread = surrogate.spread_order(self._table, start, queue)
        while spread:
            chosen, predicted = self._next(spread)
            spread.remove(chosen)
            one = self._plan.candidates[chosen]
            one.predicted = predicted
            if self._affords(one, 0) and self._beforehand(one):
                self._advance(one, 0)

    def _next(self, spread: list[int]) -> tuple[int, tuple[float, float] | None]:
        """The candidate to start next, and what the surrogate says of it, with its standard deviation.

        The first few spread over the space. Then it is the lowest of mean less standard deviation: what may be best.
        """
        tried = [i for i, one in enumerate(self._plan.candidates) if one.stages]
        scores = [self._plan.candidates[i].score_at(0) for i in tried]
        mean, error = surrogate.predict(self._table, tried, scores)
        if not self._search.surrogate or mean is None:
            return spread[0], None
        few = len(tried) <= max(3, self._plan.starts[0] // 3)
        chosen = spread[0] if few else min(spread, key=lambda i: mean[i] - error[i])
        return chosen, (float(mean[chosen]), float(error[chosen]))

    def _later_rung(self, rung: int) -> None:
        going = [one for one in self._plan.others() if len(one.stages) == rung]
        ranked = sorted(going, key=lambda one: one.score_at(rung - 1))
        for one in ranked[: self._plan.starts[rung]]:
            if self._affords(one, rung):
                self._advance(one, rung)
        for one in ranked[self._plan.starts[rung] :]:
            one.stop("stopped", None)

    def _finished(self) -> list[Candidate]:
        return [one for one in self._plan.others() if len(one.stages) == len(one.rungs)]

    def _affords(self, one: Candidate, rung: int) -> bool:
        """Whether a candidate's next rung, and what is planned after it, can be paid; it is stopped if not."""
        price, kept = self._price(one, rung), self._plan.kept_for(rung)
        short = self._plan.short(self._accounts.spent + price + kept)
        if short is not None:
            budget, limit = short
            left = limit - (self._accounts.spent + kept).of(budget.metric, self._plan.hardware)
            one.stop(
                "unaffordable",
                f"It was estimated to take {price.of(budget.metric, self._plan.hardware):.4g} {budget.metric}, and "
                f"{max(0.0, left):.4g} were left ({budget.name}).",
            )
        return short is None

    def _price(self, one: Candidate, rung: int) -> Price:
        """Of a rung; of scoring alone where another recipe's training has come as far."""
        if self._accounts.has_paid(self._trials.training_of(one.recipe), self._trials.tokens(one.rungs[rung])):
            return self._plan.estimator.scoring()
        return one.prices[rung]

    def _beforehand(self, one: Candidate) -> bool:
        """Whether the transformed base meets the limits that can be measured on it."""
        decoding = any(budget.metric in _DECODING for budget in self._plan.limits)
        if decoding or any(budget.metric == "checkpoint_bytes" for budget in self._plan.limits):
            found = self._attempt(one, "beforehand", lambda: self._trials.beforehand(one.recipe, decoding))
            if found is None:
                return False
            one.beforehand = found
            self._accounts.pay(self._part(one), seconds=found["scoring_seconds"])
            control = self._plan.control_of(one)
            for budget in self._plan.limits:
                if one is not control and budget.metric in found:
                    self._plan.hold(one, budget, found[budget.metric], control.beforehand[budget.metric], "is", _SLACK)
        return one.going

    def _advance(self, one: Candidate, rung: int) -> None:
        price = self._price(one, rung)
        self._shown(f"{one.recipe.name}: {one.rungs[rung]} steps")
        found = self._stage(one, one.rungs[rung], price)
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
        for budget in self._plan.limits:
            if one not in self._plan.controls and row[budget.metric] is not None:
                self._plan.hold(one, budget, row[budget.metric], self._plan.control_of(one).row[budget.metric], "is")

    def _seeds(self) -> None:
        """Trains the best that meet the budget, and their controls, with further seeds."""
        best = sorted(self._finished(), key=lambda one: one.score_at(-1))[: self._search.finalists]
        needed = [self._plan.control_of(one) for one in best]
        controls = [control for control in self._plan.controls if control in needed]
        for one in (*controls, *best):
            one.stop("finalist", None)
            one.seeds = [one.score_at(-1)]
        for seed in range(1, self._search.seeds):
            for one in (*controls, *best):
                price = self._plan.estimator.stage(one.counted, one.recipe, one.rungs[-1]) if one.going else Price()
                if self._plan.short(self._accounts.spent + price + self._plan.estimated["verification"]):
                    one.why = f"Nothing was left for seed {seed}."
                elif one.going:
                    self._shown(f"{one.recipe.name}: seed {seed}")
                    found = self._stage(one, one.rungs[-1], price, seed)
                    if found is not None:
                        one.stages.append(self._paid(one, found, price, "finalists"))
                        one.seeds.append(found["score"])

    def _stage(self, one: Candidate, steps: int, price: Price, seed: int = 0) -> dict[str, Any] | None:
        name = f"steps_{steps}-seed_{seed}"
        return self._attempt(one, name, lambda: self._trials.stage(one.recipe, steps, seed), price.flops)

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
        return {"usd": self._plan.hardware.usd(price.seconds), **dataclasses.asdict(price)}

    def _part(self, one: Candidate) -> str:
        return "control" if one in self._plan.controls else "search"

    def _attempt(
        self, one: Candidate, what: str, make: Callable[[], dict[str, Any]], flops: float = 0.0
    ) -> dict[str, Any] | None:
        """What `make` returns; None if it fails, which the candidate then says. A control must not fail.

        A failure is charged with its seconds and with the estimated `flops`, which are the most that it did.
        """
        before = self._trials.failure(one.recipe, what)
        started = time.perf_counter()
        if before is None:
            try:
                return make()
            except (Preempted, LostHostError, CheckpointError):
                raise
            except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
                if one in self._plan.controls:
                    raise
                why = f"{type(error).__name__}: {' '.join(str(error).split())}"
                before = self._trials.write_failure(one.recipe, what, why, time.perf_counter() - started)
        self._accounts.pay(self._part(one), seconds=before["seconds"], flops=flops)
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
