"""Times how long a train step of a config waits for its data, beside the step itself; prints medians and the share."""

import dataclasses
import statistics
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost import sharding
from jaxcost.command_line import run
from jaxcost.config import Overrides


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run a config's train steps on its own batches, and time both."""

    config: Positional[Path]
    """Config file, such as configs/quickstart.py; its fields are the flags below."""
    experiment: Overrides
    steps: int = 60
    """Timed steps, after three that are not."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints the table and returns its figures."""
    from jaxcost.session import Session
    from jaxcost.training.loop import jitted_step
    from jaxcost.training.optimizer import make_optimizer
    from jaxcost.training.step import init_state

    session = Session(arguments.experiment, quiet=True, devices=jax.devices()[:1])
    session.open()
    training = arguments.experiment.training
    optimizer = make_optimizer(arguments.experiment.optimizer, training.steps)
    shapes = session.abstract_params()
    step, _ = jitted_step(session.model, shapes, optimizer, session.transform, training, session.mesh)
    batches, waits, seconds = session.train_batches(), [], []
    with jax.set_mesh(session.mesh):
        state = init_state(session.fresh_params(), optimizer, training.seed)
        for _ in range(arguments.steps + 3):
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            state, metrics = step(state, sharding.place_batch(batch, session.mesh))
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
    waits, seconds = waits[3:], seconds[3:]
    result = {
        "schema": "jaxcost-data-wait-1",
        "wait_seconds": statistics.median(waits),
        "step_seconds": statistics.median(seconds),
        "wait_share": sum(waits) / sum(seconds),
        "steps": arguments.steps,
    }
    table = Table("figure", "value", title=f"{arguments.config}, {arguments.steps} steps")
    for name, value in list(result.items())[1:]:
        table.add_row(name, f"{value:.5g}")
    Console().print(table)
    return result


if __name__ == "__main__":
    run(main, Arguments)
