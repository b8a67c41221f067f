"""What a set of weights costs once it is trained: bytes in memory, work and speed of what it is served for."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import objectives, sharding, weights
from jaxcost.cost.hlo import compiled_cost
from jaxcost.evaluation.batch import Batch
from jaxcost.serving.engine import Engine
from jaxcost.serving.sampling import Sampling, rows_of
from jaxcost.session import Session
from jaxcost.study import quality

_RUNS = 3


@dataclasses.dataclass(frozen=True)
class ServedCost:
    """Answers in full batches: decoded tokens without a prompt, or requests, each of which is given a label."""

    per_second: float
    """Measured, over all rows; the median of a few runs, compilation left out."""
    flops: float
    """Of one, of the compiled program; of a token, attention over the whole cache included."""


def meter(session: Session) -> Callable[[weights.Params], ServedCost]:
    """What measures weights of a session's model as they are served, in batches of `study.decode_batch_size`."""
    study = session.experiment.study
    if quality.of(session.experiment.data.objective).served is quality.TOKEN:
        engine = Engine(session.model)
        return functools.partial(measure_decode, engine, batch_size=study.decode_batch_size, tokens=study.decode_tokens)
    return functools.partial(measure_requests, jax.jit(session.forward), requests(session, study.decode_batch_size))


def requests(session: Session, number: int) -> Batch:
    """A batch of the first held-out texts or images, padded to what the model was trained on."""
    data = dataclasses.replace(session.experiment.data, batch_size=number)
    examples = session.validation_stream[:number]
    return objectives.scored_batches(data, examples, session.tokenizer, session.model.config, None)[0]


def measure_decode(engine: Engine, params: weights.Params, *, batch_size: int, tokens: int) -> ServedCost:
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
    return _measured(sharding.runnable(decode, compiled, params), compiled, arguments, batch_size * tokens)


def measure_requests(forward: Callable, batch: Batch, params: weights.Params) -> ServedCost:
    """Answers the rows of a batch at once, as a server does: one forward pass, and nothing is decoded.

    `forward` is jitted and takes weights and a batch.
    """
    compiled = forward.lower(params, batch).compile()
    run = sharding.runnable(forward, compiled, params)
    return _measured(run, compiled, lambda: (params, batch), len(batch["inputs"]))


def _measured(run: Callable, compiled: jax.stages.Compiled, arguments: Callable[[], tuple], answers: int) -> ServedCost:
    """What each of so many answers costs, which a program gives at once; `arguments` makes them anew for each run."""
    seconds = []
    for _ in range(_RUNS + 1):
        args = jax.block_until_ready(arguments())
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        seconds.append(time.perf_counter() - start)
    return ServedCost(answers / statistics.median(seconds[1:]), compiled_cost(compiled).total_flops / answers)


def weight_bytes(params: weights.Params) -> int:
    """Bytes of all arrays in memory, base, masks and scales included; codes of 4 bits two a byte, as on TPUs."""
    return sum(weights.storage_bytes(leaf) for leaf in jax.tree.leaves(params))


def trainable_parameters(params: weights.Params) -> int:
    """Numbers that train."""
    return sum(int(np.prod(leaf.shape)) for leaf in weights.partition(params)[0].values())
