"""Models that answer once for a whole text, image or recording, in batches of those that wait.

A program is compiled for each of a few lengths and numbers of rows before the first request. A batch is of inputs that
are padded to one length, and there is no waiting for others: while the device is at one batch, the next one gathers.
Shapes in names: B rows.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from jaxcost import weights
from jaxcost.models.transformer import Transformer
from jaxcost.serving.programs import compiled
from jaxcost.serving.worker import Job, Reason, SchedulerConfig, Worker

SHORTEST = 16
"""Tokens of the shortest texts' padding, unless the config says otherwise."""
_LIMITS = SchedulerConfig()
_I = TypeVar("_I")


@dataclasses.dataclass(frozen=True)
class BatchesConfig:
    """In what batches inputs are read by a model that answers once for each."""

    lengths: tuple[int, ...] = ()
    """Tokens that texts, or frames that recordings, are padded to; by default powers of two from 16 (frames: 128) on,
    and the model's `max_length`."""
    rows: tuple[int, ...] = (1, 4, 16)
    """Inputs that are read at once. A program is compiled for each of these and each length."""
    tokens: int = 4096
    """Tokens of a batch at most, padding included; a single input may have more."""

    def __post_init__(self):
        for field in ("lengths", "rows"):
            sizes = getattr(self, field)
            if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
                raise ValueError(f"batches.{field} is {sizes}; give rising positive numbers, such as 1 4 16.")
        if self.rows[:1] != (1,):
            raise ValueError(f"batches.rows is {self.rows}; it must begin with 1, for an input that comes alone.")
        if self.tokens < 1:
            raise ValueError(f"batches.tokens is {self.tokens}; it must be at least 1.")


def padded_lengths(
    asked: Sequence[int], longest: int, taken: str, shortest: int = SHORTEST, limit: int | None = None
) -> tuple[int, ...]:
    """What inputs are padded to: what is asked for, or powers of two from `shortest` on, and `longest`.

    Raises:
      ValueError: more is asked for than the limit, by default `longest`, of what is `taken`, in words.
    """
    limit = longest if limit is None else limit
    found = asked or (*(2**i for i in range(longest.bit_length()) if shortest <= 2**i < longest), longest)
    if found[-1] > limit:
        raise ValueError(f"batches.lengths ends with {found[-1]}, more than the {limit} {taken}; cut it.")
    return tuple(found)


class Batched(abc.ABC, Generic[_I]):
    """The programs of one model for one kind of input."""

    def __init__(self, model: Transformer, params: weights.Params, lengths: Sequence[int], config: BatchesConfig):
        """Compiles everything; `lengths` are what inputs are padded to, in tokens, rising."""
        self.model, self.params, self.lengths = model, params, tuple(lengths)
        self.max_length = self.lengths[-1]
        self._programs: dict[tuple[int, int], Callable] = {}
        for length in self.lengths:
            for rows in config.rows:
                if rows == 1 or rows * length <= config.tokens:
                    self._programs[length, rows] = compiled(self._run, (), None, params, *self._empty(rows, length))
        # A jitted function that stands in for a program compiles at its first call.
        for (length, rows), program in self._programs.items():
            program(params, *self._empty(rows, length))

    @abc.abstractmethod
    def _run(self, params: weights.Params, *arrays: jax.Array) -> Any:
        """The answers to a batch, a tree of arrays (B, ...)."""

    @abc.abstractmethod
    def _empty(self, rows: int, length: int) -> list[np.ndarray]:
        """The arrays of a batch of padding, (B, ...)."""

    @abc.abstractmethod
    def _put(self, arrays: list[np.ndarray], row: int, given: _I) -> None:
        """Puts an input into a row of those."""

    @abc.abstractmethod
    def size(self, given: _I) -> int:
        """The length that an input needs, in tokens."""

    @abc.abstractmethod
    def tokens(self, given: _I) -> int:
        """Tokens of an input, as they are counted."""

    @abc.abstractmethod
    def check(self, given: _I) -> None:
        """ValueError if an input is none that the model takes."""

    def length(self, given: _I) -> int:
        """What an input is padded to."""
        return next(length for length in self.lengths if length >= self.size(given))

    def most(self, length: int) -> int:
        """Inputs of a padded length that are read at once."""
        return max(rows for known, rows in self._programs if known == length)

    def run(self, given: Sequence[_I]) -> Any:
        """The answers (B, ...) to inputs of one padded length, no more of them than are read at once, in numpy.

        For a text or an image they are float32 (B, N): embeddings of unit length, or what the head puts out for each
        label.
        """
        length = max(map(self.length, given))
        rows = min(rows for known, rows in self._programs if known == length and rows >= len(given))
        arrays = self._empty(rows, length)
        for row, one in enumerate(given):
            self._put(arrays, row, one)
        found = self._programs[length, rows](self.params, *arrays)
        return jax.tree.map(lambda a: np.asarray(a)[: len(given)], found)


class Ask(Job, Generic[_I]):
    """An input that waits for its answer."""

    def __init__(
        self,
        given: _I,
        tokens: int,
        on_answer: Callable[[Reason, Any], None],
        deadline_seconds: float | None = None,
    ):
        """`on_answer` is called once, by the batcher's thread, with `stop` and the answer, such as float32 (N,), or
        with why there is none, and None. It must not block."""
        super().__init__(tokens, deadline_seconds)
        self.given, self._on_answer = given, on_answer

    def end(self, reason: Reason, answer: Any = None) -> None:
        """Gives out the answer."""
        self.times.ended = time.monotonic()
        self._on_answer(reason, answer)


class Batcher(Worker[Ask]):
    """Runs what waits, in batches."""

    def __init__(self, batched: Batched, config: SchedulerConfig = _LIMITS):
        """Starts the thread."""
        self.batched = batched
        self._running: list[Ask] = []
        super().__init__(config, "batcher")

    @property
    def num_running(self) -> int:
        """Inputs of the batch that the device is at."""
        return len(self._running)

    @property
    def _at_once(self) -> int:
        return self.batched.most(self.batched.max_length)

    @property
    def _free(self) -> int:
        return 0 if self._running else self._at_once

    def _takes(self, jobs: int) -> bool:
        # One request may bring more inputs than the queue has places.
        return self.num_waiting < self.config.queue

    def _check(self, job: Ask) -> None:
        self.batched.check(job.given)

    def _abandon(self) -> list[Ask]:
        left, self._running = self._running, []
        return left

    def _round(self) -> None:
        with self._condition:
            if not self._waiting:
                return
            length = self.batched.length(self._waiting[0].given)
            most, rest = self.batched.most(length), collections.deque()
            for job in self._waiting:
                alike = len(self._running) < most and self.batched.length(job.given) == length
                (self._running if alike else rest).append(job)
            self._waiting = rest
        began = time.monotonic()
        answers = self.batched.run([job.given for job in self._running])
        each = (time.monotonic() - began) / len(self._running)
        with self._condition:
            done, self._running = self._running, []
        for i, job in enumerate(done):
            job.times.started, job.device_seconds = began, each
            job.end("stop", jax.tree.map(lambda a, i=i: a[i], answers))
            self._took(job)
