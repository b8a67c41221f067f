"""Says what an experiment's steps take on chips that need not be here: memory, seconds, money and energy.

Exit status 2 means that the step does not fit.
"""

import dataclasses
import itertools
import math
import sys
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.config import Overrides

_GIB = 2**30
_FITS = {True: "yes", False: "NO", None: "unknown"}
_SIDE_BY_SIDE = 2
"""Plans that a table shows in full; more are a row each."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Plan the experiment of a config file on one topology, or on several, side by side; JSON has all figures."""

    config: Positional[Path]
    """Config file, such as configs/quickstart.py; its fields are the flags below."""
    experiment: Overrides
    topology: tuple[str, ...] = ("v5e:2x2",)
    """Chips and shapes, such as v5e:16x16 v6e:4x4 h100:8x8; of more than two, the main figures are in one table."""
    step: Literal["train", "prefill", "decode"] = "train"
    """Which step; for serving, data.batch_size is the batch and data.sequence_length the context."""
    compare: Path | None = None
    """A second config file, planned on the same topologies beside the first."""
    search: bool = False
    """Look for the best mesh, rematerialisation, accumulation and loss pieces instead of taking the config's."""
    batches: tuple[int, ...] = ()
    """Batch sizes to search beside the config's; the tokens trained on in all stay the same."""
    top: int = 3
    """Candidates that fit to compile on each topology of a search."""
    processes: int = 0
    """Compilations at once in a search; 0 takes as many as cores and memory allow."""
    budget_usd: float | None = None
    """Money for all steps; a plan over it is said to be, and a search puts the fastest within it first."""
    deadline_hours: float | None = None
    """Hours for all steps; a plan over it is said to be, and a search puts the cheapest within it first."""
    usd_per_chip_hour: tuple[str, ...] = ()
    """Prices of a chip for an hour in place of the table's, by chip, such as tpu7x=12 b200=5."""
    watts_per_chip: tuple[str, ...] = ()
    """Power of a chip in place of the table's, by chip, such as v5e=200."""
    picture: Path | None = None
    """File for a picture of the seconds and the memory, such as plan.png."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Plans, prints the table and returns it."""
    from jaxcost.config import load
    from jaxcost.planning.picture import draw
    from jaxcost.planning.plan import cheapest_fix, plan, vocabulary_of
    from jaxcost.planning.search import search
    from jaxcost.planning.topology import topology_chip
    from jaxcost.session import started

    named = [(str(arguments.config), started(arguments.experiment))]
    if arguments.compare is not None:
        named.append((str(arguments.compare), started(load(arguments.compare))))
    plans, fix, searched, pairs = [], None, [], []
    console = Console()
    for name, value in (("--budget-usd", arguments.budget_usd), ("--deadline-hours", arguments.deadline_hours)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value:g}; it must be positive.")
    for name in ("top", "processes", *(["batches"] if arguments.batches else [])):
        value = getattr(arguments, name)
        if min(value if name == "batches" else [value]) < (name != "processes"):
            raise ValueError(f"--{name} is {value}; it must be positive.")
    chips = {topology: topology_chip(topology).name for topology in arguments.topology}
    given = {name: _by_chip(name, arguments, set(chips.values())) for name in ("usd_per_chip_hour", "watts_per_chip")}
    with console.status("compiling") as status:
        for (name, asked), (topology, chip) in itertools.product(named, chips.items()):
            status.update(f"compiling {name} for {topology}")
            figures = {figure: by_chip[chip] for figure, by_chip in given.items() if chip in by_chip}
            experiment = dataclasses.replace(asked, hardware=dataclasses.replace(asked.hardware, **figures))
            vocab_size = vocabulary_of(experiment)
            if arguments.search:
                found = search(
                    experiment,
                    topology,
                    vocab_size,
                    arguments.step,
                    arguments.top,
                    arguments.batches,
                    arguments.processes,
                    report=lambda said: print(said, file=sys.stderr),
                )
                searched.append(
                    {"config": name, "topology": topology, "considered": found.considered}
                    | {"fitting": found.fitting, "compiled": [c.flags() for c, _ in found.compiled]}
                )
                pairs += found.compiled
                continue
            made = plan(experiment, topology, arguments.step, vocab_size)
            plans.append((name, made))
            if made.compiled.fits is False and arguments.step == "train" and len(chips) == 1:
                fix = cheapest_fix(experiment, topology, vocab_size)
    if arguments.search:
        pairs.sort(key=lambda pair: _rank(pair[1], arguments))
        plans = [(candidate.flags(), made) for candidate, made in pairs]
        _print_found(console, pairs)
    else:
        (_print if len(plans) <= _SIDE_BY_SIDE else _print_rows)(console, plans)
        for name, made in plans:
            if len(plans) <= _SIDE_BY_SIDE or made.compiled.fits is not True:
                console.print(f"{name} on {made.topology}: {made.memory_sentence()}", highlight=False)
        _print_sources(console, [made.as_dict() for _, made in plans])
    if fix is not None:
        console.print(f"The cheapest change that fits: {fix[0]} ({_seconds(fix[1])} s a step).", highlight=False)
    for name, made in plans:
        for note in _over(made, arguments):
            console.print(f"{name} on {made.topology}: {note}", highlight=False)
    if arguments.picture is not None:
        draw([(name, made.as_dict()) for name, made in plans], arguments.picture)
    notes = _notes([experiment for _, experiment in named])
    for note in notes:
        console.print(note, highlight=False)
    return {
        "schema": "jaxcost-plan-1",
        "plans": [{"config": name} | made.as_dict() for name, made in plans],
        "cheapest_fix": fix and fix[0],
        "search": searched,
        "notes": notes,
        "exit_status": 2 if _nothing_fits(plans, arguments.search) else 0,
    }


def _nothing_fits(plans, searched: bool) -> bool:
    """A plan that was asked for does not fit, or none that a search found does."""
    misfits = [made.compiled.fits is False for _, made in plans]
    return not plans or (all(misfits) if searched else any(misfits))


def _rank(made, arguments) -> tuple:
    """What fits and is within the limits first; then by money for a token, or by time if the money is given."""
    cost = made.cost
    if cost is None or made.compiled.fits is False:
        return (1, bool(_over(made, arguments)), math.inf, math.inf)
    usd = math.inf if cost.usd is None else cost.usd
    order = (cost.seconds, usd) if arguments.budget_usd is not None else (usd, cost.seconds)
    return (0, bool(_over(made, arguments)), *order)


def _over(made, arguments) -> list[str]:
    cost = made.cost
    if cost is None:
        return []
    hours, said = cost.seconds / 3600, []
    if arguments.deadline_hours is not None and hours > arguments.deadline_hours:
        said.append(f"takes {hours:.4g} hours, over the deadline of {arguments.deadline_hours:g}.")
    if arguments.budget_usd is not None and cost.usd is None:
        said.append("its price is unknown; give it with --hardware.usd-per-chip-hour to hold it to the budget.")
    elif arguments.budget_usd is not None and cost.usd > arguments.budget_usd:
        said.append(f"costs {cost.usd:.4g} dollars, over the budget of {arguments.budget_usd:g}.")
    return said


def _seconds(made) -> str:
    estimate = made.compiled.estimate
    return "unknown" if estimate is None or estimate.seconds is None else f"{estimate.seconds:.4g}"


def _figure(value: float | None, scale: float = 1.0, digits: int = 4) -> str:
    return "unknown" if value is None else f"{value / scale:.{digits}g}"


def _print_found(console, pairs) -> None:
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
            _seconds(made),
            _figure(run.get("seconds"), 3600),
            _figure(run.get("usd")),
            _figure(row["usd_per_million_tokens"], 1e-3),
        )
    console.print(table)
    if pairs:
        candidate, made = pairs[0]
        console.print(f"The best {made.memory_sentence()} Its flags:", highlight=False)
        console.print(f"--topology {made.topology} {candidate.flags()}", highlight=False, soft_wrap=True)


def _busy(terms: dict[str, float | None]) -> str:
    links = [f"{_figure(seconds)} ({name})" for name, seconds in terms.items() if name not in ("compute", "memory")]
    return "\n".join(links) or "-"


def _print(console, plans) -> None:
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
    for part in ("weights", "teacher", "optimizer", "gradients", "cache", "batch", "temporaries"):
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


def _print_rows(console, plans) -> None:
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


def _print_sources(console, rows) -> None:
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


def _notes(experiments) -> list[str]:
    kinds = {type(transform).__name__ for experiment in experiments for transform in experiment.transforms}
    if "prune" in kinds:
        return [
            "A mask saves no FLOPs and adds its own bytes: the matrices stay dense. It pays off once it becomes "
            "structure (smaller matrices), or as encoded bytes on disk."
        ]
    return []


def _by_chip(name: str, arguments, chips: set[str]) -> dict[str, float]:
    """The figures of a flag such as `--usd-per-chip-hour tpu7x=12 b200=5`."""
    flag, figures = f"--{name.replace('_', '-')}", {}
    for text in getattr(arguments, name):
        chip, _, value = text.partition("=")
        if chip not in chips:
            raise ValueError(f"{flag} names {chip!r}, and the topologies are of {', '.join(sorted(chips))}.")
        try:
            figures[chip] = float(value)
        except ValueError:
            raise ValueError(f"{flag} is {text!r}; write a chip and a number, such as {chip}=5.") from None
    if len(chips) > 1 and getattr(arguments.experiment.hardware, name) is not None:
        raise ValueError(
            f"--hardware{flag[1:].replace('-', '.', 1)} would be that of every chip; use {flag} CHIP=NUMBER."
        )
    return figures


if __name__ == "__main__":
    run(main, Arguments)
