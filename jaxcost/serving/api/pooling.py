"""/v1/embeddings, /v1/classify and /v1/rerank, by OpenAI's, vLLM's and Cohere's forms."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from jaxcost.data.images import pixels, read_image
from jaxcost.data.records import BadRecord
from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.errors import ApiError, clean
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.api.protection import unless_gone
from jaxcost.serving.api.schemas import ClassifyRequest, EmbeddingRequest, ImagePart, PoolingRequest, RerankRequest
from jaxcost.serving.api.served import Served, check_end, submitted
from jaxcost.serving.batches import Ask, Batcher
from jaxcost.serving.pooled import Text
from jaxcost.serving.vocabulary import Vocabulary
from jaxcost.serving.worker import Reason


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a model's outputs stand for."""

    names: tuple[str, ...]
    several: bool = False
    """A text may have several labels, each with a probability of its own, and not one of them."""

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Of each label, from outputs (N,)."""
        if self.several:
            return _sigmoid(outputs)
        shares = np.exp(outputs - outputs.max())
        return shares / shares.sum()


def _sigmoid(outputs: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * outputs))


class PooledModel(Served):
    """A model that gives embeddings of texts, labels of them, or, with a single output, ranks of pairs."""

    def __init__(self, name: str, vocabulary: Vocabulary, batcher: Batcher, labels: Labels | None = None):
        """Labels are called LABEL_0, LABEL_1 ... if their names are not given."""
        super().__init__(name, vocabulary, batcher, batcher.batched.max_length)
        self.batcher, head = batcher, batcher.batched.model.config.head
        self.embeds, self.ranks = head.embed, head.outputs == 1
        self.labels = labels or Labels(tuple(f"LABEL_{i}" for i in range(head.outputs)))
        self.answers = "gives embeddings" if self.embeds else "gives ranks" if self.ranks else "gives labels"

    def text(self, given: str | Sequence[int]) -> Text:
        """A text, or the ids that stand for one, as the model reads it."""
        return Text(self.encode(given) if isinstance(given, str) else np.array(given, np.int32))

    def pair(self, query: str, document: str) -> Text:
        """A query and a document as the model reads them together; ApiError if they are surely too long."""
        if self.vocabulary.surely_longer(query + document, self.max_length):
            raise ApiError(
                400,
                f"A query with its document is longer than the {self.max_length} tokens that the model takes; shorten "
                "either.",
                "documents",
                "context_length_exceeded",
            )
        return Text(*self.vocabulary.tokenizer.encode_pair(query, document))

    def classified(self, given: Sequence[str | Sequence[int] | ImagePart], config: ApiConfig) -> list[Text]:
        """What labels are told of, as the model reads it; ApiError if it is of another kind."""
        if any(isinstance(one, ImagePart) for one in given):
            raise self.refuse("label images")
        return [self.text(one) for one in given]


class ImageModel(PooledModel):
    """A model that gives labels of images."""

    of_tokens = False

    def __init__(self, name: str, vocabulary: Vocabulary, batcher: Batcher, labels: Labels | None = None):
        """As `PooledModel`; the vocabulary is nobody's."""
        super().__init__(name, vocabulary, batcher, labels)
        self.embeds = self.ranks = False
        self.answers = "labels images"

    def classified(self, given: Sequence[str | Sequence[int] | ImagePart], config: ApiConfig) -> list[np.ndarray]:
        """Images as the model sees them, float32 (height, width, channels); ApiError if one cannot be read."""
        found, left = [], config.image_pixels
        for one in given:
            if not isinstance(one, ImagePart):
                raise self.refuse("label texts")
            try:
                image = read_image(_data(one.image_url.url), config.body_bytes, left)
            except BadRecord as error:
                raise ApiError(400, f"An image {error}; send fewer or smaller ones, or others.", "input") from None
            left -= image.shape[0] * image.shape[1]
            found.append(pixels(self.batcher.batched.shape, image))
        return found


def _data(url: str) -> bytes:
    """What an address of data holds."""
    head, comma, content = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise ApiError(400, "An image is at another address; send it as data:image/png;base64,...", "input")
    try:
        return base64.b64decode(content, validate=True)
    except ValueError:
        raise ApiError(400, "The data of an image are not base64; encode them again.", "input") from None


def pooling_routes(model: PooledModel, config: ApiConfig, metrics: Metrics) -> APIRouter:
    """The addresses, for one model."""
    router = APIRouter(tags=["pooling"])

    async def answers(
        body: PoolingRequest, http: Request, count: int, make: Callable[[], list[Any]]
    ) -> tuple[list[np.ndarray], dict[str, Any]]:
        """The answers to `count` texts or images, which `make` makes, and what they took."""
        model.adapter(body.model)
        if not count:
            raise ApiError(400, "There is nothing to read; give at least one input.")
        if count > config.texts:
            raise ApiError(400, f"There are {count} inputs; give at most {config.texts} in one request.")
        answering = Answering(model.batcher, metrics, count, body.deadline_seconds)
        found = await unless_gone(http.receive, answering.run(make))
        tokens = sum(ask.prompt_tokens for ask in answering.asked)
        spent = metrics.spent(sum(ask.device_seconds for ask in answering.asked))
        return found, {"prompt_tokens": tokens, "total_tokens": tokens, **spent}

    def envelope(kind: str, body: PoolingRequest) -> dict[str, Any]:
        return {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": clean(body.model or model.name),
        }

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, http: Request):
        """Embed texts."""
        if not model.embeds:
            raise model.refuse("embed them")
        width = model.batcher.batched.model.config.width
        if body.dimensions not in (None, width):
            raise ApiError(400, f"The model gives {width} numbers for a text; leave dimensions out.", "dimensions")
        given = body.texts()
        found, usage = await answers(body, http, len(given), lambda: [model.text(text) for text in given])

        def written(embedding: np.ndarray) -> list[float] | str:
            if body.encoding_format == "base64":
                return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
            return embedding.tolist()

        data = [{"object": "embedding", "index": i, "embedding": written(found[i])} for i in range(len(given))]
        return {"object": "list", "data": data, "model": clean(body.model or model.name), "usage": usage}

    @router.post("/v1/classify")
    async def classify(body: ClassifyRequest, http: Request):
        """Tell the labels of texts or images."""
        if model.embeds or model.ranks:
            raise model.refuse("label texts")
        given = body.given()
        found, usage = await answers(body, http, len(given), lambda: model.classified(given, config))
        data = []
        for i, outputs in enumerate(found):
            shares = model.labels.probabilities(outputs)
            label = model.labels.names[int(shares.argmax())]
            data.append({"index": i, "label": label, "probs": shares.tolist(), "num_classes": len(shares)})
        return {**envelope("classify", body), "object": "list", "data": data, "usage": usage}

    @router.post("/v1/rerank")
    async def rerank(body: RerankRequest, http: Request):
        """Put documents in the order of what they have to do with a query."""
        if not (model.embeds or model.ranks):
            raise model.refuse("rank documents")
        documents = body.plain()
        if model.ranks:
            count, make = len(documents), lambda: [model.pair(body.query, text) for text in documents]
        else:
            count, make = 1 + len(documents), lambda: [model.text(text) for text in (body.query, *documents)]
        found, usage = await answers(body, http, count if documents else 0, make)
        # Embeddings have unit length, so that their product is the cosine.
        scores = _sigmoid(np.stack(found)[:, 0]) if model.ranks else np.stack(found[1:]) @ found[0]
        order = np.argsort(-scores, kind="stable")[: body.top_n]
        results = [{"index": int(i), "relevance_score": float(scores[i])} for i in order]
        if body.return_documents:
            results = [{**result, "document": {"text": clean(documents[result["index"]])}} for result in results]
        return {**envelope("rerank", body), "results": results, "usage": usage}

    return router


class Answering:
    """The inputs of one request, from the batcher's thread to the event loop that answers."""

    def __init__(self, batcher: Batcher, metrics: Metrics, count: int, deadline_seconds: float | None):
        self._batcher, self._metrics, self._count, self._deadline = batcher, metrics, count, deadline_seconds
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
        self.asked: list[Ask] = []

    async def run(self, make: Callable[[], list[Any]]) -> list[Any]:
        """The answers in the order of the inputs, `count` of them, which `make` makes; ApiError if one has none."""
        self.asked = await submitted(
            self._batcher,
            self._count,
            lambda: [self._ask(i, given) for i, given in enumerate(make())],
            self._deadline,
        )
        found: dict[int, Any] = {}
        try:
            while len(found) < self._count:
                index, reason, answer = await self._queue.get()
                check_end(self.asked[index], reason)
                found[index] = answer
        finally:
            for ask in self.asked:
                ask.cancel()
        return [found[i] for i in range(self._count)]

    def _ask(self, index: int, given: Any) -> Ask:
        def on_answer(reason: Reason, answer: Any) -> None:
            self._metrics.ended(ask, reason)
            # The loop may be closed by the time that a last answer comes.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, reason, answer))

        ask = Ask(given, self._batcher.batched.tokens(given), on_answer, self._deadline)
        return ask
