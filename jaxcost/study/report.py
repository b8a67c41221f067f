"""A study for people: a self-contained page, its picture and tables beside it, and the same in short for a terminal."""

from __future__ import annotations

import shlex
import textwrap
import urllib.parse
from pathlib import Path
from typing import Any

from rich.table import Table

import jaxcost
from jaxcost import serialization
from jaxcost.data.files import atomic_write
from jaxcost.study import compare, picture, quality, tables
from jaxcost.study.figures import amount, columns_of, significant
from jaxcost.study.pages import render
from jaxcost.study.sheets import Sheet, data_name, sheets

_ABSENT: dict[str, Any] = {
    "kind": "grid",
    "answer": None,
    "flags": [],
    "budget": [],
    "trials": [],
    "finalists": [],
    "surrogate": None,
    "verification": None,
    "ledger": [],
    "serving": [],
}
"""What `jaxcost-study-1`, the schema before searches, did not have."""

_KINDS = (
    ("measured", "timed, scored or weighed on this machine"),
    ("compiled", "read off the compiled program: FLOPs with loops times their length, recomputation included"),
    ("counted", "exact: parameters, tokens, bytes of arrays"),
    ("estimated", "money and energy are measured seconds times the prices below; what was said before is planned"),
    ("published", "prices, power and peaks of chips, with their source and date"),
)

_CONFIG = '''"""The experiment of this study: scripts/study.py takes this file as any other config."""

import json
from pathlib import Path

from jaxcost import serialization

experiment = serialization.from_json(json.loads(Path(__file__).with_name("study.json").read_text())["experiment"])
'''


def write(result: dict[str, Any], workdir: Path) -> None:
    """Writes what people read of a study beside its `study.json`: `pareto.png`, `pareto.svg` and what `texts` gives."""
    picture.draw(result, workdir)
    for name, text in texts(result, workdir).items():
        with atomic_write(workdir / name) as file:
            file.write(text.encode())


def texts(result: dict[str, Any], workdir: Path) -> dict[str, str]:
    """Names of files and what stands in them, all but the picture.

    `report.html` is the report, in one file that needs no network; `*.csv`, `tables.tex` and `citation.bib` are its
    tables for other programs and for papers; `config.py` repeats the study, whose folder `workdir` is.
    """
    study = _ABSENT | result
    found = sheets(study)
    files = {f"{sheet.name}.csv": tables.to_csv(sheet) for sheet in found}
    files["tables.tex"] = tables.to_latex(found, _machine_text(study))
    files["citation.bib"] = tables.to_bibtex(tables.citation())
    return files | {"report.html": _page(study, found, workdir, files), "config.py": _CONFIG}


def _page(study: dict[str, Any], found: list[Sheet], workdir: Path, files: dict[str, str]) -> str:
    judged = quality.of_study(study)
    return render(
        "report.html",
        study=study,
        answer=answer(study),
        sheets={sheet.name: sheet for sheet in found},
        recipes=[sheet for sheet in found if sheet.name.startswith("recipes")],
        budgets=[*map(_limit_text, study["budget"]), *(_winner_text(w, judged.unit) for w in study["winners"])],
        points=_points(study),
        commands=_commands(study, workdir),
        kinds=_KINDS,
        provenance=_provenance(study),
        serving=_serving(study),
        files={name: f"data:text/plain;charset=utf-8,{urllib.parse.quote(text)}" for name, text in files.items()},
        citation=files["citation.bib"],
        version=jaxcost.__version__,
    )


def answer(result: dict[str, Any]) -> str:
    """The study in a sentence."""
    if result.get("answer"):
        return result["answer"]["text"]
    named = [winner for winner in result["winners"] if winner["recipe"]]
    if not named:
        return "No recipe fits any of the budgets."
    return compare.best_of_each(named, quality.of_study(result))


def table(result: dict[str, Any]) -> Table:
    """The rows for a terminal, the most telling columns."""
    judged = quality.of_study(result)
    title = f"Quality against cost (lower {judged.heading} is better)"
    shown = Table(title=title, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = columns_of(result["rows"])
    # There is room for one of the two.
    beside = "accuracy" if any(column.key == "accuracy" for column in columns) else "score_before_recovery"
    keys = ("score", beside, "checkpoint_bytes", "step_flops", "step_seconds", judged.served.per_second, "usd")
    columns = [column for column in columns if column.key in keys]
    shown.add_column("recipe", no_wrap=True)
    for column in columns:
        # Narrow headings, so that the table fits a terminal of 80 columns.
        heading = "\n".join(textwrap.wrap(column.heading.replace(",", ""), 9, break_long_words=False))
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        shown.add_row(row["name"], *(column.text(row) for column in columns))
    return shown


def _points(study: dict[str, Any]) -> dict[str, Any]:
    """What the page's script draws: for every recipe its score and its costs, as numbers and as text."""
    rows = study["rows"]
    axes = [column for column in columns_of(rows) if column.axis]
    axes = [column for column in axes if any(row.get(column.key) is not None for row in rows)]
    flagged = study["answer"]["recipe"] if study["answer"] and study["answer"]["flagged"] else None
    return {
        "axes": [{"key": c.key, "label": f"{c.axis} ({c.kind(rows)})"} for c in axes],
        "score": f"{quality.of_study(study).unit}, held out ({rows[0]['figures']['score']})",
        "rows": [
            {
                "name": row["name"],
                "description": row["description"],
                "data": data_name(study, row["task"]),
                "score": row["score"],
                "low": interval and interval["low"],
                "high": interval and interval["high"],
                "flagged": row["name"] == flagged,
                "said": _score_text(row),
                "costs": {c.key: [row[c.key] * c.scale, c.text(row)] for c in axes if row.get(c.key) is not None},
            }
            for row in rows
            for interval in [row.get("score_interval")]
        ],
    }


def _score_text(row: dict[str, Any]) -> str:
    said = f"{row['score']:.3f} {quality.of_row(row).heading}"
    if row.get("score_interval"):
        interval = row["score_interval"]
        said += f" ({interval['low']:.3f} to {interval['high']:.3f} over {len(interval['values'])} seeds)"
    said += "" if row["control"] else f", the control {row['control_score']:.3f}"
    return said + (f"; {row['accuracy']:.1%} right" if "accuracy" in row else "")


def _commands(study: dict[str, Any], workdir: Path) -> list[tuple[str, str]]:
    """A name and the command that repeats it, of the whole study and of every row of its experiment."""
    again = ["python", "scripts/study.py", f"{workdir}/config.py", "--workdir", f"{workdir}-again"]
    config = serialization.from_json(study["experiment"]).study
    recipes = {recipe.name: recipe for recipe in config.complete()}
    listed = {recipe.name for recipe in config.recipes}
    found = [("the whole study", again)]
    for name in (row["name"] for row in study["rows"] if row["name"] in recipes):
        # Of a space, a recipe is written out: it is not in the list that `only` chooses from.
        flags = (
            ["--study.only", name] if name in listed else ["--study.recipes", serialization.to_python(recipes[name])]
        )
        without = ["--study.spaces", "", "--study.budgets", ""] if study["kind"] == "search" else []
        found.append((name, again + without + flags))
    return [(name, shlex.join(command)) for name, command in found]


def _serving(study: dict[str, Any]) -> dict[str, Any]:
    """What a million requests would cost, each of what was asked of the model when its speed was measured."""
    served, experiment = quality.of_study(study).served, study["experiment"]
    if served is quality.TOKEN:
        answers = experiment["study"]["decode_tokens"]
        each, how = f"{answers} decoded tokens", "decoding speed"
    else:
        answers, data = 1, experiment["data"]
        read = "an image" if data["inputs"] == "images" else f"a text padded to {data['sequence_length']} tokens"
        each, how = read, f"speed of one forward pass over {experiment['study']['decode_batch_size']} at once"
    rows = {}
    for row in study["serving"]:
        paid = {"usd": row[served.usd], "kwh": row[served.kwh]}
        rows[row["recipe"]] = {name: None if cost is None else cost * answers for name, cost in paid.items()}
    return {"each": each, "how": how, "rows": rows}


def _limit_text(limit: dict[str, Any]) -> str:
    whose = "the whole study, " if limit["of"] == "study" else ""
    if limit["limit"] is None:
        return f"{limit['name']}: {limit['why']}"
    allowed, used = (amount(limit["metric"], limit[key], limit["of"] == "study") for key in ("limit", "used"))
    return f"{limit['name']}: {whose}{allowed} at most; it came to {used.rpartition(': ')[2]}."


def _winner_text(winner: dict[str, Any], unit: str) -> str:
    limit = "" if winner["limit"] is None else f" ({amount(winner['metric'], winner['limit'])} at most)"
    if winner["recipe"] is None:
        return f"{winner['budget']}{limit}: {winner['why']}"
    return f"{winner['budget']}{limit}: {winner['recipe']}, {winner['score']:.3f} {unit}"


def _machine_text(study: dict[str, Any]) -> str:
    machine = study["machine"]
    return (
        f"Measured on {machine['devices']} {machine['device']} device(s), {machine['cpus']} CPU cores, jax "
        f"{machine['jax']}; priced as {machine['priced_as']}."
    )


def _provenance(study: dict[str, Any]) -> list[str]:
    totals = study["totals"]
    said = [
        _machine_text(study),
        "On disk beside a frozen base, only what trains is counted; the base is stored once for all of its adapters.",
        "Before recovery: transformed and, where the recipe ends with one, quantised, without training on.",
        f"The study took {totals['seconds']:,.0f} s and {totals['tokens']:,} tokens "
        f"({'price unknown' if totals['usd'] is None else significant(totals['usd'], 2) + ' USD'}): all of its "
        "parts, compilation included; what a kill undid is not in it.",
        "A recipe is on the joint Pareto front if none of its task beats it in score, bytes on disk, FLOPs of a "
        f"{quality.of_study(study).served.answer} and FLOPs a step together: the costs that a second run repeats "
        "exactly.",
        _estimate_text(study["estimates"]),
        _plan_text(study["plan"]),
    ]
    return said + [f"{name}: {_price(figure)}" for name, figure in study["prices"].items()]


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


def _price(figure: dict[str, Any]) -> str:
    value = "unknown" if figure["value"] is None else f"{figure['value']:g}"
    return f"{value} ({figure['source']}{', ' + figure['date'] if figure['date'] else ''})"
