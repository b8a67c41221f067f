"""How often a loop of a compiled program runs, found by following its integer scalars; no trip count is guessed."""

from __future__ import annotations

import dataclasses
import operator
import re
from typing import Any

from jaxcost.cost import hlo_text

Values = tuple[Any, ...]
"""Known values of a computation's arguments: an integer, a tuple of such values, or None if unknown."""

_MOST_STEPS = 200_000
_ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARISONS = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_UNCHANGED = frozenset({"bitcast", "convert", "copy", "opt-barrier", "reshape"})


@dataclasses.dataclass(frozen=True)
class Loop:
    """What is known of a `while` before it runs."""

    trips: int | None
    """How often the body runs, or None if its condition depends on data."""
    invariants: Values
    """The body's argument: scalars that no trip changes, None for everything else."""


class Scalars:
    """Integer scalars of one run of a computation, as far as they do not depend on data."""

    def __init__(self, module: hlo_text.Module, computation: hlo_text.Computation, arguments: Values = ()):
        self.module = module
        self.computation = computation
        self._arguments = arguments
        self._known: dict[str, Any] = {}

    def value(self, name: str) -> Any:
        """An integer, a tuple of values, or None if it depends on data or on an operation that we do not follow."""
        if name not in self._known:
            self._known[name] = self._evaluate(self.computation.instructions[name])
        return self._known[name]

    def operands(self, instruction: hlo_text.Instruction) -> Values:
        """The values of an instruction's operands."""
        return tuple(self.value(name) for name in instruction.operands)

    def _evaluate(self, instruction: hlo_text.Instruction) -> Any:
        opcode, operands = instruction.opcode, instruction.operands
        if not instruction.is_tuple and not _is_integer_scalar(instruction):
            return None
        if opcode == "parameter":
            number = int(operands[0])
            return self._arguments[number] if number < len(self._arguments) else None
        if opcode == "constant":
            return _literal(operands[0])
        if opcode == "tuple":
            return self.operands(instruction)
        if opcode == "get-tuple-element":
            elements = self.value(operands[0])
            return elements[_tuple_index(instruction)] if isinstance(elements, tuple) else None
        if opcode in ("fusion", "call"):
            callee = self.module.computations[instruction.computation("calls" if opcode == "fusion" else "to_apply")]
            return Scalars(self.module, callee, self.operands(instruction)).value(callee.root)
        if opcode in _UNCHANGED:
            return self.value(operands[0])
        if opcode in _ARITHMETIC or opcode == "compare":
            left, right = self.operands(instruction)
            if left is None or right is None:
                return None
            function = _ARITHMETIC.get(opcode) or _COMPARISONS[instruction.text(r"\bdirection=(\w+)")]
            return function(left, right)
        return None


def read_loop(scalars: Scalars, loop: hlo_text.Instruction) -> Loop:
    """Trip count and invariants of a `while` instruction.

    The count is the compiler's own where it states one (CPU, GPU). Otherwise (TPU) the loop's integer scalars are
    stepped from their start until the condition fails, which is exact for any start, step and comparison.

    Args:
        scalars: those of the computation that holds the loop.
        loop: the `while` instruction.
    """
    module = scalars.module
    body = module.computations[loop.computation("body")]
    condition = module.computations[loop.computation("condition")]
    (start,) = scalars.operands(loop)
    stated = loop.text(r'"known_trip_count":\{"n":"(\d+)"\}')
    trips = int(stated) if stated else _step_through(module, body, condition, start)
    return Loop(trips, _invariants(body, start))


def _step_through(
    module: hlo_text.Module, body: hlo_text.Computation, condition: hlo_text.Computation, start: Any
) -> int | None:
    state = start
    for trip in range(_MOST_STEPS):
        proceed = Scalars(module, condition, (state,)).value(condition.root)
        if proceed is None:
            return None
        if not proceed:
            return trip
        state = Scalars(module, body, (state,)).value(body.root)
    return None


def _invariants(body: hlo_text.Computation, start: Any) -> Values | None:
    """The elements of the carried tuple that the body hands on as it got them."""
    root = body.instructions[body.root]
    if root.opcode != "tuple" or not isinstance(start, tuple):
        return None
    return tuple(
        value if _passes_on(body, name, index) else None
        for index, (name, value) in enumerate(zip(root.operands, start, strict=True))
    )


def _passes_on(body: hlo_text.Computation, name: str, index: int) -> bool:
    instruction = body.instructions[name]
    while instruction.opcode == "copy":
        instruction = body.instructions[instruction.operands[0]]
    return (
        instruction.opcode == "get-tuple-element"
        and instruction.operands[0] in body.parameter_names
        and _tuple_index(instruction) == index
    )


def _tuple_index(instruction: hlo_text.Instruction) -> int:
    return int(instruction.text(r"\bindex=(\d+)"))


def _is_integer_scalar(instruction: hlo_text.Instruction) -> bool:
    return all(not shape.sizes and re.fullmatch(r"[su]\d+|pred", shape.dtype) for shape in instruction.shapes)


def _literal(text: str) -> int | None:
    if text in ("true", "false"):
        return int(text == "true")
    return int(text) if text.lstrip("-").isdigit() else None
