"""Rows of recipes against each other: the control, the Pareto fronts, the best for each budget, what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxcost.study.recipes import Budget

Row = dict[str, Any]

EXACT_COSTS = ("checkpoint_bytes", "inference_flops_per_token", "step_flops")
"""The costs that a second run would repeat to the last digit; the joint front rests on these alone."""

COSTS = {
    "checkpoint_bytes": "bytes on disk",
    "inference_flops_per_token": "FLOPs a decoded token",
    "step_seconds": "seconds a training step",
    "usd": "USD of the recovery",
}
"""The costs that quality is drawn against, and their names for people."""


def compare(
    rows: Sequence[Row], budgets: Sequence[Budget], baselines: dict[str, float], base_score: float
) -> dict[str, Any]:
    """`rows` with `control_score`, `pareto` and `pareto_on`; `winners`, one a budget; and `findings` in words."""
    controls = {row["task"]: row for row in reversed(rows) if row["control"]}
    fronts = {cost: _front(rows, (cost,)) for cost in COSTS}
    joint = _front(rows, EXACT_COSTS)
    compared = [
        row
        | {
            "control_score": controls[row["task"]]["score"],
            "pareto": row["name"] in joint,
            "pareto_on": [cost for cost in COSTS if row["name"] in fronts[cost]],
        }
        for row in rows
    ]
    return {
        "rows": compared,
        "winners": [_winner(compared, controls, budget) for budget in budgets],
        "findings": _findings(compared, controls, baselines, base_score),
    }


def _front(rows: Sequence[Row], costs: tuple[str, ...]) -> set[str]:
    """Names of the rows that no other of their task beats in score and all of the costs. Unknown costs don't count."""

    def axes(row):
        return [row["score"], *(row[cost] for cost in costs if row[cost] is not None)]

    def beaten(row, other):
        pairs = list(zip(axes(row), axes(other), strict=True))
        return all(b <= a for a, b in pairs) and any(b < a for a, b in pairs)

    return {
        row["name"]
        for row in rows
        if not any(beaten(row, other) for other in rows if other["task"] == row["task"] and other is not row)
    }


def _winner(rows: Sequence[Row], controls: dict[str, Row], budget: Budget) -> dict[str, Any]:
    task = "base" if "base" in controls else next(iter(controls))
    known = [row for row in rows if row["task"] == task and row[budget.metric] is not None]
    found: dict[str, Any] = {"budget": budget.name, "metric": budget.metric}
    found |= {"limit": None, "recipe": None, "score": None}
    if not known:
        return found | {"why": f"{budget.metric} is unknown on this hardware; give its price or power in hardware.*."}
    limit = budget.share * controls[task][budget.metric]
    found["limit"] = limit
    fitting = [row for row in known if row[budget.metric] <= limit]
    if not fitting:
        cheapest = min(known, key=lambda row: row[budget.metric])
        return found | {"why": f"nothing fits; the cheapest, {cheapest['name']}, takes {cheapest[budget.metric]:.4g}."}
    best = min(fitting, key=lambda row: row["score"])
    return found | {"recipe": best["name"], "score": best["score"]}


def _findings(rows, controls, baselines, base_score) -> list[dict[str, Any]]:
    """Claims that the study puts to the test, each with whether it held here and the figures."""
    found = [
        _finding(
            "base_beats_trigram",
            base_score < baselines["trigram"] and base_score < baselines["unigram"],
            f"The base model needs {base_score:.3f} bits per byte of held-out text; byte n-grams need "
            f"{baselines['unigram']:.3f} (unigram), {baselines['trigram']:.3f} (trigram) and "
            f"{baselines['five_gram']:.3f} (5-gram).",
        )
    ]
    for row in rows:
        control = controls[row["task"]]
        said = " ".join(row["transforms"])
        if "prune(" in said:
            before, after = row["score_before_recovery"], row["score"]
            text = f"{row['name']}: {before:.3f} bits per byte after pruning, {after:.3f} after recovery."
            found.append(_finding(f"{row['name']}_recovers", after < before, text))
            same = row["step_flops"] >= control["step_flops"]
            text = (
                f"{row['name']}: a mask saves no FLOPs. The compiled step has {row['step_flops'] / 1e9:.3f} GFLOP, the "
                f"control's {control['step_flops'] / 1e9:.3f}; its peak memory is "
                f"{row['step_peak_bytes'] / control['step_peak_bytes']:.2f} times the control's."
            )
            found.append(_finding(f"{row['name']}_mask_saves_no_flops", same, text))
        if "lora(" in said:
            gain = row["score_before_recovery"] - row["score"]
            full = control["score_before_recovery"] - control["score"]
            if full <= 0:
                text = f"{row['name']}: the full fine-tune did not improve ({full:.3f}), so there is nothing to reach."
                found.append(_finding(f"{row['name']}_close_to_full", False, text))
                continue
            ratio = control["checkpoint_bytes"] / row["checkpoint_bytes"]
            flops = row["step_flops"] / control["step_flops"]
            text = (
                f"{row['name']} reaches {gain / full:.1%} of the full fine-tune's improvement ({gain:.3f} of "
                f"{full:.3f} bits per byte) with a checkpoint {ratio:.1f} times smaller and {flops:.2f} of its "
                "step's FLOPs."
            )
            found.append(_finding(f"{row['name']}_close_to_full", gain >= 0.85 * full and ratio >= 20, text))
        if row.get("distill"):
            text = (
                f"{row['name']}: {row['score']:.3f} bits per byte with the base as its teacher, the control without "
                f"{control['score']:.3f}; its step has {row['step_flops'] / control['step_flops']:.2f} times the "
                "control's FLOPs, the teacher's included."
            )
            found.append(_finding(f"{row['name']}_gains_from_its_teacher", row["score"] < control["score"], text))
        if "quantize(" in said and "lora(" not in said:
            loss = row["score"] / control["score"] - 1
            text = f"{row['name']} loses {loss:.2%} bits per byte against the control."
            found.append(_finding(f"{row['name']}_loses_little", loss < 0.01, text))
    return found


def _finding(claim: str, holds: bool, text: str) -> dict[str, Any]:
    return {"claim": claim, "holds": bool(holds), "text": text}
