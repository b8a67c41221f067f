"""One recipe, tried: the base transformed, recovered for some steps, finished, scored, and what each of that costs.

What was finished is written down in the study's folder with a fingerprint of everything that it depends on, and read
from there by a study that goes on after a kill.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import scipy  # which reads its parts, slow ones, as they are named

from jaxcost import serialization, weights
from jaxcost.config import Experiment
from jaxcost.data.files import atomic_write
from jaxcost.session import Session
from jaxcost.study import quality
from jaxcost.study.accounts import Price, costs
from jaxcost.study.export import export
from jaxcost.study.measure import ServedCost, meter, trainable_parameters, weight_bytes
from jaxcost.study.recipes import Recipe, SearchConfig, StudyConfig, VerifyConfig, is_control
from jaxcost.training.distill import DistillConfig, Teacher
from jaxcost.training.loop import Fitted
from jaxcost.transforms import chain

FIGURES = {
    "score": "measured",
    "score_before_recovery": "measured",
    "control_score": "measured",
    "checkpoint_bytes": "measured",
    "step_flops": "compiled",
    "step_peak_bytes": "compiled",
    "inference_flops_per_token": "compiled",
    "step_seconds": "measured",
    "decode_tokens_per_second": "measured",
    "decode_seconds_per_token": "measured",
    "usd_per_million_tokens": "estimated",
    "kwh_per_million_tokens": "estimated",
    "accuracy": "measured",
    "accuracy_interval": "measured",
    "inference_flops_per_request": "compiled",
    "requests_per_second": "measured",
    "seconds_per_request": "measured",
    "usd_per_million_requests": "estimated",
    "kwh_per_million_requests": "estimated",
    "hours": "measured",
    "flops": "compiled",
    "usd": "estimated",
    "kwh": "estimated",
    "kg_co2": "estimated",
}
"""What each figure of a row is: measured on this machine, read off the compiled program, or estimated from a price.

Numbers of parameters and bytes in memory are exact counts and need no label.
"""

_KEPT = 4
"""Trainings whose weights stay in memory for the recipes that share them; others are read from their checkpoint."""


class Failure(NamedTuple):
    """What of a recipe cannot be done."""

    why: str
    seconds: float
    """What finding that out took, of the whole machine."""


def recovery_of(experiment: Experiment, recipe: Recipe, seed: int = 0) -> Experiment:
    """The recovery of a recipe as an experiment of its own; each further seed draws another order of the data."""
    study, training = experiment.study, experiment.training
    data = experiment.data
    if recipe.task == "shifted":
        data = dataclasses.replace(data, name=study.shifted_data, sources=(), weights=())
    data = dataclasses.replace(data, shuffle_seed=(data.shuffle_seed + seed) % 2**32)
    rate = study.recovery_learning_rate if recipe.learning_rate is None else recipe.learning_rate
    steps = study.steps_of(recipe)
    return dataclasses.replace(
        experiment,
        data=data,
        transforms=recipe.transforms,
        distill=recipe.distill or DistillConfig(),
        optimizer=dataclasses.replace(experiment.optimizer, learning_rate=rate, warmup_steps=steps // 10),
        training=dataclasses.replace(training, steps=steps, evaluate_every=0, seed=(training.seed + seed) % 2**32),
        checkpoint=dataclasses.replace(experiment.checkpoint, keep=1),
    )


def check_shifted(base: Session, recipes: Sequence[Recipe]) -> None:
    """ValueError, before anything is trained, if the held-out data of the shifted task are of no use to its recipes."""
    recipe = next((recipe for recipe in recipes if recipe.task == "shifted"), None)
    if recipe is None:
        return
    own, other = (one.validation_stream for one in (base, base.reopen(recovery_of(base.experiment, recipe))))
    labels, others = (getattr(split, "labels", ()) for split in (own, other))
    if labels != others:
        name = base.experiment.study.shifted_data
        raise ValueError(
            f"study.shifted_data is {name!r}, whose labels are {', '.join(others)}, and the base learns "
            f"{', '.join(labels)}; give data with the same labels, and their order as data.labels."
        )


class Trials:
    """Tries recipes on one trained base, in the folder of a study."""

    def __init__(
        self, base: Session, base_params: weights.Params, workdir: Path, machine: dict[str, Any], parts: int = 1
    ):
        """`machine` is what the measured figures depend on; the base's devices are one of so many `parts` of it."""
        self._base, self._base_params, self._workdir = base, base_params, workdir
        self._machine = machine if parts == 1 else machine | {"parts": parts}
        self._parts = parts
        self._tasks = {"base": base}
        self._quality = quality.of(base.experiment.data.objective)
        self._fitted: dict[str, Fitted] = {}

    def session(self, recipe: Recipe, seed: int = 0) -> Session:
        """The recipe's recovery, sharing what is open of its task."""
        recovery = recovery_of(self._base.experiment, recipe, seed)
        if recipe.task not in self._tasks:
            self._tasks[recipe.task] = self._base.reopen(recovery)
        self._tasks[recipe.task].open()
        return self._tasks[recipe.task].derive(recovery)

    def training_of(self, recipe: Recipe, seed: int = 0) -> str:
        """The name of the recipe's training, which recipes that differ in their finish alone share."""
        recovery = recovery_of(self._base.experiment, recipe, seed)
        return fingerprint(recovery.trained_part(), dataclasses.replace(recipe, name="shared", finish=()))

    def row(self, recipe: Recipe) -> dict[str, Any]:
        """The recipe after its whole recovery, without what only a comparison knows; see `result.Row`.

        Raises what `Session.train` and `Session.transformed` raise.
        """
        return self.once(recipe, "row", lambda: self._row(recipe))

    def stage(self, recipe: Recipe, steps: int, seed: int = 0) -> dict[str, Any]:
        """The recipe after some steps of its recovery: `score`, `steps`, `seed`, `recovery`, the name of its training,
        `recovery_totals`, what that has taken so far, and `scoring_seconds`, what scoring the finish took. Both are in
        seconds of the whole machine.

        Raises what `Session.train` and `Session.transformed` raise.
        """
        return self.once(recipe, f"steps_{steps}-seed_{seed}", lambda: self._stage(recipe, steps, seed))

    def beforehand(self, recipe: Recipe, serving: bool) -> dict[str, Any]:
        """What the transformed base costs before any recovery: `checkpoint_bytes` and, if asked for, of serving.

        A recovery changes none of it but how well the bytes compress.
        """
        name = "beforehand-serving" if serving else "beforehand"
        return self.once(recipe, name, lambda: self._beforehand(recipe, serving))

    def once(self, recipe: Recipe, name: str, make: Callable[[], dict[str, Any]], beside: Any = None) -> dict[str, Any]:
        """What `make` returns for a recipe, or what it returned under this name before it was written down.

        `beside` is what it depends on beside the experiment, the recipe and the machine.
        """
        found = self._read(recipe, name, beside)
        if found is None:
            found = make()
            self._write(recipe, name, found, beside)
        return found

    def failure(self, recipe: Recipe, what: str) -> Failure | None:
        """What failed before the study was started again."""
        found = self._read(recipe, f"{what}-failed")
        return found and Failure(**found)

    def write_failure(self, recipe: Recipe, what: str, why: str, seconds: float) -> Failure:
        """Writes down what of a recipe cannot be done, so that it is not tried again."""
        found = {"why": why, "seconds": seconds / self._parts}
        self._write(recipe, f"{what}-failed", found)
        return Failure(**found)

    @property
    def devices(self) -> list[jax.Device]:
        """What the trials run on."""
        return self._base.devices

    @property
    def study(self) -> StudyConfig:
        """The study's own settings."""
        return self._base.experiment.study

    def params(self, recipe: Recipe) -> weights.Params:
        """The finished weights of a recipe whose recovery is over, from its checkpoint."""
        session = self.session(recipe)
        return self._finished(session, recipe, self._fit(session, recipe).params)

    def _row(self, recipe: Recipe) -> dict[str, Any]:
        session, study = self.session(recipe), self.study
        started = time.perf_counter()
        before = session.evaluate(self._finished(session, recipe, self._start(session, recipe)))
        scoring = time.perf_counter() - started
        fitted = self._fit(session, recipe)
        started = time.perf_counter()
        params = self._finished(session, recipe, fitted.params)
        found = session.evaluate(params) if recipe.finish else fitted.metrics
        serving = self._serving(session, params)
        written = export(params, self._folder(recipe) / "weights.npz")
        scoring += time.perf_counter() - started
        data, judged = session.experiment.data, self._quality
        price = Price(fitted.step_seconds * fitted.steps, fitted.cost.total_flops * fitted.steps)
        paid = costs(price, session.hardware)
        return {
            "name": recipe.name,
            "transforms": [repr(t) for t in (*recipe.transforms, *recipe.finish)],
            "description": recipe.describe(),
            "task": recipe.task,
            "control": is_control(recipe),
            "distill": serialization.to_json(recipe.distill),
            "objective": data.objective,
            "metric": f"{judged.unit}, {data.title} {data.validation_split}",
            "score": found[judged.score],
            "score_before_recovery": before[judged.score],
            "score_interval": None,
            **_right(found),
            "trainable_parameters": trainable_parameters(fitted.params),
            "checkpoint_bytes": written,
            "weight_bytes": weight_bytes(params),
            "step_flops": fitted.cost.total_flops,
            "step_peak_bytes": fitted.cost.peak_bytes,
            "step_seconds": fitted.step_seconds,
            **serving,
            "recovery_steps": study.steps_of(recipe),
            "recovery_learning_rate": session.experiment.optimizer.learning_rate,
            **paid,
            "kg_co2": session.hardware.kg_co2(paid["kwh"]),
            "figures": FIGURES,
            "recovery": self.training_of(recipe),
            "recovery_totals": self._charged(fitted),
            "scoring_seconds": scoring / self._parts,
        }

    def _stage(self, recipe: Recipe, steps: int, seed: int) -> dict[str, Any]:
        session = self.session(recipe, seed)
        fitted = self._fit(session, recipe, steps, seed)
        started = time.perf_counter()
        found = fitted.metrics
        if recipe.finish:
            found = session.evaluate(self._finished(session, recipe, fitted.params))
        return {
            "score": found[self._quality.score],
            "steps": steps,
            "seed": seed,
            "recovery": self.training_of(recipe, seed),
            "recovery_totals": self._charged(fitted),
            "scoring_seconds": (time.perf_counter() - started) / self._parts,
        }

    def _beforehand(self, recipe: Recipe, serving: bool) -> dict[str, Any]:
        session = self.session(recipe)
        started = time.perf_counter()
        params = self._finished(session, recipe, self._start(session, recipe))
        path = self._folder(recipe) / "beforehand.npz"
        found = {"checkpoint_bytes": export(params, path)}
        path.unlink()
        found |= self._serving(session, params) if serving else {}
        return found | {"scoring_seconds": (time.perf_counter() - started) / self._parts}

    def _charged(self, fitted: Fitted) -> dict[str, float]:
        """What a training has taken so far, in seconds of the whole machine."""
        return fitted.totals | {"seconds": fitted.totals["seconds"] / self._parts}

    @functools.cached_property
    def _meter(self) -> Callable[[weights.Params], ServedCost]:
        """Measures the weights of any recipe: the model is the same for all."""
        return meter(self._base)

    def _serving(self, session: Session, params: weights.Params) -> dict[str, Any]:
        """The costs of `quality.Served`."""
        served, hardware, cost = self._quality.served, session.hardware, self._meter(params)
        million = 1e6 / cost.per_second
        return {
            served.flops: cost.flops,
            served.per_second: cost.per_second,
            served.seconds: self.study.decode_batch_size / cost.per_second,
            served.usd: hardware.usd(million),
            served.kwh: hardware.kwh(million),
        }

    def _start(self, session: Session, recipe: Recipe) -> weights.Params:
        return session.transformed(session.transform, self._base_params, self._key(session))

    def _finished(self, session: Session, recipe: Recipe, params: weights.Params) -> weights.Params:
        return session.transformed(chain(*recipe.finish), params, self._key(session))

    def _key(self, session: Session) -> jax.Array:
        return jax.random.key(session.experiment.training.seed)

    def _fit(self, session: Session, recipe: Recipe, steps: int | None = None, seed: int = 0) -> Fitted:
        name = self.training_of(recipe, seed)
        steps = self.study.steps_of(recipe) if steps is None else steps
        fitted = self._fitted.get(name)
        if fitted is None or fitted.steps != steps:
            self._fitted.pop(name, None)
            teacher = Teacher(session.model, self._base_params) if recipe.distill else None
            folder = self._workdir / "recoveries" / name
            fitted = session.train(folder, lambda: self._start(session, recipe), recipe.name, teacher, steps)
            self._fitted[name] = fitted
            if len(self._fitted) > _KEPT:
                del self._fitted[next(iter(self._fitted))]
        return fitted

    def _read(self, recipe: Recipe, name: str, beside: Any = None) -> dict[str, Any] | None:
        path = self._folder(recipe) / f"{name}.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return found if found.pop("fingerprint", None) == self._fingerprint(recipe, beside) else None

    def _write(self, recipe: Recipe, name: str, found: dict[str, Any], beside: Any = None) -> None:
        write_json(self._folder(recipe) / f"{name}.json", found | {"fingerprint": self._fingerprint(recipe, beside)})

    def _folder(self, recipe: Recipe) -> Path:
        return self._workdir / "recipes" / recipe.name

    def _fingerprint(self, recipe: Recipe, beside: Any) -> str:
        return fingerprint(self._base.experiment, recipe, self._machine, beside)


def _right(found: dict[str, float | None]) -> dict[str, Any]:
    """The share of labels that are right, with Wilson's interval of it (Wilson 1927); nothing of text."""
    if "accuracy" not in found:
        return {}
    right, examples = found["accuracy"], found["scored_examples"]
    interval = scipy.stats.binomtest(round(right * examples), examples).proportion_ci(method="wilson")
    return {"accuracy": right, "accuracy_interval": {"low": float(interval.low), "high": float(interval.high)}}


def fingerprint(experiment: Experiment, *beside: Any) -> str:
    """Names an experiment, but for which recipes are tried and how they are chosen, and what stands beside it."""
    chosen = {"recipes": (), "only": (), "budgets": (), "spaces": ()}
    study = dataclasses.replace(experiment.study, **chosen, search=SearchConfig(), verify=VerifyConfig())
    said = serialization.to_json((dataclasses.replace(experiment, study=study), *beside))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is either whole or absent."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, allow_nan=False).encode())
