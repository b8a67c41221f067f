"""What the executed instructions of a compiled program take besides FLOPs: cycles, memory traffic, kernels.

A TPU's compiler writes on most fusions how many cycles it expects them to take. That is read here, with the bytes that
each instruction moves through the device's main memory (what stays in vector memory is not counted) and between device
and host. Calls of Pallas kernels carry no cycles: they are collected with their shapes, for the cost functions that
the kernels declare. Whatever takes time and has no estimate is listed by name.
"""

from __future__ import annotations

import collections
import dataclasses
import re

from jaxcost.cost import hlo_text

MATMUL, ELEMENTWISE = "matmul", "elementwise"
VECTOR_MEMORY, HOST_MEMORY = 1, 5
_DEVICE_MEMORY = 0
KERNEL = re.compile(r"tpu_custom_call|__cudnn\$fmha\w+")
"""Call targets of kernels that the compiler does not see into: Pallas on TPU, cuDNN's attention."""
# What names or regroups values and takes no time.
_FREE = frozenset(
    {
        "add-dependency",
        "after-all",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
        "while",
    }
)
# Priced from their bytes over the links.
_EXCHANGES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)
_MATRIX = frozenset({"convolution", "dot"})
_UNKNOWN_CYCLES = 2**63 - 1
"""What the compiler writes on what it cannot time, such as some products with ragged groups."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of a kernel that the compiler does not see into."""

    name: str
    """The kernel's path in the traced program, which ends with the kernel's own name."""
    operands: tuple[hlo_text.Shape, ...]
    results: tuple[hlo_text.Shape, ...]


@dataclasses.dataclass
class Work:
    """Totals over all executed instructions of a program, loops multiplied out."""

    cycles: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """The compiler's cycles of instructions that multiply matrices (`matmul`) and of all others (`elementwise`)."""
    hbm_bytes: int = 0
    """Bytes read from and written to the device's main memory."""
    hbm_bytes_elementwise: int = 0
    """The part of `hbm_bytes` that instructions without a matmul move."""
    host_bytes: int = 0
    """Bytes moved between the device and the host's memory."""
    kernels: collections.Counter[Kernel] = dataclasses.field(default_factory=collections.Counter)
    """Calls of such kernels, and how often."""
    steps: collections.Counter[tuple[str, int, int]] = dataclasses.field(default_factory=collections.Counter)
    """What each instruction does: operand type, FLOPs, bytes of main memory → how often."""
    untimed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Instructions that take time and have no estimate: opcode or call target → places in the program."""

    def add(self, other: Work, times: int = 1):
        for mine, theirs in (
            (self.cycles, other.cycles),
            (self.kernels, other.kernels),
            (self.steps, other.steps),
        ):
            for key, count in theirs.items():
                mine[key] += count * times
        self.hbm_bytes += other.hbm_bytes * times
        self.hbm_bytes_elementwise += other.hbm_bytes_elementwise * times
        self.host_bytes += other.host_bytes * times
        self.untimed.update(other.untimed)


def work_of(
    module: hlo_text.Module, computation: hlo_text.Computation, instruction: hlo_text.Instruction
) -> Work | None:
    """The work of one executed instruction, or None if it takes no time of its own."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or _is_scalar(instruction):
        return None
    work = Work()
    if opcode == "async-start":
        return _moved_beside(module, instruction)
    if opcode.startswith(_EXCHANGES):
        return work
    if opcode == "custom-call":
        _add_custom_call(work, computation, instruction)
    traffic = _Traffic(module, computation, instruction)
    work.hbm_bytes, work.host_bytes = traffic.hbm_bytes(), traffic.host_bytes()
    if opcode == "custom-call":
        return work
    if opcode.endswith("-start"):
        work.hbm_bytes_elementwise = work.hbm_bytes
        return work
    is_matmul = opcode in _MATRIX or (opcode == "fusion" and _multiplies(module, instruction.computation("calls")))
    if not is_matmul:
        work.hbm_bytes_elementwise = work.hbm_bytes
    cycles = instruction.text(r'"estimated_cycles":"(\d+)"')
    if cycles is not None and int(cycles) < _UNKNOWN_CYCLES:
        work.cycles[MATMUL if is_matmul else ELEMENTWISE] += int(cycles)
    elif work.hbm_bytes and not work.host_bytes:
        work.untimed[opcode] += 1
    return work


def _moved_beside(module: hlo_text.Module, instruction: hlo_text.Instruction) -> Work:
    """What an operation that runs beside the program moves; it takes none of the program's cycles."""
    work = Work()
    computation = module.computations[instruction.computation("calls")]
    for inner in computation.instructions.values():
        inside = work_of(module, computation, inner)
        if inside is not None:
            work.hbm_bytes += inside.hbm_bytes
            work.hbm_bytes_elementwise += inside.hbm_bytes
            work.host_bytes += inside.host_bytes
    return work


def _add_custom_call(work: Work, computation: hlo_text.Computation, instruction: hlo_text.Instruction):
    target = instruction.text(r'custom_call_target="([^"]*)"') or ""
    if KERNEL.fullmatch(target):
        path = (instruction.text(r'op_name="([^"]*)"') or instruction.name).removesuffix("/pallas_call")
        mask = instruction.text(r'"mask_type": ?"(\w+)"')
        if mask is not None:
            # cuDNN's call names neither its part nor its mask in the path.
            path = f"{path}/{mask.lower()}/{target}"
        operands = tuple(shape for name in instruction.operands for shape in computation.instructions[name].shapes)
        work.kernels[Kernel(path, _anywhere(operands), _anywhere(instruction.shapes))] += 1


def _anywhere(shapes: tuple[hlo_text.Shape, ...]) -> tuple[hlo_text.Shape, ...]:
    return tuple(hlo_text.Shape(shape.dtype, shape.sizes) for shape in shapes)


def _is_scalar(instruction: hlo_text.Instruction) -> bool:
    return not instruction.is_tuple and all(not shape.sizes for shape in instruction.shapes)


def _multiplies(module: hlo_text.Module, name: str) -> bool:
    for instruction in module.computations[name].instructions.values():
        if instruction.opcode in _MATRIX:
            return True
        if instruction.opcode == "fusion" and _multiplies(module, instruction.computation("calls")):
            return True
    return False


class _Traffic:
    """Bytes that one instruction moves, slices and updates in place counted as what they touch."""

    def __init__(self, module: hlo_text.Module, computation: hlo_text.Computation, instruction: hlo_text.Instruction):
        self._moved: list[tuple[int, int]] = []
        fused = instruction.computation("calls") if instruction.opcode == "fusion" else None
        inside = module.computations[fused] if fused else None
        updates = _updates_in_place(inside)
        for number, name in enumerate(instruction.operands):
            for shape in computation.instructions[name].shapes if name in computation.instructions else ():
                touched = shape.num_bytes if inside is None else _touched_bytes(inside, number, shape.num_bytes)
                self._moved.append((shape.space, touched))
        # The result of what only starts is a tuple: what is made, what is read, and the state.
        for shape in instruction.shapes[:1] if instruction.opcode.endswith("-start") else instruction.shapes:
            self._moved.append((shape.space, updates.get(shape.sizes, shape.num_bytes)))
        if instruction.opcode in ("dynamic-slice", "dynamic-update-slice", "slice", "gather"):
            self._moved = [(space, min(size, self._smallest(instruction, computation))) for space, size in self._moved]

    @staticmethod
    def _smallest(instruction: hlo_text.Instruction, computation: hlo_text.Computation) -> int:
        if instruction.opcode == "dynamic-update-slice":
            return computation.instructions[instruction.operands[1]].shapes[0].num_bytes
        return instruction.shapes[0].num_bytes

    def hbm_bytes(self) -> int:
        return sum(size for space, size in self._moved if space == _DEVICE_MEMORY)

    def host_bytes(self) -> int:
        return sum(size for space, size in self._moved if space == HOST_MEMORY)


def _touched_bytes(inside: hlo_text.Computation, number: int, whole: int) -> int:
    """Bytes of a fusion's operand that it reads: those of its slices if slices are all that is made of it."""
    parameter = next(
        (i.name for i in inside.instructions.values() if i.opcode == "parameter" and i.operands == (str(number),)), None
    )
    users = [i for i in inside.instructions.values() if parameter in i.operands]
    touched = 0
    for user in users:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter:
            touched += user.shapes[0].num_bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter:
            continue
        else:
            return whole
    return min(touched, whole)


def _updates_in_place(inside: hlo_text.Computation | None) -> dict[tuple[int, ...], int]:
    """Result sizes of a fusion that updates a slice of an operand → bytes of the slice."""
    updates = {}
    for instruction in inside.instructions.values() if inside else ():
        if instruction.opcode == "dynamic-update-slice":
            updates[instruction.shapes[0].sizes] = inside.instructions[instruction.operands[1]].shapes[0].num_bytes
    return updates
