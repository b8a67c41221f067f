"""Scores of a model that gives each text a label: accuracy, F1 and what the model says of each text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcost import weights
from jaxcost.evaluation.batch import Batch
from jaxcost.evaluation.pooled import Answerer
from jaxcost.models.transformer import Transformer


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


class Labeller(Answerer):
    """Gives texts their labels' probabilities."""

    def __init__(self, model: Transformer, batches: Iterable[Batch], mesh: Mesh):
        """Batches are as `Answerer` has them."""
        super().__init__(model, batches, mesh, jax.nn.softmax)

    def probabilities(self, params: weights.Params) -> np.ndarray:
        """float32 (N, C), in the order of the texts."""
        return self.answers(params)

    def __call__(self, params: weights.Params) -> LabelScore:
        """The score of one set of weights."""
        return label_score(self.probabilities(params), self.targets)
