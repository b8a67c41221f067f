"""Puts the claims of papers about transforms to the test on this machine: one table, whatever it says."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Reproduce the relations between transforms; the same command goes on after a kill."""

    workdir: Path = Path("runs/reproduce")
    """Folder for what was trained and measured."""
    only: tuple[str, ...] = ()
    """Names of claims; all if none are given."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws new weights, batches and layers."""
    base_steps: int = 400
    """Steps of the base model, and of whatever is trained from new weights."""
    recovery_steps: int = 100
    """Steps after a transform, and half those of a fine-tune."""
    processes: int = 0
    """Processes at once, each with seeds of its own; if 0, one a seed, but no more than a CPU has cores, and one on
    other devices."""
    data_dir: str | None = None
    """Where TFDS keeps its datasets."""
    json: Path | None = None
    """File for the table as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict[str, Any]:
    """Measures, prints the table and returns its rows."""
    # Before JAX starts: one claim is about a sharded matrix.
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2".strip()

    import jax

    from jaxcost.study.bench import Bench, BenchConfig
    from jaxcost.study.claims import CLAIMS, measure_at_once
    from jaxcost.study.relations import chosen, reproduce, said

    console = Console(stderr=True)
    sizes = {name: getattr(arguments, name) for name in ("base_steps", "recovery_steps", "data_dir")}
    bench = Bench(arguments.workdir, BenchConfig(**sizes))
    claims = list(chosen(CLAIMS, arguments.only))
    # An accelerator belongs to one process.
    most = os.cpu_count() or 1 if jax.default_backend() == "cpu" else 1
    processes = arguments.processes or min(len(arguments.seeds), most)
    if processes > 1:
        measure_at_once(bench, arguments.only, arguments.seeds, processes)
    rows = reproduce(bench, claims, arguments.seeds, console.print)
    title = f"Claims, {len(arguments.seeds)} seeds (mean and half of the range; the better side as claimed comes first)"
    table = Table("claim", "source", "ours", "verdict", title=title, show_lines=True)
    colours = {"holds": "green", "unclear": "yellow", "does not hold": "red", "not run": "dim"}
    for row in rows:
        figure = f" [dim]({row['figure']})[/]" if "figure" in row else ""
        verdict = row["verdict"] + (" (a null result)" if row.get("null") else "")
        table.add_row(row["claim"], row["source"], said(row) + figure, f"[{colours[row['verdict']]}]{verdict}[/]")
    Console(width=160).print(table)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in colours}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    seconds = sum(row.get("seconds", 0) for row in rows)
    return {"schema": "jaxcost-reproduce-1", "seconds": seconds, "verdicts": counts, "rows": rows}


if __name__ == "__main__":
    run(main, Arguments)
