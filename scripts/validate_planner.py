"""Compiles published training steps and sets the planner's three figures beside the published seconds.

Each calibrated figure is predicted with constants fitted on the other runs only (leave-one-out), or with `--shipped`
with the constants that come with jaxcost, which is the test for runs that they were not fitted on.
"""

import dataclasses
import json as json_module
import re
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Validate the planner on a file of published runs."""

    file: Positional[Path]
    """JSON of the schema published-runs-1."""
    only: str = ""
    """Regular expression on 'MODEL TOPOLOGY'; only the runs that match are compiled."""
    shipped: bool = False
    """Predict with the constants that come with jaxcost instead of leave-one-out."""
    write_calibration: Path | None = None
    """File for constants fitted on all runs of this file."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Compiles the runs, prints the table and returns it."""
    from jaxcost.cost.estimate import load_calibration
    from jaxcost.data.files import atomic_write
    from jaxcost.planning import published

    try:
        wanted = re.compile(arguments.only)
    except re.error as error:
        raise ValueError(f"--only {arguments.only!r} is no regular expression ({error}); mend it.") from None
    runs = [r for r in published.read_runs(arguments.file) if wanted.search(f"{r.model} {r.topology}")]
    if not runs:
        raise ValueError(f"--only {arguments.only!r} matches no run of {arguments.file}; change it.")
    planned, skipped = [], []
    console = Console()
    for one in track(runs, "compiling", console=Console(stderr=True)):
        try:
            planned.append((one, published.plan_run(one)))
        except published.CannotPlan as reason:
            skipped.append({"model": one.model, "topology": one.topology, "reason": str(reason)})
    # A compiler that writes no cycles, and links of unknown bandwidth, leave nothing to calibrate.
    usable = [(one, made) for one, made in planned if made.compiled.estimate.calibrated_seconds is not None]
    parts = [made.compiled.estimate.parts for _, made in usable]
    seconds = [one.step_seconds for one, _ in usable]
    if arguments.shipped or len(usable) < 3:
        predicted = [load_calibration()[0].seconds(p) for p in parts]
        method = "constants that come with jaxcost"
    else:
        predicted = published.leave_one_out(parts, seconds)
        method = "constants fitted on the other runs"
    bounds = (made.compiled.estimate.bound.seconds or 0.0 for _, made in usable)
    figures = {id(made): max(p, least) for (_, made), p, least in zip(usable, predicted, bounds, strict=True)}
    calibrated = [figures.get(id(made)) for _, made in planned]
    rows = [
        {
            "model": one.model,
            "chip": made.compiled.chip,
            "chips": one.chips,
            "topology": one.topology,
            "published_seconds": one.step_seconds,
            "lower_bound_seconds": made.compiled.estimate.bound.seconds,
            "compiler_seconds": made.compiled.estimate.compiler_seconds,
            "calibrated_seconds": predicted,
            "error_fraction": None if predicted is None else predicted / one.step_seconds - 1,
            "peak_bytes": made.compiled.peak_bytes,
            "fits": made.compiled.fits,
            "unestimated_ops": list(made.compiled.estimate.unestimated),
        }
        for (one, made), predicted in zip(planned, calibrated, strict=True)
    ]
    errors = [abs(row["error_fraction"]) for row in rows if row["error_fraction"] is not None]
    result = {
        "schema": "jaxcost-planner-validation-1",
        "method": method,
        "rows": rows,
        "skipped": skipped,
        "mean_error": sum(errors) / len(errors) if errors else None,
        "worst_error": max(errors, default=None),
    }
    if arguments.write_calibration is not None and usable:
        constants = published.fit(parts, seconds)
        stored = {"constants": dataclasses.asdict(constants), "mean_error": result["mean_error"]}
        stored["fitted_on"] = [f"{one.model} {one.topology}" for one, _ in usable]
        with atomic_write(arguments.write_calibration) as file:
            file.write((json_module.dumps(stored, indent=1) + "\n").encode())
    _print(console, result)
    return result


def _print(console: Console, result: dict) -> None:
    table = Table(title=f"Seconds a step; calibrated with {result['method']}")
    table.add_column("run", overflow="fold", min_width=13)
    for column in ("published", "bound", "compiler", "calibrated", "error", "GiB"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        figures = (row[f"{name}_seconds"] for name in ("published", "lower_bound", "compiler", "calibrated"))
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
        table.add_row(
            f"{row['model']} {row['topology']}",
            *("-" if figure is None else f"{figure:.4g}" for figure in figures),
            "-" if row["error_fraction"] is None else f"{row['error_fraction']:+.1%}",
            f"{peak}, too large" if row["fits"] is False else peak,
        )
    console.print(table)
    if result["mean_error"] is not None:
        console.print(f"mean absolute error {result['mean_error']:.1%}, worst {result['worst_error']:.1%}")
    for skip in result["skipped"]:
        console.print(f"skipped: {skip['model']} on {skip['topology']}: {skip['reason']}", highlight=False)


if __name__ == "__main__":
    run(main, Arguments)
