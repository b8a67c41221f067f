"""Models that answer once for a whole text: embeddings, labels and ranks, in batches of those that wait.

A program is compiled for each of a few lengths and numbers of rows before the first request. A batch is of texts that
are padded to one length, and there is no waiting for others: while the device is at one batch, the next one gathers.
Shapes in names: B rows, T tokens, N numbers of an answer.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.models import optional
from jaxcost.models.config import ModelConfig
from jaxcost.models.transformer import Transformer, logits
from jaxcost.serving.programs import compiled
from jaxcost.serving.worker import Job, Reason, SchedulerConfig, Worker

_SHORTEST = 16
_LIMITS = SchedulerConfig()


@dataclasses.dataclass(frozen=True)
class BatchesConfig:
    """In what batches texts are read by a model that answers once for each."""

    lengths: tuple[int, ...] = ()
    """Tokens that texts are padded to; by default powers of two from 16 on, and the model's `max_length`."""
    rows: tuple[int, ...] = (1, 4, 16)
    """Texts that are read at once. A program is compiled for each of these and each length."""
    tokens: int = 4096
    """Tokens of a batch at most, padding included; a single text may have more."""

    def __post_init__(self):
        for field in ("lengths", "rows"):
            sizes = getattr(self, field)
            if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
                raise ValueError(f"batches.{field} is {sizes}; give rising positive numbers, such as 1 4 16.")
        if self.rows[:1] != (1,):
            raise ValueError(f"batches.rows is {self.rows}; it must begin with 1, for a text that comes alone.")
        if self.tokens < 1:
            raise ValueError(f"batches.tokens is {self.tokens}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, or two of them, as a model reads it."""

    ids: np.ndarray
    """int32 (T,)."""
    types: np.ndarray | None = None
    """int32 (T,): which of two texts each token is of; all 0 if not given."""


def answering(config: ModelConfig) -> ModelConfig:
    """The config with a head that answers once for a text.

    Where its own gives the hidden states of every token as embeddings, it is their mean, or the last one of a causal
    model, which alone has seen all of the text. ValueError if the head gives anything else.
    """
    head = config.head
    reads = config.source.of_tokens and head.outputs if config.encoder.num_layers else config.of_tokens
    if not reads or head.boxes or head.of_vocabulary:
        raise ValueError(
            "The model neither continues texts nor gives embeddings or labels of them; serve a decoder, or a model of "
            "tokens with model.head.embed or model.head.outputs."
        )
    if head.pooling != "none":
        return config
    if not head.embed:
        raise ValueError(
            "model.head.pooling is 'none', so that every token has labels of its own, which no address of the API "
            "gives; serve a model that labels whole texts."
        )
    pooling = "last" if config.causal else "mean"
    return dataclasses.replace(config, head=dataclasses.replace(head, pooling=pooling))


class Pooled:
    """The programs of one model."""

    def __init__(self, model: Transformer, params: weights.Params, config: BatchesConfig = BatchesConfig()):
        """Compiles everything; ValueError if the model does not answer for texts, or is shorter than asked for."""
        self.model = Transformer(answering(model.config), model.execution)
        limit = model.config.max_length - optional.virtual_tokens(params)
        powers = [2**i for i in range(limit.bit_length()) if _SHORTEST <= 2**i < limit]
        self.lengths = config.lengths or (*powers, limit)
        self.max_length = self.lengths[-1]
        if self.max_length > limit:
            raise ValueError(
                f"batches.lengths ends with {self.max_length}, more than the {limit} tokens that the model takes; cut "
                "it."
            )
        self.params, self.vocab_size = params, model.config.vocab_size
        self.typed = model.config.token_types > 1
        self._programs = {}
        for length in self.lengths:
            for rows in config.rows:
                if rows == 1 or rows * length <= config.tokens:
                    self._programs[length, rows] = compiled(self._run, (), None, params, *self._empty(rows, length))
        # A jitted function that stands in for a program compiles at its first call.
        for rows, length in ((rows, length) for length, rows in self._programs):
            self._programs[length, rows](params, *self._empty(rows, length))

    def _run(self, params, tokens_BT, valid_BT, types_BT=None):
        beside, encoder = {"valid_BT": valid_BT, "types_BT": types_BT}, self.model.config.encoder
        if encoder.num_layers:
            # What an encoder reads, its decoder reads too, a token later.
            beside |= {"source_BS": tokens_BT, "source_valid_BS": valid_BT}
            tokens_BT = jnp.pad(tokens_BT[:, :-1], ((0, 0), (1, 0)), constant_values=encoder.start)
        hidden_B1D, _ = self.model.apply({"params": params}, tokens_BT, **beside)
        return logits(self.model.config, params, hidden_B1D[:, 0])

    def _empty(self, rows: int, length: int) -> list[np.ndarray]:
        """Tokens, which of them are valid, and their types where there are any."""
        made = [np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)]
        return [*made, np.zeros((rows, length), np.int32)] if self.typed else made

    def length(self, tokens: int) -> int:
        """What a text of so many tokens is padded to."""
        return next(length for length in self.lengths if length >= tokens)

    def most(self, length: int) -> int:
        """Texts of a padded length that are read at once."""
        return max(rows for known, rows in self._programs if known == length)

    def run(self, texts: Sequence[Text]) -> np.ndarray:
        """The answers, float32 (B, N), to texts of one padded length, no more of them than are read at once.

        They are embeddings of unit length, or what the head puts out for each label.
        """
        length = self.length(max(len(text.ids) for text in texts))
        rows = min(rows for known, rows in self._programs if known == length and rows >= len(texts))
        tokens, valid, *types = self._empty(rows, length)
        for i, text in enumerate(texts):
            tokens[i, : len(text.ids)], valid[i, : len(text.ids)] = text.ids, True
            if types and text.types is not None:
                types[0][i, : len(text.ids)] = text.types
        # A row of padding alone would divide by nothing.
        valid[len(texts) :, 0] = True
        return np.asarray(self._programs[length, rows](self.params, tokens, valid, *types))[: len(texts)]


class Ask(Job):
    """A text that waits for its answer."""

    def __init__(
        self,
        text: Text,
        on_answer: Callable[[Reason, np.ndarray | None], None],
        deadline_seconds: float | None = None,
    ):
        """`on_answer` is called once, by the batcher's thread, with `stop` and the answer, float32 (N,), or with why
        there is none. It must not block."""
        super().__init__(len(text.ids), deadline_seconds)
        self.text, self._on_answer = text, on_answer

    def end(self, reason: Reason, answer: np.ndarray | None = None) -> None:
        """Gives out the answer."""
        self.times.ended = time.monotonic()
        self._on_answer(reason, answer)


class Batcher(Worker[Ask]):
    """Runs what waits, in batches."""

    def __init__(self, pooled: Pooled, config: SchedulerConfig = _LIMITS):
        """Starts the thread."""
        self.pooled = pooled
        self._running: list[Ask] = []
        super().__init__(config, "batcher")

    @property
    def num_running(self) -> int:
        """Texts of the batch that the device is at."""
        return len(self._running)

    @property
    def _at_once(self) -> int:
        return self.pooled.most(self.pooled.max_length)

    def _takes(self, jobs: int) -> bool:
        # One request may bring more texts than the queue has places.
        return self.num_waiting < self.config.queue

    def _check(self, job: Ask) -> None:
        ids, most = job.text.ids, self.pooled.max_length
        if not len(ids):
            raise ValueError("A text is empty; give at least one token.")
        if ids.min() < 0 or ids.max() >= self.pooled.vocab_size:
            raise ValueError(f"A text has ids outside 0 to {self.pooled.vocab_size - 1}; use the model's tokenizer.")
        if len(ids) > most:
            raise ValueError(f"A text has {len(ids)} tokens, more than the {most} that the model takes; shorten it.")

    def _abandon(self) -> list[Ask]:
        left, self._running = self._running, []
        return left

    def _round(self) -> None:
        with self._condition:
            if not self._waiting:
                return
            length = self.pooled.length(len(self._waiting[0].text.ids))
            most, rest = self.pooled.most(length), collections.deque()
            for job in self._waiting:
                alike = len(self._running) < most and self.pooled.length(len(job.text.ids)) == length
                (self._running if alike else rest).append(job)
            self._waiting = rest
        began = time.monotonic()
        answers = self.pooled.run([job.text for job in self._running])
        each = (time.monotonic() - began) / len(self._running)
        with self._condition:
            done, self._running = self._running, []
        for job, answer in zip(done, answers, strict=True):
            job.times.started, job.device_seconds = began, each
            job.end("stop", answer)
            self._took(job)
