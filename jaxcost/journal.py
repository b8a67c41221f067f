"""A file of one JSON object a line, each about a step, that a killed run goes on with as if it had never stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends lines that hold a `step`; only one process may write a file."""

    def __init__(self, path: str | os.PathLike[str] | None):
        """Opens `path`, or starts it, with its folder; a last line torn by a killed process is dropped.

        Without a path nothing is kept, which is how all but the first of several processes write.

        Raises:
          ValueError: a line before the last one is not a JSON object with a step.
        """
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_torn_line()

    def append(self, line: Mapping[str, Any], on_disk: bool = False) -> dict[str, Any]:
        """Writes one line and returns it; a number that is not finite becomes null.

        With `on_disk` it is there when this returns, even if the machine fails.
        """
        line = {name: _plain(value) for name, value in line.items()}
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                if on_disk:
                    file.flush()
                    os.fsync(file.fileno())
        return line

    def lines(self) -> list[dict[str, Any]]:
        """Every line, in the order written; ValueError if one is not a JSON object with a step."""
        if self._path is None or not self._path.exists():
            return []
        return [_parse(text, n, self._path) for n, text in enumerate(self._path.read_text().splitlines(), 1)]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines after `step`, so that a run resumed from its checkpoint writes them anew; returns them."""
        lines = self.lines()
        dropped = [line for line in lines if line["step"] > step]
        if dropped:
            self._replace("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
        return dropped

    def _drop_torn_line(self) -> None:
        if not self._path.exists():
            return
        text = self._path.read_text(errors="replace")
        whole, newline, torn = text.rpartition("\n")
        if torn:
            self._replace(whole + newline)
        self.lines()

    def _replace(self, text: str) -> None:
        """Puts `text` in the file's place in one step, so that a kill leaves either the old file or the new one."""
        temporary = self._path.with_name(self._path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)


def peek(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that another process may be writing, a half-written last one left out; none without a file.

    Raises:
      ValueError: a whole line is not a JSON object with a step.
    """
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0].decode(errors="replace")
    return [_parse(text, number, path) for number, text in enumerate(whole.splitlines(), 1)]


def _parse(text: str, number: int, path: Path) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        line = None
    if not isinstance(line, dict) or "step" not in line:
        raise ValueError(f"Line {number} of {path} is no JSON object with a step; mend or remove it.")
    return line


def _plain(value: Any) -> Any:
    """A value that JSON can hold: scalars of NumPy and JAX become Python's, and what is not finite None."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
