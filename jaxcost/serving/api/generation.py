"""Sequences of one HTTP request, from the scheduler's thread to the event loop that answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import anyio.to_thread
import numpy as np

from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.errors import ApiError
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.api.schemas import ChatRequest, CompletionRequest
from jaxcost.serving.sampling import Sampling
from jaxcost.serving.scheduler import Closed, Overloaded, Piece, Request, Scheduler, Ticket
from jaxcost.serving.slots import Scored
from jaxcost.serving.vocabulary import Vocabulary

_ENDS = {
    "deadline": (504, "The request was not done by its deadline; ask for fewer tokens, or try again later."),
    "error": (500, "The model has failed; the server's log says why."),
    "cancelled": (499, "The client has gone."),
}


class TextModel:
    """A model that continues texts, with the adapters that it answers by."""

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        scheduler: Scheduler,
        adapters: Mapping[str, int] | None = None,
    ):
        """`adapters` are numbers of `weights.Adapters` by the names under which they are asked for."""
        self.name, self.vocabulary, self.scheduler = name, vocabulary, scheduler
        self.names = {name: -1, **(adapters or {})}

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer."""
        return self.scheduler.slots.max_length

    @property
    def healthy(self) -> bool:
        """Whether it answers."""
        return self.scheduler.healthy

    def close(self) -> None:
        """Ends what was accepted, and takes on nothing more."""
        self.scheduler.close()

    def adapter(self, asked: str | None) -> int:
        """The adapter of a name; ApiError if there is no such model."""
        if asked is None:
            return -1
        if asked not in self.names:
            raise ApiError(404, f"There is no model {asked[:100]!r}; see /v1/models.", "model", "model_not_found")
        return self.names[asked]

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text behind what begins a document; ApiError if it is too long to be worth the work."""
        if self.vocabulary.surely_longer(text, self.max_length):
            raise ApiError(
                400,
                f"The text has {len(text)} characters, more than the {self.max_length} tokens that the model takes can "
                "hold; shorten it.",
                code="context_length_exceeded",
            )
        tokenizer = self.vocabulary.tokenizer
        return np.concatenate([[tokenizer.separator_id], tokenizer.encode(text)]).astype(np.int32)

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a template for conversations."""
        return getattr(self.vocabulary.tokenizer, "chat_template", None) is not None

    def encode_chat(self, messages: list[Mapping[str, Any]], answer: bool = True) -> np.ndarray:
        """The ids of a conversation; ApiError if there is no template for it, or it refuses."""
        if not self.chats:
            raise ApiError(400, "The model has no chat template; send its prompt to /v1/completions.", "messages")
        if self.vocabulary.surely_longer("".join(m["content"] for m in messages), self.max_length):
            raise ApiError(400, "The conversation is longer than the model takes; shorten it.", "messages")
        try:
            return self.vocabulary.tokenizer.chat(messages, answer)
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None


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
        cls, model: TextModel, metrics: Metrics, count: int, make: Callable[[], list[Request]]
    ) -> Generation:
        """Sends `count` requests, which `make` makes in a thread once there is room for them.

        Raises:
          ApiError: there is no room, or a request cannot be met.
        """
        made, scheduler = cls(model, metrics), model.scheduler
        try:
            scheduler.reserve(count)
        except Overloaded as error:
            wait = {"Retry-After": str(error.retry_after_seconds)}
            raise ApiError(429, str(error), code="overloaded", headers=wait) from None
        except Closed as error:
            raise ApiError(503, str(error), headers={"Retry-After": "1"}) from None
        sent = 0
        try:
            requests = await anyio.to_thread.run_sync(make)
            for request in requests:
                made._submit(request)
                sent += 1
        except ValueError as error:
            made.cancel()
            code = "context_length_exceeded" if "that the model takes" in str(error) else None
            raise ApiError(400, str(error), code=code) from None
        except BaseException:
            made.cancel()
            raise
        finally:
            scheduler.release(count - sent)
        return made

    def _submit(self, request: Request) -> None:
        index = len(self.tickets)

        def tell(what: Piece | Scored) -> None:
            # The loop may be closed by the time that a last piece comes.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, what))

        def on_piece(piece: Piece) -> None:
            if piece.reason is not None:
                self._metrics.ended(ticket, piece.reason)
            tell(piece)

        ticket = Ticket(request, on_piece, tell)
        self._model.scheduler.submit(ticket)
        self.tickets.append(ticket)

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
                    if what.reason in _ENDS:
                        status, message = _ENDS[what.reason]
                        # Who is late by the client's own wish is not so by the server's fault.
                        own = what.reason == "deadline" and self.tickets[index].request.deadline_seconds is not None
                        raise ApiError(408 if own else status, message)
                yield index, what
        finally:
            self.cancel()

    def usage(self, prompt_tokens: int) -> dict[str, Any]:
        """What the request used, in OpenAI's form, and what it cost."""
        new = sum(ticket.new_tokens for ticket in self.tickets)
        seconds = sum(ticket.device_seconds for ticket in self.tickets)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new,
            "total_tokens": prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": sum(ticket.cached_tokens for ticket in self.tickets)},
            "device_seconds": seconds,
            "cost_usd": self._metrics.usd(seconds),
            "energy_kwh": self._metrics.kwh(seconds),
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
