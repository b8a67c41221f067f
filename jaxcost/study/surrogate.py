"""What the recipes tried so far say of the others: a Gaussian process over the features of a space."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import scipy.linalg
from scipy.spatial.distance import cdist

_LENGTHS = (0.3, 0.6, 1.2, 2.4)
"""Distances over which scores are alike, in units of a feature's whole range."""
_NOISES = (1e-4, 1e-2, 1e-1)
"""Variance of a score that the features do not explain, where the variance of all scores is 1."""


def predict(
    table: np.ndarray, tried: Sequence[int], scores: Sequence[float]
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """What every recipe would score, and the standard deviation of that, float64 (recipes,) each.

    The kernel is a squared exponential; its length and the noise are those of a few under which the scores are
    likeliest. Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, algorithm 2.1.

    Args:
      table: (recipes, features), as `space.features` makes it.
      tried: the rows that have a score, with one row as often as it was scored.
      scores: theirs.

    Returns:
      Nothing for either with fewer than 3 scores, or equal ones: they say too little.
    """
    y = np.asarray(scores, np.float64)
    if len(y) < 3 or np.ptp(y) == 0:
        return None, None
    mean, spread = y.mean(), y.std()
    y = (y - mean) / spread
    known = table[list(tried)]
    squares, across = cdist(known, known, "sqeuclidean"), cdist(table, known, "sqeuclidean")

    def solved(length, noise):
        kernel = np.exp(-squares / (2 * length**2)) + noise * np.eye(len(y))
        factor = scipy.linalg.cho_factor(kernel, lower=True)
        weights = scipy.linalg.cho_solve(factor, y)
        likelihood = -y @ weights / 2 - np.log(np.diag(factor[0])).sum()
        return likelihood, length, factor, weights

    found = [solved(*one) for one in itertools.product(_LENGTHS, _NOISES)]
    _, length, factor, weights = max(found, key=lambda one: one[0])
    likeness = np.exp(-across / (2 * length**2))
    explained = np.einsum("ij,ji->i", likeness, scipy.linalg.cho_solve(factor, likeness.T))
    return mean + spread * (likeness @ weights), spread * np.sqrt(np.maximum(1 - explained, 0))


def spread_order(table: np.ndarray, first: int, among: Sequence[int]) -> list[int]:
    """The rows `among`, each next one the farthest from all before it and from `first`; the earlier one of equals."""
    left, order = list(among), []
    nearest = cdist(table, table[[first]])[:, 0]
    while left:
        chosen = max(left, key=lambda i: nearest[i])
        order.append(chosen)
        left.remove(chosen)
        nearest = np.minimum(nearest, cdist(table, table[[chosen]])[:, 0])
    return order
