"""From a budget to a model: the size and the tokens that money buys, by two published fits of the scaling law.

The loss of a model of N parameters on D tokens is L = E + A / N**alpha + B / D**beta (nats a token, on the texts of
those papers). Training costs 6·N·D FLOPs and each token served 2·N more, for the model's whole life.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import optimize

TRAINING_FLOPS, SERVING_FLOPS = 6, 2
_DRAWS, _SEED = 400, 0
_INTERVAL = (2.5, 97.5)


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """One fit; `deviations` are standard errors of (E, A, B, alpha, beta), zero where the paper gives none."""

    name: str
    source: str
    e: float
    a: float
    b: float
    alpha: float
    beta: float
    deviations: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)

    def loss(self, parameters: float, tokens: float) -> float:
        """Loss in nats a token."""
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def drawn(self, rng: np.random.Generator) -> ScalingLaw:
        """The law with its constants drawn from their errors, each by itself: the paper's covariance is not public."""
        means = np.array([self.e, self.a, self.b, self.alpha, self.beta])
        e, a, b, alpha, beta = np.maximum(rng.normal(means, self.deviations), means * 0.05)
        return dataclasses.replace(self, e=e, a=a, b=b, alpha=alpha, beta=beta)


LAWS = (
    ScalingLaw("Hoffmann", "Hoffmann et al. 2022, arXiv:2203.15556, approach 3", 1.69, 406.4, 410.7, 0.34, 0.28),
    ScalingLaw(
        "Epoch",
        "Besiroglu et al. 2024, arXiv:2404.10102, a refit of the same runs",
        1.8172,
        482.01,
        2085.43,
        0.3478,
        0.3658,
        (0.03, 124.58, 1293.23, 0.02, 0.02),
    ),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best model for a budget by one law."""

    law: str
    source: str
    parameters: float
    tokens: float
    loss: float
    parameters_interval: tuple[float, float] | None
    """95 % of what the law's own errors allow; None where the paper gives none."""
    tokens_interval: tuple[float, float] | None
    training_flops: float
    serving_flops: float


def optimal(law: ScalingLaw, flops: float, tokens_served: float = 0.0) -> tuple[float, float]:
    """Parameters and tokens of the lowest loss with 6·N·D + 2·N·tokens_served = flops.

    Raises:
        ValueError: the budget is not positive, or tokens_served is negative.
    """
    if not flops > 0:
        raise ValueError(f"the budget buys {flops:g} FLOPs; give more money or a chip whose price is known.")
    if tokens_served < 0:
        raise ValueError(f"tokens_served is {tokens_served:g}; it cannot be negative.")

    def tokens(n):
        return (flops / n - SERVING_FLOPS * tokens_served) / TRAINING_FLOPS

    largest = flops / (SERVING_FLOPS * tokens_served + TRAINING_FLOPS)  # at least one token to train on
    found = optimize.minimize_scalar(
        lambda log: law.loss(math.exp(log), max(tokens(math.exp(log)), 1e-9)),
        bounds=(0.0, math.log(largest)) if largest > 1 else (0.0, 1e-6),
        method="bounded",
        options={"xatol": 1e-8},
    )
    n = math.exp(found.x)
    return n, max(tokens(n), 0.0)


def choices(flops: float, tokens_served: float = 0.0) -> list[Choice]:
    """The best model by each law, with intervals from the law's own errors."""
    rows = []
    for law in LAWS:
        n, d = optimal(law, flops, tokens_served)
        intervals = (None, None)
        if any(law.deviations):
            rng = np.random.default_rng(_SEED)
            drawn = np.array([optimal(law.drawn(rng), flops, tokens_served) for _ in range(_DRAWS)])
            intervals = tuple(tuple(float(x) for x in np.percentile(drawn[:, i], _INTERVAL)) for i in (0, 1))
        rows.append(
            Choice(
                law.name,
                law.source,
                n,
                d,
                law.loss(n, d),
                *intervals,
                TRAINING_FLOPS * n * d,
                SERVING_FLOPS * n * tokens_served,
            )
        )
    return rows
