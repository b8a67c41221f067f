"""Sequences of one HTTP request, from the scheduler's thread to the event loop that answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import numpy as np

from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.errors import ApiError
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.api.schemas import ChatRequest, CompletionRequest
from jaxcost.serving.api.served import Served, check_end, submitted
from jaxcost.serving.sampling import Sampling
from jaxcost.serving.scheduler import Piece, Request, Scheduler, Ticket
from jaxcost.serving.slots import Scored
from jaxcost.serving.sources import SourceRequest, SourceScheduler
from jaxcost.serving.vocabulary import Vocabulary


class TextModel(Served):
    """A model that continues texts."""

    answers = "continues texts"
    echoes = True
    """A prompt and its answer are one text, which can be given back and scored as a whole."""

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        scheduler: Scheduler,
        adapters: Mapping[str, int] | None = None,
    ):
        """As `Served`."""
        super().__init__(name, vocabulary, scheduler, scheduler.slots.max_length, adapters)
        self.scheduler = scheduler

    def room(self, prompt: np.ndarray) -> int:
        """Tokens that an answer to a prompt, int32 (T,), may have."""
        return self.max_length - len(prompt)

    def request(self, prompt: np.ndarray, max_new_tokens: int, sampling: Sampling, **options: Any) -> Request:
        """What the scheduler is asked to answer a prompt; `options` are further fields of a `Request`."""
        return Request(prompt, max_new_tokens, sampling, **options)

    def _with_specials(self, text: str) -> np.ndarray:
        """Behind what begins a document."""
        tokenizer = self.vocabulary.tokenizer
        return np.concatenate([[tokenizer.separator_id], tokenizer.encode(text)]).astype(np.int32)


class AnsweringModel(TextModel):
    """A model whose encoder reads the prompt, and whose decoder answers to it, such as one that translates."""

    answers = "answers to texts"
    echoes = False

    def __init__(self, name: str, vocabulary: Vocabulary, scheduler: SourceScheduler):
        """As `TextModel`; the prompts have `max_length` tokens at most, and the answers as the slots say."""
        super().__init__(name, vocabulary, scheduler)
        self.max_length = scheduler.slots.source_length
        self._begins = np.array([scheduler.slots.model.config.encoder.start], np.int32)

    def room(self, prompt: np.ndarray) -> int:
        return self.scheduler.slots.max_length - len(self._begins)

    def request(self, prompt: np.ndarray, max_new_tokens: int, sampling: Sampling, **options: Any) -> Request:
        return SourceRequest(self._begins, max_new_tokens, sampling, source=prompt, **options)

    def _with_specials(self, text: str) -> np.ndarray:
        return self.vocabulary.tokenizer.encode_source(text)


def sampling_of(body: CompletionRequest | ChatRequest, choice: int, seed: int) -> Sampling:
    """How a choice of a request is sampled."""
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=(seed + choice) % 2**32,
    )


def stops_of(body: CompletionRequest | ChatRequest, config: ApiConfig) -> tuple[str, ...]:
    """The stop strings of a request; ApiError if they are too many or too long."""
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    if len(stops) > config.stops:
        raise ApiError(400, f"There are {len(stops)} stop strings; give at most {config.stops}.", "stop")
    if any(len(stop) > config.stop_characters for stop in stops):
        raise ApiError(400, f"A stop string has more than {config.stop_characters} characters; shorten it.", "stop")
    return tuple(stop for stop in stops if stop)


class Generation:
    """The sequences of one request, which run side by side."""

    def __init__(self, model: TextModel, metrics: Metrics):
        self._model, self._metrics = model, metrics
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
        self.tickets: list[Ticket] = []

    @classmethod
    async def start(
        cls,
        model: TextModel,
        metrics: Metrics,
        count: int,
        make: Callable[[], list[Request]],
        deadline_seconds: float | None,
    ) -> Generation:
        """Sends `count` requests of a deadline, which `make` makes in a thread once there is room for them.

        Raises:
          ApiError: there is no room, or a request cannot be met.
        """
        made = cls(model, metrics)
        made.tickets = await submitted(
            model.scheduler,
            count,
            lambda: [made._ticket(*numbered) for numbered in enumerate(make())],
            deadline_seconds,
        )
        return made

    def _ticket(self, index: int, request: Request) -> Ticket:
        def tell(what: Piece | Scored) -> None:
            # The loop may be closed by the time that a last piece comes.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, what))

        def on_piece(piece: Piece) -> None:
            if piece.reason is not None:
                self._metrics.ended(ticket, piece.reason)
            tell(piece)

        ticket = Ticket(request, on_piece, tell)
        return ticket

    def cancel(self) -> None:
        """Ends all sequences: nobody waits for them."""
        for ticket in self.tickets:
            ticket.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | Scored]]:
        """What is new, with the index of its sequence, to the end of all; ApiError if one ends without an answer."""
        left = len(self.tickets)
        try:
            while left:
                index, what = await self._queue.get()
                if isinstance(what, Piece) and what.reason is not None:
                    left -= 1
                    check_end(self.tickets[index], what.reason)
                yield index, what
        finally:
            self.cancel()

    async def whole(self) -> tuple[dict[int, list[Piece]], dict[int, Scored]]:
        """All pieces of each sequence, and the scores of the prompts that were asked for."""
        pieces: dict[int, list[Piece]] = {}
        prompts: dict[int, Scored] = {}
        async for index, what in self.pieces():
            if isinstance(what, Piece):
                pieces.setdefault(index, []).append(what)
            else:
                prompts[index] = what
        return pieces, prompts

    def usage(self, prompt_tokens: int) -> dict[str, Any]:
        """What the request used, in OpenAI's form, and what it cost."""
        new = sum(ticket.new_tokens for ticket in self.tickets)
        seconds = sum(ticket.device_seconds for ticket in self.tickets)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new,
            "total_tokens": prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": sum(ticket.cached_tokens for ticket in self.tickets)},
            **self._metrics.spent(seconds),
        }


def seed_of(body: CompletionRequest | ChatRequest) -> int:
    """The request's seed, or one that nobody knows."""
    return secrets.randbits(32) if body.seed is None else body.seed


def check_choices(count: int, config: ApiConfig) -> None:
    """ApiError if one request asks for too many sequences."""
    if count > config.choices:
        raise ApiError(400, f"{count} sequences were asked for (prompts times n); at most {config.choices}.", "n")


def refuse_unsupported(body: CompletionRequest | ChatRequest) -> None:
    """ApiError if a request asks for what is not there."""
    if (name := body.unsupported()) is not None:
        raise ApiError(400, f"{name} is not supported by this server; leave it out.", name, "unsupported_parameter")
