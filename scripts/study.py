"""Trains a base model once, tries the recipes of a config or searches its spaces for one, and writes the report."""

import dataclasses
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.config import Overrides


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare recipes, or search for one within a budget: transform, recover, verify, price, report.

    The same command goes on after a kill.
    """

    config: Positional[Path]
    """Config file with recipes, such as configs/quickstart.py, or with spaces of them, such as configs/search.py; its
    fields are the flags below."""
    experiment: Overrides
    workdir: Path = Path("runs/study")
    """Folder for the report, study.json, ledger.jsonl, pareto.png and the runs."""
    json: Path | None = None
    """File for a copy of study.json."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Runs the study, prints its table and findings and returns what study.json holds."""
    from jaxcost.study import quality, report
    from jaxcost.study.run import run_study

    result = run_study(arguments.experiment, arguments.workdir)
    console = Console()
    console.print(report.table(result))
    for finding in result["findings"]:
        console.print(("[green]held[/]  " if finding["holds"] else "[red]not[/]   ") + finding["text"])
    console.print(report.answer(result))
    print(f"report: {arguments.workdir / 'report.html'}")
    base, writes = arguments.workdir / "base", quality.of_study(result).writes
    following = f"generate.py {base} --prompt 'def '" if writes else f"evaluate.py {base}"
    print(f"next: python scripts/{following}")
    return result


if __name__ == "__main__":
    run(main, Arguments)
