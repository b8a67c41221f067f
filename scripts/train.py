"""Trains the experiment of a config file, or goes on with the training that the folder holds."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table
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
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Trains, prints what it came to and returns it."""
    import jax

    from jaxcost.session import Session

    session = Session(arguments.experiment)
    coverage = session.transform.coverage(jax.eval_shape(session.base_params))
    if coverage:
        table = Table("weight", "shape", "rule", "what happens", title="Transforms")
        for row in coverage:
            table.add_row(row.path, " x ".join(map(str, row.shape)), row.rule or "-", row.action)
        Console().print(table)
    fitted = session.train(arguments.workdir)
    seconds = fitted.totals["seconds"]
    result = {
        "schema": "jaxcost-train-1",
        "steps": fitted.steps,
        **fitted.metrics,
        "step_seconds": fitted.step_seconds,
        "step_flops": fitted.cost.total_flops,
        "totals": fitted.totals,
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


if __name__ == "__main__":
    run(main, Arguments)
