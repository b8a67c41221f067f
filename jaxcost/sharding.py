"""Meshes, and where every tree lives on them: one table from logical axis names to mesh axes.

Parameters and activations name their axes by meaning ('embed', 'mlp', 'batch'); the table below says which mesh axes
split each meaning. Weights of any kind shard like the matrix that they stand for, because each kind derives the names
of its arrays' axes from that matrix's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcost import weights

RULES: Mapping[str, tuple[str, ...]] = {
    # Parameters.
    "vocab": ("tensor", "stage"),
    "embed": ("fsdp", "expert", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "layers": ("stage",),
    "rank": (),
    "adapters": (),
    "position": (),
    # Activations.
    # In this order: with data before fsdp and one row a device, XLA (0.10.2) permutes the rows of the product of a
    # matrix that fsdp x tensor split over a mesh of all three axes, and does not permute them back.
    "batch": ("fsdp", "expert", "data"),
    "length": ("context",),
    "residual": ("tensor",),
    "head_dim": (),
    "stage": ("stage",),
}
"""Logical axis name → the mesh axes that split it."""

_WHOLE = ("vocab",)
"""Logical axes that stay whole where the mesh does not divide them: nobody chooses the size of a tokenizer."""

GROUPS = "/groups"
"""Ends the name of an axis that holds one entry for a group of another's: split alike where that divides it."""

_BUSIEST_LAST = ("stage", "data", "fsdp", "expert", "context", "tensor")
"""The mesh axes by how much they exchange: the last get whole axes of a torus, the first the network between slices."""

COMPILER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    # Cutting matmuls into windows that wait for one shard of the weights each doubles the compiler's own estimate of
    # a sharded step (6.6 against 3.3 seconds for Llama-3.1-8B on v6e:4x4); whole gathers overlap as well.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}
"""Platform → options for the compilation of a step, the same where it is planned and where it runs."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many ways each kind of parallelism splits the devices; one axis may be -1 for what is left."""

    data: int = 1
    """Replicas of the weights, each with its own part of the batch; -1 takes the devices that are left."""
    fsdp: int = 1
    """Ways that both the weights and the batch are split (fully sharded data parallelism)."""
    tensor: int = 1
    """Ways that heads, MLP and vocabulary are split (tensor parallelism)."""
    context: int = 1
    """Ways that each sequence is split, and the weights like over fsdp (context parallelism, for long sequences)."""
    expert: int = 1
    """Ways that the experts are split (expert parallelism); all other weights and the batch are split as by fsdp."""
    stage: int = 1
    """Ways that the layers are split (pipeline parallelism; see `execution.microbatches`), and the vocabulary with
    them."""

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis} is {size}; it must be positive, or -1 for the devices that are left.")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("Only one mesh axis can be -1 (the devices that are left).")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The size of every axis on so many devices; ValueError if they do not multiply to them."""
        sizes = dataclasses.asdict(self)
        known = math.prod(size for size in sizes.values() if size != -1)
        filled = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
        if math.prod(filled.values()) != num_devices:
            asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise ValueError(
                f"The mesh ({asked}) does not fit {num_devices} device{'s' if num_devices > 1 else ''}; "
                "change mesh.* so that the sizes multiply to the number of devices, or set one to -1."
            )
        return filled


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over the devices (default: all of them), each axis present even where its size is 1.

    On TPUs an axis of the mesh lies along axes of the torus, and slices differ in the axes that exchange least.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return Mesh(_arranged(devices, sizes), tuple(sizes))


def _arranged(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    if not _fill_slices(devices):
        return np.asarray(devices).reshape(tuple(sizes.values()))
    left = slices = len({_slice_of(device) for device in devices})
    inner, outer = [], []
    for axis in _BUSIEST_LAST:
        outer.append(math.gcd(left, sizes[axis]))
        inner.append(sizes[axis] // outer[-1])
        left //= outer[-1]
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return arranged.transpose([_BUSIEST_LAST.index(axis) for axis in sizes])


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def _fill_slices(devices: Sequence[Any]) -> bool:
    """Whether these are the TPUs of whole cuboids of one size, which can be arranged along the axes of a torus."""
    if len(devices) == 1 or devices[0].platform != "tpu":
        return False
    slices: dict[int, list] = {}
    for device in devices:
        slices.setdefault(_slice_of(device), []).append((*device.coords, device.core_on_chip))
    boxes = [math.prod(max(axis) - min(axis) + 1 for axis in zip(*places, strict=True)) for places in slices.values()]
    return all(box == len(places) for box, places in zip(boxes, slices.values(), strict=True)) and len(set(boxes)) == 1


def platform() -> str:
    """Where a traced step will run: the platform of the current mesh, which may be only described, else this one's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def context_ways(length: int) -> int:
    """Parts that the current mesh splits a sequence into; one that is shorter than the axis is not split."""
    ways = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    return ways if ways <= length else 1


def stages() -> int:
    """Stages that the current mesh spreads the layers over."""
    return jax.sharding.get_abstract_mesh().shape.get("stage", 1)


def ways(axis: str) -> int:
    """Parts that the current mesh splits a logical axis into."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in RULES[axis])


def mesh_spec(axes: PartitionSpec, sizes: Mapping[str, int]) -> PartitionSpec:
    """The mesh axes for each logical axis; axes of size 1 are left out, and no mesh axis is used twice."""
    taken: set[str] = set()
    spec = []
    for name in axes:
        rule = () if name is None else RULES[name.removesuffix(GROUPS)]
        free = [a for a in rule if sizes.get(a, 1) > 1 and a not in taken]
        taken.update(free)
        spec.append(tuple(free) if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout inside a jitted function; outside of a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, mesh_spec(PartitionSpec(*axes), mesh.shape))


def shardings(params: weights.Params, axes: weights.Params, mesh: Mesh) -> weights.Params:
    """A NamedSharding for every array in a tree of weights, as a tree of the same structure.

    `axes` has the dense parameters' structure, with a PartitionSpec of logical names for each. Raises ValueError if
    an axis does not divide, naming the parameter; that of a vocabulary is then on all devices instead.
    """

    def place(path, w, names):
        return jax.tree.map(lambda a, n: _placed(path, a, n, mesh), w, weights.logical_axes(w, names))

    return weights.map_weights(place, params, axes)


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where one array of a tree lives."""

    path: str
    shape: tuple[int, ...]
    """Of the whole array."""
    dtype: str
    spec: PartitionSpec
    """The mesh axes that split each axis; none are replicated."""
    device_bytes: int
    """Bytes of one device's part."""


def placed(params: weights.Params, places: weights.Params) -> list[Placed]:
    """Where every array of a tree of weights lives, by the shardings of `shardings`; arrays may be only described."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = []
    for (path, a), place in zip(leaves, jax.tree.leaves(places), strict=True):
        size = math.prod(place.shard_shape(a.shape)) * jax.dtypes.itemsize_bits(a.dtype) // 8
        found.append(Placed(weights.path_name(path), a.shape, str(a.dtype), place.spec, size))
    return found


def _placed(path, array, names, mesh) -> NamedSharding:
    places = []
    for size, name, split in zip(array.shape, names, mesh_spec(names, mesh.shape), strict=True):
        ways = math.prod(mesh.shape[a] for a in ((split,) if isinstance(split, str) else split or ()))
        divides = size % ways == 0
        if not divides and name not in _WHOLE and not name.endswith(GROUPS):
            raise ValueError(
                f"{path}: its {name} axis has size {size}, which mesh axis {split} ({ways}) does not divide; "
                "change the model's size or the mesh."
            )
        places.append(split if divides else None)
    return NamedSharding(mesh, PartitionSpec(*places))


def split_further(place: NamedSharding, shape: tuple[int, ...], axis: str) -> NamedSharding:
    """A sharding that one more mesh axis splits, along the longest axis of an array that it divides; or the same."""
    mesh, spec = place.mesh, [*place.spec, *[None] * (len(shape) - len(place.spec))]
    for i in sorted(range(len(shape)), key=lambda i: -shape[i]):
        split = () if spec[i] is None else (spec[i],) if isinstance(spec[i], str) else tuple(spec[i])
        if shape[i] % math.prod(mesh.shape[a] for a in (*split, axis)) == 0 and mesh.shape[axis] > 1:
            spec[i] = (*split, axis)
            return NamedSharding(mesh, PartitionSpec(*spec))
    return place


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """The options that a step over this mesh is compiled with."""
    return dict(COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {}))


def runnable(jitted: Callable, compiled: Callable, *arguments) -> Callable:
    """What to call with these arguments: the program compiled ahead of time, or the jitted function that it came from.

    The program refuses arrays of 4 bits on CPUs, whose layouts JAX (0.10.2) writes in two ways; the function takes
    them, and finds the program that is compiled already.
    """
    narrow = [leaf for leaf in jax.tree.leaves(arguments) if jax.dtypes.itemsize_bits(leaf.dtype) < 8]
    on_cpu = any(device.platform == "cpu" for leaf in narrow for device in leaf.devices())
    return jitted if on_cpu else compiled


def microbatches(x: jax.Array, n: int) -> jax.Array:
    """A batch (B, ...) as n microbatches (n, B / n, ...): strided, so that each takes rows of every device's part."""
    return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch (B, S) lives: its rows split over all data-parallel axes, its tokens over the context axis."""
    return NamedSharding(mesh, mesh_spec(PartitionSpec("batch", "length"), mesh.shape))


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that this process's devices hold, int (rows,), ascending; all of them if it is alone."""
    places = NamedSharding(mesh, mesh_spec(PartitionSpec("batch"), mesh.shape))
    held = places.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int = 0) -> dict[str, jax.Array]:
    """A batch of host arrays (B, S) on the devices; ValueError if the mesh does not divide B and S.

    With a `batch_size`, B, the arrays hold the rows of `own_rows` alone, as each of several processes reads its part.
    """
    where = batch_sharding(mesh)
    if jax.process_count() == 1:
        return {name: jax.device_put(x, where) for name, x in batch.items()}
    rows = own_rows(mesh, batch_size) if batch_size else None

    def placed(x: np.ndarray) -> jax.Array:
        def part(index):
            if rows is None:
                return x[index]
            start, stop, _ = index[0].indices(batch_size)
            return x[(slice(*np.searchsorted(rows, (start, stop))), *index[1:])]

        return jax.make_array_from_callback((batch_size or len(x), *x.shape[1:]), where, part)

    return {name: placed(x) for name, x in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
