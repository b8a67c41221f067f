"""How hard each example is, and which texts are worth a label next."""

from __future__ import annotations

from typing import Literal

import numpy as np

Uncertainty = Literal["entropy", "margin"]
_TINY = 1e-12


def uncertainty(probabilities_NC: np.ndarray, kind: Uncertainty = "margin") -> np.ndarray:
    """How unsure a model is of each text, float64 (N,), the larger the more.

    The entropy in nats, or 1 less how much likelier the likeliest label is than the next. Source: Settles 2009, Active
    learning literature survey, section 3.1.
    """
    shares_NC = np.asarray(probabilities_NC, np.float64)
    if kind == "entropy":
        return -np.sum(shares_NC * np.log(np.maximum(shares_NC, _TINY)), axis=1)
    if kind != "margin":
        raise ValueError(f"There is no uncertainty {kind!r}; use 'entropy' or 'margin'.")
    best_N2 = np.sort(shares_NC, axis=1)[:, -2:]
    return 1 - (best_N2[:, -1] - (best_N2[:, 0] if best_N2.shape[1] > 1 else 0.0))


def el2n(probabilities_SNC: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """The distance between what models say and the label, float64 (N,), a mean over models of several seeds (S).

    Source: Paul et al. 2021, Deep learning on a data diet, arXiv:2107.07075, which takes models early in training.
    """
    shares_SNC = np.asarray(probabilities_SNC, np.float64)
    one_hot_NC = np.eye(shares_SNC.shape[-1])[np.asarray(targets_N)]
    return np.mean(np.linalg.norm(shares_SNC - one_hot_NC, axis=-1), axis=0)


def coreset(points_ND: np.ndarray, count: int, chosen: np.ndarray | None = None) -> np.ndarray:
    """Points that lie so that every other is near to one of them, int64 (count,), in the order of their choice.

    Each is the one that is farthest from all before it (k-center, greedily: at most twice the best radius). Source:
    Sener and Savarese 2018, arXiv:1708.00489.

    Args:
      points_ND: such as embeddings of texts.
      count: points to choose, at most those that are not chosen yet.
      chosen: indices of points that are chosen already; the point nearest to the mean is the first without any.

    Raises:
      ValueError: there are not so many points.
    """
    points_ND = np.asarray(points_ND, np.float64)
    before = np.zeros(0, np.int64) if chosen is None else np.asarray(chosen, np.int64)
    if not 0 <= count <= len(points_ND) - len(before):
        raise ValueError(f"{count} of {len(points_ND) - len(before)} points cannot be chosen; lower the number.")
    distance_N = np.full(len(points_ND), np.inf)
    for i in before:
        distance_N = np.minimum(distance_N, np.sum((points_ND - points_ND[i]) ** 2, axis=1))
    distance_N[before] = -1
    found = []
    for _ in range(count):
        first = not found and not len(before)
        centre = np.sum((points_ND - points_ND.mean(axis=0)) ** 2, axis=1) if first else -distance_N
        i = int(np.argmin(centre))
        found.append(i)
        distance_N = np.minimum(distance_N, np.sum((points_ND - points_ND[i]) ** 2, axis=1))
        distance_N[[*before, *found]] = -1
    return np.array(found, np.int64)
