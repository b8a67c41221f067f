"""The least time that a program can take on a chip, and what sets it: matrix unit, memory, links or network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxcost.cost import hardware

COMPUTE, MEMORY = "compute", "memory"


@dataclasses.dataclass(frozen=True)
class Bound:
    """A lower bound on the time of one run, in seconds."""

    seconds: float | None
    """The largest known term; None if none is known."""
    limit: str | None
    """The term that sets `seconds`: `compute`, `memory`, or what an exchange keeps busy (`links x`, `network`)."""
    terms: dict[str, float | None]
    """Seconds of each term; None where a figure of the chip is unknown."""
    unknown: tuple[str, ...]
    """Figures of the chip that are missing; with them the bound could be higher."""


def lower_bound(
    chip: hardware.Chip,
    flops_by_type: Mapping[str, float],
    hbm_bytes: float = 0,
    exchange_seconds: Mapping[str, float | None] | None = None,
) -> Bound:
    """The roofline of one device: the largest of FLOPs / peak, bytes / bandwidth and the seconds of its exchanges.

    Perfect overlap of all of them is assumed, and peaks that no program reaches, so a real run takes longer. FLOPs of
    several operand types share one matrix unit and add up.

    Source: Williams, Waterman and Patterson 2009, "Roofline", with further terms for the links.

    Args:
        chip: figures of a whole chip; a device is `1 / chip.devices_per_chip` of it.
        flops_by_type: FLOPs of one device by operand type.
        hbm_bytes: bytes that one device moves to and from its memory.
        exchange_seconds: seconds that exchanges between devices keep each kind of link busy; None where the kind's
            bandwidth is unknown.
    """
    share = 1 / chip.devices_per_chip
    terms: dict[str, float | None] = {COMPUTE: 0.0}
    unknown = []
    for operand_type, flops in flops_by_type.items():
        peak = chip.peak(operand_type)
        if peak is None and flops:
            unknown.append(f"peak {operand_type} FLOP/s")
        elif flops:
            terms[COMPUTE] += flops / (peak * share)
    if unknown:
        terms[COMPUTE] = terms[COMPUTE] or None
    bandwidth = chip.hbm_bytes_per_second.value
    terms[MEMORY] = 0.0 if not hbm_bytes else None if bandwidth is None else hbm_bytes / (bandwidth * share)
    terms |= exchange_seconds or {}
    unknown += [f"{term} bandwidth" for term, seconds in terms.items() if seconds is None and term != COMPUTE]
    known = {term: seconds for term, seconds in terms.items() if seconds is not None}
    limit = max(known, key=known.get) if any(known.values()) else None
    return Bound(known[limit] if limit else None, limit, terms, tuple(unknown))
