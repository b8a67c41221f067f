"""Times a train step under each way of executing it and each transform; prints medians and ratios to the first row."""

import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.config import Experiment, Overrides
from jaxcost.cost.hlo import compiled_cost
from jaxcost.models.transformer import Transformer, initialize
from jaxcost.sharding import runnable
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import chain, factorize, freeze, lora, prune, quantize


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time the train step of a config on one device."""

    config: Positional[Path]
    """Config file, such as configs/quickstart.py; its fields are the flags below."""
    experiment: Overrides
    rounds: int = 20
    """Timed steps of each case; the cases take turns, so that a slower minute slows them all."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints the table and returns its rows."""
    base = arguments.experiment
    bf16 = dataclasses.replace(base.execution, compute="bfloat16", unroll="always")
    cases = {
        "bfloat16, unrolled": (bf16, ()),
        "float32, unrolled": (dataclasses.replace(bf16, compute="float32"), ()),
        "bfloat16, scanned": (dataclasses.replace(bf16, unroll="never"), ()),
        "full remat, scanned": (dataclasses.replace(bf16, unroll="never", remat="full"), ()),
        "prune 50%": (bf16, (prune(),)),
        "low rank": (bf16, (factorize(),)),
        "lora": (bf16, (lora(),)),
        "lora on int8": (bf16, (quantize(), lora())),
        "lora on nf4": (bf16, (quantize(bits=4, numbers="nf", group=64), lora())),
        "freeze all but 1": (bf16, (freeze(),)),
        "AQT int8 training": (bf16, (quantize(mode="training"),)),
    }
    prepared = {name: _prepare(base, *case) for name, case in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.rounds + 1):
        for name, (run_step, flops, state, batch) in prepared.items():
            start = time.perf_counter()
            state, _ = jax.block_until_ready(run_step(state, batch))
            seconds[name].append(time.perf_counter() - start)
            prepared[name] = (run_step, flops, state, batch)
    rows = []
    for name, (_, flops, _, batch) in prepared.items():
        median = statistics.median(seconds[name][1:])
        rows.append({"case": name, "step_seconds": median, "step_flops": flops, "tokens": batch["inputs"].size})
    first = rows[0]
    table = Table("case", "step, ms", "ratio", "GFLOP", "ratio", "tokens/s", "GFLOP/s", title="Train step, medians")
    for row in rows:
        time_ratio, flop_ratio = (row[key] / first[key] for key in ("step_seconds", "step_flops"))
        figures = (row["step_seconds"] * 1e3, time_ratio, row["step_flops"] / 1e9, flop_ratio)
        rates = (row["tokens"] / row["step_seconds"], row["step_flops"] / row["step_seconds"] / 1e9)
        table.add_row(row["case"], *(f"{value:,.2f}" for value in figures), *(f"{value:,.0f}" for value in rates))
    Console().print(table)
    return {
        "schema": "jaxcost-train-step-1",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": rows,
    }


def _prepare(experiment: Experiment, execution, transforms):
    vocab_size = experiment.model.vocab_size or 1024
    model = Transformer(dataclasses.replace(experiment.model, vocab_size=vocab_size), execution)
    transform = chain(*transforms)
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    params = jax.jit(lambda key: transform(initialize(model, key)[0]))(jax.random.key(0))
    state = init_state(params, optimizer, 0)
    shape = (experiment.data.batch_size, experiment.data.sequence_length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, vocab_size)
    batch = {"inputs": tokens, "targets": tokens, "mask": jnp.ones(shape)}
    step = jax.jit(make_train_step(model, optimizer, transform), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
    run_step = runnable(step, compiled, state)
    return run_step, compiled_cost(compiled).total_flops, jax.tree.map(jnp.copy, state), batch


if __name__ == "__main__":
    run(main, Arguments)
