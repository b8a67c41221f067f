"""What one device's compiled program costs: FLOPs, link traffic and memory, read from the program itself.

The compiler's own `cost_analysis()` counts a loop's body once, however often it runs, so nothing is taken from it.
FLOPs are those of every dot and convolution, times the trips of the loops around them, by the types of the operands
as compiled: a CPU widens a bf16 matmul with a bf16 result to f32, and it is counted as f32. A compiler may also turn
a matrix-vector product into multiplies and a sum; those are elementwise and, like all elementwise work, not counted.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

import numpy as np

from jaxcost.cost import contractions, hlo_loops, hlo_text, hlo_work
from jaxcost.cost.links import Collective

_CALLS = {
    "fusion": "calls",
    "call": "to_apply",
    "async-start": "calls",
    "call-start": "calls",
    "fusion-start": "calls",
}
_NOT_COUNTED = frozenset(
    {
        "cholesky",
        "convolution-start",
        "dot-start",
        "fft",
        "ragged-all-to-all",
        "ragged-dot",
        "scaled-dot",
        "triangular-solve",
    }
)
# Custom calls that move or describe data and multiply nothing.
_FREE_CUSTOM_CALLS = frozenset(
    {
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "AsyncCollectiveDone",
        "AsyncCollectiveStart",
        "ConcatBitcast",
        "Sharding",
        "TopK",
    }
)
_COLLECTIVES = frozenset(
    {"all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter"}
)
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Cost of one run of a compiled program on one of its devices."""

    flops: int
    """Hardware FLOPs of all dots and convolutions, multiply-add = 2, recomputation included."""
    flops_by_type: dict[str, int]
    """FLOPs by operand type as compiled."""
    num_devices: int
    """Devices that run the program together."""
    collectives: tuple[Collective, ...]
    """Exchanges between devices."""
    collective_bytes: int
    """Bytes that the device sends over its links."""
    argument_bytes: int | None
    """Bytes of the arguments on the device; None where the backend does not say."""
    output_bytes: int | None
    """Bytes of the results on the device, those in donated buffers included."""
    alias_bytes: int | None
    """Bytes of the results that reuse a donated argument."""
    temp_bytes: int | None
    """Bytes of temporaries at their peak."""
    peak_bytes: int | None
    """Peak bytes of the device: arguments, results and temporaries alive together."""
    unestimated: tuple[str, ...]
    """What could not be read, by name: custom kernels, loops of unknown length. In no total."""
    work: hlo_work.Work = dataclasses.field(default_factory=hlo_work.Work)
    """Cycles, memory traffic and kernel calls of one device."""

    @property
    def total_flops(self) -> int:
        """FLOPs over all devices."""
        return self.flops * self.num_devices


def compiled_cost(compiled: Any) -> ProgramCost:
    """Reads a compiled function (`jax.jit(f).lower(...).compile()`).

    Raises:
        ValueError: the backend prints no program that can be read.
    """
    text = compiled.as_text()
    if text is None:
        raise ValueError("this backend does not print its compiled programs, so their cost cannot be read.")
    return program_cost(text, compiled.memory_analysis())


def program_cost(text: str, memory: Any = None, num_devices: int | None = None) -> ProgramCost:
    """Reads a compiled program's text.

    Args:
        text: the program of one device as XLA prints it.
        memory: what `compiled.memory_analysis()` returned, if there is one.
        num_devices: devices that run it together; by default those that it names, which are those of one slice.

    Raises:
        ValueError: the text is not a compiled program.
    """
    module = hlo_text.parse_module(text)
    reader = _Reader(module)
    cost = reader.cost_of(module.entry, ())
    collectives = tuple(Collective(*key, times) for key, times in cost.collectives.items())
    return ProgramCost(
        flops=cost.tally.total_flops,
        flops_by_type=dict(cost.tally.by_type),
        num_devices=num_devices or reader.num_devices,
        collectives=collectives,
        collective_bytes=sum(collective.link_bytes for collective in collectives),
        argument_bytes=getattr(memory, "argument_size_in_bytes", None),
        output_bytes=getattr(memory, "output_size_in_bytes", None),
        alias_bytes=getattr(memory, "alias_size_in_bytes", None),
        temp_bytes=getattr(memory, "temp_size_in_bytes", None),
        peak_bytes=getattr(memory, "peak_memory_in_bytes", None),
        unestimated=cost.tally.listed(),
        work=cost.work,
    )


@dataclasses.dataclass
class _Cost:
    """Running totals of a computation; a collective's key is its kind, operand bytes and first group."""

    tally: contractions.FlopTally = dataclasses.field(default_factory=contractions.FlopTally)
    collectives: collections.Counter[tuple[str, int, tuple[int, ...]]] = dataclasses.field(
        default_factory=collections.Counter
    )
    work: hlo_work.Work = dataclasses.field(default_factory=hlo_work.Work)

    def add(self, other: _Cost, times: int = 1):
        self.tally.add(other.tally, times)
        self.work.add(other.work, times)
        for key, count in other.collectives.items():
            self.collectives[key] += count * times


class _Reader:
    """Walks a module from its entry, following calls and loops."""

    def __init__(self, module: hlo_text.Module):
        self._module = module
        self.num_devices = module.num_partitions * module.num_replicas
        self._seen_channels: set[str] = set()

    def cost_of(self, name: str, arguments: hlo_loops.Values) -> _Cost:
        """Cost of one run of a computation whose scalar arguments are known where `arguments` says so."""
        scalars = hlo_loops.Scalars(self._module, self._module.computations[name], arguments)
        cost = _Cost()
        for instruction in scalars.computation.instructions.values():
            part = _Cost()
            self._add_instruction(part, scalars, instruction)
            work = hlo_work.work_of(self._module, scalars.computation, instruction)
            if work is not None:
                kind = max(part.tally.by_type, key=part.tally.by_type.get, default="")
                if not work.kernels:
                    work.steps[(kind, part.tally.total_flops, work.hbm_bytes)] += 1
                part.work.add(work)
            cost.add(part)
        return cost

    def _add_instruction(self, cost: _Cost, scalars: hlo_loops.Scalars, instruction: hlo_text.Instruction):
        opcode, computation = instruction.opcode, scalars.computation
        if opcode == "dot":
            self._add_dot(cost, computation, instruction)
        elif opcode == "convolution":
            self._add_convolution(cost, computation, instruction)
        elif opcode in _CALLS:
            called = self.cost_of(instruction.computation(_CALLS[opcode]), scalars.operands(instruction))
            if opcode != "call":
                # What is fused, or runs beside the program, takes no time of its own.
                called.work = hlo_work.Work()
            cost.add(called)
        elif opcode == "while":
            self._add_loop(cost, scalars, instruction)
        elif opcode == "conditional":
            branches = [self.cost_of(branch, ()) for branch in _branches(instruction)]
            cost.add(max(branches, key=lambda branch: (branch.tally.total_flops, sum(branch.work.cycles.values()))))
        elif opcode.removesuffix("-start") in _COLLECTIVES:
            self._add_collective(cost, computation, instruction)
        elif opcode in ("send", "recv"):
            self._add_transfer(cost, computation, instruction)
        elif opcode in ("custom-call", "custom-call-start"):
            self._add_custom_call(cost, scalars, instruction)
        elif opcode in _NOT_COUNTED:
            cost.tally.unestimated[opcode] += 1

    def _add_custom_call(self, cost: _Cost, scalars: hlo_loops.Scalars, instruction: hlo_text.Instruction):
        """Reads a call that names the computations it stands for; lists any other that may multiply something."""
        target = instruction.text(r'custom_call_target="([^"]*)"')
        called = _listed_computations(instruction, "called_computations")
        for name in called:
            cost.add(self.cost_of(name, scalars.operands(instruction)))
        if not called and target not in _FREE_CUSTOM_CALLS:
            cost.tally.unestimated[f"custom-call {target}"] += 1

    def _add_loop(self, cost: _Cost, scalars: hlo_loops.Scalars, instruction: hlo_text.Instruction):
        loop = hlo_loops.read_loop(scalars, instruction)
        body = self.cost_of(instruction.computation("body"), (loop.invariants,))
        if loop.trips is not None:
            cost.add(body, loop.trips)
            return
        cost.tally.add_unknown_loop(f"while {instruction.name}", body.tally)
        for kind, operand_bytes, group in body.collectives:
            cost.tally.unestimated[
                f"while {instruction.name}: unknown trip count, {kind} of {operand_bytes} bytes in {len(group)} devices"
            ] += 1

    def _add_dot(self, cost: _Cost, computation: hlo_text.Computation, instruction: hlo_text.Instruction):
        lhs, rhs = (computation.instructions[name].shapes[0] for name in instruction.operands[:2])
        contracting = [lhs.sizes[d] for d in instruction.sizes("lhs_contracting_dims")]
        cost.tally.count(lhs.dtype, rhs.dtype, contractions.dot_flops(instruction.shapes[0].sizes, contracting))

    def _add_convolution(self, cost: _Cost, computation: hlo_text.Computation, instruction: hlo_text.Instruction):
        lhs, rhs = (computation.instructions[name].shapes[0] for name in instruction.operands[:2])
        lhs_labels, rhs_labels, output_labels = re.split("_|->", instruction.text(r"\bdim_labels=([\w?]+->[\w?]+)"))
        output = instruction.shapes[0]
        rank = len(output.sizes) - 2
        fields = {
            key: value.split("x")
            for key, value in re.findall(r"(\w+)=([\dx_-]+)", instruction.text(r"\bwindow=\{([^}]*)\}") or "")
        }
        window = [
            contractions.WindowDimension(
                input_size=lhs.sizes[lhs_labels.index(str(i))],
                kernel_size=rhs.sizes[rhs_labels.index(str(i))],
                output_size=output.sizes[output_labels.index(str(i))],
                stride=int(fields["stride"][i]) if "stride" in fields else 1,
                padding_low=int(fields["pad"][i].split("_")[0]) if "pad" in fields else 0,
                input_dilation=int(fields["lhs_dilate"][i]) if "lhs_dilate" in fields else 1,
                kernel_dilation=int(fields["rhs_dilate"][i]) if "rhs_dilate" in fields else 1,
            )
            for i in range(rank)
        ]
        flops = contractions.convolution_flops(
            output.sizes[output_labels.index("b")],
            output.sizes[output_labels.index("f")],
            rhs.sizes[rhs_labels.index("i")],
            window,
        )
        cost.tally.count(lhs.dtype, rhs.dtype, flops)

    def _add_collective(self, cost: _Cost, computation: hlo_text.Computation, instruction: hlo_text.Instruction):
        channel = instruction.text(r"\bchannel_id=(\d+)")
        if channel in self._seen_channels:
            return
        if channel:
            # A TPU program prints one asynchronous exchange as several clones that share its channel.
            self._seen_channels.add(channel)
        kind = instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        operands = [computation.instructions[name] for name in instruction.operands]
        operand_bytes = sum(shape.num_bytes for operand in operands for shape in operand.shapes)
        group = _first_group(instruction, self.num_devices)
        if group is None:
            cost.tally.unestimated[f"{kind} {instruction.name}: unreadable replica groups"] += 1
        else:
            cost.collectives[(kind, operand_bytes, group)] += 1

    def _add_transfer(self, cost: _Cost, computation: hlo_text.Computation, instruction: hlo_text.Instruction):
        """Reads what slices send to each other; a program of several slices names the devices of one."""
        kind = instruction.text(r'_xla_megascale_transfer_type="([^"]*)"')
        slices = instruction.text(r'_xla_megascale_target="\{([\d:,]*)\}x')
        if kind is None or slices is None:
            cost.tally.unestimated[instruction.opcode] += 1
        elif instruction.opcode == "send":
            operand_bytes = sum(shape.num_bytes for shape in computation.instructions[instruction.operands[0]].shapes)
            group = tuple(number * self.num_devices for number in range(_count(slices)))
            cost.collectives[(kind.lower().replace("_", "-"), operand_bytes, group)] += 1


def _listed_computations(instruction: hlo_text.Instruction, key: str) -> list[str]:
    """The computations of an attribute such as `branch_computations={%a, %b}`; empty if it is absent."""
    listed = instruction.text(rf"\b{key}=\{{([^}}]*)\}}")
    return [name.strip().lstrip("%") for name in listed.split(",")] if listed else []


def _branches(instruction: hlo_text.Instruction) -> list[str]:
    """Computations of a conditional, in either of the two forms that XLA prints."""
    listed = _listed_computations(instruction, "branch_computations")
    return listed or [instruction.computation("true_computation"), instruction.computation("false_computation")]


def _first_group(instruction: hlo_text.Instruction, num_devices: int) -> tuple[int, ...] | None:
    """Devices of the first replica group (of a permute, its first pair), or None in a form that we do not read."""
    pair = instruction.text(r"source_target_pairs=\{\{(\d+,\d+)\}")
    listed = pair or instruction.text(r"replica_groups=\{\{([\d,]+)\}")
    if listed:
        return tuple(int(device) for device in listed.split(","))
    mesh = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", instruction.attributes
    )
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        if not re.fullmatch(r"'[^':]+'(?:,\s*'[^':]+')*", mesh[4]):
            return None
        grouped = re.findall(r"'([^']+)'", mesh[4])
        order = [*(axis for axis in sizes if axis not in grouped), *grouped]
        devices = _iota(mesh[2], mesh[3]) if mesh[2] else np.arange(np.prod(list(sizes.values())))
        devices = devices.reshape(tuple(sizes.values())).transpose([list(sizes).index(axis) for axis in order])
        return tuple(devices.reshape(-1, np.prod([sizes[axis] for axis in grouped]))[0].tolist())
    iota = re.search(rf"replica_groups=\[\d+,(\d+)\]<={_IOTA}", instruction.attributes)
    if iota:
        return tuple(_iota(iota[2], iota[3]).reshape(-1, int(iota[1]))[0].tolist())
    return tuple(range(num_devices)) if "replica_groups={}" in instruction.attributes else None


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """The devices of a list such as `[2,4]T(1,0)`: all in order, as an array of these sizes with its axes turned."""
    shape = [int(size) for size in sizes.split(",")]
    devices = np.arange(np.prod(shape)).reshape(shape)
    return devices.transpose([int(axis) for axis in order.split(",")]) if order else devices


def _count(ranges: str) -> int:
    """How many numbers a list such as `1,3:5` holds."""
    bounds = [part.split(":") for part in ranges.split(",")]
    return sum(int(bound[-1]) - int(bound[0]) + 1 for bound in bounds)
