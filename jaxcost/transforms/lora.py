"""Low-rank adaptation: a small trained update beside each frozen weight."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcost.transforms.base import Stage, Transform, matrix_shape
from jaxcost.weights import Frozen, Inputs, Lora


@dataclasses.dataclass(frozen=True)
class lora(Transform):
    """Adds an update (alpha / rank)·a·b to each picked weight and freezes everything else.

    The base may be of any kind, so that on `quantize` it is QLoRA. `a` starts uniform in ±1/sqrt(in) and `b` at zero,
    so the model is unchanged at first. Source: Hu et al. 2021, arXiv:2106.09685.
    """

    rank: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    train: str = ""
    """Regular expression for the paths of other parameters that train whole, such as 'norm/'; nothing by default."""

    stage: ClassVar[Stage] = "adapt"
    freezes_the_rest: ClassVar[bool] = True

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        base = w.weight if isinstance(w, Frozen) else w
        if isinstance(base, Lora):
            raise ValueError(f"lora: {path} has an adapter already; merge it first.")
        *stack, inward, outward = matrix_shape(path, w)
        if not 1 <= self.rank <= min(inward, outward):
            raise ValueError(
                f"lora: rank {self.rank} does not fit {path} of shape {inward} x {outward}; "
                f"choose one from 1 to {min(inward, outward)}."
            )
        bound = inward**-0.5
        a = jax.random.uniform(key, (*stack, inward, self.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, self.rank, outward), jnp.float32)
        return Lora(base, a, b, self.alpha / self.rank)

    def rest(self, path: str, w: Any) -> Any:
        return w if self.train and re.search(self.train, path) else super().rest(path, w)

    def describe(self):
        return f"LoRA rank {self.rank}"
