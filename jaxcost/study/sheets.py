"""The tables of a study, once, for its page, for CSV and for LaTeX: every cell as a value and as it is printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxcost.study import quality
from jaxcost.study.figures import Column, addends, columns_of, significant

Study = dict[str, Any]

STAGES = {
    "data": "data: examples that were bought",
    "base": "pretraining: the base model",
    "control": "recovery of the untouched control",
    "search": "tuning: all other recipes and their recoveries",
    "finalists": "further seeds of the finalists",
    "verification": "verification on held-out data",
}
"""The parts of a study's ledger, for people."""


@dataclasses.dataclass(frozen=True)
class Heading:
    """Of a column."""

    key: str
    """Its name for machines."""
    text: str
    kind: str = ""
    """What its figures are: measured, compiled, estimated, counted; empty for words."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A value, None where it is unknown or does not apply, and how it is printed."""

    value: Any
    text: str


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table whose first column names its rows."""

    name: str
    """A word: the stem of its file and of its label."""
    caption: str
    headings: tuple[Heading, ...]
    rows: tuple[tuple[Cell, ...], ...]
    marks: tuple[str, ...] = ()
    """One a row, where given: `front`, `harmed`, `total` or nothing."""

    def mark(self, index: int) -> str:
        """Of a row."""
        return self.marks[index] if self.marks else ""


def sheets(study: Study) -> list[Sheet]:
    """Those that the study has anything to say in."""
    made = [recipes(study, task) for task in dict.fromkeys(row["task"] for row in study["rows"])]
    made += [costs(study), trials(study), slices(study), fairness(study), calibration(study)]
    return [sheet for sheet in made if sheet.rows]


def data_name(study: Study, task: str) -> str:
    """The dataset that recipes of a task train and score on."""
    return study["data"]["shifted" if task == "shifted" else "name"]


def recipes(study: Study, task: str) -> Sheet:
    """The recipes of a task, quality beside cost."""
    rows = [row for row in study["rows"] if row["task"] == task]
    score, *others = columns_of(rows)
    columns = [(Heading("name", "recipe"), [_word(row["name"]) for row in rows]), _figures(score, rows)]
    if any(row.get("score_interval") for row in rows):
        intervals = [_interval(row.get("score_interval")) for row in rows]
        columns.append((Heading("score_interval", "95 % interval", "measured"), intervals))
    right = [column for column in others if column.key == "accuracy"]
    if right:
        columns.append(_figures(*right, rows))
        columns.append((Heading("accuracy_interval", "95 % interval", "measured"), [_between(row) for row in rows]))
    columns.append((Heading("description", "transforms"), [_word(row["description"]) for row in rows]))
    columns += [_figures(column, rows) for column in others if column not in right]
    pareto = [Cell(int(row["pareto"]), "yes" if row["pareto"] else "no") for row in rows]
    columns.append((Heading("pareto", "Pareto"), pareto))
    headings, cells = zip(*columns, strict=True)
    return Sheet(
        "recipes" if task == "base" else f"recipes_{task}",
        f"Recipes on {data_name(study, task)}: quality against cost, {quality.of_row(rows[0]).better}",
        headings,
        tuple(zip(*cells, strict=True)),
        tuple("front" if row["pareto"] else "" for row in rows),
    )


def _figures(column: Column, rows: Sequence[dict[str, Any]]) -> tuple[Heading, list[Cell]]:
    cells = [Cell(row.get(column.key), column.text(row)) for row in rows]
    return Heading(column.key, column.heading, column.kind(rows)), cells


def costs(study: Study) -> Sheet:
    """What each part of the study cost, its sum last; money and energy are priced seconds."""
    parts = study["ledger"]
    headings = [
        Heading("stage", "part"),
        Heading("usd", "USD", "estimated from measured seconds"),
        Heading("estimated_usd", "USD, said before", "estimated"),
        Heading("seconds", "seconds", "measured"),
        Heading("estimated_seconds", "seconds, said before", "estimated"),
        Heading("kwh", "kWh", "estimated from measured seconds"),
        Heading("tokens", "tokens", "counted"),
        Heading("flops", "TFLOP", "compiled"),
    ]
    # Of a list of recipes nothing is said before.
    said = [h for h in headings if "estimated_" not in h.key or any(part[h.key] is not None for part in parts)]
    columns = []
    for heading in said[1:]:
        values = [part[heading.key] for part in parts]
        values.append(_sum(values))
        columns.append([Cell(value, text) for value, text in zip(values, _amounts(heading.key, values), strict=True)])
    names = [Cell(part["stage"], STAGES.get(part["stage"], part["stage"])) for part in parts]
    rows = tuple(zip([*names, Cell("sum", "sum")], *columns, strict=True)) if parts else ()
    return Sheet("costs", "What the study cost", tuple(said), rows, (*("" for _ in parts), "total"))


def trials(study: Study) -> Sheet:
    """What a search tried and left, its price known before each trial beside what it took."""
    headings = (
        Heading("name", "recipe"),
        Heading("status", "status"),
        Heading("why", "why"),
        Heading("steps", "steps done", "counted"),
        Heading("score", f"{quality.of_study(study).heading} there", "measured"),
        Heading("predicted_score", "predicted", "estimated"),
        Heading("usd", "USD", "estimated from measured seconds"),
        Heading("stages_estimated_usd", "USD of these steps, said before", "estimated"),
        Heading("estimated_usd", "USD of all steps, said before", "estimated"),
    )
    return Sheet("trials", "What the search tried", headings, tuple(_trial(trial) for trial in study["trials"]))


def _trial(trial: dict[str, Any]) -> tuple[Cell, ...]:
    own = [stage for stage in trial["stages"] if stage["seed"] == 0]
    last = max(own, key=lambda stage: stage["steps"], default=None)
    paid, said = (_sum([stage[key] for stage in trial["stages"]]) for key in ("usd", "estimated_usd"))
    return (
        _word(trial["name"]),
        _word(trial["status"].replace("_", " ")),
        _word(trial["why"] or ""),
        _number(last and last["steps"], "{:,}", missing="none"),
        _number(last and last["score"], "{:.3f}", missing="none"),
        _number(trial["predicted_score"], "{:.3f}", missing="none"),
        Cell(paid, significant(paid)),
        Cell(said, significant(said)),
        Cell(trial["estimated_usd"], significant(trial["estimated_usd"])),
    )


def slices(study: Study) -> Sheet:
    """Where the answer's recipe lost or won against the control."""
    found = study["verification"]["slices"] if study["verification"] else []
    headings = (
        Heading("name", "part"),
        Heading("by", "cut by"),
        Heading("harmed", "harmed"),
        Heading("count", "tokens or texts", "counted"),
        Heading("control_loss", "control, nats", "measured"),
        Heading("loss", "recipe, nats", "measured"),
        Heading("difference", "difference", "measured"),
        Heading("low", "95 % from", "measured"),
        Heading("high", "to", "measured"),
        Heading("control_accuracy", "control, right", "measured"),
        Heading("accuracy", "recipe, right", "measured"),
        Heading("p_value", "p, corrected", "measured"),
    )
    forms = {"count": "{:,}", "control_accuracy": "{:.1%}", "accuracy": "{:.1%}", "p_value": "{:.2g}"}
    rows = []
    for part in found:
        cells = [_word(part["name"]), _word(part["by"]), _word("harmed" if part["harmed"] else "no")]
        for heading in headings[3:]:
            signed = "{:+.3f}" if heading.key in ("difference", "low", "high") else "{:.3f}"
            cells.append(_number(part[heading.key], forms.get(heading.key, signed)))
        rows.append(tuple(cells))
    marks = tuple("harmed" if part["harmed"] else "" for part in found)
    return Sheet("slices", "The recipe against the control, part by part", headings, tuple(rows), marks)


def fairness(study: Study) -> Sheet:
    """How unevenly the groups are served, by the control and by the recipe."""
    found = study["verification"]["fairness"] if study["verification"] else []
    headings = (
        Heading("by", "groups by"),
        Heading("control_worst_group", "control's worst group"),
        Heading("control_worst_accuracy", "right in it", "measured"),
        Heading("worst_group", "recipe's worst group"),
        Heading("worst_accuracy", "right in it", "measured"),
        Heading("control_gap", "control's gap", "measured"),
        Heading("gap", "recipe's gap", "measured"),
        Heading("control_loss_gap", "control's gap, nats", "measured"),
        Heading("loss_gap", "recipe's gap, nats", "measured"),
    )
    rows = []
    for one in found:
        cells = []
        for heading in headings:
            form = "{:.3f}" if "loss" in heading.key else "{:.1%}"
            value = one[heading.key]
            cells.append(_word(value) if isinstance(value, str) else _number(value, form))
        rows.append(tuple(cells))
    return Sheet("fairness", "Worst groups, and gaps between the best and the worst", headings, tuple(rows))


def calibration(study: Study) -> Sheet:
    """How often the control and the recipe were right, by how sure they were."""
    found = study["verification"]["calibration"]["bins"] if study["verification"] else []
    headings = [Heading("bin", "says")]
    for prefix, who in (("control_", "control"), ("", "recipe")):
        headings.append(Heading(f"{prefix}count", f"{who}: answers", "counted"))
        headings.append(Heading(f"{prefix}confidence", f"{who}: sure of", "measured"))
        headings.append(Heading(f"{prefix}accuracy", f"{who}: right", "measured"))
    rows = []
    for one in found:
        cells = [_word(f"{one['low']:.0%} to {one['high']:.0%}")]
        for heading in headings[1:]:
            empty = not one["control_count" if heading.key.startswith("control_") else "count"]
            counts = heading.key.endswith("count")
            value = None if empty and not counts else one[heading.key]
            cells.append(_number(value, "{:,.0f}" if counts else "{:.1%}", missing="none"))
        rows.append(tuple(cells))
    return Sheet("calibration", "How often each was right, by how sure it was", tuple(headings), tuple(rows))


def _word(text: str) -> Cell:
    return Cell(text, text)


def _number(value: float | None, form: str, missing: str = "unknown") -> Cell:
    return Cell(value, missing if value is None else form.format(value))


def _interval(interval: dict[str, Any] | None) -> Cell:
    if interval is None:
        return Cell(None, "one seed")
    text = f"{interval['low']:.3f} to {interval['high']:.3f}, {len(interval['values'])} seeds"
    return Cell(f"{interval['low']} {interval['high']}", text)


def _between(row: dict[str, Any]) -> Cell:
    interval = row["accuracy_interval"]
    return Cell(f"{interval['low']} {interval['high']}", f"{interval['low']:.1%} to {interval['high']:.1%}")


def _sum(values: Sequence[float | None]) -> float | None:
    """None if any is unknown: what is left of a sum would look like a whole."""
    return None if any(value is None for value in values) else sum(values)


def _amounts(key: str, values: Sequence[float | None]) -> list[str]:
    if key == "tokens":
        return [f"{value:,}" for value in values]
    if key.endswith("seconds"):
        return ["unknown" if value is None else f"{value:,.1f}" for value in values]
    scale = 1e-12 if key == "flops" else 1.0
    return addends([None if value is None else value * scale for value in values])
