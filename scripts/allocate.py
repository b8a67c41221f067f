"""Spreads one budget over the weights of a trained model, and compares that with the same level for all of them."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Allocate sparsity, rank or bits by sensitivity, at what one level for all would cost."""

    workdir: Positional[Path]
    """Folder of a training, such as runs/study/base."""
    what: Literal["sparsity", "rank", "bits"] = "sparsity"
    """Prune with masks, factorise, or quantise the weights."""
    uniform: float | None = None
    """The level whose cost is the budget: the share that is pruned or the share of the parameters that factors keep
    (0.8 where it is left out), or the bits (8)."""
    cost: Literal["bytes", "seconds"] = "bytes"
    """Bytes stored, or least seconds of the products on the experiment's chip."""
    batches: int = 8
    """Batches of the training split on which the loss is measured."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict[str, Any]:
    """Allocates, prints both sides and returns what they came to."""
    from jaxcost.session import load_run
    from jaxcost.study.allocate import compare_with_uniform
    from jaxcost.transforms import factorize, prune, quantize
    from jaxcost.transforms.base import ALL_KERNELS

    shares = tuple(round(0.05 * n, 2) for n in range(1, 20))
    transform, option, levels, usual = {
        "sparsity": (prune(rules=ALL_KERNELS), "sparsity", (0.0, *shares), 0.8),
        "rank": (factorize(rules=ALL_KERNELS), "parameters", (*shares, None), 0.8),
        "bits": (quantize(rules=ALL_KERNELS), "bits", (4, 8, None), 8),
    }[arguments.what]
    uniform = usual if arguments.uniform is None else arguments.uniform
    if not uniform or uniform not in levels:
        said = ", ".join(f"{level:g}" for level in levels if level)
        raise ValueError(f"--uniform {uniform:g} is none of the levels of {arguments.what} ({said}); choose one.")
    session, params, step = load_run(arguments.workdir)
    found = compare_with_uniform(
        session,
        params,
        transform,
        option,
        levels,
        uniform,
        cost=arguments.cost,
        batches=arguments.batches,
    )
    table = Table("weight", option, "cost", "loss alone, nats a token", title=f"{arguments.workdir}, step {step}")
    for path, level in found["levels"].items():
        choice = next(choice for choice in found["table"][path] if choice["level"] == level)
        table.add_row(
            path, "as it is" if level is None else f"{level:g}", f"{choice['cost']:.4g}", f"{choice['loss']:+.4f}"
        )
    console = Console()
    console.print(table)
    for side in ("uniform", "allocated"):
        console.print(
            f"{side}: {found[side]['bits_per_byte']:.3f} bits/byte at {found[side]['cost']:.5g} {arguments.cost}"
        )
    console.print(f"untouched: {found['untouched_bits_per_byte']:.3f} bits/byte")
    console.print("The allocation " + ("beats" if found["beats_uniform"] else "does not beat") + " the uniform level.")
    return {"schema": "jaxcost-allocate-1", "what": arguments.what, "unit": arguments.cost} | found


if __name__ == "__main__":
    run(main, Arguments)
