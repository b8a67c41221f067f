"""/v1/audio/transcriptions and /v1/audio/translations, by OpenAI's forms."""

from __future__ import annotations

import abc
import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import Annotated, Any

import anyio
import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Form, Request
from fastapi.responses import PlainTextResponse

from jaxcost.data.characters import Characters
from jaxcost.data.records import BadRecord
from jaxcost.data.sounds import read_sound, windows
from jaxcost.data.spectrogram import SAMPLE_RATE
from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.errors import ApiError
from jaxcost.serving.api.generation import Generation
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.api.pooling import Answering
from jaxcost.serving.api.protection import unless_gone
from jaxcost.serving.api.schemas import SpeechRequest, TranscriptionRequest
from jaxcost.serving.api.served import Served, reserve
from jaxcost.serving.batches import Batcher
from jaxcost.serving.sampling import Sampling
from jaxcost.serving.sources import SourceRequest, SourceScheduler
from jaxcost.serving.speech import Instructions
from jaxcost.serving.vocabulary import Vocabulary

_FORM = Form(media_type="multipart/form-data")
_DECODERS = 2
"""Files that are decoded at one time."""


@dataclasses.dataclass(frozen=True)
class Said:
    """What was heard in one piece of a recording."""

    tokens: list[int]
    text: str


@dataclasses.dataclass(frozen=True)
class Heard:
    """What was heard in a recording, piece by piece."""

    said: list[Said]
    language: str | None
    """Code of what was spoken, where the model tells."""
    device_seconds: float


class SpeechModel(Served, abc.ABC):
    """A model that writes down what it hears, in pieces of a recording."""

    answers = "writes down what it hears"
    longest: int
    """Samples of the longest piece, of `spectrogram.SAMPLE_RATE` a second."""

    def pieces(self, samples: np.ndarray) -> list[np.ndarray]:
        """A recording, float32 (samples,), in pieces that the model hears one by one."""
        return windows(samples, self.longest, SAMPLE_RATE)

    @abc.abstractmethod
    def check(self, body: SpeechRequest, language: str | None, translate: bool) -> None:
        """ApiError if the model does not do what is asked of it."""

    @abc.abstractmethod
    async def hear(
        self, metrics: Metrics, pieces: Sequence[np.ndarray], body: SpeechRequest, language: str | None, translate: bool
    ) -> Heard:
        """Hears the pieces of a recording; ApiError if it cannot."""


class DictatedModel(SpeechModel):
    """A decoder that answers to spectrograms, such as Whisper's, in any of its languages."""

    def __init__(self, name: str, vocabulary: Vocabulary, scheduler: SourceScheduler, instructions: Instructions):
        """The pieces of a recording are requests of the scheduler."""
        super().__init__(name, vocabulary, scheduler, scheduler.slots.max_length)
        self.scheduler, self.instructions = scheduler, instructions
        self.longest = scheduler.slots.source_length

    def check(self, body: SpeechRequest, language: str | None, translate: bool) -> None:
        known = self.instructions.languages
        if translate and not self.instructions.translates:
            raise self.refuse("translate it")
        if language is not None and language not in known:
            some = f"one of {', '.join(sorted(known))}" if known else "nothing, as it has one language alone"
            raise ApiError(400, f"The model does not know this language; give {some}.", "language")
        if body.prompt and self.instructions.before is None:
            raise ApiError(400, "The model reads no text before a recording; leave prompt out.", "prompt")

    async def hear(
        self, metrics: Metrics, pieces: Sequence[np.ndarray], body: SpeechRequest, language: str | None, translate: bool
    ) -> Heard:
        seconds = 0.0
        if language is None and self.instructions.languages:
            language, seconds = await self._language(metrics, pieces[0], body)
        seed = secrets.randbits(32) if body.seed is None else body.seed
        temperature, stop_ids = body.temperature or 0.0, frozenset(self.vocabulary.tokenizer.stop_ids)

        def make() -> list[SourceRequest]:
            prompt = self.instructions.prompt(language, translate, self._before(body.prompt))
            return [
                SourceRequest(
                    prompt,
                    self.max_length - len(prompt),
                    Sampling(temperature, seed=(seed + i) % 2**32),
                    stop_ids=stop_ids,
                    deadline_seconds=body.deadline_seconds,
                    source=piece,
                )
                for i, piece in enumerate(pieces)
            ]

        generation = await Generation.start(self, metrics, len(pieces), make, body.deadline_seconds)
        parts, _ = await generation.whole()
        said = [
            Said(
                [token for part in parts[i] for token in part.scores.tokens.tolist()],
                "".join(part.text for part in parts[i]),
            )
            for i in range(len(pieces))
        ]
        return Heard(said, language, seconds + sum(ticket.device_seconds for ticket in generation.tickets))

    def _before(self, text: str | None) -> np.ndarray | None:
        """The end of what was said before, of which half of what the model holds may be."""
        if not text:
            return None
        return self.vocabulary.tokenizer.encode(f" {text.strip()}")[1 - self.max_length // 2 :]

    async def _language(self, metrics: Metrics, piece: np.ndarray, body: SpeechRequest) -> tuple[str, float]:
        """The code of the language that is spoken, which is the first thing that the model says, and what it took."""
        start = np.array([self.instructions.start], np.int32)
        request = SourceRequest(start, 1, deadline_seconds=body.deadline_seconds, source=piece)
        generation = await Generation.start(self, metrics, 1, lambda: [request], body.deadline_seconds)
        parts, _ = await generation.whole()
        tokens = [token for part in parts[0] for token in part.scores.tokens.tolist()]
        codes = [code for code, i in self.instructions.languages.items() if [i] == tokens]
        if not codes:
            raise ApiError(400, "The model does not tell which language this is; name it.", "language")
        return codes[0], generation.tickets[0].device_seconds


class SpelledModel(SpeechModel):
    """A model of CTC, which spells what it hears in the characters of one language."""

    of_tokens = False

    def __init__(self, name: str, vocabulary: Vocabulary, batcher: Batcher, characters: Characters):
        """The pieces of a recording are inputs of the batcher; the vocabulary is nobody's."""
        super().__init__(name, vocabulary, batcher, batcher.batched.max_length)
        self.batcher, self.characters = batcher, characters
        self.longest, self._least = batcher.batched.longest, batcher.batched.model.config.audio.length(1)

    def pieces(self, samples: np.ndarray) -> list[np.ndarray]:
        # The end of a recording may be too short for a frame.
        return [np.pad(piece, (0, max(0, self._least - len(piece)))) for piece in super().pieces(samples)]

    def check(self, body: SpeechRequest, language: str | None, translate: bool) -> None:
        if translate:
            raise self.refuse("translate it")
        if language is not None:
            raise ApiError(400, "The model has one language alone; leave language out.", "language")
        for name in ("prompt", "temperature"):
            if getattr(body, name):
                raise ApiError(400, f"The model takes the likeliest characters alone; leave {name} out.", name)

    async def hear(
        self, metrics: Metrics, pieces: Sequence[np.ndarray], body: SpeechRequest, language: str | None, translate: bool
    ) -> Heard:
        answering = Answering(self.batcher, metrics, len(pieces), body.deadline_seconds)
        found = await answering.run(lambda: pieces)
        labels = [row[:count].tolist() for row, count in found]
        said = [Said(each, self.characters.text(each)) for each in labels]
        return Heard(said, None, sum(ask.device_seconds for ask in answering.asked))


def speech_routes(model: SpeechModel, config: ApiConfig, metrics: Metrics) -> APIRouter:
    """The two addresses, for one model."""
    router, decoders = APIRouter(tags=["speech"]), anyio.CapacityLimiter(_DECODERS)

    @router.post("/v1/audio/transcriptions")
    async def transcriptions(body: Annotated[TranscriptionRequest, _FORM], http: Request):
        """Write down what is said in a recording."""
        return await _answer(body, body.language, False, http, model, config, metrics, decoders)

    @router.post("/v1/audio/translations")
    async def translations(body: Annotated[SpeechRequest, _FORM], http: Request):
        """Write down what is said in a recording, in English."""
        return await _answer(body, None, True, http, model, config, metrics, decoders)

    return router


async def _answer(
    body: SpeechRequest,
    language: str | None,
    translate: bool,
    http: Request,
    model: SpeechModel,
    config: ApiConfig,
    metrics: Metrics,
    decoders: anyio.CapacityLimiter,
):
    model.adapter(body.model)
    if (name := body.unsupported()) is not None:
        raise ApiError(400, f"{name} is not supported by this server; leave it out.", name, "unsupported_parameter")
    model.check(body, language, translate)
    content = await body.file.read()
    # A place is held while the file is decoded, so that no work is spent on what would be refused.
    reserve(model.worker, 1, body.deadline_seconds)
    try:
        # A small file may be half an hour of silence, so that few of them are decoded at one time.
        samples, pieces = await anyio.to_thread.run_sync(
            _decoded, model, content, config.audio_seconds, limiter=decoders
        )
    except BadRecord as error:
        raise ApiError(400, f"The file {error}; send another one, such as WAV or FLAC.", "file") from None
    finally:
        model.worker.release(1)
    heard = await unless_gone(http.receive, model.hear(metrics, pieces, body, language, translate))
    text = " ".join(stripped for said in heard.said if (stripped := said.text.strip()))
    if body.response_format == "text":
        return PlainTextResponse(f"{text}\n")
    seconds = len(samples) / SAMPLE_RATE
    usage = {"type": "duration", "seconds": math.ceil(seconds), **metrics.spent(heard.device_seconds)}
    if body.response_format != "verbose_json":
        return {"text": text, "usage": usage}
    return {
        "task": "translate" if translate else "transcribe",
        "language": heard.language,
        "duration": seconds,
        "text": text,
        "segments": _segments(pieces, heard.said, body.temperature or 0.0),
        "usage": usage,
    }


def _decoded(model: SpeechModel, content: bytes, max_seconds: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """The samples of a file, and the pieces of them that the model hears one by one."""
    samples = read_sound(content, SAMPLE_RATE, max_seconds)
    return samples, model.pieces(samples)


def _segments(pieces: Sequence[np.ndarray], said: Sequence[Said], temperature: float) -> list[dict[str, Any]]:
    """The pieces of a recording with their times."""
    ends = (np.cumsum([len(piece) for piece in pieces]) / SAMPLE_RATE).tolist()
    starts = [0.0, *ends[:-1]]
    return [
        {
            "id": i,
            "seek": round(start * 100),
            "start": start,
            "end": end,
            "text": one.text,
            "tokens": one.tokens,
            "temperature": temperature,
        }
        for i, (start, end, one) in enumerate(zip(starts, ends, said, strict=True))
    ]
