"""FLOPs of one dot or convolution from its shapes, and the tally that the jaxpr and the program readers share.

FLOPs are operations: a multiply-add is two. Only contractions are counted; elementwise work is bound by memory.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

OPERAND_TYPE_NAMES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "s64": "int64",
    "u64": "int64",
    "uint64": "int64",
    "s32": "int32",
    "u32": "int32",
    "uint32": "int32",
    "s16": "int16",
    "u16": "int16",
    "uint16": "int16",
    "s8": "int8",
    "u8": "int8",
    "uint8": "int8",
    "s4": "int4",
    "u4": "int4",
    "uint4": "int4",
    "s2": "int2",
    "u2": "int2",
    "uint2": "int2",
    "pred": "bool",
    "c64": "complex64",
    "c128": "complex128",
}

# From the narrowest to the widest: a contraction of two different types runs at the wider one's rate.
_WIDTH_ORDER = ("bool", "int2", "int4", "fp4", "int8", "fp8", "int16", "f16", "bf16", "int32", "f32", "int64", "f64")


def operand_type(name: str) -> str:
    """One name for a number format, whether it comes from JAX (`bfloat16`, `int8`) or from XLA (`bf16`, `s8`).

    Every 8-bit float is `fp8` and every 4-bit float `fp4`, since chips quote one peak for them.
    """
    if name.startswith(("f8e", "float8")):
        return "fp8"
    if name.startswith(("f4e", "float4")):
        return "fp4"
    return OPERAND_TYPE_NAMES.get(name, name)


def contraction_type(lhs: str, rhs: str) -> str:
    """The format whose peak rate bounds a contraction of `lhs` with `rhs`: the wider of the two."""
    lhs, rhs = operand_type(lhs), operand_type(rhs)
    if lhs == rhs:
        return lhs
    if lhs in _WIDTH_ORDER and rhs in _WIDTH_ORDER:
        return max(lhs, rhs, key=_WIDTH_ORDER.index)
    return f"{lhs}*{rhs}"


def dot_flops(output_shape: Sequence[int], contracting_sizes: Sequence[int]) -> int:
    """FLOPs of a dot: two for each element of the output and each contracted index.

    Args:
        output_shape: sizes of the output, batch dimensions included.
        contracting_sizes: sizes of the contracted dimensions of either operand.
    """
    return 2 * math.prod(output_shape) * math.prod(contracting_sizes)


@dataclasses.dataclass(frozen=True)
class WindowDimension:
    """One spatial dimension of a convolution, in elements; dilations of 1 mean none."""

    input_size: int
    kernel_size: int
    output_size: int
    stride: int = 1
    padding_low: int = 0
    input_dilation: int = 1
    kernel_dilation: int = 1

    def valid_taps(self) -> int:
        """Pairs (output position, kernel tap) that meet an element of the input, not padding or a dilation hole.

        TPU programs write a batched matmul as a convolution whose window mostly meets holes, so only valid taps
        give the right FLOPs.
        """
        return sum(self._positions_of(tap) for tap in range(self.kernel_size))

    def _positions_of(self, tap: int) -> int:
        """Output positions o for which o * stride + offset is a multiple of the dilation inside the input."""
        offset = tap * self.kernel_dilation - self.padding_low
        last_input = (self.input_size - 1) * self.input_dilation
        low = max(0, -(offset // self.stride))
        high = min(self.output_size - 1, (last_input - offset) // self.stride)
        if high < low:
            return 0
        common = math.gcd(self.stride, self.input_dilation)
        if offset % common:
            return 0
        period = self.input_dilation // common
        first = (-offset // common) * pow(self.stride // common, -1, period) % period
        return (high - first) // period - (low - 1 - first) // period


def convolution_flops(
    output_batch: int, output_features: int, kernel_input_features: int, window: Sequence[WindowDimension]
) -> int:
    """FLOPs of a convolution, counting only taps that meet the input.

    Args:
        output_batch: batch size of the output.
        output_features: features of the output, over all groups.
        kernel_input_features: input features of the kernel, which is those of one feature group.
        window: the spatial dimensions.
    """
    taps = math.prod(dimension.valid_taps() for dimension in window)
    return 2 * output_batch * output_features * kernel_input_features * taps


@dataclasses.dataclass
class FlopTally:
    """FLOPs by operand type, and the names of what could not be counted with how often each occurs."""

    by_type: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unestimated: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def total_flops(self) -> int:
        """FLOPs of all types together."""
        return sum(self.by_type.values())

    def count(self, lhs_type: str, rhs_type: str, flops: int):
        """Adds one contraction; a complex one is listed, since its FLOPs a multiply-add depend on the kernel."""
        kind = contraction_type(lhs_type, rhs_type)
        if "complex" in kind:
            self.unestimated[f"contraction of {kind}"] += 1
        else:
            self.by_type[kind] += flops

    def add(self, other: FlopTally, times: int = 1):
        """Adds `other`, run `times` times; what it could not count is listed once however often it runs."""
        if times == 0:
            return
        for kind, flops in other.by_type.items():
            self.by_type[kind] += flops * times
        self.unestimated.update(other.unestimated)

    def add_unknown_loop(self, name: str, other: FlopTally):
        """Lists a loop whose trip count is unknown; its FLOPs are in no total."""
        self.unestimated.update(other.unestimated)
        if other.total_flops:
            self.unestimated[f"{name}: unknown trip count, {other.total_flops} FLOPs a trip"] += 1

    def listed(self) -> tuple[str, ...]:
        """What could not be counted, sorted, each with its number of occurrences if more than one."""
        return tuple(f"{name} (x{n})" if n > 1 else name for name, n in sorted(self.unestimated.items()))
