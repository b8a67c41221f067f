"""What a person sees of long work whose size in bytes is known: a bar, or lines where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich import progress as bars
from rich.console import Console

_LINE_SECONDS = 15


@contextlib.contextmanager
def byte_bar(title: str, total_bytes: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes of each piece that is done."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield _Lines(console, title, total_bytes)
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda size: bar.advance(task, size)


class _Lines:
    def __init__(self, console: Console, title: str, total_bytes: int):
        self._console, self._title, self._total = console, title, total_bytes
        self._done, self._last = 0, time.monotonic()

    def __call__(self, size: int) -> None:
        self._done += size
        if time.monotonic() - self._last > _LINE_SECONDS:
            self._last = time.monotonic()
            self._console.print(f"{self._title}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB")
