"""Parameter-efficient tuning that adds parameters to a model: virtual tokens and bottlenecks.

The rest is frozen, but for what the rules name. `models.optional` says how the model reads what is added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxcost import weights
from jaxcost.transforms.base import Covered, Rule, Stage, Transform
from jaxcost.weights import Params

STACKS = ("frozen_layers", "layers")
"""The stacks of blocks that a tree may hold; what is added to the blocks is added to both, and virtual tokens to no
encoder."""

Maker = Callable[[jax.Array], jax.Array]
"""A random key → the initial values of a parameter, float32."""


@dataclasses.dataclass(frozen=True)
class Addition(Transform):
    """The base of transforms that add parameters; a subclass gives `additions`."""

    rules: tuple[Rule, ...] = ()
    """What trains besides what is added."""

    stage: ClassVar[Stage] = "adapt"
    freezes_the_rest: ClassVar[bool] = True

    def additions(self, params: Params) -> dict[str, Maker]:
        """The path of every new parameter → what makes it."""
        raise TypeError(f"{type(self).__name__} does not say what it adds.")

    def __call__(self, params, key=None, calibration=None):
        makers = self._checked(params)
        key = jax.random.key(0) if key is None else key
        params = super().__call__(params, key, calibration)
        for index, (path, make) in enumerate(sorted(makers.items())):
            params = _inserted(params, path.split("/"), make(jax.random.fold_in(key, index)))
        return params

    def apply(self, path, w, key, inputs=None):
        return w

    def coverage(self, params):
        added = {path: jax.eval_shape(make, jax.random.key(0)) for path, make in self._checked(params).items()}
        rows = [Covered(path, tuple(a.shape), None, f"added: {self.describe()}") for path, a in sorted(added.items())]
        kept = [
            dataclasses.replace(row, action="train") if row.action == self.describe() else row
            for row in super().coverage(params)
        ]
        return kept + rows

    def _checked(self, params: Params) -> dict[str, Maker]:
        makers, present = self.additions(params), _shapes(params)
        for path in makers:
            if path in present:
                raise ValueError(f"{type(self).__name__}: the model has {path} already; apply it once.")
        return makers


@dataclasses.dataclass(frozen=True)
class prompt_tuning(Addition):
    """Trains the embeddings of virtual tokens before every sequence, which start as rows of the embedding table.

    Source: Lester et al. 2021, arXiv:2104.08691, section 3.1 for the start.
    """

    tokens: int = 20
    """Virtual tokens; with the sequence they must fit the model's `max_length`."""

    def __post_init__(self):
        _check_positive("prompt_tuning", "tokens", self.tokens)

    def additions(self, params):
        rows, _ = _shape("prompt_tuning", params, "embed/table")

        def make(key):
            table = weights.materialize(params["embed"]["table"]).astype(jnp.float32)
            return table[jax.random.choice(key, rows, (self.tokens,), replace=self.tokens > rows)]

        return {"prompt/table": make}

    def describe(self):
        return f"prompt of {self.tokens} tokens"


@dataclasses.dataclass(frozen=True)
class prefix_tuning(Addition):
    """Trains keys and values that stand before those of every sequence, in every layer.

    Source: Li and Liang 2021, arXiv:2101.00190, without the reparametrisation. They start normal with a standard
    deviation of 0.02, so the model changes at first, as a token sees the prefix from the start.
    """

    tokens: int = 20
    """Virtual tokens; with the sequence they must fit the model's `max_length`."""

    def __post_init__(self):
        _check_positive("prefix_tuning", "tokens", self.tokens)

    def additions(self, params):
        makers = {}
        for stack in filter(params.__contains__, STACKS):
            for name in ("key", "value"):
                layers, _, outward = _shape("prefix_tuning", params, f"{stack}/attention/{name}/kernel")
                makers[f"{stack}/attention/prefix/{name}"] = _normal(0.02, layers, self.tokens, outward)
        return makers

    def describe(self):
        return f"prefix of {self.tokens} tokens"


@dataclasses.dataclass(frozen=True)
class bottleneck(Addition):
    """Trains a small MLP with a residual connection after the attention, the MLP or both of every layer.

    Its last matrix starts at zero, so the model is unchanged at first. Both places: Houlsby et al. 2019,
    arXiv:1902.00751; after the MLP alone: Pfeiffer et al. 2020, arXiv:2005.00247.
    """

    width: int = 32
    """Size of the bottleneck; the non-linearity is the model's own."""
    after: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
    """Where it stands."""

    def __post_init__(self):
        _check_positive("bottleneck", "width", self.width)
        if not self.after or set(self.after) - {"attention", "mlp"}:
            raise ValueError(f"bottleneck: after is {self.after!r}; name 'attention', 'mlp' or both in a tuple.")

    def additions(self, params):
        makers = {}
        stacks = [name for name in STACKS if name in params]
        stacks += [f"encoder/{name}" for name in STACKS if name in params.get("encoder", {})]
        for stack in stacks:
            layers, _, outward = _shape("bottleneck", params, f"{stack}/attention/output/kernel")
            for place in self.after:
                makers[f"{stack}/{place}_adapter/down/kernel"] = _normal(outward**-0.5, layers, outward, self.width)
                makers[f"{stack}/{place}_adapter/up/kernel"] = _normal(0.0, layers, self.width, outward)
        return makers

    def describe(self):
        return f"bottleneck of {self.width} after {' and '.join(self.after)}"


def _normal(deviation: float, *shape: int) -> Maker:
    return lambda key: deviation * jax.random.normal(key, shape)


def _check_positive(transform: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{transform}: {name} is {value}; it must be at least 1.")


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    weights.map_weights(lambda path, w: found.update({path: jax.eval_shape(weights.materialize, w).shape}), params)
    return found


def _shape(transform: str, params: Params, path: str) -> tuple[int, ...]:
    shape = _shapes(params).get(path)
    if shape is None:
        raise ValueError(f"{transform}: the model has no {path}, from which the shape of what is added is taken.")
    return shape


def _inserted(tree: Any, path: list[str], leaf: jax.Array) -> Any:
    """The nested dict with one leaf more."""
    name, *rest = path
    return {**tree, name: _inserted(tree.get(name, {}), rest, leaf) if rest else leaf}
