"""Structured pruning: whole heads, channels, experts and layers go, and what is left is a smaller dense model."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxcost import weights
from jaxcost.transforms.base import Calibration, CalibrationError, Rule, Stage, Transform
from jaxcost.weights import Inputs

_PARTS = ("layers", "experts", "heads", "mlp")
_LAYERS = (Rule("layers/"),)
_OUTPUT, _DOWN, _SHARED = ("attention/output", "mlp/down", "mlp/shared/down")
Rows = dict[str, jax.Array]
"""The matrices that lead back to the residual stream → the importance of each of their rows, (L, ..., in) float32."""


@dataclasses.dataclass(frozen=True)
class shrink(Transform):
    """Drops whole parts of the blocks, so that the weights are fewer, dense, and cheaper in every step.

    Each option gives the share (a float) or the number (an int) that stays; None keeps all. The layers keep one size,
    but each chooses its own parts. A part is worth what it sends back to the residual stream: by `norm` the sum of the
    squares of its rows of the matrices `output` and `down` (Li et al. 2016, arXiv:1608.08710), and by `activations`
    that of each row times the sum of the squares of its input in the calibration data, |w|·‖x‖₂ (Sun et al. 2023,
    arXiv:2306.11695) squared and summed, which is what it adds to the stream where inputs are independent. All of its
    other weights go with it (Ma et al. 2023, arXiv:2305.11627). A layer is worth what its attention and its MLP are
    together: it goes where it changes the stream least, as in Men et al. 2024, arXiv:2403.03853, who measure the
    change by its angle instead of its size.

    With an encoder, both stacks get smaller, each by its own parts; attention to the source keeps its heads.

    Dropped channels, heads and experts that no token would choose leave exactly the model in which their rows of
    `output` and `down` are zeros, but for norms over all queries (`query_key_norm` of `projection`), which then are
    over fewer. On a mesh, what stays moves between devices, but no matrix is gathered.
    """

    rules: tuple[Rule, ...] = _LAYERS
    """Not for this transform: its parts go together, whatever their paths."""
    heads: float | int | None = None
    """Query heads that stay; those of a key-value head stay or go with it, unless `within_groups`."""
    mlp: float | int | None = None
    """Channels of the MLP that stay, of each expert and of the shared one alike; give a share where they differ."""
    experts: float | int | None = None
    """Experts that stay; the router chooses among these."""
    layers: float | int | None = None
    """Blocks that stay, in their order."""
    importance: Literal["norm", "activations"] = "norm"
    """What a part is worth: `norm`, of its weights; `activations`, of what it adds on calibration data."""
    head_dim: int = 0
    """Size of one head, which no shape tells; needed for `heads`."""
    within_groups: bool = False
    """Drop as many query heads of every key-value head, instead of whole groups with their keys and values."""

    stage: ClassVar[Stage] = "prune"

    def __post_init__(self):
        given = {name: getattr(self, name) for name in _PARTS if getattr(self, name) is not None}
        for name, keep in given.items():
            if not (0 < keep <= 1 if isinstance(keep, float) else keep >= 1):
                raise ValueError(f"shrink: {name} is {keep}; give a share above 0 and at most 1.0, or a number from 1.")
        if self.rules != _LAYERS:
            raise ValueError(
                "shrink: rules cannot choose, since parts go together; use heads, mlp, experts and layers."
            )
        if self.importance not in ("norm", "activations"):
            raise ValueError(f"shrink: importance is {self.importance!r}; choose 'norm' or 'activations'.")
        if self.head_dim < 0 or (self.heads is not None and not self.head_dim):
            raise ValueError(f"shrink: head_dim is {self.head_dim}; heads needs the size of one, model.head_dim.")

    def __call__(self, params, key=None, calibration=None):
        """The smaller tree; sizes depend on the options alone, so this works under jit and on shapes.

        Raises:
          CalibrationError: importance is `activations` and the statistics are not given.
          ValueError: a weight of the blocks is not dense, there is no such part, or too few or too many would stay.
        """
        self._check(params)
        made = params | {"layers": self._smaller(params["layers"], self._rows(params, calibration, ""))}
        if "encoder" in params:
            rows = self._rows(params, calibration, "encoder/")
            encoder = params["encoder"]
            made["encoder"] = encoder | {"layers": self._smaller(encoder["layers"], rows)}
        return made

    def _smaller(self, tree: Any, rows: Rows) -> Any:
        """The blocks of a stack with fewer parts."""
        tree = dict(tree)
        if self.layers is not None:
            tree, rows = self._fewer_layers(tree, rows)
        if self.experts is not None:
            tree["mlp"], rows = self._fewer_experts(tree["mlp"], rows)
        if self.heads is not None:
            tree["attention"] = self._fewer_heads(tree["attention"], rows[_OUTPUT])
        if self.mlp is not None:
            tree["mlp"] = self._narrower(tree["mlp"], rows[_DOWN], "mlp")
            if "shared" in tree["mlp"]:
                shared = self._narrower(tree["mlp"]["shared"], rows[_SHARED], "the shared mlp")
                tree["mlp"] = tree["mlp"] | {"shared": shared}
        return tree

    def statistics(self):
        return "norms" if self.importance == "activations" else "none"

    def picked(self, params):
        """The weights whose rows say what the parts are worth; the others go along."""
        parts = [f"layers/{name}/kernel" for name in (_OUTPUT, _DOWN, _SHARED)]
        measured = [*parts, *(f"encoder/{part}" for part in parts)]
        return {path: one for path, one in super().picked(params).items() if path in measured}

    def coverage(self, params):
        rows = super().coverage(params)
        after = self.abstract(params)
        shapes = {weights.path_name(path): a.shape for path, a in jax.tree_util.tree_leaves_with_path(after)}
        same = [row.path not in shapes or shapes[row.path] == row.shape for row in rows]
        return [dataclasses.replace(row, action="-") if s else row for row, s in zip(rows, same, strict=True)]

    def describe(self):
        kept = [(name, getattr(self, name)) for name in _PARTS if getattr(self, name) is not None]
        said = [f"{keep:.0%} of {name}" if isinstance(keep, float) else f"{keep} {name}" for name, keep in kept]
        return f"keep {', '.join(said)}" if said else "keep all"

    # ---- The parts ----

    def _rows(self, params: Any, calibration: Calibration | None, root: str) -> Rows:
        """The importance of the rows of the stack under a path such as `encoder/`."""
        rows: Rows = {}
        picked = self.picked(params)

        def one(path, w):
            if path not in picked or not path.startswith(f"{root}layers/"):
                return
            inputs = (calibration or {}).get(path) if self.importance == "activations" else None
            if inputs is None and self.importance == "activations":
                raise CalibrationError(
                    f"shrink: nothing is known of the inputs of {path}, which importance='activations' needs; "
                    "calibrate on some data first."
                )
            rows[path.removeprefix(f"{root}layers/").removesuffix("/kernel")] = _importance(w, inputs)

        weights.map_weights(one, params)
        return rows

    def _fewer_layers(self, tree: Any, rows: Rows) -> tuple[Any, Rows]:
        worth_L = sum(jnp.sum(each, axis=tuple(range(1, each.ndim))) for each in rows.values())
        kept = _best(worth_L, _number("layers", self.layers, worth_L.size))
        return jax.tree.map(lambda a: a[kept], (tree, rows))

    def _fewer_experts(self, mlp: Any, rows: Rows) -> tuple[Any, Rows]:
        if "router" not in mlp:
            raise ValueError("shrink: the model has no experts to drop; leave experts out.")
        worth_LE = jnp.sum(rows[_DOWN], axis=-1)
        kept = _best(worth_LE, _number("experts", self.experts, worth_LE.shape[-1]))
        made = {"router": {"kernel": _take(mlp["router"]["kernel"], kept, -1)}}
        for name in set(mlp) & {"up", "gate", "down"}:
            made[name] = {"kernel": _take(mlp[name]["kernel"], kept, -3)}
        return mlp | made, rows | {_DOWN: _take(rows[_DOWN], kept, -2)}

    def _fewer_heads(self, attention: Any, worth_LN: jax.Array) -> Any:
        """Whole groups, or heads of every group: both are heads (L, K, G), of which an axis gets shorter."""
        h, depth = self.head_dim, worth_LN.shape[0]
        sizes = [attention[name]["kernel"].shape[-1] for name in ("query", "key")]
        if any(size % h for size in sizes):
            raise ValueError(f"shrink: head_dim {h} does not divide the projections {sizes}; give model.head_dim.")
        heads, kv_heads = (size // h for size in sizes)
        group = heads // kv_heads
        step = kv_heads if self.within_groups else group
        number = _number("heads", self.heads, heads, step)
        worth_LKG = jnp.sum(worth_LN.reshape(depth, kv_heads, group, h), axis=-1)
        starts = jnp.arange(kv_heads)[:, None] * group
        if self.within_groups:
            chosen = starts + _best(worth_LKG, number // kv_heads)
            kept_kv = None
        else:
            kept_kv = _best(jnp.sum(worth_LKG, axis=-1), number // group)
            chosen = kept_kv[..., None] * group + jnp.arange(group)
        queries = _entries(chosen.reshape(depth, number), h)
        made = {"output": attention["output"] | {"kernel": _take(attention["output"]["kernel"], queries, -2)}}
        made["query"] = _taken(attention["query"], queries)
        if "query_norm" in attention and attention["query_norm"]["scale"].shape[-1] == heads * h:
            made["query_norm"] = _taken(attention["query_norm"], queries)
        if kept_kv is not None:
            keys = _entries(kept_kv, h)
            made |= {name: _taken(attention[name], keys) for name in ("key", "value")}
            if "key_norm" in attention and attention["key_norm"]["scale"].shape[-1] == kv_heads * h:
                made["key_norm"] = _taken(attention["key_norm"], keys)
        return attention | made

    def _narrower(self, mlp: Any, worth: jax.Array, name: str) -> Any:
        """An MLP, or experts, with fewer channels: worth is (L, F) or (L, E, F)."""
        kept = _best(worth, _number(name, self.mlp, worth.shape[-1]))
        made = {inward: _taken(mlp[inward], kept) for inward in ("up", "gate") if inward in mlp}
        return mlp | made | {"down": mlp["down"] | {"kernel": _take(mlp["down"]["kernel"], kept, -2)}}

    def _check(self, params: Any) -> None:
        if not {"attention", "mlp"} <= set(params.get("layers", ())):
            raise ValueError("shrink: the tree has no `layers` of attention and mlp; shrink works on a transformer's.")
        if self.heads is not None and "relative" in params:
            raise ValueError(
                "shrink: all layers share the relative positions of their heads, so none can go; leave heads out."
            )
        if "frozen_layers" in params:
            raise ValueError("shrink: the blocks are two stacks (freeze made them); put shrink before freeze.")

        def one(path, w):
            if path.removeprefix("encoder/").startswith("layers/") and weights.is_weight(w):
                raise ValueError(f"shrink: {path} is {type(w).__name__} already; put shrink before other transforms.")

        weights.map_weights(one, params)


def _importance(w: jax.Array, inputs: Inputs | None) -> jax.Array:
    """(..., in) float32: the sum of squares of each row of a matrix (..., in, out), times that of its input."""
    squares = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=-1)
    return squares if inputs is None else squares * inputs.squares


def _number(name: str, keep: float | int, there: int, step: int = 1) -> int:
    """How many of so many parts stay: a multiple of `step`, to which a share is rounded."""
    number = step * round(keep * there / step) if isinstance(keep, float) else keep
    if number > there:
        raise ValueError(f"shrink: {name} is {keep}, but there are {there}; keep at most as many.")
    if number < 1:
        raise ValueError(f"shrink: {name} is {keep} of {there}, which leaves none; give a larger share.")
    if number % step:
        raise ValueError(f"shrink: {name} is {keep}, which groups of queries do not allow; give a multiple of {step}.")
    return number


def _best(worth: jax.Array, number: int) -> jax.Array:
    """The places (..., number) of the largest along the last axis, in their order; of equal ones the first."""
    return jnp.sort(jax.lax.top_k(worth, number)[1], axis=-1)


def _entries(heads_LH: jax.Array, size: int) -> jax.Array:
    """The places (L, H·h) of the entries of heads (L, H)."""
    return (heads_LH[..., None] * size + jnp.arange(size)).reshape(heads_LH.shape[0], -1)


def _take(a: jax.Array, kept: jax.Array, axis: int) -> jax.Array:
    """a (stack, ...) at the places `kept` (stack, n) of an axis counted from the end, each of the stack at its own."""
    inner = kept.reshape(*kept.shape, *(1,) * (-1 - axis))
    return jnp.take_along_axis(a, jnp.expand_dims(inner, tuple(range(kept.ndim - 1, a.ndim + axis))), axis)


def _taken(part: dict[str, jax.Array], kept: jax.Array) -> dict[str, jax.Array]:
    """A kernel and its bias, or a norm's scale, with those of its outputs that stay."""
    return {name: _take(a, kept, -1) for name, a in part.items()}
