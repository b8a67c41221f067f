"""Scores of an encoder on tokens that were hidden from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcost import sharding, weights
from jaxcost.evaluation.batch import Batch, beside_inputs
from jaxcost.evaluation.losses import negative_log_likelihood
from jaxcost.models.transformer import Transformer, output_of


@dataclasses.dataclass(frozen=True)
class MaskedScore:
    """How well hidden tokens are found."""

    nats_per_masked_token: float
    """Mean negative log-likelihood of a hidden token."""
    masked_accuracy: float
    """Share of the hidden tokens that are the likeliest in their place."""
    scored_tokens: int
    """Hidden tokens scored."""


class MaskedScorer:
    """Scores weights of any kinds on fixed batches; compiles once for each structure of the weights."""

    def __init__(self, model: Transformer, batches: Iterable[Batch], mesh: Mesh):
        """ValueError if no token of the batches is hidden."""
        self._batches, self._mesh = list(batches), mesh
        if not any(batch["mask"].any() for batch in self._batches):
            raise ValueError("No token of the validation split is hidden; use a larger one.")

        def sums(params, batch):
            hidden_BSD, _ = model.apply({"params": params}, batch["inputs"], **beside_inputs(batch))
            logits_BSV = output_of(model.config, params)(hidden_BSD)
            nats_BS = negative_log_likelihood(logits_BSV, batch["targets"])
            right_BS = jnp.argmax(logits_BSV, axis=-1) == batch["targets"]
            return jnp.stack([jnp.sum(x * batch["mask"]) for x in (nats_BS, right_BS, jnp.ones(nats_BS.shape))])

        self._sums = jax.jit(sums, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: weights.Params) -> MaskedScore:
        """The score of one set of weights."""
        with jax.set_mesh(self._mesh):
            found = [self._sums(params, sharding.place_batch(batch, self._mesh)) for batch in self._batches]
        nats, right, tokens = np.sum(jax.device_get(found), axis=0, dtype=np.float64)
        return MaskedScore(nats / tokens, right / tokens, int(tokens))
