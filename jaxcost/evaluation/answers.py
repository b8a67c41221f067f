"""What a model says of each target of held-out data: how likely it finds it, what it finds likeliest, and how sure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcost import sharding, weights
from jaxcost.evaluation.batch import Batch, beside_inputs
from jaxcost.evaluation.losses import negative_log_likelihood
from jaxcost.models.transformer import Transformer, output_of


@dataclasses.dataclass(frozen=True)
class Answers:
    """Of each target that counts, in the order of the data."""

    nats_N: np.ndarray
    """float32: negative log-likelihood of the target."""
    said_N: np.ndarray
    """int32: the likeliest token, or label."""
    confidence_N: np.ndarray
    """float32: its probability."""
    right_N: np.ndarray
    """bool: whether it is the target."""


def answers(model: Transformer, params: weights.Params, batches: Sequence[Batch], mesh: Mesh) -> Answers:
    """Asks weights of any kinds about every target of the batches whose `mask` is 1."""

    # Every process of a job reads all of it.
    @jax.jit
    def ask(params, batch):
        hidden_BTD, _ = model.apply({"params": params}, batch["inputs"], **beside_inputs(batch))
        logits_BTV = output_of(model.config, params)(hidden_BTD)
        nats_BT = negative_log_likelihood(logits_BTV, batch["targets"])
        confidence_BT = jnp.exp(jnp.max(jax.nn.log_softmax(logits_BTV), axis=-1))
        said_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        return jax.lax.with_sharding_constraint((nats_BT, said_BT, confidence_BT), sharding.replicated(mesh))

    with jax.set_mesh(mesh):
        found = [jax.device_get(ask(params, sharding.place_batch(batch, mesh))) for batch in batches]
    kept = [np.asarray(batch["mask"]) > 0 for batch in batches]
    nats, said, confidence = (
        np.concatenate([one[k][mask] for one, mask in zip(found, kept, strict=True)]) for k in range(3)
    )
    targets = np.concatenate([np.asarray(batch["targets"])[mask] for batch, mask in zip(batches, kept, strict=True)])
    return Answers(nats, said, confidence, said == targets)
