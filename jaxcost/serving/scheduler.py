"""Continuous batching: requests wait in a bounded queue, take a slot as soon as one is free, and leave it at their end.

One thread owns the device. Each of its rounds gives free slots to those who wait, reads a bounded number of prompt
tokens, and decodes a few tokens of every slot, so that nobody's prompt holds up everybody's answers for long.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection

import numpy as np

from jaxcost.serving.prefix import PrefixCache
from jaxcost.serving.sampling import GREEDY, Sampling
from jaxcost.serving.slots import Scored, Slots
from jaxcost.serving.text import TextStream
from jaxcost.serving.worker import Job, Reason, SchedulerConfig, Worker

_LIMITS = SchedulerConfig()


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

    @property
    def tokens(self) -> int:
        """What is read of it, in tokens."""
        return len(self.prompt)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of a request."""

    text: str
    """What the new tokens set free, which may be less than theirs or more."""
    scores: Scored
    """The new tokens, (n,), with log-probabilities if they were asked for."""
    reason: Reason | None = None
    """Why it ended; None while it goes on."""


class Ticket(Job):
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
        super().__init__(request.tokens, request.deadline_seconds)
        self.request = request
        self.cached_tokens = 0
        """Tokens of the prompt that did not have to be read again."""
        self.kept: list[int] = []
        """Of each round with a draft, how many of its proposals were kept."""
        self._on_piece, self._on_prompt = on_piece, on_prompt

    def end(self, reason: Reason, text: str = "", scores: Scored | None = None) -> None:
        """Gives out the last piece."""
        self.times.ended = time.monotonic()
        self._on_piece(Piece(text, _no_scores() if scores is None else scores, reason))


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


class Scheduler(Worker[Ticket]):
    """Runs requests."""

    def __init__(
        self,
        slots: Slots,
        decode: Callable[[np.ndarray], str],
        config: SchedulerConfig = _LIMITS,
        prefixes: PrefixCache | None = None,
    ):
        """Starts the thread.

        Args:
          slots: what runs them.
          decode: the text of ids (tokens,).
          config: limits.
          prefixes: where read prompts are kept for those that begin alike; nothing is kept without.
        """
        self.slots, self.prefixes = slots, prefixes
        self._decode_text = decode
        self._running: dict[int, _Running] = {}
        super().__init__(config, "scheduler")

    @property
    def num_running(self) -> int:
        """Requests in slots."""
        return len(self._running)

    @property
    def cache_use(self) -> float:
        """Share of the slots' room that holds tokens."""
        held = sum(len(run.ticket.request.prompt) + run.ticket.new_tokens for run in list(self._running.values()))
        return held / (self.slots.config.slots * self.slots.max_length)

    @property
    def _at_once(self) -> int:
        return self.slots.config.slots

    @property
    def _free(self) -> int:
        return self._at_once - len(self._running)

    def _takes(self, jobs: int) -> bool:
        # One request may bring more sequences than there are places, and then needs all of them.
        return self.num_waiting + min(jobs, self.config.queue + self._at_once) <= self.config.queue + self._free

    def _check(self, job: Ticket) -> None:
        request = job.request
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

    def _abandon(self) -> list[Ticket]:
        left = [run.ticket for run in self._running.values()]
        self._running.clear()
        return left

    # ---- The thread ----

    def _round(self) -> None:
        for run in list(self._running.values()):
            if why := run.ticket.over(self.config):
                self._leave(run, "", _no_scores(), why)
        self._admit()
        self._read_prompts()
        self._decode()

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
            self._take(run, made.at(run.slot))

    def _take(self, run: _Running, made: Scored) -> None:
        """Gives a request its new tokens, (steps,), up to where it ends."""
        ticket, texts, kept = run.ticket, [], 0
        request, reason = ticket.request, None
        if self.slots.draft is not None:
            ticket.kept.append(self.slots.kept(made.tokens))
            made = made.at(made.tokens >= 0)
        for token in made.tokens.tolist():
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
        scores = made.at(slice(kept))
        if reason is not None:
            self._leave(run, "".join(texts), scores, reason)
        elif kept:
            ticket._on_piece(Piece("".join(texts), scores))

    def _leave(self, run: _Running, text: str, scores: Scored, reason: Reason) -> None:
        with self._condition:
            del self._running[run.slot]
        run.ticket.end(reason, text, scores)
        self._took(run.ticket)


def _no_scores() -> Scored:
    none = np.zeros((0,), np.float32)
    return Scored(np.zeros((0,), np.int32), none, none.reshape(0, 0), np.zeros((0, 0), np.int32))


def _joined(parts: list[Scored], count: int) -> Scored:
    """The scores of the pieces as one, of the first `count` tokens."""
    fields = [field.name for field in dataclasses.fields(Scored)]
    return Scored(*(np.concatenate([getattr(part, name) for part in parts])[:count] for name in fields))
