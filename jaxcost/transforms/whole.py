"""Work that goes through a matrix row by row, or decomposes it: on a mesh, each device does it whole and by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def on_each_device(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, computed on every device of the mesh from arrays that are gathered first; without a mesh it is f.

    Left to the partitioner, such loops exchange rows in every round, and virtual devices on a machine with fewer cores
    wait for each other for ever (jax 0.10.2).
    """

    def run(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return f(*arrays)
        return jax.shard_map(f, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)(*arrays)

    return run
