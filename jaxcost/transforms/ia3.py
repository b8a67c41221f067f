"""IA3: a trained factor for each channel of a few activations, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcost.transforms.base import Adapting, Rule, freeze_weight, matrix_shape, rule
from jaxcost.weights import Inputs, Scaled


@dataclasses.dataclass(frozen=True)
class ia3(Adapting):
    """Scales keys, values and the input of the MLP's last matrix by trained factors, and freezes everything else.

    The factors start at 1, so the model is unchanged at first. The base may be of any kind. Source: Liu et al. 2022,
    arXiv:2205.05638.
    """

    rules: tuple[Rule, ...] = (rule("attention/(key|value)/kernel$"), rule("mlp/down/kernel$", side="in"))
    """Which weights, and with which options: the first rule whose pattern is found in the path decides."""
    side: Literal["in", "out"] = "out"
    """Whether the outputs (`out`) or the inputs (`in`) of a weight are scaled."""

    def __post_init__(self):
        if self.side not in ("in", "out"):
            raise ValueError(f"ia3: side is {self.side!r}; it must be 'in' or 'out'.")

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        if isinstance(w, Scaled) and w.trains:
            raise ValueError(f"ia3: {path} has trained factors already; merge them first.")
        *stack, inward, outward = matrix_shape(path, w)
        channels = inward if self.side == "in" else outward
        return Scaled(freeze_weight(w), jnp.ones((*stack, channels), jnp.float32), self.side, trains=True)

    def describe(self):
        return "IA3"
