"""Compares two studies; a regression from the old to the new ends with exit status 2, for a team's CI."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.study.regressions import Tolerances

_REGRESSED = 2


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Set two studies side by side; exit status 2 where a score, a cost or a group got worse, 1 for bad input."""

    old: Positional[Path]
    """Folder of the study that is measured against, or its study.json."""
    new: Positional[Path]
    """Folder of the study that is judged, or its study.json."""
    tolerances: Tolerances = Tolerances()
    """How much worse is still the same."""
    all: bool = False
    """Show every figure, not only scores and what moved by more than is allowed."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints the comparison and returns it."""
    from jaxcost.study.regressions import compare_studies, read

    found = compare_studies(read(arguments.old), read(arguments.new), arguments.tolerances)
    table = Table("recipe", "figure", "old", "new", "may move by", "", box=None, pad_edge=False)
    hidden = 0
    for one in found["comparisons"]:
        moved = abs(one["new"] - one["old"]) > one["allowed"]
        if not (arguments.all or moved or one["figure"] in ("score", "accuracy")):
            hidden += 1
            continue
        verdict = "[red]worse[/]" if one["worse"] else "[green]better[/]" if moved else "same"
        table.add_row(escape(one["recipe"]), one["heading"], *one["shown"], verdict)
    console = Console()
    console.print(table)
    if hidden:
        console.print(f"{hidden} further figures are the same; --all shows them.")
    for study, names in (("old", found["only_old"]), ("new", found["only_new"])):
        if names:
            console.print(f"only in the {study} study: {', '.join(names)}", markup=False, soft_wrap=True)
    for text in found["notes"]:
        console.print(f"note: {text}", markup=False, soft_wrap=True)
    for text in found["regressions"]:
        console.print(f"[red]regression[/] {escape(text)}", soft_wrap=True)
    if not found["regressions"]:
        console.print("[green]no regression[/]")
    return found | {"exit_status": _REGRESSED if found["regressions"] else 0}


if __name__ == "__main__":
    run(main, Arguments)
