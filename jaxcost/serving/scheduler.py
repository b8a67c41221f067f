"""Continuous batching: requests wait in a bounded queue, take a slot as soon as one is free, and leave it at their end.

One thread owns the device. Each of its rounds gives free slots to those who wait, reads a bounded number of prompt
tokens, and decodes a few tokens of every slot, so that nobody's prompt holds up everybody's answers for long.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Literal

import numpy as np

from jaxcost.serving.prefix import PrefixCache
from jaxcost.serving.sampling import GREEDY, Sampling
from jaxcost.serving.slots import Scored, Slots
from jaxcost.serving.text import TextStream

_LOGGER = logging.getLogger(__name__)
_IDLE_SECONDS = 0.5

Reason = Literal["stop", "length", "cancelled", "deadline", "error"]


class Overloaded(Exception):
    """The queue is full; come back in a while."""

    def __init__(self, waiting: int, retry_after_seconds: int):
        super().__init__(f"{waiting} requests wait already; send the request again later.")
        self.retry_after_seconds = retry_after_seconds


class Closed(Exception):
    """The server takes no more requests."""


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What is taken on, and for how long."""

    queue: int = 256
    """Requests that may wait for a slot; further ones are refused."""
    deadline_seconds: float = 600.0
    """From its arrival, a request that has not ended by then is ended."""

    def __post_init__(self):
        if self.queue < 1:
            raise ValueError(f"scheduler.queue is {self.queue}; it must be at least 1.")
        if not self.deadline_seconds > 0:
            raise ValueError(f"scheduler.deadline_seconds is {self.deadline_seconds}; it must be above 0.")


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to continue."""

    prompt: np.ndarray
    """int32 (T,), at least one token."""
    max_new_tokens: int
    """Tokens to add at most; 0, to have the prompt scored alone."""
    sampling: Sampling = GREEDY
    stop_ids: Collection[int] = ()
    """Ids that end the sequence; they are not part of its text."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    scored: bool = False
    """Log-probabilities of the new tokens are wanted."""
    score_prompt: bool = False
    """Log-probabilities of the prompt's tokens are wanted."""
    adapter: int = -1
    """Which adapter answers, -1 for the base."""
    deadline_seconds: float | None = None
    """As the scheduler's, if it is to be shorter."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of a request."""

    text: str
    """What the new tokens set free, which may be less than theirs or more."""
    scores: Scored
    """The new tokens, (n,), with log-probabilities if they were asked for."""
    reason: Reason | None = None
    """Why it ended; None while it goes on."""


@dataclasses.dataclass
class Times:
    """Seconds of `time.monotonic` at which things happened; None for what has not."""

    arrived: float
    started: float | None = None
    """A slot was given."""
    first_token: float | None = None
    ended: float | None = None


class Ticket:
    """A request, and what becomes of it."""

    def __init__(
        self,
        request: Request,
        on_piece: Callable[[Piece], None],
        on_prompt: Callable[[Scored], None] | None = None,
    ):
        """A ticket to submit.

        Args:
          request: what to do.
          on_piece: called, by the scheduler's thread, with what is new; the last piece has a reason. It must not block.
          on_prompt: called once, before that, with the scores of the prompt's tokens from the second on, if they were
            asked for.
        """
        self.request = request
        self.times = Times(time.monotonic())
        self.new_tokens = 0
        """Tokens made so far."""
        self.cached_tokens = 0
        """Tokens of the prompt that did not have to be read again."""
        self.device_seconds = 0.0
        """Its share of the device's time: of each dispatch, one part of as many as there were requests in it."""
        self._on_piece, self._on_prompt = on_piece, on_prompt
        self._cancelled = False

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves its place in the queue or its slot."""
        self._cancelled = True


class _Running:
    """A request in a slot."""

    def __init__(self, ticket: Ticket, slot: int, decode: Callable[[np.ndarray], str], slots: Slots):
        self.ticket, self.slot = ticket, slot
        self.text = TextStream(decode, ticket.request.stop)
        self.left: list[tuple[int, int]] = slots.pieces(len(ticket.request.prompt))
        self.prompt_scores: list[Scored] = []
        self.begun = False

    @property
    def decodes(self) -> bool:
        return not self.left


class Scheduler:
    """Runs requests; every method may be called from any thread."""

    def __init__(
        self,
        slots: Slots,
        decode: Callable[[np.ndarray], str],
        config: SchedulerConfig = SchedulerConfig(),
        prefixes: PrefixCache | None = None,
    ):
        """Starts the thread.

        Args:
          slots: what runs them.
          decode: the text of ids (tokens,).
          config: limits.
          prefixes: where read prompts are kept for those that begin alike; nothing is kept without.
        """
        self.slots, self.config, self.prefixes = slots, config, prefixes
        self._decode_text = decode
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: dict[int, _Running] = {}
        self._reserved = 0
        self._seconds_per_request = 1.0
        self._condition = threading.Condition()
        self._closing = self._broken = False
        self._thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)
        self._thread.start()

    # ---- For those who ask ----

    @property
    def num_running(self) -> int:
        """Requests in slots."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, and places of it that are reserved."""
        return len(self._waiting) + self._reserved

    @property
    def cache_use(self) -> float:
        """Share of the slots' room that holds tokens."""
        held = sum(len(run.ticket.request.prompt) + run.ticket.new_tokens for run in list(self._running.values()))
        return held / (self.slots.config.slots * self.slots.max_length)

    @property
    def healthy(self) -> bool:
        """Whether requests are run."""
        return self._thread.is_alive() and not self._broken

    def reserve(self, requests: int = 1) -> None:
        """Holds places in the queue, so that no work is spent on what would be refused; each is given back by `submit`
        or `release`.

        Raises:
          Overloaded: there are not so many places.
          Closed: nothing is taken on any more.
        """
        with self._condition:
            if self._closing or not self.healthy:
                raise Closed("The server is shutting down; send the request to another one.")
            if self.num_waiting + requests > self.config.queue + self._free():
                rounds = self.num_waiting / self.slots.config.slots
                raise Overloaded(self.num_waiting, max(1, round(rounds * self._seconds_per_request)))
            self._reserved += requests

    def release(self, requests: int = 1) -> None:
        """Gives places back that `reserve` held."""
        with self._condition:
            self._reserved -= requests

    def submit(self, ticket: Ticket) -> None:
        """Queues a request at a place that `reserve` holds; ValueError, and the place is still held, if it cannot be
        met."""
        self._check(ticket.request)
        with self._condition:
            self._reserved -= 1
            self._waiting.append(ticket)
            self._condition.notify()

    def close(self, timeout_seconds: float | None = None) -> bool:
        """Takes on nothing more, ends all that was accepted, and says whether it did so in time."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _check(self, request: Request) -> None:
        tokens, limit = np.asarray(request.prompt), self.slots.max_length
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError("The prompt is empty; give at least one token.")
        if tokens.min() < 0 or tokens.max() >= self.slots.vocab_size:
            raise ValueError(f"The prompt has ids outside 0 to {self.slots.vocab_size - 1}; use the model's tokenizer.")
        if request.max_new_tokens < 0 or (request.max_new_tokens == 0 and not request.score_prompt):
            raise ValueError(f"{request.max_new_tokens} new tokens were asked for; ask for at least 1.")
        if len(tokens) + request.max_new_tokens > limit:
            raise ValueError(
                f"The prompt ({len(tokens)} tokens) and {request.max_new_tokens} new tokens are more than the {limit} "
                f"that the model takes; ask for at most {max(0, limit - len(tokens))}, or shorten the prompt."
            )
        if not -1 <= request.adapter < max(self.slots.adapters, 0):
            raise ValueError(f"There is no adapter {request.adapter}.")

    def _free(self) -> int:
        return self.slots.config.slots - len(self._running)

    # ---- The thread ----

    def _serve(self) -> None:
        try:
            self._rounds()
        except BaseException:
            # Whatever went wrong, nobody may wait for an answer that never comes.
            _LOGGER.exception("The scheduler has failed.")
            self._broken = True
            with self._condition:
                left = [*self._waiting, *(run.ticket for run in self._running.values())]
                self._waiting.clear()
                self._running.clear()
            for ticket in left:
                _end(ticket, "error")

    def _rounds(self) -> None:
        while True:
            with self._condition:
                while not (self._waiting or self._running):
                    if self._closing and not self._reserved:
                        return
                    self._condition.wait(_IDLE_SECONDS)
            self._drop()
            self._admit()
            self._read_prompts()
            self._decode()

    def _drop(self) -> None:
        """Ends those who were cancelled or are late."""
        now = time.monotonic()
        with self._condition:
            late = [(t, why) for t in self._waiting if (why := self._over(t, now))]
            for ticket, _ in late:
                self._waiting.remove(ticket)
        for ticket, why in late:
            _end(ticket, why)
        for run in list(self._running.values()):
            if why := self._over(run.ticket, now):
                self._leave(run, "", _no_scores(), why)

    def _over(self, ticket: Ticket, now: float) -> Reason | None:
        own = ticket.request.deadline_seconds
        limit = self.config.deadline_seconds if own is None else min(own, self.config.deadline_seconds)
        if ticket._cancelled:
            return "cancelled"
        return "deadline" if now - ticket.times.arrived > limit else None

    def _admit(self) -> None:
        free = [slot for slot in range(self.slots.config.slots) if slot not in self._running]
        for slot in free:
            with self._condition:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
                self._running[slot] = _Running(ticket, slot, self._decode_text, self.slots)
            request = ticket.request
            ticket.times.started = time.monotonic()
            self.slots.admit(slot, request.sampling, request.prompt, request.adapter)

    def _read_prompts(self) -> None:
        """Reads the pieces of prompts, the oldest request's first, as many as one dispatch may wait for."""
        budget = self.slots.config.prefill_tokens[-1]
        for run in sorted(self._running.values(), key=lambda run: run.ticket.times.arrived):
            while run.left:
                # While nobody decodes, nobody waits.
                if budget <= 0 and any(other.decodes for other in self._running.values()):
                    return
                if not run.begun:
                    self._begin(run)
                start, count = run.left.pop(0)
                budget -= count
                self._read(run, start, count)

    def _begin(self, run: _Running) -> None:
        """Fills the slot with what is known of the prompt by now, the last request's included."""
        run.begun = True
        ticket, request = run.ticket, run.ticket.request
        if self.prefixes is not None and not request.score_prompt:
            ticket.cached_tokens = self.prefixes.load(run.slot, request.prompt, request.adapter)
            run.left = self.slots.pieces(len(request.prompt), ticket.cached_tokens)

    def _read(self, run: _Running, start: int, count: int) -> None:
        request, began = run.ticket.request, time.monotonic()
        scores = self.slots.prefill(run.slot, request.prompt, start, count, request.score_prompt)
        # What the program that also scores has written may differ in its last bits.
        if self.prefixes is not None and scores is None:
            self.prefixes.keep(run.slot, request.prompt, start, count, request.adapter)
        if scores is not None:
            run.prompt_scores.append(scores)
        run.ticket.device_seconds += time.monotonic() - began
        if run.left or not request.score_prompt:
            return
        if run.ticket._on_prompt is not None:
            run.ticket._on_prompt(_joined(run.prompt_scores, len(request.prompt) - 1))
        if not request.max_new_tokens:
            self._leave(run, "", _no_scores(), "length")

    def _decode(self) -> None:
        runs = [run for run in self._running.values() if run.decodes]
        if not runs:
            return
        began = time.monotonic()
        active = np.zeros(self.slots.config.slots, bool)
        active[[run.slot for run in runs]] = True
        made = self.slots.decode(active, any(run.ticket.request.scored for run in runs))
        now = time.monotonic()
        for run in runs:
            ticket = run.ticket
            ticket.device_seconds += (now - began) / len(runs)
            if ticket.times.first_token is None:
                ticket.times.first_token = now
            self._take(run, made)

    def _take(self, run: _Running, made: Scored) -> None:
        """Gives a request its new tokens, up to where it ends."""
        ticket, texts, kept = run.ticket, [], 0
        request, reason = ticket.request, None
        for token in made.tokens[run.slot].tolist():
            if token in request.stop_ids:
                reason = "stop"
                break
            kept += 1
            texts.append(run.text.add(token))
            if run.text.stopped or ticket.new_tokens + kept == request.max_new_tokens:
                reason = "stop" if run.text.stopped else "length"
                break
        ticket.new_tokens += kept
        if reason is not None and not run.text.stopped:
            texts.append(run.text.finish())
            # The last bytes may have been what a stop string waited for.
            reason = "stop" if run.text.stopped else reason
        scores = Scored(*(getattr(made, field.name)[run.slot, :kept] for field in dataclasses.fields(Scored)))
        if reason is not None:
            self._leave(run, "".join(texts), scores, reason)
        elif kept:
            ticket._on_piece(Piece("".join(texts), scores))

    def _leave(self, run: _Running, text: str, scores: Scored, reason: Reason) -> None:
        with self._condition:
            del self._running[run.slot]
        _end(run.ticket, reason, text, scores)
        took = run.ticket.times.ended - run.ticket.times.started
        self._seconds_per_request += 0.1 * (took - self._seconds_per_request)


def _end(ticket: Ticket, reason: Reason, text: str = "", scores: Scored | None = None) -> None:
    ticket.times.ended = time.monotonic()
    ticket._on_piece(Piece(text, _no_scores() if scores is None else scores, reason))


def _no_scores() -> Scored:
    none = np.zeros((0,), np.float32)
    return Scored(np.zeros((0,), np.int32), none, none.reshape(0, 0), np.zeros((0, 0), np.int32))


def _joined(parts: list[Scored], count: int) -> Scored:
    """The scores of the pieces as one, of the first `count` tokens."""
    fields = [field.name for field in dataclasses.fields(Scored)]
    return Scored(*(np.concatenate([getattr(part, name) for part in parts])[:count] for name in fields))
