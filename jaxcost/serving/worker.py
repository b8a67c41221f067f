"""What owns the device: one thread, and the bounded queue before it, whatever it runs."""

from __future__ import annotations

import abc
import collections
import dataclasses
import logging
import math
import threading
import time
from typing import Generic, Literal, TypeVar

_LOGGER = logging.getLogger(__name__)
_IDLE_SECONDS = 0.5

Reason = Literal["stop", "length", "cancelled", "deadline", "error"]


class Overloaded(Exception):
    """Too many wait already, or for too long; come back in a while."""

    def __init__(self, waiting: int, wait_seconds: float):
        super().__init__(f"{waiting} requests wait already; send the request again later.")
        self.retry_after_seconds = max(1, round(wait_seconds))


class Closed(Exception):
    """The server takes no more requests."""


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What is taken on, and for how long."""

    queue: int = 256
    """Requests (sequences, or texts to embed or label) that may wait; further ones are refused."""
    wait_seconds: float | None = None
    """A request that would wait for longer, as those before it lasted, is refused, so that after an overload nobody
    waits for what is left of it; by default as long as its deadline allows."""
    deadline_seconds: float = 600.0
    """From its arrival, a request that has not ended by then is ended."""

    def __post_init__(self):
        if self.queue < 1:
            raise ValueError(f"scheduler.queue is {self.queue}; it must be at least 1.")
        if self.wait_seconds is not None and not self.wait_seconds > 0:
            raise ValueError(f"scheduler.wait_seconds is {self.wait_seconds}; it must be above 0.")
        if not self.deadline_seconds > 0:
            raise ValueError(f"scheduler.deadline_seconds is {self.deadline_seconds}; it must be above 0.")

    def deadline_of(self, own_seconds: float | None) -> float:
        """Seconds that a request has, which may ask for fewer itself."""
        return self.deadline_seconds if own_seconds is None else min(own_seconds, self.deadline_seconds)


@dataclasses.dataclass
class Times:
    """Seconds of `time.monotonic` at which things happened; None for what has not."""

    arrived: float
    started: float | None = None
    """The device was given to it."""
    first_token: float | None = None
    ended: float | None = None


class Job(abc.ABC):
    """Something that waits for the device, and what becomes of it."""

    new_tokens = 0
    """Tokens made so far."""

    def __init__(self, prompt_tokens: int, deadline_seconds: float | None = None):
        """`deadline_seconds` is as the worker's, if it is to be shorter."""
        self.prompt_tokens, self.deadline_seconds = prompt_tokens, deadline_seconds
        self.times = Times(time.monotonic())
        self.device_seconds = 0.0
        """Its share of the device's time: of each dispatch, one part of as many as there were jobs in it."""
        self._cancelled = False

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves its place."""
        self._cancelled = True

    def over(self, config: SchedulerConfig) -> Reason | None:
        """Why it should end by now, if it should."""
        if self._cancelled:
            return "cancelled"
        late = time.monotonic() - self.times.arrived > config.deadline_of(self.deadline_seconds)
        return "deadline" if late else None

    @abc.abstractmethod
    def end(self, reason: Reason) -> None:
        """Tells who waits that there is no more; called once, by the worker's thread."""


_J = TypeVar("_J", bound=Job)


class Worker(abc.ABC, Generic[_J]):
    """Runs jobs; every public method may be called from any thread."""

    def __init__(self, config: SchedulerConfig, name: str):
        """Starts the thread, so that a subclass has its own fields before."""
        self.config = config
        self._waiting: collections.deque[_J] = collections.deque()
        self._reserved = 0
        self._seconds_per_request: float | None = None
        self._condition = threading.Condition()
        self._closing = self._broken = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    # ---- For those who ask ----

    @property
    @abc.abstractmethod
    def num_running(self) -> int:
        """Jobs that the device is at."""

    @property
    def num_waiting(self) -> int:
        """Jobs in the queue, and places of it that are reserved."""
        return len(self._waiting) + self._reserved

    @property
    def healthy(self) -> bool:
        """Whether jobs are run."""
        return self._thread.is_alive() and not self._broken

    def reserve(self, jobs: int = 1, deadline_seconds: float | None = None) -> None:
        """Holds places in the queue, so that no work is spent on what would be refused; each is given back by `submit`
        or `release`.

        Args:
          jobs: how many places.
          deadline_seconds: as the worker's, if that of the jobs is to be shorter.

        Raises:
          Overloaded: there are not so many places, or those who wait would let the jobs wait for too long.
          Closed: nothing is taken on any more.
        """
        with self._condition:
            if self._closing or not self.healthy:
                raise Closed("The server is shutting down; send the request to another one.")
            each = self._seconds_per_request or 0.0
            before = max(0, self.num_waiting - self._free)
            wait = before / self._at_once * each
            limit = min(self.config.wait_seconds or math.inf, self.config.deadline_of(deadline_seconds) - each)
            if not self._takes(jobs) or (before and wait > limit):
                raise Overloaded(self.num_waiting, wait)
            self._reserved += jobs

    def release(self, jobs: int = 1) -> None:
        """Gives places back that `reserve` held."""
        with self._condition:
            self._reserved -= jobs

    def submit(self, job: _J) -> None:
        """Queues a job at a place that `reserve` holds; ValueError, and the place is still held, if it cannot be
        met."""
        self._check(job)
        with self._condition:
            self._reserved -= 1
            self._waiting.append(job)
            self._condition.notify()

    def close(self, timeout_seconds: float | None = None) -> bool:
        """Takes on nothing more, ends all that was accepted, and says whether it did so in time."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    # ---- What is run ----

    @property
    @abc.abstractmethod
    def _at_once(self) -> int:
        """Jobs that run at one time."""

    @property
    @abc.abstractmethod
    def _free(self) -> int:
        """Jobs of the queue that begin at once."""

    @abc.abstractmethod
    def _takes(self, jobs: int) -> bool:
        """Whether there is room for more."""

    @abc.abstractmethod
    def _check(self, job: _J) -> None:
        """ValueError if a job cannot be met."""

    @abc.abstractmethod
    def _round(self) -> None:
        """Does some of the work."""

    @abc.abstractmethod
    def _abandon(self) -> list[_J]:
        """Forgets the jobs that run, and gives them back."""

    # ---- The thread ----

    def _serve(self) -> None:
        try:
            while self._wait():
                self._drop()
                self._round()
        except BaseException:
            # Whatever went wrong, nobody may wait for an answer that never comes.
            _LOGGER.exception("The %s has failed.", self._thread.name)
            self._broken = True
            with self._condition:
                left = [*self._waiting, *self._abandon()]
                self._waiting.clear()
            for job in left:
                job.end("error")

    def _wait(self) -> bool:
        """Waits until there is work, and says whether there ever will be."""
        with self._condition:
            while not (self._waiting or self.num_running):
                if self._closing and not self._reserved:
                    return False
                self._condition.wait(_IDLE_SECONDS)
        return True

    def _drop(self) -> None:
        """Ends those in the queue who were cancelled or are late."""
        with self._condition:
            late = [(job, why) for job in self._waiting if (why := job.over(self.config))]
            for job, _ in late:
                self._waiting.remove(job)
        for job, why in late:
            job.end(why)

    def _took(self, job: _J) -> None:
        """Notes how long a job took, by which those who come are refused or told when to come back."""
        took, before = job.times.ended - job.times.started, self._seconds_per_request
        self._seconds_per_request = took if before is None else before + 0.1 * (took - before)
