"""Compares what labels buy with what changed copies, a teacher's labels and its distributions buy, for their money."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.config import Overrides


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train every way to spend money on a scenario, for several seeds; the same command goes on after a kill."""

    config: Positional[Path]
    """Config file of a scenario, such as configs/scenarios/customer_service.py; its fields are the flags below."""
    experiment: Overrides
    few: int = 500
    """Labels that the ways are compared at."""
    more: tuple[int, ...] = (1000, 2000)
    """Further numbers of labels."""
    everything: int = 4000
    """All labels that there are."""
    longer: tuple[int, ...] = ()
    """Further steps that the few labels, augmented, are trained for."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, order and labels."""
    threshold: float = 0.95
    """Probability that a pseudo-label must have."""
    workdir: Path = Path("runs/labels")
    """Folder for the trainings."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints the table and what was found, and returns both."""
    from jaxcost.study.labels import arms, exchange, gain, run_labels

    compared = arms(arguments.few, arguments.more, arguments.everything, arguments.longer)
    result = run_labels(
        arguments.experiment, arguments.workdir, compared, arguments.seeds, threshold=arguments.threshold
    )
    table = Table(
        "way",
        "accuracy",
        "macro F1",
        "labels USD",
        "machine USD",
        "front",
        title=f"{result['data']}, seeds {arguments.seeds}",
    )
    for row in result["arms"]:
        shown = [_shown(row, name) for name in ("accuracy", "macro_f1", "data_usd", "compute_usd")]
        table.add_row(row["arm"], *shown, {None: "unknown", True: "front", False: ""}[row["front"]])
    console = Console()
    console.print(table)
    few, all_of_them = (f"{n} labels" for n in (arguments.few, arguments.everything))
    pairs = [(f"{few}, {way}", few) for way in ("augmented", "pseudo-labels", "distilled")]
    pairs += [(f"{few}, {way}", f"{few}, augmented") for way in ("pseudo-labels", "distilled")]
    found = [gain(result, *pair) for pair in (*pairs, (f"{all_of_them}, augmented", all_of_them))]
    for one in found:
        said = " ".join(f"{value:+.3f}" for value in one["gains"])
        console.print(f"{'held ' if one['holds'] else 'not  '} {one['text']}: {one['mean']:+.3f} ({said})")
    worth = exchange(result)
    for one in worth:
        console.print(_said(one, arguments.few))
    return result | {"findings": found, "exchange": worth}


def _said(one: dict, few: int) -> str:
    """What a way is worth in labels."""
    by_seed = ", ".join("more than tried" if worth is None else f"{worth - few:.0f}" for worth in one["worth_by_seed"])
    if one["worth_labels"] is None:
        return f"{one['arm']}: worth more labels than were tried (by seed {by_seed})"
    gained = one["worth_labels"] - few
    if gained <= 0:
        return f"{one['arm']}: worth no label (by seed {by_seed})"
    even = one["even_label_usd"]
    price = "what the machine costs is unknown" if even is None else f"pays where a label costs above {even:.2g} USD"
    return f"{one['arm']}: worth {gained:.0f} labels (by seed {by_seed}); {price}"


def _shown(row: dict, name: str) -> str:
    if row[name] is None:
        return "unknown"
    digits = 3 if name in ("accuracy", "macro_f1") else 4
    return f"{row[name]:.{digits}f} ± {row[f'{name}_half_range']:.{digits}f}"


if __name__ == "__main__":
    run(main, Arguments)
