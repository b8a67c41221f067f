"""Times an epoch of labelled texts in batches of like lengths beside one of full length; prints medians and padding."""

import dataclasses
import itertools
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
    """Run epochs of a config's train steps with its data.buckets and without them, and time both."""

    config: Positional[Path]
    """Config file, such as configs/scenarios/customer_service.py; its fields, data.buckets among them, are the flags
    below."""
    experiment: Overrides
    rounds: int = 5
    """Timed epochs of each way, after one that compiles; the ways take turns, so that a slower minute slows both."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints the table and returns its rows."""
    from jaxcost.session import Session

    value = arguments.experiment
    if not value.data.buckets:
        raise ValueError("The config has no data.buckets to time; give some, such as --data.buckets 16 32.")
    full = dataclasses.replace(value, data=dataclasses.replace(value.data, buckets=()))
    session = Session(value, quiet=True, devices=jax.devices()[:1])
    ways = {
        "full length": _epochs(session.derive(full)),
        "buckets " + " ".join(map(str, value.data.lengths)): _epochs(session),
    }
    measured = [{name: next(epochs) for name, epochs in ways.items()} for _ in range(arguments.rounds + 1)]
    rows = []
    for name in ways:
        first, *others = (epoch[name] for epoch in measured)
        tokens, texts = (sum(epoch[kind] for epoch in others) for kind in ("tokens", "text_tokens"))
        rows.append(
            {
                "way": name,
                "epoch_tokens": tokens / len(others),
                "padding_share": 1 - texts / tokens,
                "epoch_seconds": statistics.median(epoch["seconds"] for epoch in others),
                "first_epoch_seconds": first["seconds"],
            }
        )
    table = Table("way", "tokens", "padding", "epoch, s", "with compilation, s", title=f"{arguments.config}, an epoch")
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['epoch_tokens']:,.0f}",
            f"{row['padding_share']:.1%}",
            f"{row['epoch_seconds']:.3f}",
            f"{row['first_epoch_seconds']:.2f}",
        )
    Console().print(table)
    return {"schema": "jaxcost-buckets-1", "rounds": arguments.rounds, "rows": rows}


def _epochs(session):
    """For ever, what an epoch took and how many tokens it read, those of texts and all; its last batches are whole."""
    from jaxcost.training.loop import jitted_step
    from jaxcost.training.optimizer import make_optimizer
    from jaxcost.training.step import init_state

    training, data = session.experiment.training, session.experiment.data
    optimizer = make_optimizer(session.experiment.optimizer, training.steps)
    shapes = session.abstract_params()
    step, _ = jitted_step(session.model, shapes, optimizer, session.transform, training, session.mesh)
    batches, epoch = session.train_batches(), len(session.train_stream) // data.batch_size
    with jax.set_mesh(session.mesh):
        state = init_state(session.fresh_params(), optimizer, training.seed)
    while True:
        tokens = texts = 0
        start = time.perf_counter()
        for batch in itertools.islice(batches, epoch):
            tokens, texts = tokens + batch["inputs"].size, texts + int(batch["valid"].sum())
            with jax.set_mesh(session.mesh):
                state, metrics = step(state, sharding.place_batch(batch, session.mesh))
        jax.block_until_ready(metrics)
        yield {"seconds": time.perf_counter() - start, "tokens": tokens, "text_tokens": texts}


if __name__ == "__main__":
    run(main, Arguments)
