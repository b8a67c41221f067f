"""Freezing: train the top layers of a model, or the parameters that rules name, and leave the rest as it is."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from jaxcost.transforms.base import Rule, Stage, Transform, freeze_weight, rule
from jaxcost.weights import map_weights


@dataclasses.dataclass(frozen=True)
class freeze(Transform):
    """Freezes all but the top blocks and what the rules name, anywhere in the model.

    With `top_layers`, the stack of blocks is cut in two, `frozen_layers` and `layers`, so that no gradient is computed
    for, or passed back through, the lower part; a rule that names something in it, such as 'norm/', makes that train
    and the gradient pass. A rule with `skip` freezes what it names, in the top blocks too.
    """

    rules: tuple[Rule, ...] = (Rule("^(final_norm|head|unembed)/"),)
    """What trains besides the top blocks."""
    top_layers: int | None = 1
    """Blocks, counted from the output, that train; None cuts nothing, so that only what the rules name trains."""

    stage: ClassVar[Stage] = "adapt"
    freezes_the_rest: ClassVar[bool] = True

    def __call__(self, params, key=None, calibration=None):
        if self.top_layers is None:
            return super().__call__(params, key, calibration)
        self.coverage(params)
        if "frozen_layers" in params:
            raise ValueError("freeze: the model is frozen already; apply freeze once.")
        depth = jax.tree.leaves(params["layers"])[0].shape[0]
        if not 0 < self.top_layers < depth:
            raise ValueError(
                f"freeze: top_layers is {self.top_layers}, but the model has {depth} layers; "
                f"choose from 1 to {depth - 1}."
            )
        cut = depth - self.top_layers
        parts = {name: tree for name, tree in params.items() if name != "layers"}
        parts["frozen_layers"] = jax.tree.map(lambda a: a[:cut], params["layers"])
        parts["layers"] = jax.tree.map(lambda a: a[cut:], params["layers"])
        return map_weights(lambda path, w: w if self._trains(path) else freeze_weight(w), parts)

    def apply(self, path, w, key, inputs=None):
        return w

    def coverage(self, params):
        rows = super().coverage(params)
        done = self.describe()
        return [dataclasses.replace(row, action=done if self._trains(row.path) else "frozen") for row in rows]

    def describe(self):
        if self.top_layers is not None:
            return f"train the top {self.top_layers} layers"
        return f"train {', '.join(r.pattern for r in self.rules if not r.skip)}"

    def _trains(self, path: str) -> bool:
        found = self._match(path.removeprefix("frozen_"))
        return not found.skip if found else self.top_layers is not None and path.startswith("layers/")


def bias_only() -> freeze:
    """Trains the biases alone. Source: Ben Zaken et al. 2021 (BitFit), arXiv:2106.10199."""
    return freeze(rules=(rule("bias$"),), top_layers=None)


def norm_only() -> freeze:
    """Trains the norms' scales and biases alone. Source: Zhao et al. 2023, arXiv:2312.11420."""
    return freeze(rules=(rule("norm/"),), top_layers=None)
