"""New examples that a language model writes for each label, what is thrown away of its answers, and their price."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcost import weights
from jaxcost.data.examples import Examples
from jaxcost.data.selection.duplicates import Index
from jaxcost.data.synthesis.client import Answer, Writer
from jaxcost.data.synthesis.config import SynthesisConfig
from jaxcost.labelling import agreed, check_texts
from jaxcost.session import Session

_QUOTED = re.compile(r"""^(["'“‘«])(.*)(["'”’»])$""", re.DOTALL)


def synthesize(
    session: Session,
    teacher: tuple[Session, weights.Params] | None = None,
    cache_dir: Path | None = None,
    done: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """New examples for the labels of a session's train split, as its `synthesis` config describes.

    Args:
      session: learns labels; its train split gives the examples of the prompts.
      teacher: a session of the same labels and its weights: an answer is kept only if they give it the label that was
        asked for.
      cache_dir: where answers are kept, so that the same request is paid once; beside the data if not given.
      done: called after each answer.

    Returns:
      Records with `text`, `label` (a number), `origin`, `teacher` (the model and its address), `request` (names the
      file of the answer), and `tokens` and `read_tokens`: an even share of all that were generated and read, for what
      was thrown away too, so that the records' sum is what was paid. Counts of `asked`, of each reason to throw an
      answer away (`empty`, `unfinished`, `short`, `long`, `duplicates` and, with a teacher, `disagreed`), of `kept`,
      and of `read_tokens` and `generated_tokens`.

    Raises:
      ValueError: the session learns no labels, a template is for none of them, the teacher has others, nothing is kept,
        or what `Writer` raises it for.
    """
    config, data = session.experiment.synthesis, session.experiment.data
    check_texts(data)
    train = session.train_stream
    config.check_labels(train.labels)
    if teacher is not None and teacher[0].train_stream.labels != train.labels:
        raise ValueError("The teacher was trained on other labels than the data have; give one of the same labels.")
    asked = prompts(config, train)
    writer = Writer(config, cache_dir or train.source.cache_dir / "synthesis")
    model = writer.model()
    answers = writer.answers(model, [prompt for _, prompt in asked], done)
    known = [example["text"] for part in (train, session.validation_stream) for example in part]
    found, counts = sifted(config, [label for label, _ in asked], answers, known)
    if teacher is not None:
        found, counts["disagreed"] = agreed(*teacher, found)
    counts["kept"] = len(found)
    if not found:
        thrown = ", ".join(f"{name} {number}" for name, number in counts.items() if number and name != "asked")
        raise ValueError(
            f"None of the {len(asked)} answers of '{model}' is an example ({thrown}); change synthesis.template, or "
            "ask another model."
        )
    spent = {name: sum(getattr(answer, name) for answer in answers) for name in ("read_tokens", "generated_tokens")}
    shares = {name: _shares(total, len(found)) for name, total in spent.items()}
    origin = {"origin": "generated", "teacher": f"{model} at {config.url}"}
    records = [
        record | origin | {"tokens": shares["generated_tokens"][i], "read_tokens": shares["read_tokens"][i]}
        for i, record in enumerate(found)
    ]
    return records, counts | spent


def prompts(config: SynthesisConfig, train: Examples) -> list[tuple[int, str]]:
    """What is asked: the number of a label and a prompt with examples of it, drawn for each.

    The labels take turns, so that what is asked for fewer texts is what is asked first for more of them.
    """
    texts: dict[int, list[str]] = collections.defaultdict(list)
    for example in train:
        texts[example["label"]].append(example["text"])
    draws = [np.random.default_rng((config.seed, label)) for label in range(len(train.labels))]
    found = []
    for _ in range(config.texts_per_label):
        for label, name in enumerate(train.labels):
            chosen = draws[label].permutation(len(texts[label]))[: config.examples]
            found.append((label, config.prompt(name, tuple(texts[label][i] for i in chosen))))
    return found


def sifted(
    config: SynthesisConfig, labels: Sequence[int], answers: Sequence[Answer], known: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The answers that are new texts, as records with `text`, `label` and `request`, and why the others are not.

    Args:
      config: says how long texts are, and what is alike.
      labels: the number of the label that each was asked for.
      answers: to look at.
      known: texts that there are already, to learn from or to score on.
    """
    index = Index(config.likeness)
    for text in known:
        index.find(text, add=True)
    found, counts = (
        [],
        {"asked": len(answers)} | dict.fromkeys(("empty", "unfinished", "short", "long", "duplicates"), 0),
    )
    for label, answer in zip(labels, answers, strict=True):
        text = _plain(answer.text)
        words = len(text.split())
        if not words:
            counts["empty"] += 1
        elif not answer.finished:
            counts["unfinished"] += 1
        elif words < config.least_words:
            counts["short"] += 1
        elif words > config.most_words:
            counts["long"] += 1
        elif index.find(text, add=True) is not None:
            counts["duplicates"] += 1
        else:
            found.append({"text": text, "label": label, "request": answer.request})
    return found, counts


def _plain(answer: str) -> str:
    """An answer without the spaces and the quotation marks around it."""
    text = answer.strip()
    quoted = _QUOTED.match(text)
    return quoted[2].strip() if quoted else text


def _shares(total: int, parts: int) -> list[int]:
    """A number of tokens in even parts, the first ones of which have what is left over."""
    whole, rest = divmod(total, parts)
    return [whole + (i < rest) for i in range(parts)]
