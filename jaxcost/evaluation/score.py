"""Scores of a model on held-out text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcost import sharding, weights
from jaxcost.evaluation.batch import Batch, beside_inputs
from jaxcost.evaluation.losses import cross_entropy, negative_log_likelihood
from jaxcost.models.transformer import Transformer, output_of


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How much of the validation split is scored."""

    max_tokens: int = 65_536
    """Tokens scored, the first of the split; 0 scores all of it. Of texts with labels or answers all are scored."""

    def __post_init__(self):
        if self.max_tokens < 0:
            raise ValueError(f"evaluation.max_tokens is {self.max_tokens}; use 0 for the whole split.")


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of a text that it has not seen."""

    bits_per_byte: float
    """Bits that the model needs for a byte of text; comparable over tokenisers."""
    nats_per_token: float
    """Mean negative log-likelihood of a token."""
    scored_tokens: int
    """Tokens predicted."""


class Scorer:
    """Scores weights of any kinds on fixed batches; compiles once for each structure of the weights."""

    def __init__(self, model: Transformer, batches: Iterable[Batch], token_bytes: np.ndarray, mesh: Mesh):
        """`token_bytes` is int (V,): the bytes of text that each token id stands for."""
        self._batches = list(batches)
        self._mesh = mesh
        kept = [batch["targets"][batch["mask"] > 0] for batch in self._batches]
        self._bytes = int(sum(token_bytes[targets].sum(dtype=np.int64) for targets in kept))

        def sums(params, batch):
            hidden_BSD, _ = model.apply({"params": params}, batch["inputs"], **beside_inputs(batch))
            return cross_entropy(hidden_BSD, output_of(model.config, params), batch["targets"], batch["mask"])

        self._sums = jax.jit(sums)

    def __call__(self, params: weights.Params) -> Score:
        """The score of one set of weights."""
        total_nats, total_tokens = 0.0, 0
        with jax.set_mesh(self._mesh):
            results = [self._sums(params, sharding.place_batch(batch, self._mesh)) for batch in self._batches]
        for nats, tokens in jax.device_get(results):
            total_nats += float(nats)
            total_tokens += int(tokens)
        return Score(total_nats / math.log(2) / self._bytes, total_nats / total_tokens, total_tokens)


def row_nats(model: Transformer, params: weights.Params, batches: Iterable[Batch], mesh: Mesh) -> np.ndarray:
    """Mean negative log-likelihood of each row's targets, float32 (N,): the logarithm of its perplexity.

    How hard a text is for a model, such as to leave out what it finds hardest. Rows without targets, which fill a batch
    up, are left out.
    """

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def sums(params, batch):
        hidden_BSD, _ = model.apply({"params": params}, batch["inputs"], **beside_inputs(batch))
        nats_BS = negative_log_likelihood(output_of(model.config, params)(hidden_BSD), batch["targets"])
        return jnp.sum(nats_BS * batch["mask"], axis=1), jnp.sum(batch["mask"], axis=1)

    with jax.set_mesh(mesh):
        found = [jax.device_get(sums(params, sharding.place_batch(batch, mesh))) for batch in batches]
    nats_N, counts_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return nats_N[counts_N > 0] / counts_N[counts_N > 0]
