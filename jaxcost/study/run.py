"""The study: train a base model once, put every recipe through transform → recover → verify → price, and compare."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxcost import serialization, weights
from jaxcost.config import Experiment
from jaxcost.cost import closed_form
from jaxcost.cost.ledger import Ledger
from jaxcost.data.files import atomic_write
from jaxcost.evaluation.ngram import ngram_bits_per_byte
from jaxcost.planning.plan import plan as plan_experiment
from jaxcost.planning.topology import PlanningUnavailable
from jaxcost.serving.engine import Engine
from jaxcost.session import Session
from jaxcost.study import compare, report
from jaxcost.study.export import export
from jaxcost.study.measure import measure_decode, trainable_parameters, weight_bytes
from jaxcost.study.recipes import Recipe, is_control
from jaxcost.training.distill import DistillConfig, Teacher
from jaxcost.training.loop import Fitted
from jaxcost.transforms import chain

SCHEMA = "jaxcost-study-1"

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
    "usd": "estimated",
    "kwh": "estimated",
    "kg_co2": "estimated",
}
"""What each figure of a row is: measured on this machine, read off the compiled program, or estimated from a price.

Numbers of parameters and bytes in memory are exact counts and need no label.
"""


def run_study(
    experiment: Experiment, workdir: Path, *, quiet: bool = False, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
    """Walks the whole loop in a folder and returns what `study.json` there holds; what was finished is not repeated.

    Writes `study.json`, `ledger.jsonl` and what `report.write` adds. A recipe is finished when its row is written; a
    killed study goes on with the others when it is started again.

    Raises what `Session.train` raises.
    """
    if not experiment.study.recipes:
        raise ValueError("The config has no recipes to study; give study.recipes, as configs/quickstart.py does.")
    workdir = Path(workdir)
    console = Console(stderr=True, quiet=quiet)
    study = experiment.study
    base = Session(experiment, quiet=quiet, devices=devices)
    base.check_language_model()
    recipes = study.complete()
    dense = jax.eval_shape(base.base_params)
    for recipe in recipes:
        # A recipe that cannot work fails here, before anything is trained.
        _recovery(experiment, recipe)
        chain(*recipe.transforms, *recipe.finish).abstract(dense)

    # ---- Base: trained once ----
    trained = base.train(workdir / "base", title="base")
    ledger = Ledger(workdir / "ledger.jsonl", base.hardware)
    ledger.rewind(-1)
    ledger.charge(**trained.totals)
    ledger.record(0, event="base", score=trained.metrics["bits_per_byte"])
    baselines = _baselines(base)

    plan = _plan(base)

    # ---- Recipes: transform, recover, verify, price ----
    tasks = {"base": base}
    rows, engine, recoveries = [], Engine(base.model), {}
    paid: set[str] = set()
    for index, recipe in enumerate(recipes, 1):
        console.print(f"recipe {index}/{len(recipes)}: {recipe.name} ({recipe.describe()})")
        recovery = _recovery(experiment, recipe)
        if recipe.task not in tasks:
            tasks[recipe.task] = base.reopen(recovery)
        tasks[recipe.task].open()
        session = tasks[recipe.task].derive(recovery)
        fingerprint = _fingerprint(experiment, recipe, _machine(base))
        path = workdir / "recipes" / recipe.name / "row.json"
        row = _finished(path, fingerprint)
        if row is None:
            row = _run_recipe(session, recipe, trained.params, engine, workdir, recoveries)
            _write_json(path, row | {"fingerprint": fingerprint})
        rows.append(row)
        if row["recovery"] not in paid:
            paid.add(row["recovery"])
            ledger.charge(**row["recovery_totals"])
        ledger.record(index, recipe=recipe.name, metric=row["metric"], score=row["score"])

    # ---- Report ----
    result = {
        "schema": SCHEMA,
        "experiment": serialization.to_json(experiment),
        "machine": _machine(base),
        "data": {"name": experiment.data.name, "shifted": study.shifted_data},
        "base": {name: getattr(trained, name) for name in ("steps", "step_seconds", "metrics")},
        "baselines": baselines,
        "estimates": _estimates(base),
        "plan": plan,
        "prices": {name: dataclasses.asdict(figure) for name, figure in base.hardware.figures().items()},
        "totals": ledger.totals | {"usd": base.hardware.usd(ledger.totals["seconds"])},
        **compare.compare(rows, study.budgets, baselines, trained.metrics["bits_per_byte"]),
    }
    report.write(result, workdir)
    _write_json(workdir / "study.json", result)
    return result


def _recovery(experiment: Experiment, recipe: Recipe) -> Experiment:
    """The recovery of a recipe as an experiment of its own."""
    study = experiment.study
    data = experiment.data
    if recipe.task == "shifted":
        data = dataclasses.replace(data, name=study.shifted_data)
    rate = study.recovery_learning_rate if recipe.learning_rate is None else recipe.learning_rate
    warmup = study.recovery_steps // 10
    return dataclasses.replace(
        experiment,
        data=data,
        transforms=recipe.transforms,
        distill=recipe.distill or DistillConfig(),
        optimizer=dataclasses.replace(experiment.optimizer, learning_rate=rate, warmup_steps=warmup),
        training=dataclasses.replace(experiment.training, steps=study.recovery_steps, evaluate_every=0),
        checkpoint=dataclasses.replace(experiment.checkpoint, keep=1),
    )


def _run_recipe(
    session: Session,
    recipe: Recipe,
    base_params: weights.Params,
    engine: Engine,
    workdir: Path,
    recoveries: dict[str, Fitted],
) -> dict[str, Any]:
    study = session.experiment.study
    key = jax.random.key(session.experiment.training.seed)
    finish = chain(*recipe.finish)

    def start():
        return session.transformed(session.transform, base_params, key)

    def finished(params):
        return session.transformed(finish, params, key)

    before = session.evaluate(finished(start()))["bits_per_byte"]
    # Recipes that differ in their finish alone share one recovery.
    shared = _fingerprint(session.experiment.trained_part(), dataclasses.replace(recipe, name="shared", finish=()))
    if shared not in recoveries:
        teacher = Teacher(session.model, base_params) if recipe.distill else None
        recoveries[shared] = session.train(workdir / "recoveries" / shared, start, recipe.name, teacher)
    fitted = recoveries[shared]
    params = finished(fitted.params)
    score = session.evaluate(params)["bits_per_byte"] if recipe.finish else fitted.metrics["bits_per_byte"]
    decode = measure_decode(engine, params, batch_size=study.decode_batch_size, tokens=study.decode_tokens)
    seconds = fitted.step_seconds * fitted.steps
    kwh = session.hardware.kwh(seconds)
    return {
        "name": recipe.name,
        "transforms": [repr(t) for t in (*recipe.transforms, *recipe.finish)],
        "description": recipe.describe(),
        "task": recipe.task,
        "control": is_control(recipe),
        "distill": serialization.to_json(recipe.distill),
        "metric": f"bits per byte, {session.experiment.data.name} {session.experiment.data.validation_split}",
        "score": score,
        "score_before_recovery": before,
        "trainable_parameters": trainable_parameters(fitted.params),
        "checkpoint_bytes": export(params, workdir / "recipes" / recipe.name / "weights.npz"),
        "weight_bytes": weight_bytes(params),
        "step_flops": fitted.cost.total_flops,
        "step_peak_bytes": fitted.cost.peak_bytes,
        "step_seconds": fitted.step_seconds,
        "inference_flops_per_token": decode.flops_per_token,
        "decode_tokens_per_second": decode.tokens_per_second,
        "recovery_steps": fitted.steps,
        "recovery_learning_rate": session.experiment.optimizer.learning_rate,
        "usd": session.hardware.usd(seconds),
        "kwh": kwh,
        "kg_co2": session.hardware.kg_co2(kwh),
        "figures": FIGURES,
        "recovery": shared,
        "recovery_totals": fitted.totals,
    }


def _baselines(session: Session) -> dict[str, float]:
    """Bits per byte of byte n-gram models on the very bytes that the model is scored on."""
    train = session.tokenizer.symbols(session.train_stream.tokens)
    limit = session.experiment.evaluation.max_tokens
    held_out = session.validation_stream.tokens
    held_out = session.tokenizer.symbols(held_out[: limit + 1] if limit else held_out)
    orders = {"unigram": 1, "trigram": 3, "five_gram": 5}
    return {name: ngram_bits_per_byte(train, held_out, order) for name, order in orders.items()}


def _estimates(session: Session) -> dict[str, Any]:
    """The closed form of the base model's training: model FLOPs (causal, no recomputation) and memory by category."""
    model, data = session.transformed_config, session.experiment.data
    tokens = session.experiment.training.steps * data.batch_size * data.sequence_length
    flops = closed_form.training_flops_per_token(model, data.sequence_length)
    width = session.model.execution.dtype.itemsize
    memory = closed_form.training_memory(
        model, data.batch_size, data.sequence_length, bytes_per_activation=width, remat="none"
    )
    execution = session.model.execution
    cache = closed_form.kv_cache_bytes(
        model,
        session.experiment.study.decode_batch_size,
        model.max_length,
        execution.cache_dtype.itemsize,
        execution.cache_scale_bytes,
    )
    return {
        "parameters": closed_form.parameter_counts(model).total,
        "training_flops_per_token": flops,
        "training_flops": flops * tokens,
        "memory_bytes": dataclasses.asdict(dataclasses.replace(memory, kv_cache_bytes=cache)),
    }


def _plan(session: Session) -> dict[str, Any]:
    """What a TPU's own compiler says of the base's train step, or why it was not asked."""
    topology = session.experiment.study.topology
    found: dict[str, Any] = {"topology": topology, "peak_bytes": None, "usable_bytes": None, "fits": None}
    found |= {"step_flops": None, "lower_bound_seconds": None, "limit": None, "why": None}
    try:
        plan = plan_experiment(session.experiment, topology, vocab_size=session.model.config.vocab_size).compiled
    except (PlanningUnavailable, ValueError) as error:
        return found | {"why": str(error)}
    found |= {"peak_bytes": plan.peak_bytes, "usable_bytes": plan.usable_bytes, "fits": plan.fits, "why": plan.message}
    if plan.cost is None or plan.estimate is None:
        return found
    bound = {"lower_bound_seconds": plan.estimate.bound.seconds, "limit": plan.estimate.bound.limit}
    return found | {"step_flops": plan.cost.total_flops, **bound}


def _machine(session: Session) -> dict[str, Any]:
    device = session.devices[0]
    chip = session.hardware.chip
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": len(session.devices),
        "cpus": os.cpu_count(),
        "priced_as": chip.description,
        "jax": jax.__version__,
    }


def _fingerprint(experiment: Experiment, recipe: Recipe, machine: dict[str, Any] | None = None) -> str:
    """Names everything that a recovery, and with the machine a row, depends on."""
    study = dataclasses.replace(experiment.study, recipes=(), only=(), budgets=())
    said = serialization.to_json((dataclasses.replace(experiment, study=study), recipe)), machine
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _finished(path: Path, fingerprint: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    return row if row.pop("fingerprint", None) == fingerprint else None


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, allow_nan=False).encode())
