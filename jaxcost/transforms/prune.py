"""Pruning: masks over weights, chosen by one of several scores, at once or while training."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxcost import weights
from jaxcost.transforms import masks
from jaxcost.transforms.base import Stage, Transform, matrix_shape
from jaxcost.transforms.schedules import SET, Gradual, Iterative, RigL, check_sparsity
from jaxcost.transforms.sparsegpt import sparsegpt
from jaxcost.weights import (
    Dora,
    Frozen,
    Inputs,
    Lora,
    LowRank,
    Masked,
    Params,
    QuantAware,
    Quantized,
    Scaled,
    Scored,
    Weight,
)

Method = Literal["magnitude", "random", "wanda", "sparsegpt", "movement"]
Matrices = dict[str, tuple["prune", Any]]
"""The path of every matrix that is, or gets, a mask → the options for it, and the matrix: an array or `Masked`."""


@dataclasses.dataclass(frozen=True)
class prune(Transform):
    """Masks weights, each matrix of a stack for itself unless the budget is shared.

    Pruned weights stay pruned: a later, sparser mask is a part of the earlier one, but for connections that `regrow`
    moves and for `movement`. A mask saves neither FLOPs nor memory while it is a mask.

    The methods: `magnitude` takes the smallest |w|. `random` is what the others must beat. `wanda` takes the smallest
    |w|·‖x‖₂, x being the weight's input in the calibration data (Sun et al. 2023, arXiv:2306.11695). `sparsegpt` takes
    what costs the output least once the remaining weights have made up for it, and changes those accordingly (Frantar
    and Alistarh 2023, arXiv:2301.00774). `movement` learns while training which weights go (Sanh et al. 2020,
    arXiv:2005.07683) and needs a `gradual` schedule.
    """

    method: Method = "magnitude"
    """What a weight's importance is: `magnitude`, `random`, `wanda`, `sparsegpt` or `movement`."""
    sparsity: float = 0.5
    """Share that is pruned, in [0, 1). The number is rounded as each method's authors do: Wanda down, SparseGPT down
    and one more in each block, others to the nearest. Unused by N:M patterns."""
    pattern: str = "unstructured"
    """`unstructured`; N:M as in `2:4`, the N best of every M neighbours along the contracted axis are kept; or whole
    tiles, as in `16x16` (in x out), by the norm of their scores."""
    scope: Literal["auto", "matrix", "output"] = "auto"
    """Compare the weights of a whole matrix or those of each output; auto is each output for Wanda, else the matrix."""
    budget: Literal["uniform", "erk", "global"] = "uniform"
    """How matrices share the sparsity: each alike, by Erdős-Rényi densities, or by one threshold over all of them."""
    gradual: Gradual | Iterative | None = None
    """Raise the sparsity while training instead of at once."""
    regrow: SET | RigL | None = None
    """Move connections while training, at one sparsity."""
    damping: float = 0.01
    """SparseGPT: share of the mean of the Hessian's diagonal that is added to it."""
    block: int = 128
    """SparseGPT: inputs whose mask is chosen together, unstructured."""

    stage: ClassVar[Stage] = "prune"

    def __post_init__(self):
        check_sparsity("sparsity", self.sparsity)
        if self.block < 1:
            raise ValueError(f"prune: block is {self.block}; it must be at least 1.")
        if not self.damping > 0:
            raise ValueError(f"prune: damping is {self.damping}; it must be positive.")
        groups, tile = self._groups(), self._tile()
        if self.pattern != "unstructured" and groups is None and tile is None:
            raise ValueError(
                f"prune: the pattern {self.pattern!r} is neither 'unstructured' nor N:M such as '2:4' nor tiles such "
                "as '16x16'."
            )
        if groups is not None and not 0 < groups[0] < groups[1]:
            raise ValueError(f"prune: the pattern {self.pattern} must keep fewer than it has, as 2:4 does.")
        if tile is not None and min(tile) < 1:
            raise ValueError(f"prune: the pattern {self.pattern} has empty tiles.")
        wrong = [
            (groups and self.gradual, "a gradual schedule needs another pattern; N:M masks are made at once"),
            (groups and self.budget != "uniform", "N:M masks take the same share everywhere; use budget='uniform'"),
            (groups and self.scope != "auto", "N:M masks compare neighbours; leave scope at 'auto'"),
            (tile and self._scope() == "output", "tiles span outputs; use scope='matrix'"),
            (tile and self.method == "sparsegpt", "sparsegpt makes no tiles; use another pattern or method"),
            (self.scope == "output" and self.method == "sparsegpt", "sparsegpt compares a matrix; use scope='matrix'"),
            (self.scope == "output" and self.budget == "global", "one global threshold needs scope='matrix'"),
            (
                self.budget == "global" and self.method in ("random", "sparsegpt"),
                f"scores of {self.method} in different matrices do not compare; use budget='uniform' or 'erk'",
            ),
            (self.gradual and self.regrow, "gradual raises the sparsity and regrow keeps it; choose one"),
            (
                self.gradual and self.method not in ("magnitude", "movement"),
                f"a gradual schedule needs method='magnitude' or 'movement'; {self.method} is for masks made at once",
            ),
            (
                self.method == "movement" and not self.gradual,
                "movement learns while training; give it gradual",
            ),
            (self.regrow and self.pattern != "unstructured", "regrow moves single weights; use pattern='unstructured'"),
            (self.regrow and self.sparsity == 0, "regrow moves what is pruned; give a sparsity above 0"),
        ]
        for is_wrong, sentence in wrong:
            if is_wrong:
                raise ValueError(f"prune: {sentence}.")

    # ---- At once ----

    def __call__(self, params, key=None, calibration=None):
        if self.budget == "uniform":
            return super().__call__(params, key, calibration)
        self._check_one_budget(params)
        scored: dict[str, Any] = {}

        def score(settings, path, w, key, inputs):
            def one(path, matrix, inputs):
                scored[path] = settings._scored(path, matrix, key, inputs)
                return matrix

            return _over_matrices(path, w, inputs, one)

        def mask(settings, path, w, key, inputs):
            def one(path, matrix, inputs):
                return settings._masked(path, matrix, key, inputs, shares[path], numbers.get(path))

            return _over_matrices(path, w, inputs, one)

        self.over_picked(score, params, key, calibration)
        shapes = {path: kept.shape for path, (_, kept) in scored.items()}
        shares = self._shares(shapes)
        numbers = {}
        if self.budget == "global":
            first = {path: self._first_share(share) for path, share in shares.items()}
            numbers = _together(scored, {path: self._number(first[path], shape) for path, shape in shapes.items()})
        return self.over_picked(mask, params, key, calibration)

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        def one(path, matrix, inputs):
            return self._masked(path, matrix, key, inputs, self.sparsity)

        return _over_matrices(path, w, inputs, one)

    def statistics(self):
        return {"wanda": "norms", "sparsegpt": "gram"}.get(self.method, "none")

    def describe(self):
        words = [f"prune {self.pattern}" if self._groups() else f"prune {self.sparsity:.0%}"]
        words += [f"in {self.pattern} tiles"] * (self._tile() is not None)
        words += [f"by {self.method}"] * (self.method != "magnitude")
        words += [f"per {self.scope}"] * (self.scope != "auto")
        words += [{"erk": "with Erdős-Rényi densities", "global": "under one threshold"}.get(self.budget, "")]
        words += ["gradually"] * isinstance(self.gradual, Gradual) + ["in rounds"] * isinstance(self.gradual, Iterative)
        words += [f"moved by {type(self.regrow).__name__}"] * (self.regrow is not None)
        return " ".join(word for word in words if word)

    def _masked(self, path, matrix, key, inputs, share: float, number=None) -> Masked:
        """The matrix under its first mask; `share` of its entries go in the end, or `number` now if that is given."""
        dense, kept = _parts(matrix)
        if self.method == "sparsegpt":
            self._check_shape(path, kept.shape)
            dense, mask = sparsegpt(
                weights.materialize(matrix), kept, inputs, share, self._groups(), self.damping, self.block
            )
            return Masked(dense, mask, isinstance(self.regrow, RigL))
        score, units = self._scored(path, matrix, key, inputs)
        number = self._number(self._first_share(share), units.shape) if number is None else number
        mask = self._kept(score, units, number)
        mask = kept & (mask if self._tile() is None else masks.untiled(mask, self._tile()))
        if self.method == "movement":
            return Scored(dense, mask, scores=jnp.zeros(mask.shape, jnp.float32))
        return Masked(dense, mask, isinstance(self.regrow, RigL))

    def _scored(self, path, matrix, key, inputs) -> tuple[jax.Array, jax.Array]:
        """The scores of what goes or stays as one, entries or tiles, and which of them are kept so far."""
        dense, kept = _parts(matrix)
        self._check_shape(path, kept.shape)
        if isinstance(matrix, Scored):
            # What is pruned may come back, as its score rises.
            score, kept = matrix.scores, jnp.ones_like(kept)
        else:
            score = jnp.abs(weights.materialize(dense)).astype(jnp.float32)
        if self.method == "random":
            score = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), kept.shape)
        if self.method == "wanda":
            if inputs is None:
                raise ValueError(f"prune: the inputs of {path} alone are not known; prune by wanda before factorising.")
            score = score * inputs.root_mean_squares()[..., None]
        tile = self._tile()
        if tile is None:
            return score, kept
        norms = score if isinstance(matrix, Scored) else jnp.square(score)
        return jnp.sum(masks.tiles(norms, tile), axis=(-3, -1)), jnp.any(masks.tiles(kept, tile), axis=(-3, -1))

    def _kept(self, score: jax.Array, kept: jax.Array, number: jax.Array | int) -> jax.Array:
        if self._groups():
            return masks.keep_largest_of_group(score, kept, *self._groups())
        return masks.drop_smallest(score, kept, number, self._axes())

    # ---- While training ----

    def update(self, params, step, gradients):
        moving = {p: (s, m) for p, (s, m) in self._matrices(params).items() if s.gradual or s.regrow}
        if not moving:
            return params
        shares = self._shares({path: s._units(m.mask.shape) for path, (s, m) in moving.items()}, moving)
        together = [moving] if self.budget == "global" else [{path: one} for path, one in moving.items()]
        new: dict[str, Masked] = {}
        for group in together:
            settings = next((s for s, _ in group.values()), self)
            if settings.regrow is not None:
                new |= {path: s._regrown(path, m, step, gradients) for path, (s, m) in group.items()}
            elif settings.gradual is not None:
                new |= settings._tightened({path: m for path, (_, m) in group.items()}, shares, step)
        return _replace_masked(params, new)

    def waived(self):
        # Under one threshold, what is learned to be worth less in one matrix may give back weights of another.
        every = [dataclasses.replace(self, **dict(r.options)) for r in self.rules if not r.skip]
        return ("sparsity",) if any(one.method == "movement" and one.budget == "global" for one in every) else ()

    def last_step(self):
        options = [dict(r.options) for r in self.rules if not r.skip]
        schedules = [o.get(name, getattr(self, name)) for o in options for name in ("gradual", "regrow")]
        return max((schedule.end_step for schedule in schedules if schedule is not None), default=-1)

    def _tightened(self, found: dict[str, Masked], shares: dict[str, float], step: jax.Array) -> dict[str, Masked]:
        """The matrices under the masks of `step`, where it is one in which they move."""
        schedule = self.gradual

        def tighter():
            scored = {path: self._scored(path, matrix, None, None) for path, matrix in found.items()}
            numbers = {}
            for path, (_, kept) in scored.items():
                rising = schedule.sparsity(step, shares[path]) * self._compared(kept.shape)
                # The last number is not left to float32, which cannot count the entries of a large matrix.
                final = self._number(shares[path], kept.shape)
                numbers[path] = jnp.where(step >= schedule.end_step, final, jnp.round(rising).astype(jnp.int32))
            if self.budget == "global":
                numbers = _together(scored, numbers)
            new = {}
            for path, matrix in found.items():
                mask = self._kept(*scored[path], numbers[path])
                new[path] = mask if self._tile() is None else masks.untiled(mask, self._tile())
                new[path] &= True if isinstance(matrix, Scored) else matrix.mask
            return new

        old = {path: matrix.mask for path, matrix in found.items()}
        new = lax.cond(schedule.is_due(step), tighter, lambda: old)
        return {path: matrix.replace(mask=new[path]) for path, matrix in found.items()}

    def _regrown(self, path: str, matrix: Masked, step: jax.Array, gradients: dict[str, jax.Array]) -> Masked:
        """The matrix with its smallest connections pruned and as many others at zero, where `step` is one for that."""
        schedule, axes = self.regrow, self._axes()
        if f"{path}/weight" not in gradients:
            raise ValueError(f"prune: {path} does not train, so regrow cannot move its weights; skip it with a rule.")

        def regrow():
            kept = jnp.sum(matrix.mask, axis=axes, keepdims=True, dtype=jnp.int32)
            moved = jnp.round(schedule.moved(step) * kept).astype(jnp.int32)
            whole = self._compared(matrix.mask.shape)
            stay = masks.drop_smallest(jnp.abs(matrix.weight), matrix.mask, whole - kept + moved, axes)
            if isinstance(schedule, RigL):
                wanted = jnp.abs(gradients[f"{path}/weight"])
            else:
                key = jax.random.fold_in(jax.random.key(schedule.seed), zlib.crc32(path.encode()))
                wanted = jax.random.uniform(jax.random.fold_in(key, step), matrix.mask.shape)
            grown = masks.drop_smallest(wanted, ~stay, whole - moved, axes)
            # One that went and came back at once keeps its value.
            dense = jnp.where(grown & ~matrix.mask, jnp.zeros((), matrix.weight.dtype), matrix.weight)
            return dense, stay | grown

        dense, mask = lax.cond(schedule.is_due(step), regrow, lambda: (matrix.weight, matrix.mask))
        return matrix.replace(weight=dense, mask=mask)

    # ---- What is compared, and how many go ----

    def _shares(self, shapes: dict[str, tuple[int, ...]], found: Matrices | None = None) -> dict[str, float]:
        """The share of every matrix that goes in the end."""
        if self.budget == "erk":
            return masks.erdos_renyi_shares(shapes, self.sparsity)
        return {path: found[path][0].sparsity if found else self.sparsity for path in shapes}

    def _number(self, share: float, shape: tuple[int, ...]) -> int:
        """How many of the units (..., in, out) that are compared go; one always stays."""
        size = self._compared(shape)
        return min(int(share * size) if self.method == "wanda" else round(share * size), size - 1)

    def _compared(self, shape: tuple[int, ...]) -> int:
        return shape[-2] if self._scope() == "output" else shape[-2] * shape[-1]

    def _first_share(self, share: float) -> float:
        return share if self.gradual is None else self.gradual.initial_sparsity

    def _scope(self) -> str:
        if self.scope != "auto":
            return self.scope
        return "output" if self.method == "wanda" and self.budget != "global" and self._tile() is None else "matrix"

    def _axes(self) -> tuple[int, ...]:
        return masks.OUTPUT if self._scope() == "output" else masks.MATRIX

    def _groups(self) -> tuple[int, int] | None:
        return self._numbers_of(r"(\d+):(\d+)")

    def _tile(self) -> tuple[int, int] | None:
        return self._numbers_of(r"(\d+)x(\d+)")

    def _numbers_of(self, pattern: str) -> tuple[int, int] | None:
        found = re.fullmatch(pattern, self.pattern)
        return (int(found[1]), int(found[2])) if found else None

    def _units(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        tile = self._tile()
        return shape if tile is None else (*shape[:-2], shape[-2] // tile[0], shape[-1] // tile[1])

    def _check_shape(self, path: str, shape: tuple[int, ...]) -> None:
        groups, tile = self._groups(), self._tile()
        if groups and shape[-2] % groups[1]:
            raise ValueError(
                f"prune: the contracted axis of {path} has size {shape[-2]}, which {groups[1]} does not divide."
            )
        if tile and (shape[-2] % tile[0] or shape[-1] % tile[1]):
            raise ValueError(f"prune: {self.pattern} tiles do not divide {path} of shape {shape[-2]} x {shape[-1]}.")

    def _check_one_budget(self, params: Params) -> None:
        for path, settings in self.picked(params).items():
            if dataclasses.replace(settings, rules=self.rules) != self:
                raise ValueError(
                    f"prune: budget={self.budget!r} is shared by all matrices, but a rule sets options for {path}; "
                    "let rules pick and skip only, or use budget='uniform'."
                )

    def _matrices(self, params: Params) -> Matrices:
        """The masked matrices within the weights that the rules pick."""
        found: Matrices = {}

        def one(path, node):
            if isinstance(node, Masked):
                found[weights.path_name(path)] = node

        jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda node: isinstance(node, Masked))
        picked = self.picked(params)
        owners = {path: next((p for p in picked if path == p or path.startswith(f"{p}/")), None) for path in found}
        return {path: (picked[owners[path]], node) for path, node in found.items() if owners[path] is not None}


def _over_matrices(path: str, w: Any, inputs: Inputs | None, f: Callable[[str, Any, Inputs | None], Any]) -> Any:
    """Maps f(path, matrix, inputs) over the arrays and masked arrays within a weight that a mask can stand on."""
    if isinstance(w, Lora):
        return w.replace(base=_over_matrices(f"{path}/base", w.base, inputs, f))
    if isinstance(w, LowRank):
        u = _over_matrices(f"{path}/u", w.u, inputs, f)
        return w.replace(u=u, v=_over_matrices(f"{path}/v", w.v, None, f))
    if isinstance(w, Scaled) and w.side == "in" and inputs is not None:
        inputs = inputs.scaled(w.scale)
    if isinstance(w, Dora | Frozen | QuantAware | Scaled):
        return w.replace(weight=_over_matrices(f"{path}/weight", w.weight, inputs, f))
    inner = w.weight if isinstance(w, Masked) else w
    if isinstance(inner, Quantized):
        raise ValueError(f"prune: {path} is quantised already; prune before quantising.")
    if isinstance(inner, Weight):
        raise ValueError(f"prune: {path} is {type(inner).__name__}, which takes no mask; prune first.")
    matrix_shape(path, w)
    return f(path, w, inputs)


def _parts(matrix: Any) -> tuple[Any, jax.Array]:
    """The values of an array or of a masked one, and which of them are kept."""
    if isinstance(matrix, Masked):
        return matrix.weight, matrix.mask
    return matrix, jnp.ones(matrix.shape, bool)


def _together(scored: dict[str, Any], numbers: dict[str, Any]) -> dict[str, jax.Array]:
    """The numbers under one threshold over all, where each matrix of a stack alone would lose `numbers`."""
    scores, kept = zip(*scored.values(), strict=True)
    spread = masks.numbers_under_one_threshold(scores, kept, [numbers[path] for path in scored])
    return dict(zip(scored, spread, strict=True))


def _replace_masked(params: Params, new: dict[str, Masked]) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, node: new.get(weights.path_name(path), node),
        params,
        is_leaf=lambda node: isinstance(node, Masked),
    )
