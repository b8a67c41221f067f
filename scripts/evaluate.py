"""Scores a training's newest checkpoint on held-out text."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Score the newest checkpoint of a training on its validation split."""

    workdir: Positional[Path]
    """Folder of a training (the --workdir of train.py, or base/ of a study)."""
    data: str | None = None
    """Another dataset to score on, such as python_text/reference."""
    max_tokens: int | None = None
    """Tokens to score; 0 is the whole split, unset what the experiment says."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints the scores and returns them."""
    from jaxcost.session import load_run

    session, params, step = load_run(arguments.workdir)
    changed = session.experiment
    if arguments.data is not None:
        changed = dataclasses.replace(changed, data=dataclasses.replace(changed.data, name=arguments.data))
    if arguments.max_tokens is not None:
        evaluation = dataclasses.replace(changed.evaluation, max_tokens=arguments.max_tokens)
        changed = dataclasses.replace(changed, evaluation=evaluation)
    scores = session.reopen(changed).evaluate(params)
    table = Table("score", "value", title=f"step {step} on {changed.data.name} {changed.data.validation_split}")
    for name, value in scores.items():
        said = f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if value is not None else "unknown"
        table.add_row(name, said)
    Console().print(table)
    return {"schema": "jaxcost-evaluate-1", "step": step, "data": changed.data.name, **scores}


if __name__ == "__main__":
    run(main, Arguments)
