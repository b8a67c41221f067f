"""Merging adapters: one weight where a base and its update stood, in a copy. There is no way back.

Taking an update out of a merged weight again does not give the base: in bfloat16 many weights come back changed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcost import weights
from jaxcost.transforms.base import Rule, Stage, Transform
from jaxcost.weights import Adapters, Dora, Frozen, Inputs, Lora, Masked, Params, Quantized, Scaled, Weight, quantized


@dataclasses.dataclass(frozen=True)
class merge_adapters(Transform):
    """Puts what `lora` and `ia3` trained into the weights that it stands on, and thaws what they froze.

    A masked or quantised base stays of its kind, and so cannot hold the whole update: an entry that is pruned stays
    pruned, and what is smaller than a step of the grid is rounded away. That is refused unless `lossy` asks for it;
    `merge_losses` says what it costs. `weights.merge` makes a dense float array of every weight instead.
    """

    rules: tuple[Rule, ...] = (Rule(""),)
    """Which weights; all unless told otherwise."""
    lossy: bool = False
    """Merge into masked and quantised bases too."""

    stage: ClassVar[Stage] = "adapt"

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        if isinstance(w, Frozen):
            return self.apply(path, w.weight, key, inputs)
        if isinstance(w, Masked):
            return w.replace(weight=self.apply(path, w.weight, key, inputs))
        if isinstance(w, Adapters):
            raise ValueError(f"merge_adapters: {path} holds several adapters; merge the tree that has one of them.")
        if not _is_adapted(w):
            return w
        base = _base(w)
        if isinstance(base, Masked | Quantized | Scaled) and not self.lossy:
            raise ValueError(
                f"merge_adapters: {path} stands on a base that is {type(base).__name__}, and merging would lose "
                f"{_share(w)} of its update; serve it unmerged, or accept that with lossy=True."
            )
        return _held_by(path, base, weights.materialize(w))

    def describe(self):
        return "merge adapters"


def merge_losses(params: Params) -> dict[str, float]:
    """The path of every adapted weight → the share of its update that merging it into its base would lose.

    That is ‖merged - wanted‖ / ‖wanted - base‖, Frobenius norms over the whole stack: 0 for a float base up to
    rounding, 1 where the merge gives the base again, more where rounding anew moves the rest further than the update
    is large. NaN where the update is zero.
    """
    found: dict[str, float] = {}

    def one(path, w):
        w = w.weight if isinstance(w, Frozen) else w
        if _is_adapted(w):
            found[path] = float(_loss(path, w))

    weights.map_weights(one, params)
    return found


def _is_adapted(w: Any) -> bool:
    return isinstance(w, Lora | Dora) or (isinstance(w, Scaled) and w.trains)


def _base(w: Any) -> Any:
    """What stands below an adapter, thawed."""
    while isinstance(w, Lora | Dora | Frozen) or (isinstance(w, Scaled) and w.trains):
        w = w.base if isinstance(w, Lora) else w.weight
    return w


def _held_by(path: str, base: Any, dense: jax.Array) -> Any:
    """The dense array (..., in, out) as a weight of the base's kind, as nearly as that can hold it."""
    if isinstance(base, Masked):
        return base.replace(weight=_held_by(path, base.weight, jnp.where(base.mask, dense, 0)))
    if isinstance(base, Scaled):
        channels = base.scale[..., :, None] if base.side == "in" else base.scale[..., None, :]
        return base.replace(weight=_held_by(path, base.weight, dense / channels))
    if isinstance(base, Quantized):
        groups = base.scale.shape[-2]
        group = base.codes.shape[-2] // groups if groups > 1 else None
        return quantized(dense, base.grid, group, base.activation_bits).replace(activation_scale=base.activation_scale)
    if isinstance(base, Weight):
        raise ValueError(
            f"merge_adapters: {path} stands on a base that is {type(base).__name__}, which cannot take an update; "
            "serve it unmerged, or make it dense with weights.merge."
        )
    return dense.astype(base.dtype)


@jax.jit
def _distances(merged: Any, wanted: Any, base: Any) -> tuple[jax.Array, jax.Array]:
    merged, wanted, base = (weights.materialize(w).astype(jnp.float32) for w in (merged, wanted, base))
    return jnp.linalg.norm((merged - wanted).ravel()), jnp.linalg.norm((wanted - base).ravel())


def _loss(path: str, w: Any) -> jax.Array:
    base = _base(w)
    lost, update = _distances(_held_by(path, base, weights.materialize(w)), w, base)
    return lost / update


def _share(w: Any) -> str:
    """The loss in words; while a function is traced there are no values to measure."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(w))
    return "part" if traced else f"{float(_loss('', w)):.0%}"
