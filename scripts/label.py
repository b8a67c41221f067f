"""Lets a training give labels to texts that have none, and writes them with those that people gave as data."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Label texts with a teacher that is sure of them; the folder that is written is for --data.sources of train.py."""

    workdir: Positional[Path]
    """Folder of a training on labels, the teacher's."""
    output: Positional[Path]
    """A new folder, for the training's own examples with those that the teacher labels, and its validation split."""
    split: str
    """Texts without labels, such as 'train[500:]'; labels that they have are not looked at."""
    sources: tuple[str, ...] = ()
    """Files or folders that they are read from; the training's own data if none are given."""
    threshold: float = 0.95
    """Probability that a label must have."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Writes the folder, prints how many texts were kept and returns the counts."""
    from jaxcost.labelling import write_labelled
    from jaxcost.session import load_run

    session, params, step = load_run(arguments.workdir)
    counts = write_labelled(
        session,
        params,
        f"{arguments.workdir}, step {step}",
        arguments.output,
        split=arguments.split,
        threshold=arguments.threshold,
        sources=arguments.sources,
    )
    table = Table("texts", "number", title=f"Labelled by step {step} of {arguments.workdir}")
    for name, value in counts.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)
    print(f"next: train.py with --data.sources {arguments.output} --data.train-split train")
    return {"schema": "jaxcost-label-1", "step": step, **counts, "output": str(arguments.output)}


if __name__ == "__main__":
    run(main, Arguments)
