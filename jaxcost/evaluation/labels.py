"""Scores of a model that gives each text a label: accuracy, F1 and what the model says of each text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcost import sharding, weights
from jaxcost.evaluation.batch import Batch, beside_inputs
from jaxcost.models.transformer import Transformer, output_of


@dataclasses.dataclass(frozen=True)
class LabelScore:
    """How well labels of texts that the model has not seen are told."""

    accuracy: float
    """Share of the texts whose label is the likeliest."""
    macro_f1: float
    """F1 of each label that texts have or the model gives, a mean in which each counts alike."""
    nats_per_label: float
    """Mean negative log-likelihood of a label."""
    scored_examples: int
    """Texts scored."""


def label_score(probabilities_NC: np.ndarray, targets_N: np.ndarray) -> LabelScore:
    """The score of probabilities against the right labels.

    F1 is 2·TP / (2·TP + FP + FN), as a mean over labels (van Rijsbergen 1979).

    Raises:
      ValueError: there is nothing to score, or a label is none of the outputs.
    """
    targets_N = np.asarray(targets_N)
    labels = probabilities_NC.shape[1]
    if not len(targets_N) or targets_N.min() < 0 or targets_N.max() >= labels:
        raise ValueError(f"There are {len(targets_N)} labels to score among {labels}; give at least one, all of these.")
    guesses_N = probabilities_NC.argmax(axis=1)
    hits, given, there = (
        np.bincount(kind, minlength=labels) for kind in (targets_N[guesses_N == targets_N], guesses_N, targets_N)
    )
    met = given + there > 0
    likely_N = probabilities_NC[np.arange(len(targets_N)), targets_N].astype(np.float64)
    return LabelScore(
        accuracy=float(np.mean(guesses_N == targets_N)),
        macro_f1=float(np.mean(2 * hits[met] / (given + there)[met])),
        nats_per_label=float(-np.mean(np.log(np.maximum(likely_N, np.finfo(np.float32).tiny)))),
        scored_examples=len(targets_N),
    )


class Labeller:
    """Gives texts their labels' probabilities, with weights of any kinds; compiles once for each structure."""

    def __init__(self, model: Transformer, batches: Iterable[Batch], mesh: Mesh):
        """Batches have one target a row; rows whose `mask` is 0 fill a batch up."""
        self._batches, self._mesh = list(batches), mesh

        def states(params, batch):
            hidden_B1D, _ = model.apply({"params": params}, batch["inputs"], **beside_inputs(batch))
            return hidden_B1D

        def shares(params, batch):
            return jax.nn.softmax(output_of(model.config, params)(states(params, batch))[:, 0])

        # Every process of a job reads all of it.
        whole = sharding.replicated(mesh)
        self._shares = jax.jit(shares, out_shardings=whole)
        self._states = jax.jit(
            lambda params, batch: states(params, batch)[:, 0].astype(jnp.float32), out_shardings=whole
        )

    def probabilities(self, params: weights.Params) -> np.ndarray:
        """float32 (N, C), in the order of the texts."""
        return self._of_each(self._shares, params)

    def states(self, params: weights.Params) -> np.ndarray:
        """The hidden states that labels are told from, float32 (N, D), in the order of the texts."""
        return self._of_each(self._states, params)

    def _of_each(self, compute, params: weights.Params) -> np.ndarray:
        with jax.set_mesh(self._mesh):
            found = [compute(params, sharding.place_batch(batch, self._mesh)) for batch in self._batches]
        kept = [np.asarray(f)[b["mask"][:, 0] > 0] for f, b in zip(found, self._batches, strict=True)]
        return np.concatenate(kept)

    def __call__(self, params: weights.Params) -> LabelScore:
        """The score of one set of weights."""
        targets = [batch["targets"][batch["mask"] > 0] for batch in self._batches]
        return label_score(self.probabilities(params), np.concatenate(targets))
