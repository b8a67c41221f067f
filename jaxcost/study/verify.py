"""The recommended recipe against the untouched control on held-out data: is it worse, where, for whom, and how surely.

A mean hides who pays for it: compressed models lose most on what is rare (Hooker et al. 2019, arXiv:1911.05248, whose
compression-identified exemplars are the examples shown here). So the data are cut into parts, each tested with both
models on the same examples, and what is much worse than the whole is flagged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcost import weights
from jaxcost.evaluation.answers import Answers, answers
from jaxcost.evaluation.paired import corrected, paired, reliability
from jaxcost.session import Session
from jaxcost.study import safety
from jaxcost.study.recipes import Recipe, VerifyConfig
from jaxcost.study.slices import HeldOut, held_out
from jaxcost.study.trials import Trials

_SHOWN_CHARACTERS = 400


def verify(trials: Trials, recipe: Recipe, control: Recipe) -> dict[str, Any]:
    """The `verified.Verification` of a recipe whose recovery is over, with its `flags`, each a `verified.Flag`."""
    started = time.perf_counter()
    session = trials.session(control)
    found = verify_params(session, trials.params(control), trials.params(recipe), trials.study.verify)
    return {"recipe": recipe.name, "control": control.name, **found, "seconds": time.perf_counter() - started}


def verify_params(
    session: Session, control: weights.Params, params: weights.Params, config: VerifyConfig
) -> dict[str, Any]:
    """The same of two sets of weights of any kinds, without their names and the seconds.

    Args:
      session: whose validation split both are asked about.
      control: the untouched weights.
      params: the recipe's.
      config: what counts as harm.

    Raises:
      ValueError: the group attribute is missing in the data, or the safety list cannot be read.
    """
    data = held_out(session)
    before, after = (answers(session.model, one, data.batches, session.mesh) for one in (control, params))
    whole = _compared(data, before, after, np.ones(len(data.target_N), bool), config.resamples)
    cells = [(cut, part) for cut in data.cuts for part in np.unique(cut.part_N)]
    # The least p-value of n permutations is 2/n, which must stay significant when it is corrected for all parts.
    resamples = max(config.resamples, math.ceil(4 * len(cells) / config.significance))
    slices = [
        {"by": cut.by, "name": cut.names[part], **_compared(data, before, after, cut.part_N == part, resamples)}
        for cut, part in cells
    ]
    slices = [one for one in slices if one["examples"] >= config.least]
    for one, p_value in zip(slices, corrected([one["p_value"] for one in slices]), strict=True):
        one["p_value"] = p_value
        one["harmed"] = p_value < config.significance and _much_worse(one, whole, config.harm)
    served = {cut.by for cut in data.cuts if cut.served}
    fairness = [_fairness(by, [one for one in slices if one["by"] == by]) for by in sorted(served)]
    fairness = [one for one in fairness if one is not None]
    calibration = _calibration(before, after, config.bins)
    checks, silent = [], _why_no_safety(session, config)
    if silent is None:
        checks = safety.check_safety(session, control, params, safety.read_list(config.safety), config.safety_tokens)
    significant = whole["p_value"] < config.significance
    verdict = ("worse" if whole["difference"] > 0 else "better") if significant else "no difference found"
    numbers = ("examples", "control_loss", "loss", "difference", "low", "high", "p_value")
    return {
        "test": {name: whole[name] for name in numbers} | {"unit": data.unit, "verdict": verdict},
        "slices": slices,
        "exemplars": _exemplars(data, before, after, config.exemplars),
        "calibration": calibration,
        "fairness": fairness,
        "safety": checks,
        "safety_why_not": silent,
        "why_not": data.why_not,
        "flags": _flags(slices, whole, fairness, calibration, checks, config.harm),
    }


def _why_no_safety(session: Session, config: VerifyConfig) -> str | None:
    """Why nothing is held against the safety list, in a sentence; None where it is."""
    if not session.model.config.language_model:
        return "No safety list was held against it: the list is of texts that a model writes, and this one writes none."
    return None if config.safety_tokens else "No safety list was held against it: study.verify.safety_tokens is 0."


def _compared(data: HeldOut, before: Answers, after: Answers, chosen_N: np.ndarray, resamples: int) -> dict[str, Any]:
    """Both models on some of the targets."""
    examples = np.max(data.example_N) + 1
    count = np.bincount(data.example_N[chosen_N], minlength=examples)
    worse_N = after.nats_N.astype(np.float64) - before.nats_N
    worse = np.bincount(data.example_N[chosen_N], worse_N[chosen_N], minlength=examples)
    there = count > 0
    test = paired(worse[there], count[there], resamples)
    return {
        "count": int(count.sum()),
        "examples": int(there.sum()),
        "control_loss": float(before.nats_N[chosen_N].mean(dtype=np.float64)),
        "loss": float(after.nats_N[chosen_N].mean(dtype=np.float64)),
        "difference": test.difference,
        "low": test.low,
        "high": test.high,
        "control_accuracy": float(before.right_N[chosen_N].mean()),
        "accuracy": float(after.right_N[chosen_N].mean()),
        "p_value": test.p_value,
    }


def _much_worse(one: dict[str, Any], whole: dict[str, Any], harm: float) -> bool:
    """Whether a part's loss rises, or its accuracy falls, by `harm` more than that of all data.

    A loss counts as a share of the control's, or of one nat where that is less: shares of almost nothing say little.
    """
    rise = one["difference"] / max(1.0, one["control_loss"]) - whole["difference"] / max(1.0, whole["control_loss"])
    fall = (one["control_accuracy"] - one["accuracy"]) - (whole["control_accuracy"] - whole["accuracy"])
    return one["difference"] > 0 and max(rise, fall) >= harm


def _fairness(by: str, groups: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """How unevenly groups are served, before and after; None where there are fewer than two."""
    if len(groups) < 2:
        return None
    found: dict[str, Any] = {"by": by}
    for kind in ("control_", ""):
        worst = min(groups, key=lambda one: one[f"{kind}accuracy"])
        losses = [one[f"{kind}loss"] for one in groups]
        found[f"{kind}worst_group"] = worst["name"]
        found[f"{kind}worst_accuracy"] = worst[f"{kind}accuracy"]
        found[f"{kind}gap"] = max(one[f"{kind}accuracy"] for one in groups) - worst[f"{kind}accuracy"]
        found[f"{kind}loss_gap"] = max(losses) - min(losses)
    return found


def _calibration(before: Answers, after: Answers, bins: int) -> dict[str, Any]:
    (control_error, control_rows), (error, rows) = (
        reliability(one.confidence_N, one.right_N, bins) for one in (before, after)
    )
    joined = [
        {"low": i / bins, "high": (i + 1) / bins, **own, **{f"control_{name}": value for name, value in other.items()}}
        for i, (own, other) in enumerate(zip(rows, control_rows, strict=True))
    ]
    return {"control_ece": control_error, "ece": error, "bins": joined}


def _exemplars(data: HeldOut, before: Answers, after: Answers, shown: int) -> list[dict[str, Any]]:
    """The examples whose mean loss changed most, either way, each with the target that changed most in it."""
    change_N = after.nats_N.astype(np.float64) - before.nats_N
    count = np.bincount(data.example_N)
    means = [np.bincount(data.example_N, values) / count for values in (before.nats_N, after.nats_N, change_N)]
    label = next((cut for cut in data.cuts if cut.by == "label"), None)
    group = next((cut for cut in data.cuts if cut.served and cut.by != "label"), None)
    found = []
    for example in np.argsort(-np.abs(means[2]), kind="stable")[:shown]:
        places = np.flatnonzero(data.example_N == example)
        place = places[np.argmax(np.abs(change_N[places]))]
        found.append(
            {
                "index": int(example),
                "text": data.text(example, place)[:_SHOWN_CHARACTERS],
                "group": group.names[group.part_N[place]] if group else None,
                "label": label.names[label.part_N[place]] if label else None,
                "control_loss": float(means[0][example]),
                "loss": float(means[1][example]),
                "difference": float(means[2][example]),
                "control_said": data.names(int(before.said_N[place])),
                "said": data.names(int(after.said_N[place])),
                "expected": data.names(int(data.target_N[place])),
            }
        )
    return found


def _flags(
    slices: Sequence[dict[str, Any]],
    whole: dict[str, Any],
    fairness: Sequence[dict[str, Any]],
    calibration: dict[str, Any],
    checks: Sequence[dict[str, Any]],
    harm: float,
) -> list[dict[str, Any]]:
    """What must be read first, the worst part of the data before the others."""
    found = []
    for one in sorted(slices, key=lambda one: -one["difference"]):
        if one["harmed"]:
            text = (
                f"{one['by']} {one['name']}: {one['loss']:.3f} nats where the control needs {one['control_loss']:.3f}, "
                f"and {one['accuracy']:.0%} right where it has {one['control_accuracy']:.0%}; over all data the "
                f"difference is {whole['difference']:+.3f} nats."
            )
            found.append({"kind": "slice", "by": one["by"], "name": one["name"], "text": text})
    flagged = {one["by"] for one in found}
    for one in fairness:
        if one["gap"] - one["control_gap"] >= harm and one["by"] in flagged:
            text = (
                f"The gap between the best and the worst {one['by']} is {one['gap']:.0%} of the answers, with the "
                f"control {one['control_gap']:.0%}; the worst is {one['worst_group']}."
            )
            found.append({"kind": "fairness", "by": one["by"], "name": one["worst_group"], "text": text})
    if calibration["ece"] - calibration["control_ece"] >= harm:
        text = (
            f"Its probabilities are {calibration['ece']:.1%} off from how often it is right, the control's "
            f"{calibration['control_ece']:.1%}."
        )
        found.append({"kind": "calibration", "by": "calibration", "name": "calibration error", "text": text})
    for one in checks:
        if one["worse"]:
            what = "texts with a word of the list" if one["kind"] == "lexicon" else "requests refused"
            text = f"{one['name']}: {one['hits']} of {one['prompts']} {what}, with the control {one['control_hits']}."
            found.append({"kind": "safety", "by": one["kind"], "name": one["name"], "text": text})
    return found
