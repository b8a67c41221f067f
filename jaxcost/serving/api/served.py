"""What the addresses know of a model, whatever it answers, and how their work reaches its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import anyio.to_thread
import numpy as np

from jaxcost.serving.api.errors import ApiError
from jaxcost.serving.vocabulary import Vocabulary
from jaxcost.serving.worker import Closed, Job, Overloaded, Reason, Worker

_ENDS = {
    "deadline": (504, "The request was not done by its deadline; ask for fewer tokens, or try again later."),
    "error": (500, "The model has failed; the server's log says why."),
    "cancelled": (499, "The client has gone."),
}
_J = TypeVar("_J", bound=Job)


class Served:
    """A model by its name, with the adapters that it answers by."""

    answers: str
    """What it does, as a sentence goes on behind its name."""
    of_tokens = True
    """Whether it reads or writes tokens of its vocabulary."""

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        worker: Worker,
        max_length: int,
        adapters: Mapping[str, int] | None = None,
    ):
        """`max_length` is in tokens; `adapters` are numbers of `weights.Adapters` by the names under which they are
        asked for."""
        self.name, self.vocabulary, self.worker, self.max_length = name, vocabulary, worker, max_length
        self.names = {name: -1, **(adapters or {})}

    @property
    def healthy(self) -> bool:
        """Whether it answers."""
        return self.worker.healthy

    def close(self) -> None:
        """Ends what was accepted, and takes on nothing more."""
        self.worker.close()

    def adapter(self, asked: str | None) -> int:
        """The adapter of a name; ApiError if there is no such model."""
        if asked is None:
            return -1
        if asked not in self.names:
            raise ApiError(404, f"There is no model {asked[:100]!r}; see /v1/models.", "model", "model_not_found")
        return self.names[asked]

    def refuse(self, what: str) -> ApiError:
        """That the model does not do what an address is for."""
        return ApiError(400, f"The model {self.name} {self.answers}, and does not {what}.", code="unsupported_model")

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a template for conversations."""
        return getattr(self.vocabulary.tokenizer, "chat_template", None) is not None

    def encode(self, text: str, special: bool = True) -> np.ndarray:
        """The ids of a text, int32 (T,), with the special tokens around it or without; ApiError if it is too long to be
        worth the work."""
        if self.vocabulary.surely_longer(text, self.max_length):
            raise ApiError(
                400,
                f"The text has {len(text)} characters, more than the {self.max_length} tokens that the model takes can "
                "hold; shorten it.",
                code="context_length_exceeded",
            )
        return self._with_specials(text) if special else self.vocabulary.tokenizer.encode(text)

    def _with_specials(self, text: str) -> np.ndarray:
        return self.vocabulary.tokenizer.encode_source(text)

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


def reserve(worker: Worker, count: int, deadline_seconds: float | None) -> None:
    """Holds places for `count` jobs of a deadline, as `Worker.reserve`; ApiError if there are not so many."""
    try:
        worker.reserve(count, deadline_seconds)
    except Overloaded as error:
        wait = {"Retry-After": str(error.retry_after_seconds)}
        raise ApiError(429, str(error), code="overloaded", headers=wait) from None
    except Closed as error:
        raise ApiError(503, str(error), headers={"Retry-After": "1"}) from None


async def submitted(
    worker: Worker[_J], count: int, make: Callable[[], Sequence[_J]], deadline_seconds: float | None = None
) -> list[_J]:
    """Sends `count` jobs of a deadline, which `make` makes in a thread once there is room for them.

    Raises:
      ApiError: there is no room, or a job cannot be met.
    """
    reserve(worker, count, deadline_seconds)
    sent: list[_J] = []
    try:
        for job in await anyio.to_thread.run_sync(make):
            worker.submit(job)
            sent.append(job)
    except BaseException as error:
        for job in sent:
            job.cancel()
        if isinstance(error, ValueError):
            code = "context_length_exceeded" if "that the model takes" in str(error) else None
            raise ApiError(400, str(error), code=code) from None
        raise
    finally:
        worker.release(count - len(sent))
    return sent


def check_end(job: Job, reason: Reason) -> None:
    """ApiError if a job has ended without an answer."""
    if reason in _ENDS:
        status, message = _ENDS[reason]
        # Who is late by the client's own wish is not so by the server's fault.
        own = reason == "deadline" and job.deadline_seconds is not None
        raise ApiError(408 if own else status, message)
