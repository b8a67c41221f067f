"""Where a run's seconds go: the share that trained, and what took the rest."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxcost.cost.ledger import Ledger

LOSSES = ("compile", "start", "data", "evaluation", "checkpoint", "redone")
"""What takes a run's seconds besides its steps: compiling, making or restoring the state, waiting for data, scoring,
saving, and steps that a kill made it do twice (known where `watch.steps` is on)."""


class Clock:
    """Charges a run's seconds to the ledger, and times the steps without what happens between them.

    Seconds of a run before its first step in this process count too, from when the clock is made.
    """

    def __init__(self, ledger: Ledger):
        """Starts to count."""
        self._ledger = ledger
        self._charged = self._mark = time.perf_counter()
        self._steps: list[float] = []
        self._lost = dict.fromkeys(LOSSES, 0.0)

    @property
    def lost(self) -> dict[str, float]:
        """A copy of the seconds that did not train, by what took them."""
        return dict(self._lost)

    @property
    def goodput(self) -> float:
        """The share of all seconds, those before restarts included, in which steps were done once and for good."""
        uncharged = time.perf_counter() - self._charged
        total = self._ledger.totals["seconds"] + uncharged
        return max(0.0, 1 - sum(self._lost.values()) / total) if total else 1.0

    def restore(self, lost: Mapping[str, float], redone_seconds: float) -> None:
        """Goes on from what was lost before a restart, and charges the steps that are done again."""
        for name in LOSSES:
            self._lost[name] += lost.get(name, 0.0)
        self._lost["redone"] += redone_seconds
        self._ledger.charge(seconds=redone_seconds)

    @contextlib.contextmanager
    def losing(self, what: str) -> Iterator[None]:
        """Counts the block as one of `LOSSES`, and not as part of a step."""
        start = time.perf_counter()
        yield
        self._mark = time.perf_counter()
        self._lost[what] += self._mark - start

    @contextlib.contextmanager
    def waiting(self, running: Any) -> Iterator[None]:
        """Counts the block as a wait for data if the devices had nothing more to do when it ended.

        `running` is the tree of arrays that the step before makes, or None. What is counted is the whole wait, of which
        the devices may still have worked in the first part.
        """
        start = time.perf_counter()
        yield
        if running is None or all(leaf.is_ready() for leaf in jax.tree.leaves(running)):
            self._lost["data"] += time.perf_counter() - start

    def charge(self) -> None:
        """Charges the seconds since the last charge."""
        now = time.perf_counter()
        self._ledger.charge(seconds=now - self._charged)
        self._charged = now

    def step_done(self, tokens: int, flops: int) -> float:
        """Charges a step's tokens and FLOPs, and returns its seconds."""
        now = time.perf_counter()
        self._steps.append(now - self._mark)
        self._mark = now
        self._ledger.charge(tokens=tokens, flops=flops)
        return self._steps[-1]

    def recent_seconds(self) -> float:
        """Median seconds of the last twenty steps."""
        return statistics.median(self._steps[-20:])

    def median_seconds(self) -> float:
        """Median seconds of the steps in this process; the first also pays for what is made on first use."""
        return statistics.median(self._steps[1:] or self._steps)
