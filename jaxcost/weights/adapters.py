"""Several adapters over one base at once, so that each row of a batch is served with its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from jaxcost.weights.base import Weight, contract, is_weight, logical_axes, materialize, matmul, nothing
from jaxcost.weights.lowrank import Lora
from jaxcost.weights.tree import Params, map_weights


@struct.dataclass
class Adapters(Weight):
    """A frozen base and N updates of one rank, of which each row of the batch takes the one that `choice` names.

    Each row's own pair of factors is gathered. Multiplying with all N and masking costs as much for two adapters and
    more for every further one (measured on a CPU, 8 rows, width 1024, rank 8: 0.12 against 0.38 ms for 32 adapters and
    one token a row). With a choice for each row it stands for as many matrices as there are rows: `materialize` gives
    (..., B, in, out), and x is (B, ..., in). Source: Sheng et al. 2023 (S-LoRA, arXiv:2311.03285).
    """

    base: Any
    a: jax.Array
    """(..., N, in, r)."""
    b: jax.Array
    """(..., N, r, out), the adapter's scale included."""
    choice: jax.Array
    """int32, (..., B), or (...) for one choice for all rows: 0 to N - 1, or -1 for the base alone."""

    def contract(self, x, key):
        a, b = self._chosen()
        y = contract(x, lax.stop_gradient(self.base), key)
        if not self._by_row():
            return y + matmul(matmul(x, a.astype(x.dtype)), b.astype(x.dtype))
        if x.ndim < 2 or x.shape[0] != a.shape[0]:
            raise ValueError(
                f"Adapters are chosen for {a.shape[0]} rows, but the activation has shape {x.shape}; "
                "choose one for each row of the batch."
            )
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        return y + matmul(matmul(rows, a.astype(x.dtype)), b.astype(x.dtype)).reshape(y.shape)

    def materialize(self):
        a, b = self._chosen()
        base = lax.stop_gradient(materialize(self.base))
        base = base[..., None, :, :] if self._by_row() else base
        return base + matmul(a, b).astype(base.dtype)

    def logical_axes(self, axes):
        *stack, inward, outward = axes
        return Adapters(
            logical_axes(self.base, axes),
            PartitionSpec(*stack, "adapters", inward, "rank"),
            PartitionSpec(*stack, "adapters", "rank", outward),
            PartitionSpec(*stack, *(None,) * self._by_row()),
        )

    def trainable(self):
        return Adapters(nothing(self.base), True, True, False)

    def _by_row(self) -> bool:
        return self.choice.ndim > self.a.ndim - 3

    def _chosen(self) -> tuple[jax.Array, jax.Array]:
        """The factors (..., B, in, r) and (..., B, r, out), without B if all rows share a choice; zeros for -1."""
        index = (self.choice if self._by_row() else self.choice[..., None])[..., None, None]
        a = jnp.take_along_axis(self.a, jnp.maximum(index, 0), axis=-3)
        b = jnp.take_along_axis(self.b, jnp.maximum(index, 0), axis=-3)
        b = jnp.where(index >= 0, b, jnp.zeros((), b.dtype))
        return (a, b) if self._by_row() else (a[..., 0, :, :], b[..., 0, :, :])


def stack_adapters(trees: Sequence[Params]) -> Params:
    """One tree of `Adapters` from trees that `lora` made over the same weights; no row takes any of them yet.

    Raises:
        ValueError: no tree, adapters of different places or shapes, or weights beside the adapters that differ.
    """
    if not trees:
        raise ValueError("There are no adapters to stack; give at least one tree of weights.")
    paths = [[path for path, _ in jax.tree_util.tree_leaves_with_path(t, is_leaf=is_weight)] for t in trees]
    if any(found != paths[0] for found in paths):
        raise ValueError("The trees of weights have different parameters; stack adapters of one model.")

    def one(path, *every):
        if any(isinstance(w, Lora) != isinstance(every[0], Lora) for w in every):
            raise ValueError(f"{path} has an adapter in some of the trees only; stack adapters of the same places.")
        if not isinstance(every[0], Lora):
            _check_equal(path, every)
            return every[0]
        _check_equal(f"{path}, below its adapter,", [w.base for w in every])
        pairs = [(materialize(w.a), w.scale * materialize(w.b)) for w in every]
        shapes = {(a.shape, b.shape) for a, b in pairs}
        if len(shapes) > 1:
            ranks = ", ".join(str(a.shape[-1]) for a, _ in pairs)
            raise ValueError(f"The adapters of {path} have ranks {ranks}; stack adapters of one rank.")
        a, b = (jnp.stack(factors, axis=-3) for factors in zip(*pairs, strict=True))
        return Adapters(every[0].base, a, b, jnp.full(a.shape[:-3], -1, jnp.int32))

    return map_weights(one, *trees)


def choose(params: Params, rows: Sequence[int] | jax.Array) -> Params:
    """The same tree with the adapter of each row of the batch chosen: `rows` is int (B,), -1 for none.

    Raises:
        ValueError: an adapter that is not there (not checked of values that are being traced), or a tree without any.
    """
    counts: list[int] = []

    def one(_, w):
        def chosen(node):
            if not isinstance(node, Adapters):
                return node
            counts.append(node.a.shape[-3])
            stack = node.a.shape[:-3]
            choice = jnp.asarray(rows, jnp.int32)
            return node.replace(choice=jnp.broadcast_to(choice, (*stack, *choice.shape)))

        return jax.tree.map(chosen, w, is_leaf=lambda node: isinstance(node, Adapters))

    params = map_weights(one, params)
    if not counts:
        raise ValueError("There are no adapters to choose from; make some with stack_adapters.")
    if not isinstance(rows, jax.core.Tracer):
        for number in np.asarray(rows).ravel():
            if not -1 <= number < min(counts):
                raise ValueError(f"There is no adapter {number}; choose from 0 to {min(counts) - 1}, or -1 for none.")
    return params


def _check_equal(path: str, every: Sequence[Any]) -> None:
    first, *others = every
    for other in others:
        if jax.tree.structure(first) != jax.tree.structure(other) or not all(
            a is b or jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
        ):
            raise ValueError(f"{path} differs between the trees; stack adapters that were trained over one base.")
