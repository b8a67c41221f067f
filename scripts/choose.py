"""Says which texts without labels are worth one next: those that a training is unsure of, or that lie far apart."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Choose texts to have labelled; they are written as JSON lines, without labels."""

    workdir: Positional[Path]
    """Folder of a training on labels."""
    output: Positional[Path]
    """A new file for the texts, the most wanted first."""
    split: str
    """Texts without labels, such as 'train[500:]'; labels that they have are not looked at."""
    count: int = 100
    """Texts to choose."""
    by: Literal["margin", "entropy", "coreset"] = "margin"
    """How sure the training is of its likeliest label over the next, or of all; or the texts that lie farthest from
    those that have labels and from each other, by the hidden states that labels are told from."""
    sources: tuple[str, ...] = ()
    """Files or folders that they are read from; the training's own data if none are given."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Writes the file, prints the first texts and returns what was chosen."""
    from jaxcost.data.files import atomic_write
    from jaxcost.labelling import choose
    from jaxcost.session import load_run

    if arguments.output.exists():
        raise ValueError(f"{arguments.output} exists already; name a file that does not.")
    session, params, step = load_run(arguments.workdir)
    found = choose(
        session, params, split=arguments.split, count=arguments.count, by=arguments.by, sources=arguments.sources
    )
    with atomic_write(arguments.output) as file:
        file.write("".join(json.dumps(record) + "\n" for record in found).encode())
    table = Table("text", "likeliest", "its share", title=f"{len(found)} texts by {arguments.by}, step {step}")
    for record in found[:10]:
        table.add_row(record["text"], record["likeliest"], f"{record['share']:.3f}")
    Console().print(table)
    return {"schema": "jaxcost-choose-1", "step": step, "by": arguments.by, "chosen": found}


if __name__ == "__main__":
    run(main, Arguments)
