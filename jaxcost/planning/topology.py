"""Compiles a step for chips that this machine does not have, and says whether it fits and how fast it could be.

The compilers are libtpu for TPU slices and JAX's CUDA plugin for NVIDIA GPUs, both from the package index; neither
needs its chips.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax

from jaxcost import sharding
from jaxcost.cost import estimate as estimates
from jaxcost.cost import hardware, hlo, links
from jaxcost.planning import memory, nvidia

# Without these libtpu looks for a real slice and for its neighbours; they must be set before it is loaded.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# A v4 chip is one device on a real machine, as in chips.json; the compiler's default is two.
_CHIP_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


class PlanningUnavailable(RuntimeError):
    """The compiler for the described chips is not installed, too old, or held by another process."""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What the compiler says about one step on a number of devices."""

    chip: str
    """Name of the chip."""
    num_devices: int
    """Devices of the slice."""
    fits: bool | None
    """Whether a device's peak is within its usable memory; None if either is unknown."""
    peak_bytes: int | None
    """Peak memory of one device; None if the step is too large to be compiled to the end."""
    usable_bytes: int | None
    """Memory of one device that a program may use."""
    cost: hlo.ProgramCost | None
    """FLOPs, traffic and memory of one device; None if the step is too large to be compiled."""
    estimate: estimates.Estimate | None
    """Lower bound, compiler's and calibrated estimate of the step; None if it is too large to be compiled."""
    message: str = ""
    """What the compiler said when the step did not fit."""
    needed_bytes: int | None = None
    """Bytes of a device that the step needs: its peak, or what the compiler said of a step that is too large."""
    largest: tuple[memory.Buffer, ...] = ()
    """The largest temporaries, by what made them."""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What a compiler made of a step, before anything is read from it; this is what a cache keeps."""

    num_devices: int
    text: str | None
    """The program of one device; None if the step does not fit."""
    memory: memory.DeviceMemory | None
    needed_bytes: int | None
    """Bytes of a device that the step needs; None if the compiler does not say."""
    largest: tuple[memory.Buffer, ...] = ()
    message: str = ""
    """What the compiler said when the step did not fit."""


def topology_chip(topology: str) -> hardware.Chip:
    """The chip of a topology such as `v5e:4x4`.

    Raises:
        ValueError: the chip is unknown, or neither a TPU nor a GPU.
    """
    chip = hardware.load_chip(_split(topology)[1])
    if chip.kind not in ("tpu", "gpu"):
        raise ValueError(f"the topology {topology!r} is of no TPU or GPU; use for example 'v5e:4x4' or 'h100:1x8'.")
    return chip


def _check_slice(topology: str, chip: hardware.Chip, sizes: list[int]) -> None:
    """ValueError for a slice that the compiler would describe although no pod holds it."""
    axes = sum(size > 1 for size in sizes)
    if axes > chip.torus_axes:
        raise ValueError(
            f"the topology {topology!r} has {axes} axes, and {chip.name} chips make a torus of {chip.torus_axes}; "
            f"give {chip.torus_axes} sizes."
        )
    largest = chip.pod_chips.value
    if largest is not None and math.prod(sizes) > largest:
        raise ValueError(
            f"the topology {topology!r} has {math.prod(sizes)} chips, and a pod of {chip.name} has {largest}; make it "
            f"smaller, or join slices by the network as in '2x{chip.name}:...'."
        )


@functools.cache
def topology_devices(topology: str) -> tuple[Any, ...]:
    """The described devices of slices that need not exist, slice by slice.

    Args:
        topology: chip and shape, for example `v5e:4x4` or `v5p:2x2x1`; two such slices are `2xv5e:4x4`; for GPUs hosts
            x GPUs a host, as in `h100:8x8`.

    Raises:
        PlanningUnavailable: the chip's compiler is not installed.
        ValueError: the chip is unknown or has no slice of this shape.
    """
    slices, chip_name, shape = _split(topology)
    chip = topology_chip(topology)
    sizes = [int(size) for size in shape.split("x")]
    if min(slices, *sizes) < 1:
        raise ValueError(f"the topology {topology!r} has no chips; every size must be at least 1.")
    if chip.kind == "gpu":
        if len(sizes) != 2 or slices != 1:
            raise ValueError(f"the topology {topology!r} is not hosts x GPUs a host; write for example 'h100:8x8'.")
        if not nvidia.installed():
            raise PlanningUnavailable(
                "planning for NVIDIA GPUs needs JAX's CUDA plugin; install it with pip install 'jaxcost[plan-gpu]'."
            )
        with _native_messages_held():
            return tuple(nvidia.describe(chip, *sizes))
    _check_slice(topology, chip, sizes)
    _require_libtpu()
    from jax.experimental import topologies

    options = dict(_CHIP_OPTIONS.get(chip_name, {}))
    wraps = links.wraps_of(chip, sizes)
    if any(wraps):
        # The compiler wants three axes, also for a chip that has two.
        options["wrap"] = [*wraps, False, False][:3]
    if slices > 1:
        options["num_slices"] = slices
    try:
        with _native_messages_held():
            described = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip_name}:{shape}", **options)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        if "lockfile" in said or "already in use" in said:
            raise PlanningUnavailable(
                f"another process holds libtpu; wait for it, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 ({said})."
            ) from error
        raise ValueError(f"the compiler knows no topology {topology!r}, change its shape: {said}") from error
    return tuple(described.devices)


def plan_step(
    jitted_step: Any, abstract_args: tuple[Any, ...], chip: hardware.Chip, static_args: Mapping[str, Any] | None = None
) -> StepPlan:
    """Compiles a step for the devices of its arguments and reads its memory, FLOPs and seconds.

    Args:
        jitted_step: the step under `jax.jit`.
        abstract_args: its arguments, trees of `jax.ShapeDtypeStruct` with `NamedSharding`s over one mesh of devices,
            described or real; the mesh is the current one while the step is traced.
        chip: figures of the mesh's chips.
        static_args: the step's static keyword arguments.

    Raises:
        ValueError: no argument says over which mesh it is sharded.
    """
    network = links.network_of(list(_mesh_of(abstract_args).devices.flat), chip)
    return read_step(compile_step(jitted_step, abstract_args, static_args), chip, network)


def compile_step(
    jitted_step: Any, abstract_args: tuple[Any, ...], static_args: Mapping[str, Any] | None = None
) -> CompiledStep:
    """The first, slow half of `plan_step`: everything that only the compiler knows."""
    mesh = _mesh_of(abstract_args)
    with contextlib.ExitStack() as stack:
        dump = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(jax.set_mesh(mesh))
        if _describes_gpus(mesh):
            stack.enter_context(nvidia.described_cudnn())
        lowered = jitted_step.lower(*abstract_args, **(static_args or {}))
        try:
            compiled, text = _compile(lowered, mesh, dump)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = memory.read_exhausted(str(error), memory.argument_bytes(abstract_args))
            message = str(error).splitlines()[0]
            return CompiledStep(mesh.size, None, None, needed, memory.largest_buffers(pathlib.Path(dump)), message)
        sizes = memory.device_memory(compiled)
        largest = memory.largest_buffers(pathlib.Path(dump))
    return CompiledStep(mesh.size, text, sizes, sizes.peak_memory_in_bytes, largest)


def read_step(compiled: CompiledStep, chip: hardware.Chip, network: links.Network) -> StepPlan:
    """The second half of `plan_step`: what the compiled program costs on chips that a network joins."""
    usable_bytes = chip.usable_bytes_per_device.value
    if compiled.text is None:
        return StepPlan(
            chip=chip.name,
            num_devices=compiled.num_devices,
            fits=False,
            peak_bytes=None,
            usable_bytes=usable_bytes,
            cost=None,
            estimate=None,
            message=compiled.message,
            needed_bytes=compiled.needed_bytes,
            largest=compiled.largest,
        )
    cost = hlo.program_cost(compiled.text, compiled.memory, compiled.num_devices)
    return StepPlan(
        chip=chip.name,
        num_devices=compiled.num_devices,
        fits=None if usable_bytes is None or cost.peak_bytes is None else cost.peak_bytes <= usable_bytes,
        peak_bytes=cost.peak_bytes,
        usable_bytes=usable_bytes,
        cost=cost,
        estimate=estimates.estimate(chip, cost, network),
        needed_bytes=cost.peak_bytes,
        largest=compiled.largest,
    )


def _mesh_of(abstract_args: tuple[Any, ...]) -> jax.sharding.Mesh:
    for leaf in jax.tree.leaves(abstract_args):
        if isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding):
            return leaf.sharding.mesh
    raise ValueError("no argument of the step has a NamedSharding; give the jax.ShapeDtypeStructs their shardings.")


def _compile(lowered: Any, mesh: jax.sharding.Mesh, dump: str) -> tuple[Any, str]:
    """The compiled step and its program's text; what the compiler says of its memory is left in the folder `dump`.

    A TPU's program is read from the compiler's dump: `as_text()` fails on v5p, v6e and tpu7x once something is
    offloaded to a SparseCore.
    """
    options = sharding.compiler_options(mesh)
    if _describes_gpus(mesh):
        options |= nvidia.COMPILER_OPTIONS
    if mesh.devices.flat[0].platform != "tpu":
        compiled = lowered.compile(compiler_options=options)
        return compiled, compiled.as_text()
    with _no_compilation_cache():
        compiled = lowered.compile(compiler_options=options | {"xla_dump_to": dump})
        dumps = list(pathlib.Path(dump).glob("*.after_codegen.txt"))
        # Small helper programs may be dumped beside the step.
        largest = max(dumps, key=lambda path: path.stat().st_size, default=None)
        return compiled, largest.read_text() if largest else compiled.as_text()


def _describes_gpus(mesh: jax.sharding.Mesh) -> bool:
    return mesh.devices.flat[0].platform == "gpu" and jax.default_backend() != "gpu"


@contextlib.contextmanager
def _no_compilation_cache():
    """A step from JAX's cache would leave no dump, and one for described devices cannot be read back from it."""
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX remembers whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _split(topology: str) -> tuple[int, str, str]:
    """Slices, chip and shape of a topology."""
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9]*):(\d+(?:x\d+)*)", topology)
    if not match:
        raise ValueError(
            f"the topology is {topology!r}; write a chip and a shape, for example 'v5e:4x4', or '2xv5e:4x4' for two."
        )
    return int(match[1] or 1), match[2], match[3]


@contextlib.contextmanager
def _native_messages_held():
    """Holds back what a compiler's library writes to standard error, of chips that are not here.

    What it says of a failure of its own, an error of JAX's, is in that error.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, os.fdopen(os.dup(2), "wb") as shown:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise
            held.seek(0)
            shown.write(held.read())
            raise
        finally:
            os.dup2(shown.fileno(), 2)


def _require_libtpu():
    """Prepares the environment for libtpu.

    Raises:
        PlanningUnavailable: it is not installed, or older than the one that JAX was made for.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise PlanningUnavailable("planning for TPUs needs libtpu; install it with pip install 'jaxcost[plan]'.")
    installed, wanted = importlib.metadata.version("libtpu"), _libtpu_of_jax()
    if wanted and _numbers(installed) < _numbers(wanted):
        # It would crash the process: a step is in a form that it does not know.
        raise PlanningUnavailable(
            f"libtpu {installed} is older than the {wanted} that JAX {jax.__version__} was made for; upgrade it with "
            f"pip install 'libtpu>={wanted}'."
        )
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _libtpu_of_jax() -> str | None:
    """The version of libtpu that JAX's own metadata names."""
    for requirement in importlib.metadata.requires("jax") or ():
        match = re.match(r"libtpu[=~><]=([\d.]*\d)", requirement)
        if match:
            return match[1]
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
