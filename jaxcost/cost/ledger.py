"""What a run has cost so far, beside the quality it bought: a file of one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxcost.cost import hardware as hardware_lib

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
        path: str | os.PathLike[str],
        hardware: hardware_lib.Hardware | None = None,
        clock: Callable[[], float] = time.time,
        data: Mapping[str, Any] | None = None,
    ):
        """Opens `path`, or starts it; a last line torn by a killed process is dropped.

        Args:
            path: the file; its directory is made if it is missing.
            hardware: prices the seconds; without it `usd` and `kwh` are null.
            clock: gives a line's `time`.
            data: what the data cost, paid before the run: fields of every line, such as `labels` and `data_usd`.

        Raises:
            ValueError: a line before the last one is not a JSON object.
        """
        self._path = pathlib.Path(path)
        self._hardware = hardware
        self._clock = clock
        self._data = dict(data or {})
        self._totals: dict[str, float] = dict.fromkeys(_TOTALS, 0)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_torn_line()

    @property
    def totals(self) -> dict[str, float]:
        """A copy of the totals so far: `seconds`, `tokens`, `flops`, `bytes`. Plain numbers, to save as JSON."""
        return dict(self._totals)

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
            "usd": self._hardware.usd(seconds) if self._hardware else None,
            "kwh": self._hardware.kwh(seconds) if self._hardware else None,
            **self._data,
        }
        taken = sorted(line.keys() & metrics.keys())
        if taken:
            raise ValueError(f"the ledger already has a field {taken[0]!r}; give the metric another name.")
        line |= {name: _plain(value) for name, value in metrics.items()}
        text = json.dumps(line) + "\n"
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return line

    def lines(self) -> list[dict[str, Any]]:
        """Every line of the file, in the order written.

        Raises:
            ValueError: a line is not a JSON object.
        """
        if not self._path.exists():
            return []
        return [self._parse(text, number) for number, text in enumerate(self._path.read_text().splitlines(), 1)]

    def rewind(self, step: int):
        """Drops the lines after `step`, so that a run resumed from its checkpoint writes them anew."""
        kept = [line for line in self.lines() if line["step"] <= step]
        self._replace("".join(json.dumps(line) + "\n" for line in kept))

    def _parse(self, text: str, number: int) -> dict[str, Any]:
        line = _parse_line(text)
        if line is None:
            raise ValueError(f"line {number} of {self._path} is not a ledger line; mend or remove it.")
        return line

    def _drop_torn_line(self):
        if not self._path.exists():
            return
        text = self._path.read_text(errors="replace")
        whole, newline, torn = text.rpartition("\n")
        if torn:
            self._replace(whole + newline)
        self.lines()

    def _replace(self, text: str):
        """Puts `text` in the file's place in one step, so that a kill leaves either the old file or the new one."""
        temporary = self._path.with_name(self._path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)


def _parse_line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) and "step" in line else None


def _plain(value: Any) -> Any:
    """A value that JSON can hold: scalars of NumPy and JAX become Python's, and what is not finite None."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
