"""Rows of recipes against each other: the control, the Pareto fronts, the best for each budget, what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxcost.study import quality
from jaxcost.study.quality import Quality, Served
from jaxcost.study.recipes import Budget

Row = dict[str, Any]


def exact_costs(served: Served) -> tuple[str, ...]:
    """The costs that a second run would repeat to the last digit; the joint front rests on these alone."""
    return ("checkpoint_bytes", served.flops, "step_flops")


def drawn_costs(served: Served) -> dict[str, str]:
    """The costs that quality is drawn against, and their names for people."""
    return {
        "checkpoint_bytes": "bytes on disk",
        served.flops: f"FLOPs of a {served.answer}",
        "step_seconds": "seconds a training step",
        "usd": "USD of the recovery",
    }


def compare(
    rows: Sequence[Row], budgets: Sequence[Budget], baselines: dict[str, float], base_score: float
) -> dict[str, Any]:
    """`rows` with `control_score`, `pareto` and `pareto_on`; `winners`, one a budget; and `findings` in words."""
    served = quality.of_row(rows[0]).served
    fronts = {cost: _front(rows, (cost,)) for cost in drawn_costs(served)}
    joint = _front(rows, exact_costs(served))
    compared = [
        row
        | {
            "control_score": control_of(row["name"], rows)["score"],
            "pareto": row["name"] in joint,
            "pareto_on": [cost for cost in fronts if row["name"] in fronts[cost]],
        }
        for row in rows
    ]
    return {
        "rows": compared,
        "winners": [_winner(compared, budget) for budget in budgets],
        "findings": _findings(compared, baselines, base_score),
    }


def control_of(name: str, rows: Sequence[Row]) -> Row:
    """The row that a recipe is compared with: the first untouched one of its task and of as many steps of recovery."""
    own = next(row for row in rows if row["name"] == name)

    def alike(row):
        return row["control"] and all(row[key] == own[key] for key in ("task", "recovery_steps"))

    return next(row for row in rows if alike(row))


def recommended(rows: Sequence[Row], budgets: Sequence[Budget]) -> str | None:
    """The name of the best recipe for the first budget that any recipe meets; of all recipes without a budget."""
    if not budgets:
        return min(rows, key=lambda row: row["score"])["name"]
    return next((name for name in (_winner(rows, budget)["recipe"] for budget in budgets) if name), None)


def answer(
    row: Row | None, control: Row | None, flags: Sequence[dict[str, Any]], winners: Sequence[Row], nothing: str
) -> dict[str, Any]:
    """The `result.Answer`: the recommended row beside its control, or, where there is none, `nothing` as its text.

    Of a grid, whose budgets each have a winner, the text names them all.
    """
    if row is None:
        found = dict.fromkeys(("recipe", "score", "score_interval", "control_score"))
        return found | {"cost_shares": {}, "text": nothing, "flagged": False}
    judged = quality.of_row(row)
    served = judged.served
    shares = {
        cost: row[cost] / control[cost]
        for cost in ("checkpoint_bytes", "weight_bytes", served.flops, served.seconds, served.usd)
        if row[cost] is not None and control[cost] not in (None, 0)
    }
    named = [winner for winner in winners if winner["recipe"]]
    if named:
        text = best_of_each(named, judged)
    else:
        text = (
            f"{row['name']} needs {_score(row):.3f} {judged.unit} where the untouched control needs "
            f"{_score(control):.3f}, with {shares['checkpoint_bytes']:.0%} of its bytes on disk and "
            f"{shares[served.seconds]:.0%} of its time for a {served.answer}."
        )
    if "accuracy" in row:
        text += f" {row['name']} gets {row['accuracy']:.1%} of the labels right, the control {control['accuracy']:.1%}."
    if flags:
        text = f"Harm was found in {row['name']}: {flags[0]['text']} {text}"
    return {
        "recipe": row["name"],
        "score": row["score"],
        "score_interval": row["score_interval"],
        "control_score": control["score"],
        "cost_shares": shares,
        "text": text,
        "flagged": bool(flags),
    }


def best_of_each(winners: Sequence[Row], judged: Quality) -> str:
    """The recipes that are best for each budget, in a sentence; all of them have one."""
    best = "; ".join(f"{w['budget']}: {w['recipe']} ({w['score']:.3f} {judged.unit})" for w in winners)
    return f"Best recipe for each budget: {best}."


def serving(row: Row) -> dict[str, Any]:
    """The `result.Serving` of a row."""
    served = quality.of_row(row).served
    return {"recipe": row["name"]} | {name: row[name] for name in (served.usd, served.kwh)}


def _score(row: Row) -> float:
    """The mean over the seeds, or of the one that there is."""
    return row["score_interval"]["mean"] if row["score_interval"] else row["score"]


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


def _winner(rows: Sequence[Row], budget: Budget) -> dict[str, Any]:
    tasks = [row["task"] for row in rows]
    task = "base" if "base" in tasks else tasks[0]
    known = [row for row in rows if row["task"] == task and row[budget.metric] is not None]
    found: dict[str, Any] = {"budget": budget.name, "metric": budget.metric}
    found |= {"limit": None, "recipe": None, "score": None}
    if not known:
        return found | {"why": f"{budget.metric} is unknown on this hardware; give its price or power in hardware.*."}
    limits = {row["name"]: budget.limit(control_of(row["name"], rows)[budget.metric]) for row in known}
    found["limit"] = limits[known[0]["name"]]
    fitting = [row for row in known if row[budget.metric] <= limits[row["name"]]]
    if not fitting:
        cheapest = min(known, key=lambda row: row[budget.metric])
        return found | {"why": f"nothing fits; the cheapest, {cheapest['name']}, takes {cheapest[budget.metric]:.4g}."}
    best = min(fitting, key=lambda row: row["score"])
    return found | {"recipe": best["name"], "score": best["score"]}


def _findings(rows, baselines, base_score) -> list[dict[str, Any]]:
    """Claims that the study puts to the test, each with whether it held here and the figures."""
    judged = quality.of_row(rows[0])
    unit = judged.unit
    found = [
        _finding(
            f"base_beats_{judged.beaten}",
            base_score < baselines[judged.beaten],
            judged.baseline.format(base=base_score, **baselines),
        )
    ]
    for row in rows:
        control = control_of(row["name"], rows)
        said = " ".join(row["transforms"])
        if "prune(" in said:
            before, after = row["score_before_recovery"], row["score"]
            text = f"{row['name']}: {before:.3f} {unit} after pruning, {after:.3f} after recovery."
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
                f"{full:.3f} {unit}) with a checkpoint {ratio:.1f} times smaller and {flops:.2f} of its "
                "step's FLOPs."
            )
            found.append(_finding(f"{row['name']}_close_to_full", gain >= 0.85 * full and ratio >= 20, text))
        if row.get("distill"):
            text = (
                f"{row['name']}: {row['score']:.3f} {unit} with the base as its teacher, the control without "
                f"{control['score']:.3f}; its step has {row['step_flops'] / control['step_flops']:.2f} times the "
                "control's FLOPs, the teacher's included."
            )
            found.append(_finding(f"{row['name']}_gains_from_its_teacher", row["score"] < control["score"], text))
        if "quantize(" in said and "lora(" not in said:
            loss = row["score"] - control["score"]
            little = loss < 0.01 * judged.share(control["score"])
            text = f"{row['name']} needs {loss:+.4f} {unit} against the control's {control['score']:.3f}."
            found.append(_finding(f"{row['name']}_loses_little", little, text))
    return found


def _finding(claim: str, holds: bool, text: str) -> dict[str, Any]:
    return {"claim": claim, "holds": bool(holds), "text": text}
