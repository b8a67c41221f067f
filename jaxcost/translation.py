"""Texts that are translated there and back by two encoder-decoders, so that they say the same in other words.

Source: Sennrich et al. 2016, arXiv:1511.06709; for other words of one text, Xie et al. 2020 (UDA), arXiv:1904.12848.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcost import serialization, weights
from jaxcost.data.files import atomic_write
from jaxcost.serving.engine import Engine
from jaxcost.serving.sampling import GREEDY, Sampling
from jaxcost.serving.stopping import Stop
from jaxcost.session import Session, load_run


class Translator:
    """An encoder-decoder that answers to texts, a batch at a time."""

    def __init__(self, session: Session, params: weights.Params, name: str):
        """`name` tells these weights from any others.

        Raises:
          ValueError: the model is none that reads a text and writes another.
        """
        config = session.model.config
        if not (config.encoder.num_layers and config.generates and config.source.of_tokens):
            raise ValueError(
                "Translation takes a model with an encoder of texts and logits of the vocabulary; train one with "
                "model.encoder.num_layers and data.objective 'answers', or convert one."
            )
        self.name, self._session, self._params = name, session, params
        self._engine = Engine(session.model)

    @classmethod
    def load(cls, directory: Path) -> Translator:
        """That of a training's folder, or of an imported checkpoint's; raises what `load_run` does."""
        session, params, step = load_run(directory)
        said = json.dumps([str(Path(directory).resolve()), step, serialization.to_json(session.experiment)])
        return cls(session, params, hashlib.sha256(said.encode()).hexdigest()[:16])

    def __call__(self, texts: Sequence[str], sampling: Sampling = GREEDY) -> list[str]:
        """The translation of each text; each is drawn by itself, with the seed of `sampling` and its place.

        What is longer than the experiment's `data.sequence_length` is cut, before and after.
        """
        data, tokenizer = self._session.experiment.data, self._session.tokenizer
        length, rows = data.sequence_length, data.batch_size
        start = np.array([self._session.model.config.encoder.start], np.int32)
        stop, found = Stop(tokenizer.stop_ids), []
        # A further row of the full length keeps the shapes, and so the program, the same for all batches.
        longest = np.full(length, tokenizer.separator_id, np.int32)
        for first in range(0, len(texts), rows):
            some = texts[first : first + rows]
            sources = [tokenizer.encode_source(text)[:length] for text in some]
            sources += [longest] * (rows + 1 - len(some))
            draws = [dataclasses.replace(sampling, seed=sampling.seed + first + i) for i in range(rows + 1)]
            new = self._engine.generate(
                self._params,
                [start] * (rows + 1),
                max_new_tokens=length - 1,
                sampling=draws,
                stop=stop,
                sources=sources,
            )
            found += [tokenizer.decode(tokens) for tokens in new[: len(some)]]
        return found


def back_translate(
    texts: Sequence[str],
    there: Translator,
    back: Translator,
    sampling: Sampling = GREEDY,
    cache_dir: Path | None = None,
) -> list[str]:
    """Each text translated and translated back.

    Args:
      texts: in the language that `there` reads.
      there: translates them.
      back: translates what comes of it into their language.
      sampling: of both ways; with a temperature, other words come out.
      cache_dir: where whole answers are kept, by the texts, the models and the sampling; none if it is not given.
    """
    said = json.dumps([list(texts), there.name, back.name, dataclasses.astuple(sampling)])
    path = (
        None if cache_dir is None else cache_dir / f"translated-{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"
    )
    if path is not None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    found = back(there(texts, sampling), sampling)
    if path is not None:
        with atomic_write(path) as file:
            file.write(json.dumps(found).encode())
    return found


def translated_copies(
    examples: Sequence[dict[str, Any]], made: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Records of the copies that are other texts than what they were made of, with its label; and counts.

    Args:
      examples: with `text` and `label`.
      made: a translation of each.

    Returns:
      Records with `text`, `label` and `origin`; counts of `translated`, `unchanged`, `empty` and `kept`.
    """
    copies, unchanged, empty = [], 0, 0
    for example, text in zip(examples, made, strict=True):
        if not text.strip():
            empty += 1
        elif text.split() == example["text"].split():
            unchanged += 1
        else:
            copies.append({"text": text, "label": example["label"], "origin": "translated"})
    return copies, {"translated": len(made), "unchanged": unchanged, "empty": empty, "kept": len(copies)}
