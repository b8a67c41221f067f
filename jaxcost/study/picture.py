"""The picture of a study for papers and README: what quality costs, as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcost.data.files import atomic_write
from jaxcost.study import quality
from jaxcost.study.compare import drawn_costs

_NAMED = 16
"""With more rows than these, only some on the front are named."""


def draw(study: dict[str, Any], folder: Path) -> None:
    """Writes `pareto.png` and `pareto.svg`: the score against each cost, the Pareto front joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in study["rows"] if row["task"] == "base"] or study["rows"]
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    costs = drawn_costs(quality.of_study(study).served)
    for axis, (cost, label) in zip(axes.flat, costs.items(), strict=True):
        _draw_cost(axis, rows, cost, label)
    figure.suptitle("What each cut costs and saves: lower and further left is better, o on the Pareto front, x not")
    # Without a date and with fixed names, the same study draws the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "jaxcost"}):
        for kind, options in (("png", {"dpi": 110}), ("svg", {"metadata": {"Date": None}})):
            with atomic_write(folder / f"pareto.{kind}") as file:
                figure.savefig(file, format=kind, **options)
    pyplot.close(figure)


def _draw_cost(axis, rows: Sequence[dict[str, Any]], cost: str, label: str) -> None:
    known = [row for row in rows if row[cost] is not None]
    front = sorted((row for row in known if cost in row["pareto_on"]), key=lambda row: row[cost])
    axis.step([r[cost] for r in front], [r["score"] for r in front], where="post", color="0.6", zorder=1)
    colours = [f"C{index % 10}" for index in range(len(known))]
    for marker, wanted in (("o", True), ("x", False)):
        drawn = [
            (row, colour) for row, colour in zip(known, colours, strict=True) if (cost in row["pareto_on"]) == wanted
        ]
        points = ([row[cost] for row, _ in drawn], [row["score"] for row, _ in drawn])
        axis.scatter(*points, s=70, color=[colour for _, colour in drawn], marker=marker, zorder=2)
    for row, colour in zip(known, colours, strict=True):
        if row.get("score_interval"):
            ends = [row["score_interval"]["low"], row["score_interval"]["high"]]
            axis.plot([row[cost]] * 2, ends, color=colour, linewidth=1.5, zorder=1)
    named = known if len(known) <= _NAMED else front[:: max(1, len(front) // _NAMED)]
    for names, point in _labels(named, cost):
        axis.annotate(names, point, (6, 5), textcoords="offset points", fontsize=8, parse_math=False)
    axis.set_xlabel(f"{label} ({rows[0]['figures'][cost]})")
    axis.set_ylabel(f"{quality.of_row(rows[0]).unit}, held out (measured)")
    axis.set_xlim(0, 1.35 * max((row[cost] for row in known), default=1.0))
    axis.margins(y=0.15)
    axis.grid(alpha=0.3)
    if not known:
        axis.text(0.5, 0.5, "unknown on this hardware", ha="center", transform=axis.transAxes)


def _labels(rows: Sequence[dict[str, Any]], cost: str) -> list[tuple[str, tuple[float, float]]]:
    """Names and points; rows that lie on each other in the picture share a label."""
    spans = [max(row[key] for row in rows) - min(row[key] for row in rows) for key in (cost, "score")] if rows else []
    labels: list[tuple[str, tuple[float, float]]] = []
    for row in rows:
        point = (row[cost], row["score"])
        for index, (names, other) in enumerate(labels):
            if all(abs(a - b) <= 0.03 * span for a, b, span in zip(point, other, spans, strict=True)):
                labels[index] = (f"{names}, {row['name']}", other)
                break
        else:
            labels.append((row["name"], point))
    return labels
