"""Two studies side by side: what got worse from the old one to the new, and by more than noise explains."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jaxcost.study import quality
from jaxcost.study.figures import COLUMNS, Column, columns_of

SCHEMA = "jaxcost-compare-1"

_RIGHT = next(column for column in COLUMNS if column.key == "accuracy")
_COSTS = tuple(column for column in COLUMNS if column.axis)
_MACHINE = ("platform", "device", "devices", "cpus")


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """How much worse a figure may be, as a share of the old one."""

    score: float = 0.01
    """Of a score, or of a nat where a label needs less; where both studies have intervals over seeds, no less than
    these explain. Of all labels, how many fewer may be right."""
    cost: float = 0.02
    """Of bytes and FLOPs, which a second run repeats."""
    timing: float = 0.25
    """Of seconds, and of the money and energy that follow from them."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < math.inf:
                raise ValueError(f"The tolerance of {field.name} is {getattr(self, field.name)}; give 0 or a share.")


def read(path: Path) -> dict[str, Any]:
    """The `study.json` of a study's folder, or the file itself.

    Raises:
      ValueError: there is none, or it is something else.
    """
    file = path / "study.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"There is no study in {path}; name the --workdir of a study that has ended, or a study.json.")
    try:
        found = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or not str(found.get("schema", "")).startswith("jaxcost-study-"):
        raise ValueError(f"{file} is not the study.json of a study; name the --workdir of one.")
    return found


def compare_studies(old: dict[str, Any], new: dict[str, Any], tolerances: Tolerances) -> dict[str, Any]:
    """Every recipe that both studies have, the recommendations, and the harm that was found.

    Returns:
      `comparisons`: one a figure of a recipe, with `old`, `new`, how much worse it is allowed to be (`allowed`, in its
      own unit) and whether it is `worse` than that; `regressions`: in words, all that got worse; `notes`: what could
      not be compared; `only_old` and `only_new`: names of recipes of one study alone.

    Raises:
      ValueError: a recipe was scored on other data, or the studies have nothing in common.
    """
    rows = {(row["name"], row["task"]): row for row in old["rows"]}
    others = {(row["name"], row["task"]): row for row in new["rows"]}
    both = [key for key in rows if key in others]
    if not both:
        raise ValueError("The two studies have no recipe in common; compare studies of one config, or of one space.")
    same_machine = all(old["machine"][key] == new["machine"][key] for key in _MACHINE)
    comparisons = []
    for key in both:
        _check_same_data(rows[key], others[key])
        comparisons.append(_compare_scores(rows[key], others[key], tolerances))
        if _RIGHT.key in rows[key] and _RIGHT.key in others[key]:
            one, other = rows[key][_RIGHT.key], others[key][_RIGHT.key]
            comparisons.append(_comparison(rows[key]["name"], _RIGHT, one, other, tolerances.score))
        for column in _COSTS:
            if rows[key].get(column.key) is None or others[key].get(column.key) is None:
                continue
            if same_machine or not (column.timed or column.kind([rows[key]]) == "compiled"):
                share = tolerances.timing if column.timed else tolerances.cost
                one, other = rows[key][column.key], others[key][column.key]
                comparisons.append(_comparison(rows[key]["name"], column, one, other, share * abs(one)))
    return {
        "schema": SCHEMA,
        "comparisons": comparisons,
        "regressions": [
            *(_text(one) for one in comparisons if one["worse"]),
            *_lost(old, new, tolerances),
            *_newly_harmed(old, new),
        ],
        "notes": _notes(old, new, same_machine),
        "only_old": [name for name, task in rows if (name, task) not in others],
        "only_new": [name for name, task in others if (name, task) not in rows],
    }


def _check_same_data(row: dict[str, Any], other: dict[str, Any]) -> None:
    if row["metric"] != other["metric"]:
        raise ValueError(
            f"{row['name']} was scored by {row['metric']!r} in the old study and by {other['metric']!r} in the new; "
            "compare studies that score the same data."
        )


def _compare_scores(row: dict[str, Any], other: dict[str, Any], tolerances: Tolerances) -> dict[str, Any]:
    one, another = row.get("score_interval"), other.get("score_interval")
    column, share = columns_of([row])[0], quality.of_row(row).share
    if not (one and another):
        return _comparison(row["name"], column, row["score"], other["score"], tolerances.score * share(row["score"]))
    noise = math.hypot(*((each["high"] - each["low"]) / 2 for each in (one, another)))
    allowed = max(tolerances.score * share(one["mean"]), noise)
    return _comparison(row["name"], column, one["mean"], another["mean"], allowed)


def _comparison(recipe: str, column: Column, old: float, new: float, allowed: float) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "figure": column.key,
        "heading": column.heading,
        "old": old,
        "new": new,
        "allowed": allowed,
        "worse": (old - new if column is _RIGHT else new - old) > allowed,
        "shown": [column.text({column.key: value}) for value in (old, new, allowed)],
    }


def _text(one: dict[str, Any]) -> str:
    old, new, allowed = one["shown"]
    moved, by = ("fell", "less") if one["new"] < one["old"] else ("rose", "more")
    return f"{one['recipe']}: {one['heading']} {moved} from {old} to {new}; at most {allowed} {by} is allowed."


def _recommended(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the study recommends: for all of its budgets together, or for each."""
    if study.get("kind") == "search":
        return {"the budget": study["answer"]}
    return {f"the budget {winner['budget']!r}": winner for winner in study["winners"]}


def _lost(old: dict[str, Any], new: dict[str, Any], tolerances: Tolerances) -> list[str]:
    """Budgets that something met before and nothing does now, or nothing as good."""
    found, now, judged = [], _recommended(new), quality.of_study(old)
    for budget, before in _recommended(old).items():
        after = now.get(budget)
        if before["recipe"] is None or after is None:
            continue
        if after["recipe"] is None:
            found.append(f"Nothing meets {budget} any more; {before['recipe']} did.")
        elif after["score"] - before["score"] > tolerances.score * judged.share(before["score"]):
            found.append(
                f"The best within {budget} is {after['recipe']} with {after['score']:.3f} {judged.heading}; it was "
                f"{before['recipe']} with {before['score']:.3f}."
            )
    return found


def _newly_harmed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    known = {(flag["kind"], flag["by"], flag["name"]) for flag in old.get("flags", [])}
    fresh = (flag for flag in new.get("flags", []) if (flag["kind"], flag["by"], flag["name"]) not in known)
    return [f"Newly harmed: {flag['text']}" for flag in fresh]


def _notes(old: dict[str, Any], new: dict[str, Any], same_machine: bool) -> list[str]:
    notes = []
    if not same_machine:
        notes.append("The studies ran on different machines: of the costs, only bytes are compared.")
    if old.get("verification") and not new.get("verification"):
        notes.append("The new study was not verified group by group, as the old one was.")
    for column in _COSTS:
        known = [any(row.get(column.key) is not None for row in study["rows"]) for study in (old, new)]
        if known[0] != known[1]:
            notes.append(f"{column.heading} is unknown in the {'new' if known[0] else 'old'} study.")
    return notes
