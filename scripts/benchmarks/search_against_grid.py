"""Does a search at a share of the exhaustive grid's cost find as good a recipe? Trains both, for several seeds."""

import dataclasses
import statistics
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.config import Overrides
from jaxcost.study import quality


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Search a config's space, then train every recipe of it to the end, and compare what was found and paid."""

    config: Positional[Path]
    """Config file with spaces and a budget of the study, such as configs/search.py; its fields are the flags below."""
    experiment: Overrides
    workdir: Path = Path("runs/search_against_grid")
    """Folder for the trainings; what was finished there is not repeated."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the base's weights and of the order of all data."""
    within: float = 0.01
    """How much worse than the grid's best the found recipe may be, as a share of its score."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints a row for each seed and returns them."""
    rows = []
    for seed in arguments.seeds:
        rows.append(_compare(arguments, seed))
        Console(stderr=True).print(f"seed {seed}: {rows[-1]}")
    unit = quality.of(arguments.experiment.data.objective).unit
    shown = Table(title=f"A search against the exhaustive grid ({unit})", box=None, padding=(0, 2, 0, 0))
    for heading in ("seed", "found", "its score", "best of the grid", "its score", "worse by", "FLOPs spent"):
        shown.add_column(heading, justify="left" if "score" not in heading else "right")
    for row in rows:
        shown.add_row(
            *(str(row["seed"]), row["found"], f"{row['found_score']:.4f}", row["best"], f"{row['best_score']:.4f}"),
            *(f"{row['worse_by']:.2%}", f"{row['flops_share']:.1%} of the grid's"),
        )
    console = Console()
    console.print(shown)
    held = sum(row["worse_by"] <= arguments.within for row in rows)
    console.print(
        f"Within {arguments.within:.0%} of the best: {held} of {len(rows)} seeds, at "
        f"{statistics.mean(row['flops_share'] for row in rows):.1%} of the grid's FLOPs; "
        f"{sum(row['seconds'] for row in rows):,.0f} s in all."
    )
    return {"schema": "jaxcost-search-against-grid-1", "within": arguments.within, "held": held, "rows": rows}


def _compare(arguments: Arguments, seed: int) -> dict:
    from jaxcost.session import Session
    from jaxcost.study.candidates import Plan
    from jaxcost.study.estimates import Estimator, probe
    from jaxcost.study.run import run_study
    from jaxcost.study.trials import Trials

    started = time.perf_counter()
    given = arguments.experiment
    # One seed of each recipe on both sides: further seeds would confirm what either side found.
    study = dataclasses.replace(
        given.study,
        search=dataclasses.replace(given.study.search, seeds=1),
        verify=dataclasses.replace(given.study.verify, on=False),
    )
    experiment = dataclasses.replace(
        given,
        study=study,
        data=dataclasses.replace(given.data, shuffle_seed=seed),
        training=dataclasses.replace(given.training, seed=seed),
    )
    folder = Path(arguments.workdir) / f"seed_{seed}"
    found = run_study(experiment, folder / "search", quiet=True)
    # The grid trains in a folder of its own and shares nothing with the search but the base.
    base = Session(experiment, quiet=True)
    trained = base.train(folder / "search" / "base")
    trials = Trials(base, trained.params, folder / "grid", found["machine"])
    speed = probe(base, folder / "search" / "base", folder / "search" / "probe.json", found["machine"])
    plan = Plan(base, jax.eval_shape(base.base_params), Estimator(base, speed))
    tried = {one.recipe: one for one in plan.candidates if one.going}
    scores, flops = {}, {}
    for recipe, one in tried.items():
        stage = trials.stage(recipe, one.rungs[-1])
        flops[stage["recovery"]] = stage["recovery_totals"]["flops"]
        if one not in plan.controls:
            scores[recipe.name] = stage["score"]
    best = min(scores, key=scores.get)
    name = found["answer"]["recipe"]
    paid = sum(part["flops"] for part in found["ledger"] if part["stage"] != "base")
    return {
        "seed": seed,
        "recipes": len(scores),
        "trials": sum(bool(trial["stages"]) for trial in found["trials"]),
        "found": name,
        "found_score": scores[name],
        "best": best,
        "best_score": scores[best],
        "worse_by": scores[name] / scores[best] - 1,
        "flops_share": paid / sum(flops.values()),
        "surrogate": found["surrogate"],
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    run(main, Arguments)
