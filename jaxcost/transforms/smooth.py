"""Smoothing: outliers among the activations moved into the weights, before both are quantised."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcost.transforms.base import ALL_KERNELS, Rule, Stage, Transform, matrix_shape
from jaxcost.weights import Frozen, Inputs, Lora, LowRank, Masked, Scaled, Weight

_SMALLEST = 1e-5


@dataclasses.dataclass(frozen=True)
class smooth(Transform):
    """Divides each input channel by a factor and multiplies its row of the weight with it; the product is unchanged.

    The factor of channel j is max|X_j|^alpha / max|W_j|^(1 - alpha), at least 1e-5. What is smoothed computes one
    multiplication an activation more until it is quantised, and as much after. Source: Xiao et al. 2022 (SmoothQuant),
    arXiv:2211.10438, equation 4.
    """

    rules: tuple[Rule, ...] = ALL_KERNELS
    """Which weights, and with which options: the first rule whose pattern is found in the path decides."""
    alpha: float = 0.5
    """How much of the activations' range is moved: 0 evens out the weights' rows, 1 the activations' channels."""

    stage: ClassVar[Stage] = "quantize"

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"smooth: alpha is {self.alpha}; it must be from 0 to 1.")

    def statistics(self):
        return "norms"

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        matrix_shape(path, w)
        if isinstance(w, Lora):
            return w.replace(base=self.apply(path, w.base, key, inputs))
        if isinstance(w, LowRank):
            return w.replace(u=self.apply(path, w.u, key, inputs))
        if isinstance(w, Frozen):
            return w.replace(weight=self.apply(path, w.weight, key, inputs))
        held = w.weight if isinstance(w, Masked) else w
        if isinstance(held, Weight):
            raise ValueError(f"smooth: {path} is {type(held).__name__} already; smooth comes before it.")
        factor = smoothing_factor(held, inputs, self.alpha)
        scaled = (held * factor[..., None]).astype(held.dtype)
        return Scaled(w.replace(weight=scaled) if isinstance(w, Masked) else scaled, 1.0 / factor)

    def describe(self):
        return f"smooth {self.alpha:g}"


def smoothing_factor(dense: jax.Array, inputs: Inputs, alpha: float) -> jax.Array:
    """What each row of the dense weight (..., in, out) is multiplied with: float32, (..., in)."""
    rows = jnp.maximum(jnp.max(jnp.abs(dense), axis=-1).astype(jnp.float32), _SMALLEST)
    return jnp.maximum(inputs.largest**alpha / rows ** (1 - alpha), _SMALLEST)
