"""Asks a language model behind an address of OpenAI's API for new texts with labels, and writes them as data."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.config import Overrides


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a config's examples with new ones of a language model; the folder is for --data.sources of train.py."""

    config: Positional[Path]
    """Config file whose data have labels; its `synthesis` says whom to ask and how (--synthesis.url and so on)."""
    experiment: Overrides
    output: Path = Path("runs/synthesized")
    """A new folder."""
    teacher: Path | None = None
    """Folder of a training on the same labels: a text is kept only if its model gives it the label asked for."""
    cache: Path | None = None
    """Folder where answers are kept; beside the data if it is not given."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Writes the folder, prints how many texts were kept and what they cost, and returns both."""
    from jaxcost.labelling import write_folder
    from jaxcost.session import Session, load_run
    from jaxcost.synthesis import synthesize

    a = arguments
    if a.output.exists():
        raise ValueError(f"{a.output} exists already; name a folder that does not, as --output.")
    session = Session(a.experiment)
    teacher = None if a.teacher is None else load_run(a.teacher)[:2]
    config = a.experiment.synthesis
    with Console(stderr=True).status(f"Asking {config.url}"):
        records, counts = synthesize(session, teacher, a.cache)
    write_folder(session, records, a.output)
    table = Table("texts", "number", title=f"Written by {records[0]['teacher']}")
    for name, value in counts.items():
        table.add_row(name, f"{value:,}")
    usd = a.experiment.prices.usd({name: counts[name] for name in ("read_tokens", "generated_tokens")})
    table.add_row("USD, at the config's prices", "unknown" if usd is None else f"{usd:.4f}")
    Console().print(table)
    print(f"next: train.py with --data.sources {a.output} --data.train-split train")
    return {"schema": "jaxcost-synthesize-1", **counts, "usd": usd, "output": str(a.output)}


if __name__ == "__main__":
    run(main, Arguments)
