"""Says how large a model and how many tokens a budget buys, by two published scaling laws, serving included."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Spend a budget on one kind of chip."""

    usd: Positional[float]
    """Money for training and, with --tokens-served, for serving."""
    chip: str = "v5e"
    """Chip whose price and peak count, such as v5e or h100."""
    usd_per_chip_hour: float | None = None
    """Price of a chip for an hour; unset takes the table's."""
    utilization: float = 0.4
    """Share of the chips' bf16 peak that model FLOPs reach; 0.4 is usual, the planner says it for a config."""
    tokens_served: float = 0.0
    """Tokens that the model will read and write in its life."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints the table and returns it."""
    from jaxcost.cost import hardware
    from jaxcost.planning import scaling

    if not arguments.usd > 0 or arguments.usd == float("inf"):
        raise ValueError(f"the budget is {arguments.usd:g} dollars; give a positive, finite one.")
    if not 0 < arguments.utilization <= 1:
        raise ValueError(f"--utilization is {arguments.utilization:g}; it must be above 0 and at most 1.")
    config = hardware.HardwareConfig(chip=arguments.chip, num_chips=1, usd_per_chip_hour=arguments.usd_per_chip_hour)
    chip = hardware.resolve(config)
    price, peak = chip.usd_per_chip_hour, chip.chip.peak("bf16")
    if not price.value or peak is None:
        raise ValueError(f"the price of {arguments.chip} is unknown; give it with --usd-per-chip-hour.")
    chip_hours = arguments.usd / price.value
    flops = chip_hours * 3600 * peak * arguments.utilization
    rows = scaling.choices(flops, arguments.tokens_served)
    table = Table("law", "parameters", "95 %", "tokens", "95 %", "loss, nats", title=f"{flops:.3g} FLOPs")
    for row in rows:
        table.add_row(
            row.law,
            f"{row.parameters:.3g}",
            _interval(row.parameters_interval),
            f"{row.tokens:.3g}",
            _interval(row.tokens_interval),
            f"{row.loss:.3f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{chip_hours:.4g} chip-hours at {price.value} dollars ({price.provenance}), "
        f"{arguments.utilization:.0%} of {peak / 1e12:.0f} TFLOP/s; losses are on the papers' own texts.",
        highlight=False,
    )
    for row in rows:
        console.print(f"{row.law}: {row.source}", highlight=False)
    return {
        "schema": "jaxcost-budget-1",
        "usd": arguments.usd,
        "chip": arguments.chip,
        "chip_hours": chip_hours,
        "flops": flops,
        "usd_per_chip_hour": dataclasses.asdict(price),
        "choices": [dataclasses.asdict(row) for row in rows],
    }


def _interval(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.2g} to {ends[1]:.2g}"


if __name__ == "__main__":
    run(main, Arguments)
