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
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy  # which reads its parts, slow ones, as they are named

from jaxcost.cost.hardware import Hardware
from jaxcost.hosts import LostHostError, Preempted
from jaxcost.study import surrogate
from jaxcost.study.accounts import Accounts, Price
from jaxcost.study.candidates import Candidate, Plan
from jaxcost.study.parts import Parts
from jaxcost.study.recipes import Budget
from jaxcost.study.space import features
from jaxcost.study.trials import Failure, Trials
from jaxcost.training.checkpoints import CheckpointError

_SLACK = 1.05
"""How far above a limit what is measured before a recovery may lie: bytes then compress otherwise, and seconds vary."""


class Search:
    """The search of one study."""

    def __init__(self, plan: Plan, parts: Parts, accounts: Accounts, shown: Callable[[str], None]):
        """`shown` is told what goes on, in lines for a person."""
        self._plan, self._parts, self._accounts, self._shown = plan, parts, accounts, shown
        self._trials = parts.trials[0]
        self._search, self._lines = plan.study.search, 0
        self._steps: dict[str, int] = {}
        """Of each training, those that are done and paid for."""
        self._table = features([one.recipe for one in plan.candidates])

    def run(self) -> None:
        """Tries recipes until the last rung is done, then the finalists' further seeds.

        Raises what trying the control raises, and what ends a study: CheckpointError, Preempted, LostHostError.
        """
        for rung in range(len(self._search.rungs)):
            queue = itertools.chain(self._plan.controls, self._by_promise() if rung == 0 else self._best_of(rung))
            while batch := self._taken(queue, functools.partial(self._afforded, rung)):
                self._advance(self._beforehand(batch) if rung == 0 else batch, rung)
        queue = iter((*self._plan.controls, *self._finished()))
        while batch := self._taken(queue, lambda *_: Price()):
            self._measure(batch)
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

    def _by_promise(self) -> Iterator[Candidate]:
        """The candidates as they are to be started, each chosen by all that is known when it is asked for."""
        queue = [self._plan.candidates.index(one) for one in self._plan.others()]
        start = self._plan.candidates.index(self._plan.controls[0])
        spread = surrogate.spread_order(self._table, start, queue)
        while spread:
            chosen, predicted = self._next(spread)
            spread.remove(chosen)
            one = self._plan.candidates[chosen]
            one.predicted = predicted
            yield one

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

    def _best_of(self, rung: int) -> Iterator[Candidate]:
        """The candidates that go on to a rung; the others are stopped."""
        going = [one for one in self._plan.others() if len(one.stages) == rung]
        ranked = sorted(going, key=lambda one: one.score_at(rung - 1))
        for one in ranked[self._plan.starts[rung] :]:
            one.stop("stopped", None)
        yield from ranked[: self._plan.starts[rung]]

    def _taken(self, queue: Iterator[Candidate], price: Callable[[Candidate, Price], Price | None]) -> list[Candidate]:
        """The next of a queue, one for each part of the devices; `price` says what each will take beside what was
        promised to those before it, None if it is not to be tried."""
        batch, promised = [], Price()
        for one in queue:
            estimated = price(one, promised)
            if estimated is not None:
                batch.append(one)
                promised += estimated
            if len(batch) == len(self._parts):
                break
        return batch

    def _finished(self) -> list[Candidate]:
        return [one for one in self._plan.others() if len(one.stages) == len(one.rungs)]

    def _afforded(self, rung: int, one: Candidate, promised: Price) -> Price | None:
        """The price of a candidate's next rung; None, and it is stopped, if that cannot be paid with what is promised
        already and what is planned afterwards."""
        price = self._price(one, rung)
        committed = self._accounts.spent + promised + self._plan.kept_for(rung)
        short = None if one in self._plan.controls else self._plan.short(committed + price)
        if short is None:
            return price
        budget, limit = short
        left = limit - committed.of(budget.metric, self._plan.hardware)
        one.stop(
            "unaffordable",
            f"It was estimated to take {price.of(budget.metric, self._plan.hardware):.4g} {budget.metric}, and "
            f"{max(0.0, left):.4g} were left ({budget.name}).",
        )
        return None

    def _price(self, one: Candidate, rung: int) -> Price:
        """Of a rung; of scoring alone where another recipe's training has come as far."""
        if self._steps.get(self._trials.training_of(one.recipe), 0) >= one.rungs[rung]:
            return self._plan.estimator.scoring()
        return one.prices[rung]

    def _beforehand(self, batch: list[Candidate]) -> list[Candidate]:
        """Those whose transformed base meets the limits that can be measured on it."""
        serving = any(budget.metric in self._plan.quality.served.costs for budget in self._plan.limits)
        if not serving and not any(budget.metric == "checkpoint_bytes" for budget in self._plan.limits):
            return batch

        def settle(one, found):
            one.beforehand = found
            self._accounts.pay(self._part(one), seconds=found["scoring_seconds"])
            control = self._plan.control_of(one)
            for budget in self._plan.limits:
                if one is not control and budget.metric in found:
                    self._plan.hold(one, budget, found[budget.metric], control.beforehand[budget.metric], "is", _SLACK)

        self._together(batch, "beforehand", lambda trials, one: trials.beforehand(one.recipe, serving), settle)
        return [one for one in batch if one.going]

    def _advance(self, batch: list[Candidate], rung: int) -> None:
        prices = {one: self._price(one, rung) for one in batch}

        def settle(one, found):
            one.stages.append(self._paid(one, found, prices[one], self._part(one)))
            if rung == len(one.rungs) - 1:
                one.stop("finished", None)

        for one in batch:
            self._shown(f"{one.recipe.name}: {one.rungs[rung]} steps")
        self._stages(batch, lambda one: one.rungs[rung], prices, settle)

    def _measure(self, batch: list[Candidate]) -> None:
        """The rows of candidates whose recovery is over, and whether they meet every limit."""

        def settle(one, row):
            one.row = row
            self._accounts.pay_training(self._part(one), row["recovery"], row["recovery_totals"])
            self._accounts.pay(self._part(one), seconds=row["scoring_seconds"])
            for budget in self._plan.limits:
                if one not in self._plan.controls and row[budget.metric] is not None:
                    self._plan.hold(
                        one, budget, row[budget.metric], self._plan.control_of(one).row[budget.metric], "is"
                    )

        self._together(batch, "row", lambda trials, one: trials.row(one.recipe), settle)

    def _seeds(self) -> None:
        """Trains the best that meet the budget, and their controls, with further seeds."""
        best = sorted(self._finished(), key=lambda one: one.score_at(-1))[: self._search.finalists]
        needed = [self._plan.control_of(one) for one in best]
        controls = [control for control in self._plan.controls if control in needed]
        for one in (*controls, *best):
            one.stop("finalist", None)
            one.seeds = [one.score_at(-1)]
        for seed in range(1, self._search.seeds):
            queue = iter((*controls, *best))
            while batch := self._taken(queue, functools.partial(self._seed_afforded, seed)):
                self._train_seed(batch, seed)

    def _seed_price(self, one: Candidate) -> Price:
        return self._plan.estimator.stage(one.counted, one.recipe, one.rungs[-1])

    def _seed_afforded(self, seed: int, one: Candidate, promised: Price) -> Price | None:
        """The price of a further seed; None, and why is written down, if it cannot be paid."""
        if not one.going:
            return None
        price = self._seed_price(one)
        if self._plan.short(self._accounts.spent + promised + price + self._plan.estimated["verification"]):
            one.why = f"Nothing was left for seed {seed}."
            return None
        return price

    def _train_seed(self, batch: list[Candidate], seed: int) -> None:
        prices = {one: self._seed_price(one) for one in batch}

        def settle(one, found):
            one.stages.append(self._paid(one, found, prices[one], "finalists"))
            one.seeds.append(found["score"])

        for one in batch:
            self._shown(f"{one.recipe.name}: seed {seed}")
        self._stages(batch, lambda one: one.rungs[-1], prices, settle, seed)

    def _stages(
        self,
        batch: list[Candidate],
        steps: Callable[[Candidate], int],
        prices: dict[Candidate, Price],
        settle: Callable[[Candidate, dict[str, Any]], None],
        seed: int = 0,
    ) -> None:
        self._together(
            batch,
            lambda one: f"steps_{steps(one)}-seed_{seed}",
            lambda trials, one: trials.stage(one.recipe, steps(one), seed),
            settle,
            prices,
        )

    def _paid(self, one: Candidate, found: dict[str, Any], price: Price, part: str) -> dict[str, Any]:
        """Charges what a stage took, and returns its `result.Stage`."""
        paid = self._accounts.pay_training(part, found["recovery"], found["recovery_totals"])
        self._steps[found["recovery"]] = max(found["steps"], self._steps.get(found["recovery"], 0))
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

    def _together(
        self,
        batch: list[Candidate],
        what: str | Callable[[Candidate], str],
        make: Callable[[Trials, Candidate], dict[str, Any]],
        settle: Callable[[Candidate, dict[str, Any]], None],
        prices: dict[Candidate, Price] | None = None,
    ) -> None:
        """Makes something of each candidate at once, and settles it in their order, so that it is the same every time.

        What fails is charged with its seconds and the estimated FLOPs, which are the most that it did, and the
        candidate says why. The parts of the devices that wait for the last one are paid for too.
        """
        named = what if callable(what) else lambda _: what
        jobs = [
            (
                self._trials.training_of(one.recipe),
                lambda trials, one=one: self._tried(trials, one, named(one), lambda: make(trials, one)),
            )
            for one in batch
        ]
        took = []
        for one, found in zip(batch, self._parts.run(jobs), strict=True):
            before = self._accounts.spent.seconds
            if isinstance(found, Failure):
                flops = prices[one].flops if prices else 0.0
                self._accounts.pay(self._part(one), seconds=found.seconds, flops=flops)
                self._shown(f"{one.recipe.name} failed: {found.why}")
                one.stop("failed", found.why)
            else:
                settle(one, found)
            took.append(self._accounts.spent.seconds - before)
        self._accounts.pay("search", seconds=len(self._parts) * max(took, default=0.0) - sum(took))

    def _tried(
        self, trials: Trials, one: Candidate, what: str, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | Failure:
        """What `make` returns, or how it failed, now or before the study was started again. A control must not fail."""
        before = trials.failure(one.recipe, what)
        if before is not None:
            return before
        started = time.perf_counter()
        try:
            return make()
        except (Preempted, LostHostError, CheckpointError):
            raise
        except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
            if one in self._plan.controls:
                raise
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return trials.write_failure(one.recipe, what, why, time.perf_counter() - started)


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
