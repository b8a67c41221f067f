"""Low-rank adaptation: a small trained update beside each frozen weight."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcost.transforms.base import Adapting, matrix_shape
from jaxcost.transforms.svd import factors
from jaxcost.weights import Adapters, Dora, Frozen, Inputs, Lora, Weight, column_norm


@dataclasses.dataclass(frozen=True)
class lora(Adapting):
    """Adds an update (alpha / rank)·a·b to each picked weight and freezes everything else.

    The base may be of any kind, so that on `quantize` it is QLoRA. The model is unchanged at first. Source: Hu et al.
    2021, arXiv:2106.09685. The variants combine:

    * `rank_stabilized` scales by alpha / √rank, so that the update's size does not fall with the rank. Source:
      Kalajdzievski 2023 (rsLoRA), arXiv:2312.03732.
    * `dora` trains the length of every output's column apart from its direction. Source: Liu et al. 2024,
      arXiv:2402.09353.
    * `init="pissa"` starts the update as the principal part of the weight and leaves the rest as the base, so a float
      weight without a kind is needed; quantise what is left afterwards. What is left is no other adapter's base, and
      is exported with this one. Source: Meng et al. 2024, arXiv:2404.02948.
    """

    rank: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead."""
    dora: bool = False
    """Train the magnitude of each output's column too."""
    init: Literal["zero", "pissa"] = "zero"
    """`zero`: a uniform in ±1/√in, b zero. `pissa`: the weight's largest singular triplets, shared by both."""

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        base = w.weight if isinstance(w, Frozen) else w
        if isinstance(base, Lora | Dora | Adapters):
            raise ValueError(f"lora: {path} has an adapter already; merge it first, or stack adapters with weights.")
        *stack, inward, outward = matrix_shape(path, w)
        if not 1 <= self.rank <= min(inward, outward):
            raise ValueError(
                f"lora: rank {self.rank} does not fit {path} of shape {inward} x {outward}; "
                f"choose one from 1 to {min(inward, outward)}."
            )
        if self.init == "pissa":
            adapted = self._principal(path, base)
        else:
            bound = inward**-0.5
            a = jax.random.uniform(key, (*stack, inward, self.rank), jnp.float32, -bound, bound)
            adapted = Lora(base, a, jnp.zeros((*stack, self.rank, outward), jnp.float32), self._scale())
        return Dora(adapted, column_norm(base)) if self.dora else adapted

    def describe(self):
        name = f"{'rs' if self.rank_stabilized else ''}{'DoRA' if self.dora else 'LoRA'}"
        return f"{name} rank {self.rank}{', PiSSA' if self.init == 'pissa' else ''}"

    def _scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def _principal(self, path: str, w: Any) -> Lora:
        if isinstance(w, Weight):
            raise ValueError(
                f"lora: init='pissa' splits float weights, but {path} is {type(w).__name__} already; apply it first."
            )
        a, b = (factor / self._scale() ** 0.5 for factor in factors(w.astype(jnp.float32), self.rank))
        rest = w.astype(jnp.float32) - self._scale() * jnp.matmul(a, b, preferred_element_type=jnp.float32)
        return Lora(rest.astype(w.dtype), a, b, self._scale(), own_base=True)
