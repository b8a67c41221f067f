"""Freezing: train the top layers of a model and leave the rest as it is."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from jaxcost.transforms.base import Rule, Stage, Transform, freeze_weight
from jaxcost.weights import map_weights


@dataclasses.dataclass(frozen=True)
class freeze(Transform):
    """Freezes all but the top blocks and what the rules name.

    The stack of blocks is cut in two, `frozen_layers` and `layers`, so that no gradient is computed for, or passed
    back through, the frozen part.
    """

    rules: tuple[Rule, ...] = (Rule("final_norm/|unembed/"),)
    """What trains besides the top blocks."""
    top_layers: int = 1
    """Blocks, counted from the output, that train."""

    stage: ClassVar[Stage] = "adapt"
    freezes_the_rest: ClassVar[bool] = True

    def __call__(self, params, key=None, calibration=None):
        self.coverage(params)
        if "frozen_layers" in params:
            raise ValueError("freeze: the model is frozen already; apply freeze once.")
        depth = jax.tree.leaves(params["layers"])[0].shape[0]
        if not 0 < self.top_layers < depth:
            raise ValueError(
                f"freeze: top_layers is {self.top_layers}, but the model has {depth} layers; "
                f"choose from 1 to {depth - 1}."
            )
        rest = {name: tree for name, tree in params.items() if name != "layers"}
        frozen = super().__call__(rest, key, calibration)
        cut = depth - self.top_layers
        lower = jax.tree.map(lambda a: a[:cut], params["layers"])
        frozen["frozen_layers"] = map_weights(lambda _, w: freeze_weight(w), lower)
        frozen["layers"] = jax.tree.map(lambda a: a[cut:], params["layers"])
        return frozen

    def apply(self, path, w, key, inputs=None):
        return w

    def coverage(self, params):
        rows = super().coverage(params)
        return [dataclasses.replace(r, action=self.describe()) if r.path.startswith("layers/") else r for r in rows]

    def describe(self):
        return f"train the top {self.top_layers} layers"
