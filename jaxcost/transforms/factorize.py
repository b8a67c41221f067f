"""Low-rank compression: each dense weight becomes the product of two thin ones."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.transforms.base import Calibration, CalibrationError, Stage, Transform, matrix_shape, rule
from jaxcost.transforms.svd import factors, singular_values
from jaxcost.weights import Frozen, Inputs, LowRank, Params, Weight


@dataclasses.dataclass(frozen=True)
class factorize(Transform):
    """Replaces each picked weight by its truncated singular value decomposition.

    The best approximation of that rank in the Frobenius norm (Eckart and Young 1936), or, whitened, the best one of
    the weight's outputs on the calibration data. The singular values are shared evenly by the two factors, so that
    both train at one learning rate. The layers of a stack share a rank, since a scanned stack is uniform;
    `allocate_ranks` finds one for each stack under a budget for all.
    """

    rank: int | None = None
    """Rank of every product; None takes it from `parameters`."""
    parameters: float = 0.5
    """Share of each dense weight's parameters that the two factors may hold, where no rank is given."""
    whitened: bool = False
    """Minimise the error of the outputs x·W instead of that of W; needs calibration data.

    Source: Wang et al. 2024 (SVD-LLM), arXiv:2403.07378, section 3.1, with the eigenvectors of the damped product of
    inputs in place of its Cholesky factor, which fails where inputs are dependent.
    """
    damping: float = 1e-3
    """Whitened: added to every direction of the inputs, as a share of their mean square."""
    multiple: int = 1
    """Ranks are multiples of this; matrix units want 8 (GPU) or 128 (TPU)."""

    stage: ClassVar[Stage] = "factorize"

    def __post_init__(self):
        if self.rank is None and not 0 < self.parameters <= 1:
            raise ValueError(f"factorize: parameters is {self.parameters}; it must be above 0 and at most 1.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"factorize: rank is {self.rank}; it must be at least 1.")
        if self.multiple < 1:
            raise ValueError(f"factorize: multiple is {self.multiple}; it must be at least 1.")
        if self.rank is not None and self.rank % self.multiple:
            raise ValueError(f"factorize: rank {self.rank} is no multiple of {self.multiple}; change either.")
        if self.damping <= 0:
            raise ValueError(f"factorize: damping is {self.damping}; it must be above 0.")

    def statistics(self):
        return "gram" if self.whitened else "none"

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        if isinstance(w, Frozen):
            return w.replace(weight=self.apply(path, w.weight, key, inputs))
        dense = _dense(path, w)
        rank = self.rank_for(path, dense.shape)
        u, v = factors(dense, rank, inputs.gram if self.whitened else None, self.damping)
        return LowRank(u.astype(w.dtype), v.astype(w.dtype))

    def rank_for(self, path: str, shape: tuple[int, ...]) -> int:
        """The rank for a matrix (..., in, out); ValueError where the factors would hold more than the matrix."""
        inward, outward = shape[-2:]
        largest = self.largest_rank(path, shape)
        if self.rank is None:
            affordable = int(self.parameters * inward * outward / (inward + outward))
            return max(self.multiple, affordable // self.multiple * self.multiple)
        if self.rank > largest:
            raise ValueError(
                f"factorize: rank {self.rank} of {path} ({inward} x {outward}) would cost more than the dense weight; "
                f"choose at most {largest}, or skip it with a rule."
            )
        return self.rank

    def largest_rank(self, path: str, shape: tuple[int, ...]) -> int:
        """The largest rank whose factors hold no more than the matrix (..., in, out); ValueError if there is none."""
        inward, outward = shape[-2:]
        largest = inward * outward // (inward + outward) // self.multiple * self.multiple
        if largest < 1:
            raise ValueError(
                f"factorize: no rank that is a multiple of {self.multiple} costs less than {path} ({inward} x "
                f"{outward}); lower multiple, or skip it with a rule."
            )
        return largest

    def describe(self):
        how = "whitened low rank" if self.whitened else "low rank"
        return f"{how}, {self.parameters:.0%} of the parameters" if self.rank is None else f"{how} {self.rank}"


def allocate_ranks(transform: factorize, params: Params, calibration: Calibration | None = None) -> factorize:
    """The transform with a rank of its own for each weight, so that all together keep the most energy in its budget.

    The budget is `transform.parameters`, as a share of the parameters of all weights that its rules pick; where they
    give a share or a rank of their own, that stays. The energy of a weight is the sum of its squared singular values
    over the layers of its stack, which share the rank; what counts is the share of it that is kept, so that a weight
    of small numbers is worth as much as another. Ranks rise by `multiple` where a parameter keeps the most. Energies
    of further ranks only fall, so no other choice of ranks with as many parameters keeps more; ranks that still fit at
    the end fill the budget.

    What comes back is a transform as any other, whose ranks are known without data. Ranks depend on the values, so
    this runs outside of jit.

    Args:
      transform: what is done to which weights, and the budget.
      params: the weights.
      calibration: statistics of the inputs of the weights, where the transform is whitened.

    Raises:
      CalibrationError: the statistics of a weight are needed and not given.
      RuleError: a rule picks nothing.
      ValueError: a weight cannot be factorized, or the budget is below the smallest ranks.
    """
    transform.coverage(params)
    every = transform.picked(params)
    picked = {path: one for path, one in every.items() if one.rank is None and one.parameters == transform.parameters}
    energies: dict[str, np.ndarray] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def measure(path, w):
        if path in picked:
            shapes[path] = matrix_shape(path, w)
            energies[path] = _energies(path, picked[path], w, (calibration or {}).get(path))

    weights.map_weights(measure, params)
    costs = {path: int(np.prod(shape[:-2])) * sum(shape[-2:]) for path, shape in shapes.items()}
    budget = transform.parameters * sum(int(np.prod(shape)) for shape in shapes.values())
    ranks = {path: one.multiple for path, one in picked.items()}
    left = budget - sum(costs[path] * rank for path, rank in ranks.items())
    if left < 0:
        raise ValueError(
            f"allocate_ranks: the smallest ranks hold {(budget - left) / budget * transform.parameters:.1%} of the "
            f"parameters, but the budget is {transform.parameters:.1%}; raise it, or lower multiple."
        )
    steps: list[tuple[float, str]] = []
    for path, one in picked.items():
        largest, m = one.largest_rank(path, shapes[path]), one.multiple
        gains = energies[path][:largest].reshape(-1, m).sum(axis=1) / energies[path].sum()
        steps += [(gain / (m * costs[path]), path) for gain in gains[1:]]
    full: set[str] = set()
    for _, path in sorted(steps, key=lambda step: -step[0]):
        step = picked[path].multiple * costs[path]
        if step > left:
            full.add(path)
        if path not in full:
            ranks[path] += picked[path].multiple
            left -= step

    def ruled(path, one):
        given = {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name != "rules"}
        changed = {name: value for name, value in given.items() if value != getattr(transform, name)}
        return rule(f"^{re.escape(path)}$", **changed | ({"rank": ranks[path]} if path in ranks else {}))

    return dataclasses.replace(transform, rules=tuple(ruled(path, one) for path, one in every.items()))


def _dense(path: str, w: Any) -> jax.Array:
    if isinstance(w, Weight):
        raise ValueError(f"factorize: {path} is {type(w).__name__} already; factorize comes before other transforms.")
    matrix_shape(path, w)
    return w.astype(jnp.float32)


def _energies(path: str, settings: factorize, w: Any, inputs: Inputs | None) -> np.ndarray:
    """The squared singular values of a weight, largest first, summed over its stack."""
    dense, gram = _dense(path, w.weight if isinstance(w, Frozen) else w), None
    if settings.whitened:
        if inputs is None:
            raise CalibrationError(f"allocate_ranks: nothing is known of the inputs of {path}; calibrate first.")
        gram = inputs.gram
    values = np.asarray(_singular_values(dense, gram, settings.damping), np.float64)
    return np.square(values).reshape(-1, values.shape[-1]).sum(axis=0)


_singular_values = jax.jit(singular_values)
