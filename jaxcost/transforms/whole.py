"""Work that goes through a matrix input by input, or decomposes it, and how the devices of a mesh share it.

Left to the partitioner, such loops exchange rows in every round. Outputs do not know of each other there, so each
device takes the whole columns of some of them (`by_outputs`), and none ever holds the matrix; a decomposition is of
the matrix as it is, and each device makes it for itself (`on_each_device`), of one matrix of a stack after the other.
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


def by_outputs(f: Callable[..., Any], split: Arrays, shared: Arrays, gives_outputs: bool = True) -> Any:
    """f(share, *split, *shared) for every matrix of a stack, each device of the mesh with its own outputs.

    Args:
      f: a function of one matrix; its first argument is the device's `Share`.
      split: arrays (..., in, out), of which a device gets (..., in, part).
      shared: arrays (..., ...) of as many stack axes, which every device gets whole.
      gives_outputs: whether what f gives has outputs as its last axes, or is the same on every device.
    """

    def every(share, *arrays):
        one = functools.partial(f, share)
        return functools.reduce(lambda inner, _: jax.vmap(inner), range(split[0].ndim - 2), one)(*arrays)

    if _alone():
        return every(Share(), *split, *shared)
    axes = _sharing(split[0].shape[-1])

    def last(a):
        return PartitionSpec(*(None,) * (a.ndim - 1), axes or None)

    given = jax.eval_shape(functools.partial(every, Share()), *split, *shared)
    mapped = jax.shard_map(
        functools.partial(every, Share(axes)),
        in_specs=(*map(last, split), *(PartitionSpec(),) * len(shared)),
        out_specs=jax.tree.map(last, given) if gives_outputs else PartitionSpec(),
        check_vma=False,
    )
    return mapped(*split, *shared)


def splitting_axes() -> tuple[str, ...]:
    """The axes of the mesh that split weights, in the order in which the partitioner trades inputs for outputs.

    In another order it would gather both.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name, size in reversed(sizes.items()) if size > 1 and name != _COPIES)


def _sharing(outputs: int) -> tuple[str, ...]:
    """Those of them that share so many outputs: as many as divide them."""
    sizes, axes = jax.sharding.get_abstract_mesh().shape, []
    for name in splitting_axes():
        if outputs % math.prod(sizes[axis] for axis in (*axes, name)) == 0:
            axes.append(name)
    return tuple(axes)


def _alone() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1
