"""Says what an experiment's steps take on chips that need not be here: memory, seconds, money and energy.

Exit status 2 means that the step does not fit.
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Literal

from rich.console import Console
from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.config import Overrides

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
    from jaxcost.planning import tables
    from jaxcost.planning.limits import Limits
    from jaxcost.planning.picture import draw
    from jaxcost.planning.plan import cheapest_fix, plan, vocabulary_of
    from jaxcost.planning.search import search

    a, console = arguments, Console()
    limits = Limits(a.budget_usd, a.deadline_hours)
    for name, least in {"top": 1, "processes": 0, "batches": 1}.items():
        value = getattr(a, name)
        if min(value if isinstance(value, tuple) else (value,), default=least) < least:
            raise ValueError(f"--{name} is {value}; it must be positive.")
    asked = _experiments(a)
    plans, fix, searched, pairs = [], None, [], []
    with console.status("compiling") as status:
        for name, topology, experiment in asked:
            status.update(f"compiling {name} for {topology}")
            vocab_size = vocabulary_of(experiment)
            if a.search:
                options = {"report": lambda said: print(said, file=sys.stderr)}
                found = search(experiment, topology, vocab_size, a.step, a.top, a.batches, a.processes, **options)
                compiled = [candidate.flags() for candidate, _ in found.compiled]
                counts = {"considered": found.considered, "fitting": found.fitting}
                searched.append({"config": name, "topology": topology, **counts, "compiled": compiled})
                pairs += found.compiled
                continue
            made = plan(experiment, topology, a.step, vocab_size)
            plans.append((name, made))
            if made.compiled.fits is False and a.step == "train" and len(set(a.topology)) == 1:
                fix = cheapest_fix(experiment, topology, vocab_size)
    if a.search:
        pairs.sort(key=lambda pair: limits.rank(pair[1]))
        plans = [(candidate.flags(), made) for candidate, made in pairs]
        tables.print_found(console, pairs)
    else:
        few = len(plans) <= _SIDE_BY_SIDE
        (tables.print_side_by_side if few else tables.print_rows)(console, plans)
        for name, made in plans:
            if few or made.compiled.fits is not True:
                console.print(f"{name} on {made.topology}: {made.memory_sentence()}", highlight=False)
        tables.print_sources(console, [made.as_dict() for _, made in plans])
    if fix is not None:
        console.print(f"The cheapest change that fits: {fix[0]} ({tables.seconds(fix[1])} s a step).", highlight=False)
    for name, made in plans:
        for note in limits.over(made):
            console.print(f"{name} on {made.topology}: {note}", highlight=False)
    if a.picture is not None:
        draw([(name, made.as_dict()) for name, made in plans], a.picture)
    notes = _notes([experiment for _, _, experiment in asked])
    for note in notes:
        console.print(note, highlight=False)
    return {
        "schema": "jaxcost-plan-1",
        "plans": [{"config": name} | made.as_dict() for name, made in plans],
        "cheapest_fix": fix and fix[0],
        "search": searched,
        "notes": notes,
        "exit_status": 2 if _nothing_fits(plans, a.search) else 0,
    }


def _experiments(arguments: Arguments) -> list[tuple]:
    """The configs on each topology, with the figures of its chip: name, topology, experiment."""
    from jaxcost.config import load
    from jaxcost.planning.limits import figures_by_chip
    from jaxcost.planning.topology import topology_chip
    from jaxcost.session import started

    chips = {topology: topology_chip(topology).name for topology in arguments.topology}
    given = {}
    for name in ("usd_per_chip_hour", "watts_per_chip"):
        flag = f"--{name.replace('_', '-')}"
        given[name] = figures_by_chip(flag, getattr(arguments, name), set(chips.values()))
        if len(set(chips.values())) > 1 and getattr(arguments.experiment.hardware, name) is not None:
            raise ValueError(f"--hardware.{flag[2:]} would be that of every chip; use {flag} CHIP=NUMBER.")
    named = [(str(arguments.config), started(arguments.experiment))]
    if arguments.compare is not None:
        named.append((str(arguments.compare), started(load(arguments.compare))))
    found = []
    for (name, asked), (topology, chip) in itertools.product(named, chips.items()):
        figures = {figure: by_chip[chip] for figure, by_chip in given.items() if chip in by_chip}
        hardware = dataclasses.replace(asked.hardware, **figures)
        found.append((name, topology, dataclasses.replace(asked, hardware=hardware)))
    return found


def _nothing_fits(plans, searched: bool) -> bool:
    """A plan that was asked for does not fit, or none that a search found does."""
    misfits = [made.compiled.fits is False for _, made in plans]
    return not plans or (all(misfits) if searched else any(misfits))


def _notes(experiments) -> list[str]:
    kinds = {type(transform).__name__ for experiment in experiments for transform in experiment.transforms}
    if "prune" in kinds:
        return [
            "A mask saves no FLOPs and adds its own bytes: the matrices stay dense. It pays off once it becomes "
            "structure (smaller matrices), or as encoded bytes on disk."
        ]
    return []


if __name__ == "__main__":
    run(main, Arguments)
