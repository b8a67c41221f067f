"""Times the server's decode step beside what this machine's memory allows at best; prints the share of that bound."""

import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.config import Overrides
from jaxcost.models.transformer import Transformer, initialize
from jaxcost.serving.sampling import GREEDY
from jaxcost.serving.slots import Slots, SlotsConfig

_READ_BYTES = 512 * 2**20  # beyond every cache


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time decode steps of new weights of a config's model, for each number of requests and tokens that each holds.

    The bound is the bytes of all weights (of an embedding that does not unembed, the rows that are looked up) and of
    the keys and values held, over the bandwidth at which this process reads memory between the steps.
    """

    config: Positional[Path]
    """Config file, such as configs/quickstart.py; its fields are the flags below."""
    experiment: Overrides
    requests: tuple[int, ...] = (1, 8)
    """Requests that are decoded at once."""
    tokens: tuple[int, ...] = (64,)
    """Tokens that each holds."""
    rounds: int = 10
    """Timed dispatches of each case; the cases take turns with each other and with the reading of memory."""
    engine: SlotsConfig = SlotsConfig()
    """The slots."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints the table and returns its rows."""
    a = arguments
    config = dataclasses.replace(a.experiment.model, vocab_size=a.experiment.model.vocab_size or 1024)
    needed = max(a.tokens) + (a.rounds + 1) * a.engine.tokens_per_dispatch
    if min(a.requests) < 1 or max(a.requests) > a.engine.slots:
        raise ValueError(f"--requests {a.requests} must lie between 1 and engine.slots ({a.engine.slots}).")
    if min(a.tokens) < 1 or needed > (a.engine.max_length or config.max_length):
        raise ValueError(
            f"--tokens {a.tokens} and {a.rounds} rounds need room for {needed} tokens; raise --model.max-length."
        )
    model = Transformer(config, a.experiment.execution)
    slots = Slots(model, jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0)), a.engine)
    cases = [(requests, tokens) for requests in a.requests for tokens in a.tokens]
    seconds, read = {case: [] for case in cases}, []
    read_memory = _reader()
    for case in cases:
        _fill(slots, *case)
        for _ in range(a.rounds + 1):
            read.append(_READ_BYTES / _timed(read_memory))
            active = np.arange(a.engine.slots) < case[0]
            seconds[case].append(_timed(lambda active=active: slots.decode(active)) / a.engine.tokens_per_dispatch)
    bandwidth = statistics.median(read)
    rows = []
    for case, each in seconds.items():
        step, moved = statistics.median(each[1:]), _step_bytes(slots, *case)
        rows.append(
            {
                "requests": case[0],
                "tokens": case[1],
                "step_seconds": step,
                "step_bytes": moved,
                "bound_seconds": moved / bandwidth,
                "share_of_bound": moved / bandwidth / step,
                "new_tokens_per_second": case[0] / step,
            }
        )
    table = Table(
        "requests", "tokens each", "step, ms", "MB", "bound, ms", "share", "tokens/s", title="Decode, medians"
    )
    for row in rows:
        figures = [row["step_seconds"] * 1e3, row["step_bytes"] / 1e6, row["bound_seconds"] * 1e3]
        figures += [row["share_of_bound"], row["new_tokens_per_second"]]
        table.add_row(str(row["requests"]), str(row["tokens"]), *(f"{value:,.2f}" for value in figures))
    Console().print(table)
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s")
    device = jax.devices()[0].device_kind
    return {"schema": "jaxcost-decode-1", "device": device, "bytes_per_second": bandwidth, "rows": rows}


def _fill(slots: Slots, requests: int, tokens: int) -> None:
    prompt = np.zeros(tokens, np.int32)
    for slot in range(requests):
        slots.admit(slot, GREEDY, prompt)
        for start, count in slots.pieces(tokens):
            slots.prefill(slot, prompt, start, count)


def _step_bytes(slots: Slots, requests: int, tokens: int) -> int:
    """What a step must read: see `Arguments`."""
    params, c = slots.params, slots.model.config
    weights_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not c.tie_embeddings:
        table = sum(leaf.nbytes for leaf in jax.tree.leaves(params["embed"]))
        weights_bytes -= table - requests * table // c.vocab_size
    cache = jax.tree.leaves((slots.state.cache.key, slots.state.cache.value))
    return weights_bytes + requests * tokens * sum(leaf.nbytes // (leaf.shape[1] * leaf.shape[2]) for leaf in cache)


def _reader():
    """Reads memory once, with all cores."""
    data = jnp.ones((_READ_BYTES // 4,), jnp.float32)
    total = jax.jit(jnp.sum).lower(data).compile()
    jax.block_until_ready(total(data))
    return lambda: jax.block_until_ready(total(data))


def _timed(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    run(main, Arguments)
