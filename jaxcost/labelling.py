"""Texts that a training's model gives labels, and the folder of data that they make with those that people gave."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxcost import weights
from jaxcost.data import DataConfig, open_source
from jaxcost.data.augmentation import AugmentConfig
from jaxcost.data.examples import Examples
from jaxcost.data.files import atomic_folder
from jaxcost.data.pipeline import batches_in_order
from jaxcost.data.selection.duplicates import normalized
from jaxcost.data.selection.scores import coreset, uncertainty
from jaxcost.evaluation.labels import Labeller
from jaxcost.objectives import label_rows
from jaxcost.session import Session


def labeller(session: Session, texts: Sequence[str]) -> Labeller:
    """What gives texts the probabilities of their labels with the model of a session.

    Raises:
      ValueError: the session does not learn labels, or there are no texts.
    """
    data = session.experiment.data
    check_texts(data)
    if not len(texts):
        raise ValueError("There are no texts to label; give a larger split.")
    make = label_rows(data, session.tokenizer, session.model.config)
    rows = [make({"text": text, "label": 0}) for text in texts]
    return Labeller(session.model, batches_in_order(rows, data.batch_size), session.mesh)


def check_texts(data: DataConfig) -> None:
    """ValueError unless labels of texts are learned."""
    if data.objective != "labels" or data.of_images:
        raise ValueError(
            f"What is learned is {data.objective!r} of {data.inputs}; give a training with data.objective 'labels' and "
            "data.inputs 'texts'."
        )


def pseudo_label(
    session: Session, params: weights.Params, texts: Sequence[str], labels: Sequence[str], threshold: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Texts with the labels that a teacher is sure of, and how many were left out and why.

    Source: Lee 2013, Pseudo-label, ICML workshop on challenges in representation learning; with a threshold as in Sohn
    et al. 2020 (FixMatch), arXiv:2001.07685.

    Args:
      session: the teacher's.
      params: its weights.
      texts: without labels; of texts that are the same but for case, marks and spaces the first counts.
      labels: names of the labels by number.
      threshold: probability that the likeliest label must have, from 0 to 1.

    Returns:
      Records with `text`, `label` (a name), `confidence` and `tokens`, those that the teacher read; counts of
      `texts`, `duplicates`, `unsure` and `kept`.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"The threshold is {threshold}; it is a probability, from 0 to 1.")
    different = list({normalized(text): text for text in reversed(texts)}.values())[::-1]
    probabilities_NC = labeller(session, different).probabilities(params)[:, : len(labels)]
    found = []
    for text, shares_C in zip(different, probabilities_NC, strict=True):
        best = int(shares_C.argmax())
        if shares_C[best] >= threshold:
            tokens = min(len(session.tokenizer.encode_source(text)), session.experiment.data.sequence_length)
            record = {"text": text, "label": labels[best], "confidence": float(shares_C[best]), "tokens": tokens}
            found.append(record)
    counts = {"texts": len(texts), "duplicates": len(texts) - len(different)}
    return found, counts | {"unsure": len(different) - len(found), "kept": len(found)}


def write_labelled(
    session: Session,
    params: weights.Params,
    teacher: str,
    folder: Path,
    *,
    split: str,
    threshold: float,
    sources: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Writes a folder for `data.sources`: labelled examples with pseudo-labelled texts, and the validation split.

    Every record says where it came from (`origin`), and what it cost (`tokens`).

    Args:
      session: the teacher's; its data are the labelled ones.
      params: its weights.
      teacher: what it is called in the records.
      folder: a new one.
      split: of texts without labels, in TFDS's notation.
      threshold: as for `pseudo_label`.
      sources: where the texts without labels are; the session's own data if none are given.

    Returns:
      The counts of `pseudo_label`, and `labels`, the number of labelled examples.

    Raises:
      ValueError: what `open_source` and `pseudo_label` raise it for, or the folder exists already.
    """
    texts = unlabelled(session, split, sources)
    found, counts = pseudo_label(session, params, texts, session.train_stream.labels, threshold)
    write_folder(session, [record | {"origin": "pseudo_label", "teacher": teacher} for record in found], folder)
    return counts | {"labels": len(session.train_stream)}


def write_folder(session: Session, made: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes a folder for `data.sources`: a session's train split with further records, and its validation split.

    Args:
      session: learns labels.
      made: records with `text`, `label`, a name or a number, and `origin`.
      folder: a new one.

    Raises:
      ValueError: the folder exists already.
    """
    data, train = session.experiment.data, session.train_stream
    named = [r | {"label": r["label"] if isinstance(r["label"], str) else train.labels[r["label"]]} for r in made]
    with atomic_folder(folder) as unfinished:
        _write(unfinished / "train.jsonl", data, [*_records(train), *named])
        _write(unfinished / "validation.jsonl", data, _records(session.validation_stream))


def agreed(
    session: Session, params: weights.Params, made: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    """The records whose label, a number, is the one that a model finds likeliest, and how many are not so."""
    if not made:
        return [], 0
    guesses_N = labeller(session, [record["text"] for record in made]).probabilities(params).argmax(axis=1)
    kept = [record for record, guess in zip(made, guesses_N, strict=True) if record["label"] == guess]
    return kept, len(made) - len(kept)


def unlabelled(session: Session, split: str, sources: tuple[str, ...] = ()) -> list[str]:
    """The texts of a split that are neither among the session's examples nor among those that it is scored on."""
    data = session.experiment.data
    check_texts(data)
    plain = dataclasses.replace(
        data, objective="next_token", augment=AugmentConfig(), sources=sources or data.sources, weights=()
    )
    taken = {
        normalized(example["text"]) for part in (session.train_stream, session.validation_stream) for example in part
    }
    return [text for text in open_source(plain, split) if normalized(text) not in taken]


def choose(
    session: Session,
    params: weights.Params,
    *,
    split: str,
    count: int,
    by: Literal["margin", "entropy", "coreset"],
    sources: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """The texts of a split that are worth a label next, the most wanted first.

    Args:
      session: of a training on labels.
      params: its weights.
      split: of texts without labels, in TFDS's notation.
      count: texts to choose.
      by: as `scores.uncertainty` has it, or by `scores.coreset` of the hidden states beside those of the examples.
      sources: where the texts are; the session's own data if none are given.

    Returns:
      Records with `text`, and `likeliest`, the name of the likeliest label, with its `share`.

    Raises:
      ValueError: there are fewer texts, or the session does not learn labels.
    """
    texts = unlabelled(session, split, sources)
    if not 0 < count <= len(texts):
        raise ValueError(f"{count} of {len(texts)} texts cannot be chosen; ask for 1 to {len(texts)}, or give more.")
    teacher, labels = labeller(session, texts), session.train_stream.labels
    probabilities_NC = teacher.probabilities(params)[:, : len(labels)]
    if by == "coreset":
        known_ND = labeller(session, [example["text"] for example in session.train_stream]).states(params)
        points_ND = np.concatenate([known_ND, teacher.states(params)])
        chosen = coreset(points_ND, count, chosen=np.arange(len(known_ND))) - len(known_ND)
    else:
        chosen = np.argsort(-uncertainty(probabilities_NC, by), kind="stable")[:count]
    best_N = probabilities_NC.argmax(axis=1)
    return [
        {"text": texts[i], "likeliest": labels[best_N[i]], "share": float(probabilities_NC[i, best_N[i]])}
        for i in chosen
    ]


def _records(examples: Examples) -> list[dict[str, Any]]:
    """Examples with the names of their labels, and where they came from and what they cost as far as it is known."""
    found = []
    for i, example in enumerate(examples):
        record = {"text": example["text"], "label": examples.labels[example["label"]]}
        found.append(record | examples.origin(i))
    return found


def _write(path: Path, config: DataConfig, records: Sequence[dict[str, Any]]) -> None:
    names = {"text": config.text_field, "label": config.label_field}
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({names.get(name, name): value for name, value in record.items()}) + "\n")
