"""Scores of a model that tells a number of each text: its squared error and its correlation with the right ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy  # which reads its parts, slow ones, as they are named

from jaxcost import weights
from jaxcost.evaluation.pooled import Answerer


@dataclasses.dataclass(frozen=True)
class RegressionScore:
    """How well numbers of texts that the model has not seen are told."""

    mean_squared_error: float
    """In the square of the numbers' unit."""
    pearson: float | None
    """Correlation with the right numbers, from -1 to 1; None where either side is one number throughout."""
    spearman: float | None
    """Correlation of the ranks, in which equal numbers share the mean of theirs; None as above."""
    scored_examples: int
    """Texts scored."""


def regression_score(found_N: np.ndarray, targets_N: np.ndarray) -> RegressionScore:
    """The score of numbers against the right ones.

    Raises:
      ValueError: there is nothing to score, or not a number for each.
    """
    found_N, targets_N = np.asarray(found_N, np.float64), np.asarray(targets_N, np.float64)
    if not len(targets_N) or found_N.shape != targets_N.shape:
        raise ValueError(f"There are {len(found_N)} numbers for {len(targets_N)} texts; give one for each of some.")
    # A model that has gone astray gives what is no number, of which nothing runs along with anything.
    varied = np.isfinite(found_N).all() and np.ptp(found_N) > 0 and np.ptp(targets_N) > 0
    return RegressionScore(
        mean_squared_error=float(np.mean((found_N - targets_N) ** 2)),
        pearson=float(scipy.stats.pearsonr(found_N, targets_N).statistic) if varied else None,
        spearman=float(scipy.stats.spearmanr(found_N, targets_N).statistic) if varied else None,
        scored_examples=len(targets_N),
    )


class Regressor(Answerer):
    """Tells the numbers of texts."""

    def numbers(self, params: weights.Params) -> np.ndarray:
        """float32 (N,), in the order of the texts."""
        return self.answers(params)[:, 0]

    def __call__(self, params: weights.Params) -> RegressionScore:
        """The score of one set of weights."""
        return regression_score(self.numbers(params), self.targets)
