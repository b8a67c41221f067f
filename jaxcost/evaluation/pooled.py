"""What a model that answers once for each text says of texts, with weights of any kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcost import sharding, weights
from jaxcost.evaluation.batch import Batch, beside_inputs
from jaxcost.models.transformer import Transformer, output_of


class Answerer:
    """Gives texts their answers; compiles once for each structure of the weights."""

    def __init__(
        self,
        model: Transformer,
        batches: Iterable[Batch],
        mesh: Mesh,
        finished: Callable[[jax.Array], jax.Array] = lambda outputs_BC: outputs_BC,
    ):
        """Batches have one target a row; rows whose `mask` is 0 fill a batch up. Answers are the head's outputs,
        float32 (B, C), `finished`."""
        self._batches, self._mesh = list(batches), mesh

        def states(params, batch):
            hidden_B1D, _ = model.apply({"params": params}, batch["inputs"], **beside_inputs(batch))
            return hidden_B1D

        # Every process of a job reads all of it.
        whole = sharding.replicated(mesh)
        self._answers = jax.jit(
            lambda params, batch: finished(output_of(model.config, params)(states(params, batch))[:, 0]),
            out_shardings=whole,
        )
        self._states = jax.jit(
            lambda params, batch: states(params, batch)[:, 0].astype(jnp.float32), out_shardings=whole
        )

    @property
    def targets(self) -> np.ndarray:
        """What each text is to be answered, (N,), in their order."""
        return np.concatenate([batch["targets"][batch["mask"] > 0] for batch in self._batches])

    def answers(self, params: weights.Params) -> np.ndarray:
        """float32 (N, C), in the order of the texts."""
        return self._of_each(self._answers, params)

    def states(self, params: weights.Params) -> np.ndarray:
        """The hidden states that the answers are made of, float32 (N, D), in the order of the texts."""
        return self._of_each(self._states, params)

    def _of_each(self, compute, params: weights.Params) -> np.ndarray:
        with jax.set_mesh(self._mesh):
            found = [compute(params, sharding.place_batch(batch, self._mesh)) for batch in self._batches]
        kept = [np.asarray(f)[b["mask"][:, 0] > 0] for f, b in zip(found, self._batches, strict=True)]
        return np.concatenate(kept)
