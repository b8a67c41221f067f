"""Trials at once, each on an equal part of the devices, in a thread of its own: JAX releases the interpreter's lock
while programs compile and run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, TypeVar

import jax

from jaxcost import hosts, weights
from jaxcost.session import Session
from jaxcost.study.trials import Trials

_T = TypeVar("_T")


def divided(base: Session, number: int) -> list[Session]:
    """Sessions of the base's experiment and data, each on one of `number` equal parts of its devices and its chips.

    Raises:
      ValueError: the devices do not divide so, several processes share them, or the model does not divide over a part.
    """
    if number == 1:
        return [base]
    if jax.process_count() > 1:
        raise ValueError(
            f"study.search.parallel is {number}, and {jax.process_count()} processes share the devices; leave it at 1, "
            "or run the study in one process."
        )
    if len(base.devices) % number:
        raise ValueError(
            f"study.search.parallel is {number}, and {len(base.devices)} devices do not divide into so many parts; "
            "give a divisor of their number."
        )
    size = len(base.devices) // number
    return [base.on(base.devices[first : first + size]) for first in range(0, len(base.devices), size)]


class Parts:
    """The trials of one study on each part of its devices."""

    def __init__(self, sessions: Sequence[Session], base_params: weights.Params, *beside: Any):
        """`beside` is what `Trials` takes beside the base and its weights."""
        self.trials = [Trials(s, s.put(base_params), *beside, parts=len(sessions)) for s in sessions]

    def __len__(self) -> int:
        return len(self.trials)

    def run(self, jobs: Sequence[tuple[str, Callable[[Trials], _T]]]) -> list[_T]:
        """What each job returns on one of the parts; jobs of one name are done one after the other on one part.

        What a job raises is raised when all have ended. SIGTERM reaches the trainings of every part.
        """
        if len(self) == 1:
            return [job(self.trials[0]) for _, job in jobs]
        names = list(dict.fromkeys(name for name, _ in jobs))
        turns = [names.index(name) % len(self) for name, _ in jobs]
        found: dict[int, _T] = {}

        def work(part):
            with jax.default_device(self.trials[part].devices[0]):
                found.update((i, job(self.trials[part])) for i, (_, job) in enumerate(jobs) if turns[i] == part)

        with hosts.Preemption(), futures.ThreadPoolExecutor(len(self)) as pool:
            running = [pool.submit(work, part) for part in range(len(self))]
        for each in running:
            each.result()
        return [found[i] for i in range(len(jobs))]
