"""How the devices of a mesh share matrices, so that none ever holds one, and work that goes through one by its inputs.

Left to the partitioner, such loops exchange rows in every round. Outputs do not know of each other there, so each
device takes the whole columns of some of them (`by_outputs`). Decompositions, where they do, are in `svd`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

Arrays = tuple[jax.Array, ...]

_COPIES = "data"
"""The axis of a mesh that splits no weight."""
_STACKS = ("stage", "expert")
"""Those that split stacks of weights, by layers and by experts: there they stay, and others share each matrix."""


@dataclasses.dataclass(frozen=True)
class Share:
    """A device's part of the outputs, for what must be known of all of them."""

    axes: tuple[str, ...] = ()
    """The axes of the mesh that share the outputs; none where one device has all."""

    @property
    def devices(self) -> int:
        """How many share them."""
        return lax.axis_size(self.axes) if self.axes else 1

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of what all devices have."""
        return lax.psum(x, self.axes) if self.axes else x

    def all(self, x: jax.Array) -> jax.Array:
        """(..., part) of every device as (..., out)."""
        return lax.all_gather(x, self.axes, axis=x.ndim - 1, tiled=True) if self.axes else x

    def rows(self, x: jax.Array) -> jax.Array:
        """(rows, part) of every device as (rows / devices, out): all columns of some rows, for all rows of some."""
        return lax.all_to_all(x, self.axes, split_axis=0, concat_axis=1, tiled=True) if self.axes else x

    def mine(self, x: jax.Array) -> jax.Array:
        """(..., part) of what all devices know, (..., out)."""
        if not self.axes:
            return x
        part = x.shape[-1] // self.devices
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.axes) * part, part, axis=-1)


@dataclasses.dataclass(frozen=True)
class Split:
    """The axes of a mesh that share a stack of matrices."""

    stack: tuple[str | None, ...]
    """What splits each axis of the stack."""
    matrix: tuple[str, ...]
    """What is there to share each matrix."""

    def spec(self, *last: Any) -> PartitionSpec:
        """Of an array of as many stack axes, the others being split so."""
        return PartitionSpec(*self.stack, *last)


def by_outputs(f: Callable[..., Any], wholes: Arrays, shared: Arrays, gives_outputs: bool = True) -> Any:
    """f(share, *wholes, *shared) for every matrix of a stack, each device of the mesh with its own outputs.

    Args:
      f: a function of one matrix; its first argument is the device's `Share`.
      wholes: arrays (..., in, out), of which a device gets (..., in, part).
      shared: arrays (..., ...) of as many stack axes, which every device gets whole, but
        for its part of the stack.
      gives_outputs: whether what f gives has outputs as its last axes, or is the same on every device.
    """

    def every(share, *arrays):
        one = functools.partial(f, share)
        return functools.reduce(lambda inner, _: jax.vmap(inner), range(wholes[0].ndim - 2), one)(*arrays)

    if alone():
        return every(Share(), *wholes, *shared)
    outputs, stack = wholes[0].shape[-1], wholes[0].shape[:-2]
    places, axes = split(stack), ()
    for name in places.matrix:
        if outputs % math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in (*axes, name)) == 0:
            axes = (*axes, name)

    def last(a):
        return places.spec(*(None,) * (a.ndim - len(stack) - 1), axes or None)

    given = jax.eval_shape(functools.partial(every, Share()), *wholes, *shared)
    mapped = jax.shard_map(
        functools.partial(every, Share(axes)),
        in_specs=(*map(last, wholes), *(places.spec(),) * len(shared)),
        out_specs=jax.tree.map(last, given) if gives_outputs else places.spec(),
        check_vma=False,
    )
    return mapped(*wholes, *shared)


def split(stack: tuple[int, ...]) -> Split:
    """How the mesh shares matrices that are stacked along axes of these sizes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    names = [name if sizes.get(name, 1) > 1 else None for name in _STACKS[: len(stack)]]
    names = [name if name and size % sizes[name] == 0 else None for name, size in zip(names, stack, strict=False)]
    # In this order the partitioner trades inputs for outputs; in the mesh's it would gather both.
    left = (name for name, size in reversed(sizes.items()) if size > 1 and name not in (_COPIES, *names))
    return Split((*names, *(None,) * (len(stack) - len(names))), tuple(left))


def alone() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1
