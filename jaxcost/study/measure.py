"""What a set of weights costs once it is trained: bytes in memory, work and speed of a decoded token."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import sharding, weights
from jaxcost.cost.hlo import compiled_cost
from jaxcost.serving.engine import Engine
from jaxcost.serving.sampling import Sampling, rows_of

_RUNS = 3


@dataclasses.dataclass(frozen=True)
class DecodeCost:
    """Decoding with a full batch, no prompt."""

    tokens_per_second: float
    """Measured, over all rows; the median of a few runs, compilation left out."""
    flops_per_token: float
    """Of the compiled program, attention over the whole cache included."""


def measure_decode(engine: Engine, params: weights.Params, *, batch_size: int, tokens: int) -> DecodeCost:
    """Decodes `tokens` tokens in each of `batch_size` rows."""
    config = engine.model.config
    tokens = min(tokens, config.max_length)

    def arguments():
        cache = engine.start(params, batch_size=batch_size, slots=tokens)
        logits = jnp.zeros((batch_size, config.vocab_size), jnp.float32)
        drawn = [Sampling(temperature=1.0, seed=row) for row in range(batch_size)]
        return params, logits, cache, rows_of(drawn, [np.zeros(0, int)] * batch_size, config.vocab_size)

    decode = functools.partial(engine.decode, steps=tokens)
    compiled = engine.decode.lower(*arguments(), steps=tokens).compile()
    run = sharding.runnable(decode, compiled, params)
    seconds = []
    for _ in range(_RUNS + 1):
        args = jax.block_until_ready(arguments())
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        seconds.append(time.perf_counter() - start)
    flops = compiled_cost(compiled).total_flops
    return DecodeCost(batch_size * tokens / statistics.median(seconds[1:]), flops / (batch_size * tokens))


def weight_bytes(params: weights.Params) -> int:
    """Bytes of all arrays in memory, base, masks and scales included; codes of 4 bits two a byte, as on TPUs."""
    return sum(weights.storage_bytes(leaf) for leaf in jax.tree.leaves(params))


def trainable_parameters(params: weights.Params) -> int:
    """Numbers that train."""
    return sum(int(np.prod(leaf.shape)) for leaf in weights.partition(params)[0].values())
