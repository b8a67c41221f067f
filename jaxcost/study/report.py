"""A study for people: a picture of what quality costs, and one self-contained page."""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxcost.data.files import atomic_write
from jaxcost.study.compare import COSTS

_COLUMNS = (
    ("name", "recipe", "{}"),
    ("description", "transforms", "{}"),
    ("score", "bits/byte", "{:.3f}"),
    ("score_before_recovery", "before recovery", "{:.3f}"),
    ("control_score", "control", "{:.3f}"),
    ("checkpoint_bytes", "on disk, MB", "mega"),
    ("weight_bytes", "in memory, MB", "mega"),
    ("trainable_parameters", "trains", "{:,}"),
    ("step_flops", "step, GFLOP", "giga"),
    ("step_seconds", "step, ms", "milli"),
    ("inference_flops_per_token", "decode, MFLOP/token", "mega"),
    ("decode_tokens_per_second", "decode, tokens/s", "{:,.0f}"),
    ("usd", "recovery, USD", "{:.2g}"),
    ("kwh", "recovery, kWh", "{:.2g}"),
    ("pareto", "Pareto", "flag"),
)
"""Key of a row, heading, format."""

_SCALES = {"mega": 1e-6, "giga": 1e-9, "milli": 1e3}


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture: bits per byte against each cost, the Pareto front joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["task"] == "base"] or result["rows"]
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for axis, (cost, label) in zip(axes.flat, COSTS.items(), strict=True):
        known = [row for row in rows if row[cost] is not None]
        front = sorted((row for row in known if cost in row["pareto_on"]), key=lambda row: row[cost])
        axis.step([r[cost] for r in front], [r["score"] for r in front], where="post", color="0.6", zorder=1)
        for index, row in enumerate(known):
            on_front = cost in row["pareto_on"]
            colour = f"C{index % 10}"
            axis.scatter(row[cost], row["score"], s=70, color=colour, marker="o" if on_front else "x", zorder=2)
        for names, point in _labels(known, cost):
            axis.annotate(names, point, (6, 5), textcoords="offset points", fontsize=8)
        axis.set_xlabel(f"{label} ({_kind(rows, cost)})")
        axis.set_ylabel("bits per byte, held out (measured)")
        axis.set_xlim(0, 1.35 * max((row[cost] for row in known), default=1.0))
        axis.margins(y=0.15)
        axis.grid(alpha=0.3)
        if not known:
            axis.text(0.5, 0.5, "unknown on this hardware", ha="center", transform=axis.transAxes)
    figure.suptitle("What each cut costs and saves: lower and further left is better, o on the Pareto front, x not")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


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


def write(result: dict[str, Any], path: Path, picture: Path) -> None:
    """Writes the page, the picture inside it, so that the file alone is the report."""
    encoded = base64.b64encode(picture.read_bytes()).decode()
    body = [
        "<h1>What quality costs</h1>",
        f"<p class=lead>{html.escape(answer(result))}</p>",
        f'<img alt="Bits per byte against four costs" src="data:image/png;base64,{encoded}">',
        "<h2>Budgets</h2>",
        _list(_winner_text(winner) for winner in result["winners"]),
        "<h2>What held</h2>",
        _list(f"{'Held' if f['holds'] else 'Did not hold'}: {f['text']}" for f in result["findings"]),
    ]
    for task, title in (("base", result["data"]["name"]), ("shifted", result["data"]["shifted"])):
        rows = [row for row in result["rows"] if row["task"] == task]
        if rows:
            body += [f"<h2>Recipes on {html.escape(title)}</h2>", _html_table(rows)]
    body += ["<h2>What each figure is</h2>", _provenance(result)]
    page = _PAGE.format(body="\n".join(body))
    with atomic_write(path) as file:
        file.write(page.encode())


def answer(result: dict[str, Any]) -> str:
    """The study in a sentence."""
    named = [winner for winner in result["winners"] if winner["recipe"]]
    if not named:
        return "No recipe fits any of the budgets."
    best = "; ".join(f"{w['budget']}: {w['recipe']} ({w['score']:.3f} bits per byte)" for w in named)
    return f"Best recipe for each budget: {best}."


def table(result: dict[str, Any]) -> Table:
    """The rows for a terminal, the most telling columns."""
    title = "Quality against cost (lower bits/byte is better)"
    shown = Table(title=title, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    keys = ("name", "score", "score_before_recovery", "checkpoint_bytes", "step_flops")
    keys += ("step_seconds", "decode_tokens_per_second", "usd")
    columns = [column for column in _COLUMNS if column[0] in keys]
    for key, heading, _ in columns:
        # Narrow headings, so that the table fits a terminal of 80 columns.
        heading = "\n".join(textwrap.wrap(heading.replace(",", ""), 9))
        shown.add_column(heading, justify="left" if key == "name" else "right", no_wrap=True)
    for row in result["rows"]:
        shown.add_row(*(_text(row, key, form) for key, _, form in columns))
    return shown


def _text(row: dict[str, Any], key: str, form: str) -> str:
    value = row[key]
    if value is None:
        return "unknown"
    if form == "flag":
        return "yes" if value else ""
    return f"{value * _SCALES[form]:,.1f}" if form in _SCALES else form.format(value)


def _html_table(rows: Sequence[dict[str, Any]]) -> str:
    head = "".join(
        f"<th>{html.escape(heading)}<small>{html.escape(rows[0]['figures'].get(key, ''))}</small></th>"
        for key, heading, _ in _COLUMNS
    )
    lines = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(_text(row, key, form))}</td>" for key, _, form in _COLUMNS)
        lines.append(f"<tr{' class=front' if row['pareto'] else ''}>{cells}</tr>")
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _winner_text(winner: dict[str, Any]) -> str:
    limit = "" if winner["limit"] is None else f" (at most {winner['limit']:.4g} {winner['metric']})"
    if winner["recipe"] is None:
        return f"{winner['budget']}{limit}: {winner['why']}"
    return f"{winner['budget']}{limit}: {winner['recipe']}, {winner['score']:.3f} bits per byte"


def _provenance(result: dict[str, Any]) -> str:
    machine, totals = result["machine"], result["totals"]
    said = [
        f"Measured on {machine['devices']} {machine['device']} device(s), {machine['cpus']} CPU cores, jax "
        f"{machine['jax']}; priced as {machine['priced_as']}.",
        "Scores, seconds and bytes on disk are measured here. FLOPs are read off the compiled programs, loops times "
        "their length, recomputation included. Parameters and bytes in memory are counted. Money and energy are "
        "estimates: measured seconds of the recovery's steps, without compilation, times the prices below.",
        "On disk beside a frozen base, only what trains is counted; the base is stored once for all of its adapters.",
        "score before recovery: transformed and, where the recipe ends with one, quantised, without training on.",
        f"The training runs took {totals['seconds']:,.0f} s and {totals['tokens']:,} tokens, compilation and their "
        f"evaluations included ({_money(totals['usd'])}); scoring before recovery, decoding and what a kill undid are "
        "not in it.",
        "A recipe is on the joint Pareto front (green) if none of its task beats it in score, bytes on disk, FLOPs a "
        "decoded token and FLOPs a step together: the costs that a second run repeats exactly.",
        _estimate_text(result["estimates"]),
    ]
    said.append(_plan_text(result["plan"]))
    said += [f"{name}: {_price(figure)}" for name, figure in result["prices"].items()]
    return _list(said)


def _estimate_text(estimates: dict[str, Any]) -> str:
    memory = ", ".join(
        f"{name.removesuffix('_bytes')} {v / 1e6:,.1f} MB" for name, v in estimates["memory_bytes"].items()
    )
    return (
        f"Closed form of the base (estimated): {estimates['parameters']:,} parameters, "
        f"{estimates['training_flops'] / 1e12:,.2f} TFLOP of training (model FLOPs, causal attention), memory of a "
        f"step: {memory}."
    )


def _plan_text(plan: dict[str, Any]) -> str:
    if plan["step_flops"] is None:
        return f"Compiled for {plan['topology']}: not done. {plan['why']}"
    return (
        f"Compiled for {plan['topology']} by its own compiler: the base's train step has "
        f"{plan['step_flops'] / 1e9:,.2f} GFLOP and takes {plan['peak_bytes'] / 2**20:,.1f} of "
        f"{plan['usable_bytes'] / 2**20:,.0f} MiB on each device; it cannot be faster than "
        f"{plan['lower_bound_seconds'] * 1e6:,.0f} µs, the bound of its {plan['limit']} (from datasheet peaks)."
    )


def _money(usd: float | None) -> str:
    return "price unknown" if usd is None else f"{usd:.2g} USD"


def _price(figure: dict[str, Any]) -> str:
    value = "unknown" if figure["value"] is None else f"{figure['value']:g}"
    return f"{value} ({figure['source']}{', ' + figure['date'] if figure['date'] else ''})"


def _kind(rows, cost: str) -> str:
    return rows[0]["figures"][cost]


def _list(items) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>jaxcost: what quality costs</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }}
.lead {{ font-size: 1.15rem; }}
img {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.35rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
th small {{ display: block; font-weight: normal; color: #595959; }}
tr.front {{ background: #eef6ee; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
