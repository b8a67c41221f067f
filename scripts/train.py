"""Trains the experiment of a config file, or goes on with the training that the folder holds."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.config import Overrides


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train the experiment of a config file; the same command goes on after a kill."""

    config: Positional[Path]
    """Config file, such as configs/quickstart.py; its fields are the flags below."""
    experiment: Overrides
    workdir: Path = Path("runs/train")
    """Folder for checkpoints, the ledger and the tokenizer."""
    dry_run: bool = False
    """Show where every weight lives on the mesh, and how long a pipeline's stages wait, and train nothing."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Trains, prints what it came to and returns it."""
    import jax

    from jaxcost import hosts
    from jaxcost.session import Session

    hosts.join()
    session = Session(arguments.experiment)
    coverage = session.transform.coverage(jax.eval_shape(session.base_params))
    if coverage:
        table = Table("weight", "shape", "rule", "what happens", title="Transforms")
        for row in coverage:
            table.add_row(row.path, " x ".join(map(str, row.shape)), row.rule or "-", row.action)
        Console().print(table)
    if session.mesh.shape["stage"] > 1:
        Console().print(f"pipeline: {session.mesh.shape['stage']} stages wait {session.bubble:.0%} of each pass")
    if arguments.dry_run:
        return _show_places(session)
    fitted = session.train(arguments.workdir)
    seconds = fitted.totals["seconds"]
    result = {
        "schema": "jaxcost-train-1",
        "steps": fitted.steps,
        "skipped_steps": fitted.skipped_steps,
        **fitted.metrics,
        "step_seconds": fitted.step_seconds,
        "step_flops": fitted.cost.total_flops,
        "totals": fitted.totals,
        "goodput": fitted.goodput,
        "lost_seconds": fitted.lost_seconds,
        "usd": session.hardware.usd(seconds),
        "kwh": session.hardware.kwh(seconds),
        **session.purchases,
        "workdir": str(arguments.workdir),
    }
    table = Table("figure", "value", title=f"{arguments.config} after {fitted.steps} steps")
    for name in (*fitted.metrics, "step_seconds", "step_flops", "usd", "kwh", *session.purchases):
        table.add_row(name, "unknown" if result[name] is None else f"{result[name]:.5g}")
    Console().print(table)
    learned = arguments.experiment.data
    print(
        f"next: python scripts/generate.py {arguments.workdir} --prompt 'def '"
        if learned.objective in ("next_token", "answers")
        else f"next: python scripts/evaluate.py {arguments.workdir}"
    )
    return result


def _show_places(session) -> dict:
    """Prints where every weight lives, and returns it."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in session.mesh.shape.items() if size > 1) or "one device"
    rows = session.placed()
    weight = Column("weight", overflow="fold")
    table = Table(weight, "shape", "dtype", "split by", "bytes a device", title=f"Weights on {mesh}")
    for row in rows:
        split = ", ".join("-" if s is None else s if isinstance(s, str) else "+".join(s) for s in row.spec)
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.path, shape, row.dtype, split, f"{row.device_bytes:,}")
    total = sum(row.device_bytes for row in rows)
    table.add_row("all", "", "", "", f"{total:,}")
    Console().print(table)
    weights = [
        {**dataclasses.asdict(row), "spec": [list(s) if isinstance(s, tuple) else s for s in row.spec]} for row in rows
    ]
    mesh = dict(session.mesh.shape)
    return {
        "schema": "jaxcost-places-1",
        "mesh": mesh,
        "bubble": session.bubble,
        "device_bytes": total,
        "weights": weights,
    }


if __name__ == "__main__":
    run(main, Arguments)
