"""The study: train a base model once, try recipes on it, verify the best against the control, and say what all costs.

A list of recipes is tried whole; spaces of recipes are searched within a budget.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxcost import objectives, serialization
from jaxcost.config import Experiment
from jaxcost.cost import closed_form
from jaxcost.cost.ledger import Ledger
from jaxcost.planning.plan import plan as plan_experiment
from jaxcost.planning.topology import PlanningUnavailable
from jaxcost.session import Session
from jaxcost.study import baselines, compare, quality, report
from jaxcost.study.accounts import Accounts, Price
from jaxcost.study.candidates import Plan
from jaxcost.study.estimates import Estimator, count, probe
from jaxcost.study.parts import Parts, divided
from jaxcost.study.quality import Quality
from jaxcost.study.recipes import Recipe
from jaxcost.study.result import SCHEMA
from jaxcost.study.safety import read_list
from jaxcost.study.search import Search, interval, trial_of
from jaxcost.study.slices import check_groups
from jaxcost.study.trials import Trials, check_shifted, write_json
from jaxcost.study.verify import verify
from jaxcost.workdir import alone_in


def run_study(
    experiment: Experiment, workdir: Path, *, quiet: bool = False, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
    """Walks the whole loop in a folder and returns what `study.json` there holds; what was finished is not repeated.

    Writes `study.json`, whose fields `result.Study` says, `ledger.jsonl`, and what `report.write` adds. What of a
    recipe is finished is written down; a killed study goes on with the rest when it is started again.

    Raises what `Session.train` raises, and:
      ValueError: there is no recipe, another process works in the folder, or what `Search` raises it for.
    """
    study = experiment.study
    if not study.recipes and not study.spaces:
        raise ValueError(
            "The config has no recipes to study; give study.recipes, as configs/quickstart.py does, or study.spaces to "
            "search, as configs/search.py does."
        )
    workdir = Path(workdir)
    console = Console(stderr=True, quiet=quiet)
    base = Session(experiment, quiet=quiet, devices=devices)
    judged = _judged(base.experiment)
    recipes = study.complete()
    if study.verify.on:
        check_groups(base)
        if judged.writes:
            read_list(study.verify.safety)
    check_shifted(base, recipes)
    with alone_in(workdir, "working"):
        machine = _machine(base)
        dense = jax.eval_shape(base.base_params)
        if study.spaces:
            parts = divided(base, study.search.parallel)
            speed = probe(base, workdir / "base", workdir / "probe.json", machine)
            plan = Plan(base, dense, Estimator(base, speed))
            _say_estimate(plan, console)
        else:
            # A recipe that cannot work fails here, before anything is trained.
            for recipe in recipes:
                count(base, recipe, dense)

        # ---- Base: trained once ----
        trained = base.train(workdir / "base", title="base")
        bought = base.purchases
        ledger = Ledger(workdir / "ledger.jsonl", base.hardware, data=bought)
        ledger.rewind(-1)
        accounts = Accounts(ledger, base.hardware, bought.get("data_usd", 0.0))
        accounts.pay("base", **trained.totals)
        base_score = trained.metrics[judged.score]
        accounts.record(0, event="base", score=base_score, unit=judged.unit, heading=judged.heading)

        # ---- Recipes: transform, recover, score, price ----
        trials = Trials(base, trained.params, workdir, machine)
        if study.spaces:
            search = Search(plan, Parts(parts, trained.params, workdir, machine), accounts, console.print)
            search.run()
            found = _searched(search, plan)
        else:
            found = _grid(trials, recipes, accounts, console)

        # ---- Verification: the recommended recipe against its control, on held-out data ----
        verification = _verified(found, recipes, trials, console)
        if verification is not None:
            accounts.pay("verification", seconds=verification["seconds"])

        # ---- Report ----
        simple = baselines.measured(base)
        estimated = plan.estimated if study.spaces else None
        budgets = () if study.spaces else study.budgets
        compared = compare.compare(found["rows"], budgets, simple, base_score)
        flags = [] if verification is None else verification.pop("flags")
        recommended, control = (_row(compared["rows"], found[name]) for name in ("recommended", "control"))
        result = {
            "schema": SCHEMA,
            "kind": "search" if study.spaces else "grid",
            "experiment": serialization.to_json(experiment),
            "machine": machine,
            "data": {"name": experiment.data.title, "shifted": study.shifted_data},
            "base": {name: getattr(trained, name) for name in ("steps", "step_seconds", "metrics")},
            "baselines": simple,
            "estimates": _estimates(base),
            "plan": _plan(base),
            "prices": {name: dataclasses.asdict(figure) for name, figure in base.hardware.figures().items()},
            "answer": compare.answer(recommended, control, flags, compared["winners"], found["nothing"]),
            "flags": flags,
            "budget": search.limits(found["candidate"]) if study.spaces else [],
            **compared,
            **{name: found[name] for name in ("trials", "finalists", "surrogate")},
            "verification": verification,
            "ledger": accounts.parts(estimated),
            "serving": [compare.serving(row) for row in (recommended, control) if row],
            "totals": accounts.totals(estimated),
        }
        report.write(result, workdir)
        write_json(workdir / "study.json", result)
    return result


def _judged(experiment: Experiment) -> Quality:
    """What the experiment is judged by; ValueError, in one sentence, if it cannot be studied."""
    judged = quality.of(experiment.data.objective)
    objectives.check_model(experiment.data.objective, experiment.model, experiment.data.of_images)
    for budget in experiment.study.budgets:
        if budget.metric in quality.SERVED_COSTS - {*judged.served.costs}:
            raise ValueError(
                f"The budget {budget.name!r} limits {budget.metric}, and what this model is served for is a "
                f"{judged.served.answer}; limit one of {', '.join(judged.served.costs)}, or leave it out."
            )
    return judged


def _grid(trials: Trials, recipes: Sequence[Recipe], accounts: Accounts, console: Console) -> dict[str, Any]:
    """Every recipe's row, and the one that the first budget that anything meets recommends."""
    rows = []
    for index, recipe in enumerate(recipes, 1):
        console.print(f"recipe {index}/{len(recipes)}: {recipe.name} ({recipe.describe()})")
        row = trials.row(recipe)
        rows.append(row)
        part = "control" if row["control"] else "search"
        accounts.pay_training(part, row["recovery"], row["recovery_totals"])
        accounts.pay(part, seconds=row["scoring_seconds"])
        accounts.record(index, recipe=recipe.name, metric=row["metric"], score=row["score"])
    recommended = compare.recommended(rows, trials.study.budgets)
    return {
        "rows": rows,
        "recommended": recommended,
        "control": None if recommended is None else compare.control_of(recommended, rows)["name"],
        "nothing": "No recipe fits any of the budgets.",
        "candidate": None,
        "trials": [],
        "finalists": [],
        "surrogate": None,
    }


def _searched(search: Search, plan: Plan) -> dict[str, Any]:
    """What a search came to, in the form of `_grid`."""
    best = search.finalists()
    answer = best[0] if best else None
    controls = [one.recipe.name for one in plan.controls]
    finalists = [one for one in plan.candidates if one.status == "finalist"]
    rows = []
    for one in plan.candidates:
        if one.row is not None:
            row = one.row | {"control": one.recipe.name in controls}
            rows.append(row | {"score_interval": interval(one.seeds) if one.seeds else None})
    return {
        "rows": rows,
        "recommended": answer and answer.recipe.name,
        "control": plan.control_of(answer).recipe.name if answer else controls[0],
        "nothing": "" if answer else search.nothing_meets(),
        "candidate": answer,
        "trials": [trial_of(one, one.recipe.name in controls, plan.hardware) for one in plan.candidates],
        "finalists": [
            {
                "name": one.recipe.name,
                "control": one.recipe.name in controls,
                "seeds": list(range(len(one.seeds))),
                "score": interval(one.seeds),
            }
            for one in finalists
        ],
        "surrogate": search.compared(),
    }


def _verified(
    found: dict[str, Any], recipes: Sequence[Recipe], trials: Trials, console: Console
) -> dict[str, Any] | None:
    """The verification of what is recommended; from its file where it was done before."""
    names = {recipe.name: recipe for recipe in recipes}
    if not trials.study.verify.on or found["recommended"] in (None, found["control"]):
        return None
    recipe, control = names[found["recommended"]], names[found["control"]]
    console.print(f"verification: {recipe.name} against {control.name}")
    return trials.once(
        recipe, "verification", lambda: verify(trials, recipe, control), beside=(control, trials.study.verify)
    )


def _row(rows: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any] | None:
    return next((row for row in rows if row["name"] == name), None)


def _say_estimate(plan: Plan, console: Console) -> None:
    whole = sum(plan.estimated.values(), Price())
    usd = plan.hardware.usd(whole.seconds)
    money = "price unknown" if usd is None else f"{usd:.2g} USD"
    console.print(
        f"estimate: {plan.starts[0]} of {len(plan.candidates) - len(plan.controls)} recipes started, "
        f"{whole.seconds:,.0f} s, {money}"
    )


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
    if model.generates:
        cache = closed_form.kv_cache_bytes(
            model,
            session.experiment.study.decode_batch_size,
            model.max_length,
            execution.cache_dtype.itemsize,
            execution.cache_scale_bytes,
        )
        memory = dataclasses.replace(memory, kv_cache_bytes=cache)
    return {
        "parameters": closed_form.parameter_counts(model).total,
        "training_flops_per_token": flops,
        "training_flops": flops * tokens,
        "memory_bytes": dataclasses.asdict(memory),
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
