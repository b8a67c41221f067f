"""A plan as a picture: the seconds that bound it, and what fills a device's memory."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcost.data.files import atomic_write

_GIB = 2**30
PARTS = ("weights", "teacher", "optimizer", "gradients", "cache", "batch", "temporaries")


def draw(plans: Sequence[tuple[str, Mapping[str, Any]]], path: pathlib.Path) -> None:
    """Draws plans (name, `Plan.as_dict()`) into a file whose ending names the format, such as .png or .svg.

    Raises:
        ValueError: matplotlib knows no such format.
    """
    from matplotlib.figure import Figure

    labels = [f"{name}\n{row['step']} on {row['topology']}" for name, row in plans]
    figure = Figure(figsize=(11, 1.6 + 0.9 * len(plans)), layout="constrained")
    seconds, memory = figure.subplots(1, 2, sharey=True)
    kinds = {
        "lower bound": "lower_bound_seconds",
        "compiler, links hidden": "compiler_seconds",
        "compiler, links exposed": "compiler_exposed_seconds",
        "calibrated": "calibrated_seconds",
    }
    height = 0.8 / len(kinds)
    for index, (kind, key) in enumerate(kinds.items()):
        places = [y + (index - 1.5) * height for y in range(len(plans))]
        seconds.barh(places, [row[key] or 0 for _, row in plans], height, label=kind)
    seconds.set_yticks(range(len(plans)), labels, fontsize=8)
    seconds.invert_yaxis()
    seconds.set_xlabel("seconds a step")
    seconds.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=4, frameon=False)
    left = [0.0] * len(plans)
    for part in PARTS:
        widths = [(row["memory_split_bytes"] or {}).get(part, 0) / _GIB for _, row in plans]
        if any(widths):
            memory.barh(range(len(plans)), widths, 0.6, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, (_, row) in enumerate(plans):
        if row["usable_bytes"] is not None:
            limit = row["usable_bytes"] / _GIB
            memory.plot([limit, limit], [y - 0.4, y + 0.4], color="black", label="usable" if y == 0 else None)
    memory.set_xlabel("GiB a device")
    memory.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=7, frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.lstrip(".") or "png", dpi=150)
    with atomic_write(path) as file:
        file.write(drawn.getvalue())
