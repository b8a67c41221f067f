"""What a run has cost so far, beside the quality it bought: a file of one JSON object a line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxcost.cost import hardware as hardware_lib
from jaxcost.journal import Journal

_TOTALS = ("seconds", "tokens", "flops", "bytes")


class Ledger:
    """Appends one line an evaluation or event, each with the totals so far.

    A line holds `time` (seconds since 1970), `step`, `event`, the totals `seconds`, `tokens`, `flops`, `bytes`,
    `usd` and `kwh`, and the metrics given. `usd` and `kwh` are null where the hardware's price or power is unknown.

    To resume a run as if it had never stopped: record a step's lines before saving its checkpoint, save `totals` in
    the checkpoint, and on resuming pass them to `restore` and the checkpoint's step to `rewind`.
    Only one process may write a file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        hardware: hardware_lib.Hardware | None = None,
        clock: Callable[[], float] = time.time,
        data: Mapping[str, Any] | None = None,
    ):
        """Opens the file, or starts it.

        Args:
            path: as `Journal` takes it.
            hardware: prices the seconds; without it `usd` and `kwh` are null.
            clock: gives a line's `time`.
            data: what the data cost, paid before the run: fields of every line, such as `labels` and `data_usd`.

        Raises:
            ValueError: as `Journal` raises it.
        """
        self._journal = Journal(path)
        self._hardware = hardware
        self._clock = clock
        self._data = dict(data or {})
        self._totals: dict[str, float] = dict.fromkeys(_TOTALS, 0)

    @property
    def totals(self) -> dict[str, float]:
        """A copy of the totals so far: `seconds`, `tokens`, `flops`, `bytes`. Plain numbers, to save as JSON."""
        return dict(self._totals)

    @property
    def usd(self) -> float | None:
        """What the seconds so far cost; None where the price is unknown."""
        return self._hardware.usd(self._totals["seconds"]) if self._hardware else None

    def restore(self, totals: Mapping[str, float]):
        """Continues from totals saved earlier.

        Raises:
            ValueError: `totals` lacks one of the names.
        """
        missing = [name for name in _TOTALS if name not in totals]
        if missing:
            raise ValueError(f"the saved ledger totals lack {', '.join(missing)}; they come from another version.")
        self._totals = {name: totals[name] for name in _TOTALS}

    def charge(self, *, seconds: float = 0, tokens: int = 0, flops: float = 0, bytes: int = 0):
        """Adds to the totals without writing.

        Args:
            seconds: time that the hardware was paid for.
            tokens: tokens trained on, or served.
            flops: operations over all devices; the caller keeps to one convention (model or hardware FLOPs).
            bytes: bytes moved through memory and links over all devices, if the caller counts them.
        """
        for name, amount in (("seconds", seconds), ("tokens", tokens), ("flops", flops), ("bytes", bytes)):
            if amount < 0:
                raise ValueError(f"the ledger was charged {amount} {name}; a cost cannot be negative.")
            self._totals[name] += amount

    def record(self, step: int, event: str = "evaluation", **metrics: Any) -> dict[str, Any]:
        """Writes one line with the totals so far and returns it.

        The line is on the disk when this returns.

        Args:
            step: training step that the line describes.
            event: what happened: `evaluation`, `checkpoint`, `start`, ...
            **metrics: quality or anything else that JSON can hold; a number that is not finite becomes null.

        Raises:
            ValueError: a metric has the name of one of the ledger's own fields.
        """
        seconds = self._totals["seconds"]
        line = {
            "time": self._clock(),
            "step": step,
            "event": event,
            **self._totals,
            "usd": self.usd,
            "kwh": self._hardware.kwh(seconds) if self._hardware else None,
            **self._data,
        }
        taken = sorted(line.keys() & metrics.keys())
        if taken:
            raise ValueError(f"the ledger already has a field {taken[0]!r}; give the metric another name.")
        return self._journal.append(line | metrics, on_disk=True)

    def lines(self) -> list[dict[str, Any]]:
        """Every line of the file, in the order written."""
        return self._journal.lines()

    def rewind(self, step: int):
        """Drops the lines after `step`, so that a run resumed from its checkpoint writes them anew."""
        self._journal.rewind(step)
