"""/v1/completions and /v1/chat/completions."""

from __future__ import annotations

import abc
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.errors import ApiError, clean
from jaxcost.serving.api.generation import (
    Generation,
    TextModel,
    check_choices,
    refuse_unsupported,
    sampling_of,
    seed_of,
    stops_of,
)
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.api.protection import unless_gone
from jaxcost.serving.api.schemas import ChatRequest, CompletionRequest
from jaxcost.serving.scheduler import Piece
from jaxcost.serving.scheduler import Request as Sequence
from jaxcost.serving.slots import Scored
from jaxcost.serving.vocabulary import Vocabulary

_LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON cannot write."""
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default


def completion_routes(model: TextModel, config: ApiConfig, metrics: Metrics) -> APIRouter:
    """The two addresses, for one model."""
    router = APIRouter(tags=["generation"])

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request):
        """Continue prompts."""
        return await _answer(_Completion(body, model, config), http, model, metrics)

    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request):
        """Answer a conversation."""
        return await _answer(_Chat(body, model, config), http, model, metrics)

    return router


class _Job(abc.ABC):
    """What the two addresses share: a request's sequences, and how its pieces are written."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, body: CompletionRequest | ChatRequest, model: TextModel, config: ApiConfig):
        refuse_unsupported(body)
        self.body, self.model, self.vocabulary = body, model, model.vocabulary
        self.adapter = model.adapter(body.model)
        self.stops, self.seed, self.each = stops_of(body, config), seed_of(body), body.n or 1
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.prompts: list[np.ndarray] = []
        self.count = self.each * self.num_prompts
        check_choices(self.count, config)
        if self.top > model.scheduler.slots.top:
            most = model.scheduler.slots.top
            raise ApiError(400, f"{self.top} log-probabilities a token were asked for; at most {most}.", "logprobs")

    num_prompts = 1

    @property
    @abc.abstractmethod
    def top(self) -> int:
        """Likeliest tokens that are told of each."""

    def make(self) -> list[Sequence]:
        """The requests, one for each choice of each prompt; encodes the prompts."""
        self.prompts = self.encoded()
        return [
            self.sequence(prompt, i * self.each + choice) for i, prompt in enumerate(self.prompts)
            for choice in range(self.each)
        ]  # fmt: skip

    def sequence(self, prompt: np.ndarray, index: int) -> Sequence:
        room = self.model.room(prompt)
        if room < 1 and self.max_tokens(room) != 0:
            raise ApiError(
                400,
                f"The prompt has {len(prompt)} tokens, and prompt and answer together at most {self.model.max_length}; "
                "shorten it.",
                code="context_length_exceeded",
            )
        return self.model.request(
            prompt,
            self.max_tokens(room),
            sampling_of(self.body, index, self.seed),
            stop_ids=() if self.body.ignore_eos else frozenset(self.vocabulary.tokenizer.stop_ids),
            stop=self.stops,
            scored=self.scored,
            score_prompt=self.score_prompt,
            adapter=self.adapter,
            deadline_seconds=self.body.deadline_seconds,
        )

    scored = score_prompt = False

    @abc.abstractmethod
    def encoded(self) -> list[np.ndarray]:
        """The tokens of each prompt."""

    @abc.abstractmethod
    def max_tokens(self, room: int) -> int:
        """Tokens of an answer at most, where so many find room."""

    def envelope(self, kind: str) -> dict[str, Any]:
        name = self.body.model or self.model.name
        return {"id": self.id, "object": kind, "created": self.created, "model": clean(name)}

    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @abc.abstractmethod
    def choice(self, index: int, pieces: list[Piece], prompt: Scored | None) -> dict[str, Any]:
        """A whole choice."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice in a stream, if there is one before its first piece."""
        return None

    @abc.abstractmethod
    def chunk(self, index: int, piece: Piece | Scored) -> dict[str, Any] | None:
        """A piece of a choice in a stream, if there is something to say."""


class _Completion(_Job):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, body: CompletionRequest, model: TextModel, config: ApiConfig):
        prompt = body.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            self.given = [prompt]
        else:
            self.given = prompt
        if not self.given:
            raise ApiError(400, "There is no prompt; give at least one.", "prompt")
        self.num_prompts = len(self.given)
        self.scored = body.logprobs is not None
        self.score_prompt = bool(body.echo) and self.scored
        if body.echo and not model.echoes:
            raise ApiError(400, "The model answers to a prompt and does not go on with it; leave echo out.", "echo")
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens is 0, which only says something with echo; ask for 1.", "max_tokens")
        # Without log-probabilities there is nothing to compute for an echo alone, but something to check.
        self.score_prompt |= body.max_tokens == 0
        self._offsets: dict[int, int] = {}
        super().__init__(body, model, config)

    @property
    def top(self) -> int:
        return self.body.logprobs or 0

    def encoded(self) -> list[np.ndarray]:
        each = [self.model.encode(g) if isinstance(g, str) else np.array(g, np.int32) for g in self.given]
        if not all(map(len, each)):
            raise ApiError(400, "A prompt is empty; give at least one token.", "prompt")
        return each

    def max_tokens(self, room: int) -> int:
        asked = self.body.max_tokens
        return max(1, min(_DEFAULT_COMPLETION_TOKENS, room)) if asked is None else asked

    def echoed(self, index: int) -> str:
        """The prompt of a choice as text."""
        given = self.given[index // self.each]
        return clean(given) if isinstance(given, str) else self.vocabulary.decode(self.prompts[index // self.each])

    def choice(self, index: int, pieces: list[Piece], prompt: Scored | None) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        made = self._logprobs(index, prompt, True) if self.body.echo and self.scored else None
        if self.scored:
            parts = [self._logprobs(index, piece.scores) for piece in pieces]
            parts = parts if made is None else [made, *parts]
            made = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
        text = self.echoed(index) + text if self.body.echo else text
        return {"index": index, "text": text, "logprobs": made, "finish_reason": pieces[-1].reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        if not self.body.echo or self.score_prompt:
            return None
        return {"index": index, "text": self.echoed(index), "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, piece: Piece | Scored) -> dict[str, Any] | None:
        if isinstance(piece, Scored):
            made = self._logprobs(index, piece, True) if self.scored else None
            return {"index": index, "text": self.echoed(index), "logprobs": made, "finish_reason": None}
        made = self._logprobs(index, piece.scores) if self.scored else None
        if not piece.text and piece.reason is None and not (made and made["tokens"]):
            return None
        return {"index": index, "text": piece.text, "logprobs": made, "finish_reason": piece.reason}

    def _logprobs(self, index: int, scores: Scored, of_prompt: bool = False) -> dict[str, list]:
        """Log-probabilities in the form of completions; the first token of a prompt has none."""
        tokens = scores.tokens.tolist()
        own: list[float | None] = [_written(value) for value in scores.logprobs.tolist()]
        top: list[dict[str, float] | None] = [
            _spelled_top(self.vocabulary, scores, i, self.top) for i in range(len(tokens))
        ]
        if of_prompt:
            tokens = [int(self.prompts[index // self.each][0]), *tokens]
            own, top = [None, *own], [None, *top]
        spelled, offsets = [self.vocabulary.spelled(token) for token in tokens], []
        at = self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(self.vocabulary.bytes_of(token).decode(errors="ignore"))
        self._offsets[index] = at
        return {"tokens": spelled, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}


class _Chat(_Job):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, body: ChatRequest, model: TextModel, config: ApiConfig):
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs; set it to true.", "top_logprobs")
        if not model.chats:
            raise ApiError(400, "The model has no chat template; send its prompt to /v1/completions.", "messages")
        self.scored = bool(body.logprobs)
        super().__init__(body, model, config)

    @property
    def top(self) -> int:
        return self.body.top_logprobs or 0

    def encoded(self) -> list[np.ndarray]:
        return [self.model.encode_chat([message.plain() for message in self.body.messages])]

    def max_tokens(self, room: int) -> int:
        asked = self.body.max_completion_tokens or self.body.max_tokens
        return max(1, room) if asked is None else asked

    def choice(self, index: int, pieces: list[Piece], prompt: Scored | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        made = {"content": [entry for p in pieces for entry in self._logprobs(p.scores)]} if self.scored else None
        return {"index": index, "message": message, "logprobs": made, "finish_reason": pieces[-1].reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, piece: Piece | Scored) -> dict[str, Any] | None:
        made = {"content": self._logprobs(piece.scores)} if self.scored else None
        if not piece.text and piece.reason is None and not (made and made["content"]):
            return None
        delta = {"content": piece.text} if piece.text or piece.reason is None else {}
        return {"index": index, "delta": delta, "logprobs": made, "finish_reason": piece.reason}

    def _logprobs(self, scores: Scored) -> list[dict[str, Any]]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            own = list(self.vocabulary.bytes_of(token))
            return {"token": self.vocabulary.spelled(token), "logprob": _written(logprob), "bytes": own}

        found = []
        for i, (token, logprob) in enumerate(zip(scores.tokens.tolist(), scores.logprobs.tolist(), strict=True)):
            top = zip(scores.top_tokens[i, : self.top], scores.top_logprobs[i, : self.top], strict=True)
            found.append({**entry(token, logprob), "top_logprobs": [entry(int(t), float(x)) for t, x in top]})
        return found


def _written(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def _spelled_top(vocabulary: Vocabulary, scores: Scored, place: int, top: int) -> dict[str, float]:
    """The likeliest tokens at a place, and its own."""
    pairs = zip(scores.top_tokens[place, :top].tolist(), scores.top_logprobs[place, :top].tolist(), strict=True)
    found = {vocabulary.spelled(token): _written(logprob) for token, logprob in pairs}
    own = vocabulary.spelled(int(scores.tokens[place]))
    return found | {own: _written(float(scores.logprobs[place]))} if top else found


async def _answer(job: _Job, http: Request, model: TextModel, metrics: Metrics):
    generation = await Generation.start(model, metrics, job.count, job.make, job.body.deadline_seconds)
    if job.body.stream:
        return StreamingResponse(_stream(job, generation), media_type="text/event-stream")
    try:
        pieces, prompts = await unless_gone(http.receive, generation.whole())
    finally:
        generation.cancel()
    choices = [job.choice(i, pieces[i], prompts.get(i)) for i in range(job.count)]
    return JSONResponse(
        {**job.envelope(job.kind), "choices": choices, "usage": generation.usage(job.prompt_tokens())}
    )  # fmt: skip


async def _stream(job: _Job, generation: Generation) -> AsyncIterator[str]:
    envelope = job.envelope(job.chunk_kind)
    wants_usage = job.body.stream_options is not None and job.body.stream_options.include_usage
    usage = {"usage": None} if wants_usage else {}
    try:
        for index in range(job.count):
            if (opening := job.opening(index)) is not None:
                yield _event({**envelope, "choices": [opening], **usage})
        async for index, what in generation.pieces():
            if (chunk := job.chunk(index, what)) is not None:
                yield _event({**envelope, "choices": [chunk], **usage})
        if wants_usage:
            yield _event({**envelope, "choices": [], "usage": generation.usage(job.prompt_tokens())})
    except ApiError as error:
        # The status is sent already; the client's library raises what it finds here.
        yield _event(error.body())
    finally:
        generation.cancel()
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"
