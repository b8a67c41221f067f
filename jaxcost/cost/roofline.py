"""The least time that a program can take on a chip, and what sets it: the matrix unit, the memory or the links."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxcost.cost import hardware

COMPUTE, MEMORY, LINKS = "compute", "memory", "links"


@dataclasses.dataclass(frozen=True)
class Bound:
    """A lower bound on the time of one run, in seconds."""

    seconds: float | None
    """The largest known term; None if none is known."""
    limit: str | None
    """The term that sets `seconds`: `compute`, `memory` or `links`."""
    terms: dict[str, float | None]
    """Seconds of each term; None where a figure of the chip is unknown."""
    unknown: tuple[str, ...]
    """Figures of the chip that are missing; with them the bound could be higher."""


def lower_bound(
    chip: hardware.Chip, flops_by_type: Mapping[str, float], hbm_bytes: float = 0, link_bytes: float = 0
) -> Bound:
    """The roofline of one device: the largest of FLOPs / peak, bytes / bandwidth and link bytes / link bandwidth.

    Perfect overlap of the three is assumed, and peaks that no program reaches, so a real run takes longer. FLOPs of
    several operand types share one matrix unit and add up. A device sends over its links in one direction, which is
    half of the bandwidth that `Chip.link_bytes_per_second` states.

    Source: Williams, Waterman and Patterson 2009, "Roofline", with a third term for the links.

    Args:
        chip: figures of a whole chip; a device is `1 / chip.devices_per_chip` of it.
        flops_by_type: FLOPs of one device by operand type.
        hbm_bytes: bytes that one device moves to and from its memory.
        link_bytes: bytes that one device sends to others.
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
    rates = {
        MEMORY: (hbm_bytes, chip.hbm_bytes_per_second.value, 1),
        LINKS: (link_bytes, chip.link_bytes_per_second.value, 2),
    }
    for term, (num_bytes, rate, directions) in rates.items():
        if rate is None and num_bytes:
            unknown.append(f"{term} bandwidth")
            terms[term] = None
        else:
            terms[term] = num_bytes * directions / (rate * share) if num_bytes else 0.0
    known = {term: seconds for term, seconds in terms.items() if seconds is not None}
    limit = max(known, key=known.get) if any(known.values()) else None
    return Bound(known[limit] if limit else None, limit, terms, tuple(unknown))
