"""Plans as tables for people: a few side by side, many in rows, what a search found, and where figures come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxcost.planning.picture import PARTS
from jaxcost.planning.plan import Plan
from jaxcost.planning.search import Candidate

_GIB = 2**30
_FITS = {True: "yes", False: "NO", None: "unknown"}


def seconds(made: Plan) -> str:
    """Seconds of a plan's step."""
    estimate = made.compiled.estimate
    return "unknown" if estimate is None or estimate.seconds is None else f"{estimate.seconds:.4g}"


def print_side_by_side(console: Console, plans: Sequence[tuple[str, Plan]]) -> None:
    """All figures of a few plans, by the names of their configs."""
    rows = [(name, made.as_dict()) for name, made in plans]
    table = Table(title="Plan")
    table.add_column("figure")
    for name, row in rows:
        table.add_column(f"{name}\n{row['step']} on {row['topology']}", justify="right")

    def line(label, get):
        table.add_row(label, *(get(row) for _, row in rows))

    line("fits", lambda r: _FITS[r["fits"]])
    line("needed, GiB a device", lambda r: _figure(r["needed_bytes"], _GIB))
    line("usable, GiB a device", lambda r: _figure(r["usable_bytes"], _GIB))
    for part in PARTS:
        line(f"  {part}, GiB", lambda r, p=part: _figure((r["memory_split_bytes"] or {}).get(p), _GIB))
    line("lower bound, s", lambda r: f"{_figure(r['lower_bound_seconds'])} ({r['bound_by'] or 'unknown'})")
    line("compiler, links hidden, s", lambda r: _figure(r["compiler_seconds"]))
    line("compiler, links exposed, s", lambda r: _figure(r["compiler_exposed_seconds"]))
    line("compiler's figure is", lambda r: r["compiler_source"] or "-")
    line(
        "calibrated, s",
        lambda r: (
            _figure(r["calibrated_seconds"])
            + (f" ± {r['calibrated_error_fraction']:.0%}" if r["calibrated_error_fraction"] else "")
        ),
    )
    line("FLOPs a device, T", lambda r: _figure(sum((r["flops_per_device_by_type"] or {}).values()) or None, 1e12))
    line("memory traffic a device, GB", lambda r: _figure(r["hbm_bytes_per_device"], 1e9))
    line("sent over links a device, GB", lambda r: _figure(r["link_bytes_per_device"], 1e9))
    line("links busy, s", lambda r: _busy(r["bound_terms_seconds"] or {}))
    line("steps x tokens", lambda r: f"{r['steps']} x {r['tokens_per_step']}")
    for key, label in (("chip_hours", "chip-hours"), ("usd", "US dollars"), ("kwh", "kWh"), ("kg_co2", "kg CO2")):
        line(f"{label} ({rows[0][1]['step']}, all steps)", lambda r, k=key: _figure((r["run"] or {}).get(k)))
    line("US dollars a million tokens", lambda r: _figure(r["usd_per_million_tokens"]))
    line("tokens a second, all chips", lambda r: _figure(r["tokens_per_second"]))
    if rows[0][1]["step"] == "prefill":
        line("time to first token, s", lambda r: _figure(r["time_to_first_token_seconds"]))
    line("money and energy rest on", lambda r: r["seconds_are"] or "-")
    line("no estimate for", lambda r: "\n".join(r["unestimated_ops"]) or "-")
    console.print(table)


def print_rows(console: Console, plans: Sequence[tuple[str, Plan]]) -> None:
    """The main figures of many plans, a row each, by the names of their configs."""
    rows = [(name, made.as_dict()) for name, made in plans]
    step = rows[0][1]["step"]
    one_config = len({name for name, _ in rows}) == 1
    table = Table(title=f"{rows[0][0]}, {step}" if one_config else step, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("on", overflow="fold")
    seconds = ("bound\ns", "compiler\ns", "calibrated\ns")
    for column in ("fits", "needs\nGiB", *seconds, "US\ndollars", "kWh", "dollars a\nM tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows:
        run = row["run"] or {}
        figures = (
            _figure(row["needed_bytes"], _GIB, 3),
            *(_figure(row[f"{figure}_seconds"], digits=3) for figure in ("lower_bound", "compiler", "calibrated")),
            *(_figure(run.get(figure), digits=3) for figure in ("usd", "kwh")),
            _figure(row["usd_per_million_tokens"], digits=3),
        )
        table.add_row(
            row["topology"] if one_config else f"{name}\n{row['topology']}",
            _FITS[row["fits"]],
            *("?" if figure == "unknown" else figure for figure in figures),
        )
    console.print(table)
    console.print(
        f"Dollars and kWh are of all {rows[0][1]['steps']} steps; ? is unknown. They rest on:", highlight=False
    )
    for kind in dict.fromkeys(row["seconds_are"] for _, row in rows if row["seconds_are"]):
        who = ", ".join(dict.fromkeys(row["topology"] for _, row in rows if row["seconds_are"] == kind))
        console.print(f"  {kind}: {who}", highlight=False)
    for name, row in rows:
        if row["unestimated_ops"]:
            where = row["topology"] if one_config else f"{name} on {row['topology']}"
            console.print(f"{where}: no estimate for {', '.join(row['unestimated_ops'])}", highlight=False)


def print_found(console: Console, pairs: Sequence[tuple[Candidate, Plan]]) -> None:
    """What a search compiled, the best first, and the flags of the best."""
    table = Table(title="Compiled, the best first")
    table.add_column("layout", overflow="fold")
    for column in ("GiB", "s a step", "hours", "dollars", "$ a billion tokens"):
        table.add_column(column, justify="right")
    for candidate, made in pairs:
        row = made.as_dict()
        run = row["run"] or {}
        table.add_row(
            f"{made.topology}, {candidate.layout()}",
            _figure(row["needed_bytes"], _GIB) + ("" if row["fits"] else ", too large"),
            seconds(made),
            _figure(run.get("seconds"), 3600),
            _figure(run.get("usd")),
            _figure(row["usd_per_million_tokens"], 1e-3),
        )
    console.print(table)
    if pairs:
        candidate, made = pairs[0]
        console.print(f"The best {made.memory_sentence()} Its flags:", highlight=False)
        console.print(f"--topology {made.topology} {candidate.flags()}", highlight=False, soft_wrap=True)


def print_sources(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """The price and power of each chip, and what is assumed for all, each with its source; a figure is said once."""
    said = {}
    for row in rows:
        for name, figure in row["sources"].items():
            owner = row["chip"] if name.endswith(("_hour", "_chip")) else "all"
            known = figure["value"] is not None
            source = ", ".join(filter(None, (figure["source"], figure["date"])))
            text = f"{name} {figure['value']} ({source})" if known else f"{name} unknown"
            said.setdefault(owner, {})[text] = None
    assumed = {"all": said.pop("all", {})}
    for owner, texts in (said | assumed).items():
        console.print(f"{owner}: {'; '.join(texts)}", highlight=False)


def _figure(value: float | None, scale: float = 1.0, digits: int = 4) -> str:
    return "unknown" if value is None else f"{value / scale:.{digits}g}"


def _busy(terms: dict[str, float | None]) -> str:
    links = [f"{_figure(seconds)} ({name})" for name, seconds in terms.items() if name not in ("compute", "memory")]
    return "\n".join(links) or "-"
