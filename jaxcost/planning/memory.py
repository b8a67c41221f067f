"""What fills a device's memory: arguments by category, the largest temporaries by the layer that made them."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import jax

from jaxcost import weights

_VALUE = re.compile(r"^ value: <\d+ ([\w.$-]+)[^>]*?> \(size=(\d+),offset=(\d+)\): (\S+)$")
_EXCEEDED = re.compile(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# What JAX puts around the names that a reader knows.
_WRAPPERS = re.compile(r"(?:jit|jvp|transpose|vmap|checkpoint|remat\w*)\(|\)|/(?:while|body|closed_call|checkpoint)\b")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One buffer of a program."""

    size_bytes: int
    shape: str
    made_by: str
    """Path of the operation in the model; the instruction's name where the compiler made it up."""


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """What `compiled.memory_analysis()` says of one device, as plain integers; None where a backend does not say.

    The peak is the device's own memory, without what is offloaded to the host.
    """

    argument_size_in_bytes: int | None
    output_size_in_bytes: int | None
    alias_size_in_bytes: int | None
    temp_size_in_bytes: int | None
    host_temp_size_in_bytes: int | None
    peak_memory_in_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Split:
    """Peak bytes of one device by what they hold; the parts add up to the peak."""

    weights: int
    teacher: int
    """Weights of a teacher that runs inside of the step."""
    optimizer: int
    gradients: int
    """Bytes of the gradients of what trains, at most what the arguments leave of the peak."""
    cache: int
    batch: int
    temporaries: int
    """Activations kept for the backward pass, gathered weights, and the program's working space."""


def device_memory(compiled: Any) -> DeviceMemory:
    """The memory analysis of a compiled function."""
    analysis = compiled.memory_analysis()
    found = DeviceMemory(*(getattr(analysis, field.name, None) for field in dataclasses.fields(DeviceMemory)))
    if found.argument_size_in_bytes is not None and (not found.peak_memory_in_bytes or found.host_temp_size_in_bytes):
        # A GPU's program states no peak, and a TPU's that offloads counts the host's memory in it; temporaries are one
        # allocation, so all parts are alive together.
        live = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        found = dataclasses.replace(found, peak_memory_in_bytes=live + found.temp_size_in_bytes)
    return found


def split_peak(peak_bytes: int, bytes_by_category: dict[str, int]) -> Split:
    """Splits a peak by the sizes of what is known; the rest is temporaries."""
    held = {name: bytes_by_category.get(name, 0) for name in ("weights", "teacher", "optimizer", "cache", "batch")}
    rest = max(0, peak_bytes - sum(held.values()))
    gradients = min(rest, bytes_by_category.get("gradients", 0))
    return Split(**held, gradients=gradients, temporaries=rest - gradients)


def argument_bytes(arguments: Any) -> int:
    """Bytes of one device that a step's abstract arguments take."""
    return sum(
        weights.storage_bytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))
        for leaf in jax.tree.leaves(arguments)
        if getattr(leaf, "sharding", None) is not None and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    )


def read_exhausted(message: str, held_bytes: int) -> int | None:
    """Bytes of a device that a program needs which was too large to compile, or None if the message does not say."""
    used = _USED.search(message)
    if used:
        return int(float(used[1]) * _UNITS[used[2]])
    exceeded = _EXCEEDED.search(message)
    return held_bytes + int(float(exceeded[1]) * _UNITS[exceeded[2]]) if exceeded else None


def largest_buffers(dump: pathlib.Path, count: int = 5) -> tuple[Buffer, ...]:
    """The largest temporaries that the compiler's dump lists, one for each place in memory; empty without a dump."""
    files = [path for path in dump.glob("*buffer-assignment.txt") if "jit" in path.name]
    if not files:
        return ()
    path = max(files, key=lambda p: p.stat().st_size)
    largest: dict[tuple[int, int], tuple[int, str, str]] = {}
    allocation, temporary = -1, False
    for line in path.read_text().splitlines():
        if line.startswith("allocation"):
            allocation, temporary = allocation + 1, "preallocated-temp" in line and "color" not in line
            continue
        value = _VALUE.match(line) if temporary else None
        if value:
            name, size, offset, shape = value[1], int(value[2]), int(value[3]), value[4]
            key = (allocation, offset)
            if size > largest.get(key, (0,))[0]:
                largest[key] = (size, shape.split("{")[0], name)
    chosen = sorted(largest.values(), reverse=True)[:count]
    names = _op_names(path, {name for *_, name in chosen})
    return tuple(Buffer(size, shape, names.get(name, name)) for size, shape, name in chosen)


def _op_names(assignment: pathlib.Path, wanted: set[str]) -> dict[str, str]:
    program = assignment.with_name(assignment.name.replace("-buffer-assignment", ""))
    if not program.exists():
        return {}
    names = {}
    for line in program.read_text().splitlines():
        name = line.lstrip().removeprefix("ROOT ").split(" ", 1)[0].lstrip("%")
        found = _OP_NAME.search(line) if name in wanted else None
        if found:
            names[name] = _WRAPPERS.sub("", found[1]).strip("/")
    return names
