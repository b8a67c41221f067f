"""The parts that held-out data are cut into, to see where a recipe loses: label, group, length and token frequency."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcost import objectives
from jaxcost.data import open_source
from jaxcost.data.packing import TokenStream
from jaxcost.session import Session

_FIFTHS = ("commonest fifth", "second fifth", "third fifth", "fourth fifth", "rarest fifth")
_THIRDS = ("shortest third", "middle third", "longest third")
_SHOWN_TOKENS = 24
"""Tokens shown before and after the place of a text where two models differ most."""
_COUNTED_TOKENS = 10_000_000
"""Tokens of the train split, its first ones, that say how frequent each is."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """One way to cut the data."""

    by: str
    """`label`, `length`, `token frequency`, or the name of the group attribute."""
    names: tuple[str, ...]
    """Of the parts."""
    part_N: np.ndarray
    """int (targets,): the part that each target is in."""
    served: bool = False
    """Whether the parts are groups that a model should serve alike."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out data of a session, target by target."""

    batches: list[dict[str, np.ndarray]]
    """What models are asked about."""
    target_N: np.ndarray
    """int (targets,): what is right."""
    example_N: np.ndarray
    """int (targets,): which example each is of."""
    unit: str
    """What an example is, in words."""
    cuts: tuple[Cut, ...]
    """Ways to cut them."""
    why_not: str | None
    """Which cuts there are not, and why, in a sentence."""
    text: Callable[[int, int], str]
    """(example, target among all) → the text, or what stands around that target."""
    names: Callable[[int], str]
    """What a target, or an answer, is called."""


def held_out(session: Session) -> HeldOut:
    """The held-out data that the session scores on.

    Raises:
      ValueError: the data have no feature of the name `data.group_field`.
    """
    data, split = session.experiment.data, session.validation_stream
    limit = session.experiment.evaluation.max_tokens or None
    batches = objectives.scored_batches(data, split, session.tokenizer, session.model.config, limit)
    masks = np.concatenate([batch["mask"] for batch in batches]) > 0
    targets = np.concatenate([batch["targets"] for batch in batches])[masks]
    examples = np.repeat(np.arange(len(masks)), masks.sum(axis=1))
    make = _of_tokens if isinstance(split, TokenStream) else _of_examples
    return make(session, batches, targets, examples)


def groups(session: Session, records: Sequence[int]) -> list[str]:
    """The group of each of these records of the held-out split; ValueError if they have no such feature."""
    data = session.experiment.data
    source = open_source(data, data.validation_split)
    try:
        return [str(source.record(int(i), (data.group_field,))[data.group_field]) for i in records]
    except KeyError:
        raise ValueError(
            f"data.group_field is {data.group_field!r}, which a record of '{source.label}' does not have; name a "
            "feature that all have, or leave it out."
        ) from None


def check_groups(session: Session) -> None:
    """ValueError, before anything is trained, if the first record has no such feature."""
    if session.experiment.data.group_field:
        groups(session, (0,))


def _of_tokens(session: Session, batches: list[dict[str, Any]], targets: np.ndarray, examples: np.ndarray) -> HeldOut:
    data, tokenizer, stream = session.experiment.data, session.tokenizer, session.validation_stream
    cuts = [_by_frequency(targets, _token_counts(session))]
    why_not = None if data.group_field else "The data have no group attribute; name one as data.group_field."
    if data.packing == "concatenate":
        begins = np.flatnonzero(stream.tokens == stream.tokens[0])
        document_N = np.searchsorted(begins, np.arange(1, len(targets) + 1), side="right") - 1
        lengths = np.diff(begins, append=len(stream.tokens))
        seen = np.unique(document_N)
        cuts += _in_thirds(lengths[seen], np.searchsorted(seen, document_N))
        if data.group_field:
            cuts += [_by_group(data.group_field, groups(session, seen), np.searchsorted(seen, document_N))]
    else:
        why_not = "Documents are packed out of order, so that they are not told apart: no length and no group."

    def text(example, target):
        around = targets[max(0, target - _SHOWN_TOKENS) : target + _SHOWN_TOKENS + 1]
        return tokenizer.decode(around.astype(np.int32))

    def names(token):
        return tokenizer.decode(np.array([token], np.int32))

    unit = f"a window of {data.sequence_length} tokens"
    return HeldOut(batches, targets, examples, unit, tuple(cuts), why_not, text, names)


def _of_examples(session: Session, batches: list[dict[str, Any]], targets: np.ndarray, examples: np.ndarray) -> HeldOut:
    data, split = session.experiment.data, session.validation_stream
    cuts = []
    if data.objective == "labels":
        names = split.labels
        cuts.append(Cut("label", names, targets.astype(int), served=True))
    else:
        names = None
        cuts.append(_by_frequency(targets, _token_counts(session)))
    if not data.of_images:
        lengths = np.array([len(split[i]["text"]) for i in range(len(split))])
        cuts += _in_thirds(lengths, examples)
    why_not = None if data.group_field else "The data have no group attribute; name one as data.group_field."
    if data.group_field:
        cuts.append(_by_group(data.group_field, groups(session, split.chosen), examples))

    def name(answer):
        if names is None:
            return session.tokenizer.decode(np.array([answer], np.int32))
        # A head may have more outputs than the data have labels.
        return names[answer] if answer < len(names) else f"output {answer}, which is no label"

    unit = f"{'an image' if data.of_images else 'a text'} with its label"
    unit = unit if names is not None else "an answer to a text"
    return HeldOut(
        batches, targets, examples, unit, tuple(cuts), why_not, lambda example, _: split.shown(example), name
    )


def _token_counts(session: Session) -> np.ndarray:
    """How often each token is in the train split."""
    stream, size = session.train_stream, session.model.config.vocab_size
    if isinstance(stream, TokenStream):
        return np.bincount(stream.tokens[:_COUNTED_TOKENS], minlength=size)
    counts = np.zeros(size, np.int64)
    for i in range(len(stream)):
        counts += np.bincount(session.tokenizer.encode(stream[i]["answer"]), minlength=size)
    return counts


def _by_frequency(targets: np.ndarray, counts: np.ndarray) -> Cut:
    """Fifths of the targets, from those that training saw most often on; a token is in one of them whole."""
    there = np.bincount(targets, minlength=len(counts))
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(there[order]) - there[order]
    part = np.zeros(len(counts), int)
    part[order] = np.minimum((before + there[order] / 2) * len(_FIFTHS) // max(1, there.sum()), len(_FIFTHS) - 1)
    return Cut("token frequency", _FIFTHS, part[targets])


def _in_thirds(lengths: np.ndarray, text_N: np.ndarray) -> list[Cut]:
    """Thirds of the texts by length; nothing where there are too few of them."""
    if len(lengths) < len(_THIRDS):
        return []
    rank = np.argsort(np.argsort(lengths, kind="stable"), kind="stable")
    return [Cut("length", _THIRDS, (rank * len(_THIRDS) // len(lengths))[text_N])]


def _by_group(field: str, values: Sequence[str], text_N: np.ndarray) -> Cut:
    names, place = np.unique(values, return_inverse=True)
    return Cut(field, tuple(str(name) for name in names), place[text_N], served=True)
