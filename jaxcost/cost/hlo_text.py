"""Reads the text of a compiled XLA program into computations, instructions and shapes; it judges nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
_END = re.compile(r"^\}(?:, execution_thread=\"[^\"]*\")?\s*$")
_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) (?:\(.*\) -> .* )?\{$")
_ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.$-]+) = ")
_OPEN, _CLOSE = "([{", ")]}"


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's element type (XLA's name: `f32`, `s8`, ...) and sizes."""

    dtype: str
    sizes: tuple[int, ...]
    space: int = 0
    """Memory that holds it: 0 is the device's main memory; on a TPU 1 is vector memory and 5 the host's."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the array without padding, rounded up to whole bytes."""
        return -(-self._bits() * math.prod(self.sizes) // 8)

    def _bits(self) -> int:
        if self.dtype in _BITS:
            return _BITS[self.dtype]
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        if not digits:
            raise ValueError(f"the program holds an array of the unknown type {self.dtype!r}.")
        return int(digits[1])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Arrays of the result: one, or a tuple's leaves in order."""
    is_tuple: bool
    operands: tuple[str, ...]
    """Names of the operands; for a constant or a parameter, its literal or number."""
    attributes: str
    """Everything after the operands."""

    def computation(self, key: str) -> str | None:
        """The computation named by an attribute (`calls`, `to_apply`, `body`, `condition`), or None."""
        match = re.search(rf"\b{key}=%?([\w.$-]+)", self.attributes)
        return match[1] if match else None

    def sizes(self, key: str) -> tuple[int, ...]:
        """The integers of an attribute such as `lhs_contracting_dims={0,1}`; empty if it is absent."""
        match = re.search(rf"\b{key}=\{{([^}}]*)\}}", self.attributes)
        return tuple(int(d) for d in match[1].split(",") if d) if match else ()

    def text(self, pattern: str) -> str | None:
        """The first group of a regular expression found among the attributes, or None."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameter_names(self) -> frozenset[str]:
        """Names of the instructions that are parameters."""
        return frozenset(i.name for i in self.instructions.values() if i.opcode == "parameter")


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations and on how many devices it runs."""

    computations: dict[str, Computation]
    entry: str
    num_partitions: int
    num_replicas: int


def parse_module(text: str) -> Module:
    """Reads a program printed by `compiled.as_text()` or by the compiler's dump after code generation.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = None, None, []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if name is None and header and not line.startswith("HloModule"):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif name is not None and _END.match(line):
            computations[name] = _parse_computation(name, lines)
            name = None
        elif name is not None:
            lines.append(line)
    if entry is None:
        raise ValueError("the text is not a compiled program: it has no ENTRY computation.")
    header_line = text[text.find("HloModule") :].split("\n", 1)[0]
    return Module(
        computations, entry, _header_count(header_line, "num_partitions"), _header_count(header_line, "replica_count")
    )


def _header_count(line: str, key: str) -> int:
    match = re.search(rf"\b{key}=(\d+)", line)
    return int(match[1]) if match else 1


def _parse_computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, None
    for line in _whole_instructions(lines):
        instruction, is_root = _parse_instruction(line)
        instructions[instruction.name] = instruction
        root = instruction.name if is_root or root is None else root
    if root is None:
        raise ValueError(f"the program's computation {name!r} is empty.")
    return Computation(name, instructions, root)


def _whole_instructions(lines: list[str]) -> Iterator[str]:
    """Joins what was broken over lines: kernels carry raw newlines in their attributes."""
    current: list[str] = []
    for line in lines:
        if _ASSIGNMENT.match(line):
            if current:
                yield " ".join(current)
            current = [line]
        elif current:
            current.append(line)
    if current:
        yield " ".join(current)


def _parse_instruction(line: str) -> tuple[Instruction, bool]:
    """One instruction and whether it is the root: `ROOT %name = TYPE opcode(operands), attributes`."""
    line = _COMMENT.sub("", line)
    assignment = _ASSIGNMENT.match(line)
    rest = line[assignment.end() :]
    type_end = _end_of(rest, 0, " ")
    opcode_end = rest.index("(", type_end)
    operands_end = _end_of(rest, opcode_end + 1, ")")
    instruction = Instruction(
        name=assignment[2],
        opcode=rest[type_end:opcode_end].strip(),
        shapes=tuple(_shapes(rest[:type_end])),
        is_tuple=rest.startswith("("),
        operands=tuple(_operands(rest[opcode_end + 1 : operands_end])),
        attributes=rest[operands_end + 1 :],
    )
    return instruction, bool(assignment[1])


def _end_of(text: str, start: int, stop: str) -> int:
    """Position of the first `stop` after `start` that is outside all brackets, or the text's length."""
    depth = 0
    for position in range(start, len(text)):
        character = text[position]
        if character == stop and depth == 0:
            return position
        if character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
    return len(text)


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, sizes, space in _ARRAY.findall(text):
        yield Shape(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), int(space or 0))


def _operands(text: str) -> Iterator[str]:
    """Names of the operands, whether or not their types stand before them."""
    start = 0
    while start < len(text):
        end = _end_of(text, start, ",")
        yield text[start:end].split()[-1].lstrip("%") if text[start:end].split() else ""
        start = end + 1
