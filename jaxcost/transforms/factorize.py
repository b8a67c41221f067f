"""Low-rank compression: each dense weight becomes the product of two thin ones."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcost.transforms.base import Stage, Transform, matrix_shape
from jaxcost.weights import Frozen, Inputs, LowRank, Weight


@dataclasses.dataclass(frozen=True)
class factorize(Transform):
    """Replaces each picked weight by its truncated singular value decomposition.

    The best approximation of that rank in the Frobenius norm (Eckart and Young 1936). The singular values are shared
    evenly by the two factors, so that both train at one learning rate.
    """

    rank: int | None = None
    """Rank of every product; None takes it from `parameters`."""
    parameters: float = 0.5
    """Share of each dense weight's parameters that the two factors may hold, where no rank is given."""

    stage: ClassVar[Stage] = "factorize"

    def __post_init__(self):
        if self.rank is None and not 0 < self.parameters <= 1:
            raise ValueError(f"factorize: parameters is {self.parameters}; it must be above 0 and at most 1.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"factorize: rank is {self.rank}; it must be at least 1.")

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        if isinstance(w, Frozen):
            return w.replace(weight=self.apply(path, w.weight, key, inputs))
        if isinstance(w, Weight):
            raise ValueError(
                f"factorize: {path} is {type(w).__name__} already; factorize comes before other transforms."
            )
        rank = self.rank_for(path, matrix_shape(path, w))
        u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(s[..., :rank])
        return LowRank(
            (u[..., :rank] * root[..., None, :]).astype(w.dtype), (root[..., None] * vt[..., :rank, :]).astype(w.dtype)
        )

    def rank_for(self, path: str, shape: tuple[int, ...]) -> int:
        """The rank for a matrix (..., in, out); ValueError where the factors would hold more than the matrix."""
        inward, outward = shape[-2:]
        largest = inward * outward // (inward + outward)
        rank = max(1, int(self.parameters * inward * outward / (inward + outward))) if self.rank is None else self.rank
        if rank > largest:
            raise ValueError(
                f"factorize: rank {rank} of {path} ({inward} x {outward}) would cost more than the dense weight; "
                f"choose at most {largest}, or skip it with a rule."
            )
        return rank

    def describe(self):
        return f"low rank, {self.parameters:.0%} of the parameters" if self.rank is None else f"low rank {self.rank}"
