"""A canary: some sequences with the score that the model gave them when they were chosen, asked again while it serves.

What drifts is the server or its machine, not the sequences: another library, a broken chip, weights that were swapped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxcost import weights
from jaxcost.models.transformer import Transformer, logits
from jaxcost.serving.scheduler import Request, Scheduler, Ticket
from jaxcost.serving.slots import Scored
from jaxcost.serving.worker import Closed, Overloaded

FILE = "canary.json"
"""Its name in a training's folder."""
_LOGGER = logging.getLogger("jaxcost.serving")


@dataclasses.dataclass(frozen=True)
class Canary:
    """The sequences and their score."""

    sequences: tuple[tuple[int, ...], ...]
    """Ids, at least two each."""
    nats_per_token: float
    """Mean negative log-likelihood of all tokens but the first of each."""

    def write(self, directory: Path) -> None:
        """Puts it into a training's folder."""
        (Path(directory) / FILE).write_text(json.dumps(dataclasses.asdict(self)))


def read(directory: Path) -> Canary | None:
    """The canary of a training's folder, None if it has none; ValueError if it is damaged."""
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return Canary(tuple(map(tuple, found["sequences"])), float(found["nats_per_token"]))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); write it again with scripts/canary.py.") from None


def choose(model: Transformer, params: weights.Params, tokens: np.ndarray, count: int, length: int) -> Canary:
    """Cuts sequences out of a stream at equal distances, and scores them without a server.

    Args:
      model: continues texts.
      params: its weights.
      tokens: int (N,).
      count: sequences.
      length: tokens of each, at least 2.

    Raises:
      ValueError: there are fewer tokens, or the model takes fewer at once.
    """
    if count < 1 or length < 2 or len(tokens) < count * length:
        raise ValueError(f"{len(tokens)} tokens are too few for {count} sequences of {length}; ask for less.")
    if length > model.config.max_length:
        raise ValueError(f"The model takes {model.config.max_length} tokens, not {length}; ask for shorter sequences.")
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    chosen_BT = np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)

    def likelihoods(params, tokens_BT):
        hidden_BTD, _ = model.apply({"params": params}, tokens_BT)
        logprobs_BTV = jax.nn.log_softmax(logits(model.config, params, hidden_BTD[:, :-1]), axis=-1)
        return jax.numpy.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1)

    score = -float(np.mean(jax.jit(likelihoods)(params, chosen_BT)))
    return Canary(tuple(tuple(row) for row in chosen_BT.tolist()), score)


class Watch:
    """Asks a scheduler for the canary's score, again and again, in a thread of its own."""

    def __init__(self, canary: Canary, scheduler: Scheduler, *, every_seconds: float, tolerance: float):
        """Starts the thread.

        Args:
          canary: what is asked.
          scheduler: what answers.
          every_seconds: between two rounds.
          tolerance: nats a token by which a score may differ from the canary's own without a word in the log.

        Raises:
          ValueError: the scheduler's slots are shorter than the sequences, or a number makes no sense.
        """
        if not (every_seconds > 0 and tolerance > 0):
            raise ValueError("--canary-seconds and --canary-tolerance must be above 0.")
        longest = max(map(len, canary.sequences))
        if longest > scheduler.slots.max_length:
            raise ValueError(
                f"The canary has sequences of {longest} tokens, more than the {scheduler.slots.max_length} of a slot; "
                "raise --engine.max-length, or write it again with scripts/canary.py --length."
            )
        self.canary, self._scheduler = canary, scheduler
        self._every, self._tolerance = every_seconds, tolerance
        self.rounds = 0
        """Times that all sequences were scored."""
        self.nats_per_token: float | None = None
        """The last score, None before the first."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="canary", daemon=True)
        self._thread.start()

    @property
    def drifted(self) -> bool:
        """Whether the last score is another than the canary's own."""
        return self.nats_per_token is not None and not (
            abs(self.nats_per_token - self.canary.nats_per_token) <= self._tolerance
        )

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._stopped.is_set():
            # Those who ask come first; another round will do.
            with contextlib.suppress(Overloaded, Closed):
                self._round()
            self._stopped.wait(self._every)

    def _round(self) -> None:
        found = [self._score(np.array(ids, np.int32)) for ids in self.canary.sequences]
        if any(logprobs is None for logprobs in found):
            return
        self.nats_per_token = -float(np.mean(np.concatenate(found)))
        self.rounds += 1
        if self.drifted:
            scores = {"nats_per_token": self.nats_per_token, "reference_nats_per_token": self.canary.nats_per_token}
            _LOGGER.warning("%s", json.dumps({"canary": "drifted", **scores}))

    def _score(self, ids: np.ndarray) -> Sequence[float] | None:
        """Log-likelihoods of all tokens but the first, None if there was no answer."""
        scores: queue.SimpleQueue[Scored | None] = queue.SimpleQueue()
        request = Request(ids, 0, score_prompt=True)
        self._scheduler.reserve()
        try:
            self._scheduler.submit(Ticket(request, lambda _: scores.put(None), scores.put))
        except BaseException:
            self._scheduler.release()
            raise
        found = scores.get()
        return None if found is None else found.logprobs
