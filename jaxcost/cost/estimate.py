"""How long one run of a compiled program takes: three figures that are never mixed.

* The **lower bound**: FLOPs over peak, bytes over bandwidth, exchanges over the links they take; the largest of them.
* The **compiler's estimate**: the cycles that the compiler wrote on the instructions, over the clock, and each Pallas
  kernel at the peak rate. Where a compiler writes none (NVIDIA), every instruction at its own roofline, one after the
  other. Communication fully hidden (the longer of the two), and fully exposed (their sum).
* The **calibrated estimate**: the compiler's figure corrected by four physical constants, fitted on published steps.

None is ever below the lower bound.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import pathlib

from jaxcost.cost import hardware, hlo, hlo_work, kernels, links, roofline

_CALIBRATION = pathlib.Path(__file__).parent / "calibration.json"
CYCLES, INSTRUCTION_ROOFLINE = "compiler's cycles", "each instruction at its roofline"


@dataclasses.dataclass(frozen=True)
class Parts:
    """Seconds of one device by what they are spent on, before any calibration."""

    matmul_seconds: float
    """The compiler's cycles of instructions that multiply matrices."""
    elementwise_seconds: float
    """The compiler's cycles of all other instructions."""
    kernel_seconds: float
    """Pallas kernels at the chip's peak rate or memory bandwidth."""
    link_seconds: float
    """Exchanges at the bandwidth of the links that they take, one after the other; 0 where that is unknown."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Four constants that turn the compiler's cycles into seconds on real chips."""

    matmul: float
    """Real over estimated seconds of matmuls: the compiler's model of the matrix unit."""
    elementwise: float
    """Real over estimated seconds of the rest: its model of the memory is about 2.5 times too slow."""
    kernel: float
    """Real seconds of attention kernels over those at peak: one over the share of the peak that they reach."""
    exposed: float
    """Share of the link time that is not hidden behind computation."""

    def seconds(self, parts: Parts) -> float:
        """The calibrated estimate."""
        return (
            self.matmul * parts.matmul_seconds
            + self.elementwise * parts.elementwise_seconds
            + self.kernel * parts.kernel_seconds
            + self.exposed * parts.link_seconds
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The three figures for one run, in seconds."""

    bound: roofline.Bound
    compiler_seconds: float | None
    """Communication fully hidden; None where a figure of the chip is unknown."""
    compiler_exposed_seconds: float | None
    """Communication fully exposed; None where a bandwidth that it needs is unknown."""
    compiler_source: str
    """Where `compiler_seconds` comes from."""
    calibrated_seconds: float | None
    """None where no published steps of this kind of chip exist to fit on."""
    calibrated_error: float | None
    """Mean error of the calibrated estimate on published steps that it was not fitted on, as a fraction."""
    parts: Parts | None
    flops_by_type: dict[str, int]
    """FLOPs of one device by operand type, those of kernels with a cost function included."""
    exchanges: tuple[tuple[links.Collective, links.Exchange], ...]
    """Every kind of exchange and what one run of it takes."""
    unestimated: tuple[str, ...]
    """What takes time and is in no figure but the bound."""

    @property
    def seconds(self) -> float | None:
        """The best figure there is: calibrated, else the compiler's, else the bound."""
        for figure in (self.calibrated_seconds, self.compiler_seconds, self.bound.seconds):
            if figure is not None:
                return figure
        return None

    @property
    def kind(self) -> str:
        """Which figure `seconds` is."""
        if self.calibrated_seconds is not None:
            return "calibrated"
        return self.compiler_source if self.compiler_seconds is not None else "lower bound"


@functools.cache
def load_calibration() -> tuple[Calibration, float]:
    """The constants that come with jaxcost, and their leave-one-out mean error."""
    stored = json.loads(_CALIBRATION.read_text())
    return Calibration(**stored["constants"]), stored["mean_error"]


def estimate(chip: hardware.Chip, cost: hlo.ProgramCost, network: links.Network | None = None) -> Estimate:
    """The three figures of a compiled program on chips joined by a network, by default one switch."""
    work = cost.work
    calls = {kernel: kernels.kernel_cost(kernel) for kernel in work.kernels}
    flops = dict(cost.flops_by_type)
    for kernel, call in calls.items():
        if call is not None:
            flops[call.operand_type] = flops.get(call.operand_type, 0) + call.flops * work.kernels[kernel]
    moved_bytes = (cost.argument_bytes or 0) + (cost.output_bytes or 0) - (cost.alias_bytes or 0)
    network = network or links.switched(cost.num_devices)
    exchanges = tuple((one, links.exchange(one, chip, network)) for one in cost.collectives)
    bound = roofline.lower_bound(chip, flops, moved_bytes, _busy_seconds(exchanges))
    undeclared = [f"kernel {kernel.name.rsplit('/', 1)[-1]}" for kernel, call in calls.items() if call is None]
    unpriced = sorted({f"{one.kind} over links of unknown bandwidth" for one, e in exchanges if e.seconds is None})
    link_seconds = sum(one.times * (each.seconds or 0.0) for one, each in exchanges)
    parts = None
    if work.cycles and chip.clock_hz.value:
        parts = Parts(
            matmul_seconds=work.cycles[hlo_work.MATMUL] / chip.clock_hz.value,
            elementwise_seconds=work.cycles[hlo_work.ELEMENTWISE] / chip.clock_hz.value,
            kernel_seconds=_kernel_seconds(chip, work, calls),
            link_seconds=link_seconds,
        )
        compiler = parts.matmul_seconds + parts.elementwise_seconds + parts.kernel_seconds
        source = CYCLES
    else:
        compiler, source = _instruction_roofline(chip, work, calls), INSTRUCTION_ROOFLINE
    calibration, error = load_calibration() if parts and not unpriced else (None, None)
    least = bound.seconds or 0.0
    return Estimate(
        bound=bound,
        compiler_seconds=None if compiler is None else max(compiler, least),
        compiler_exposed_seconds=None if compiler is None or unpriced else compiler + link_seconds,
        compiler_source=source,
        calibrated_seconds=max(calibration.seconds(parts), least) if calibration else None,
        calibrated_error=error,
        parts=parts,
        flops_by_type=flops,
        exchanges=exchanges,
        unestimated=tuple(
            # Where every instruction is taken at its roofline, none is without a figure.
            [f"{name} (x{n})" for name, n in sorted(work.untimed.items()) if parts]
            + sorted(undeclared)
            + unpriced
            + [name for name in cost.unestimated if not hlo_work.KERNEL.search(name)]
        ),
    )


def _busy_seconds(exchanges) -> dict[str, float | None]:
    """Seconds that all exchanges keep each axis of the links and the network busy."""
    busy: dict[str, float | None] = collections.defaultdict(float)

    def add(name: str, seconds: float | None, times: int):
        busy[name] = None if seconds is None or busy[name] is None else busy[name] + seconds * times

    for one, each in exchanges:
        for axis in each.axes:
            add(axis, each.link_seconds, one.times)
        if each.network_seconds != 0.0:
            add(links.NETWORK, each.network_seconds, one.times)
    return dict(busy)


def _kernel_seconds(chip: hardware.Chip, work: hlo_work.Work, calls) -> float:
    share = 1 / chip.devices_per_chip
    total = 0.0
    for kernel, call in calls.items():
        if call is not None:
            compute = call.flops / ((chip.peak(call.operand_type) or math.inf) * share)
            memory = call.hbm_bytes / ((chip.hbm_bytes_per_second.value or math.inf) * share)
            total += max(compute, memory) * work.kernels[kernel]
    return total


def _instruction_roofline(chip: hardware.Chip, work: hlo_work.Work, calls) -> float | None:
    """Every instruction at the slower of its FLOPs and its bytes; None if a rate that it needs is unknown."""
    share = 1 / chip.devices_per_chip
    total = _kernel_seconds(chip, work, calls)
    for (operand_type, flops, moved_bytes), times in work.steps.items():
        peak, bandwidth = chip.peak(operand_type) if flops else math.inf, chip.hbm_bytes_per_second.value
        if peak is None or (bandwidth is None and moved_bytes):
            return None
        total += max(flops / (peak * share), moved_bytes / (bandwidth * share) if moved_bytes else 0.0) * times
    return total
