"""Texts with what is learned of each, a label, a number or an answer, and the arrays that a model reads of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcost.data.config import DataConfig
from jaxcost.data.images import read_image
from jaxcost.data.local import check_corrupt
from jaxcost.data.records import BadRecord
from jaxcost.data.sources import DocumentSource, open_source
from jaxcost.data.tokenizers import Tokenizer

_MEASURED = 10_000
"""Examples whose tokens are counted for the report, the first ones."""

_ORIGIN = ("origin", "teacher", "confidence", "request", "tokens", "read_tokens")
_BOUGHT = {
    "pseudo_label": ("read_tokens", True),
    "generated": ("generated_tokens", True),
    "translated": ("translated_sentences", False),
}
"""What an example of each origin costs, and whether that is counted in tokens; a label if it is another. What a model
read to write it comes on top."""

Example = dict[str, Any]
"""`text`, or `image`, uint8 (height, width, 3), and `label`, the number of one, an int, or what is learned, a float; or
`answer`, another text."""
Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Examples(Sequence):
    """The examples of a split."""

    source: DocumentSource
    """Where they are read."""
    config: DataConfig
    """Names their features and the objective."""
    chosen: np.ndarray
    """int64 (examples,): the records that they are, those with a good label or number."""
    labels: tuple[str, ...]
    """Names of the labels by number; none where numbers or answers are learned."""
    skipped: tuple[str, ...]
    """Corrupt records that were left out, and why."""

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"Example {index} was asked of {self.source.label}, which holds {len(self)}.")
        config = self.config
        record = self.source.record(int(self.chosen[index]), config.fields)
        if config.of_images:
            example: Example = {"image": self._image(record[config.text_field], int(self.chosen[index]))}
        else:
            example = {"text": record[config.text_field]}
        if config.objective == "labels":
            return example | {"label": label_number(record[config.label_field], self.labels)}
        if config.objective == "regression":
            return example | {"label": number(record[config.label_field])}
        return example | {"answer": str(record[config.answer_field])}

    def _image(self, file: str | bytes, record: int) -> np.ndarray:
        try:
            return read_image(file, self.config.max_record_bytes)
        except BadRecord as error:
            which = f"Record {record} of {self.source.label}" if isinstance(file, bytes) else file
            raise ValueError(f"{which} {error}; mend it, or leave it out of the split.") from error

    def shown(self, index: int) -> str:
        """What a person is shown of an example: its text, or where its image lies."""
        record = int(self.chosen[index])
        whole = self.source.records[record][self.config.text_field]
        inside = self.config.of_images and isinstance(whole, bytes)
        return f"record {record} of {self.source.label}" if inside else self.source[record]

    def origin(self, index: int) -> dict[str, str | int]:
        """Where an example came from and what it cost, as its record says.

        That is `origin`, `teacher`, `confidence`, `request`, `tokens` and `read_tokens`, as far as it has them; nothing
        where a person gave the label.
        """
        record = self.source.records[int(self.chosen[index])]
        return {name: record[name] for name in _ORIGIN if name in record}

    def label_counts(self) -> np.ndarray:
        """How many examples have each label, int64 (labels,)."""
        values = (self.source.record(int(i), (self.config.label_field,)) for i in self.chosen)
        numbers = [label_number(value[self.config.label_field], self.labels) for value in values]
        return np.bincount(numbers, minlength=len(self.labels))

    def bought(self) -> dict[str, int]:
        """What the examples cost, by the names of `cost.purchases.PURCHASES`."""
        found = dict.fromkeys(("labels", "read_tokens", "generated_tokens", "translated_sentences"), 0)
        for i in range(len(self)):
            origin = self.origin(i)
            kind = origin.get("origin", "label")
            name, by_tokens = _BOUGHT.get(kind, ("labels", False))
            found[name] += int(origin.get("tokens", 0)) if by_tokens else 1
            found["read_tokens"] += int(origin.get("read_tokens", 0))
        return found


def open_examples(config: DataConfig, split: str) -> Examples:
    """Opens a split whose texts have labels, numbers or answers.

    Raises:
      ValueError: the split cannot be opened (see `open_source`), or more labels than may be corrupt are none of the
        known ones, or no numbers.
    """
    source = open_source(config, split)
    chosen = np.arange(len(source))
    if not config.one_answer:
        return Examples(source, config, chosen, (), source.skipped)
    found = _label_values(config, source)
    labels: tuple[str, ...] = ()
    if config.objective == "regression":
        good = np.array([math.isfinite(number(value)) for value in found], bool)
        known = "which is no finite number"
    else:
        labels = config.labels or source.classes
        if not labels:
            own = split == config.train_split
            labels = _in_order(found if own else _label_values(config, open_source(config, config.train_split)))
        good = np.array([label_number(value, labels) >= 0 for value in found], bool)
        known = "which is none of " + ", ".join(labels[:8]) + (" and so on" if len(labels) > 8 else "")
    wrong = [f"record {i} has the label {found[i]!r}, {known}" for i in np.flatnonzero(~good)]
    check_corrupt(wrong, config.max_corrupt_records, f"'{source.label}'")
    return Examples(source, config, chosen[good], labels, (*source.skipped, *wrong))


def label_number(value: str | float, labels: Sequence[str]) -> int:
    """The number of a label that is given by name or by number; -1 if it is none of the labels."""
    if str(value) in labels:
        return labels.index(str(value))
    return int(value) if isinstance(value, int) and 0 <= value < len(labels) else -1


def number(value: str | float) -> float:
    """A number that is given as one, or written out; not a number (NaN) where it is none."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def label_row(tokenizer: Tokenizer, sequence_length: int, start: int | None, example: Example) -> Row:
    """What a model that gives one answer for a text reads, and the label, or the number, that it is to give.

    Args:
      tokenizer: makes tokens as an encoder reads them, with the special tokens that it was trained to see around.
      sequence_length: S; of a longer text the first tokens are kept.
      start: where an encoder reads the text for a decoder, the token behind which the decoder reads it too; None where
        there is no encoder.
      example: with `text` and `label`.

    Returns:
      `inputs`, int32 (S,), `valid`, bool (S,), `targets`, (1,), int32 of a label and float32
      of a number, and `mask`, float32 (1,); for an encoder also `source`, int32 (S,), and `source_valid`, bool (S,).
    """
    ids, label = tokenizer.encode_source(example["text"])[:sequence_length], example["label"]
    inputs = np.zeros(sequence_length, np.int32)
    inputs[: len(ids)] = ids
    row = {
        "inputs": inputs,
        "valid": np.arange(sequence_length) < len(ids),
        "targets": np.array([label], np.float32 if isinstance(label, float) else np.int32),
        "mask": np.ones(1, np.float32),
    }
    if start is None:
        return row
    shifted = np.concatenate([np.array([start], np.int32), inputs[:-1]])
    return row | {"inputs": shifted, "source": inputs, "source_valid": row["valid"]}


def answer_row(tokenizer: Tokenizer, sequence_length: int, example: Example) -> Row:
    """What a causal model reads of a text and its answer, of which the answer alone, and its end, is learned.

    The text is a user's turn in the template of a tokenizer that has one. Of what is too long, the text loses its
    beginning; an answer that fills the sequence by itself loses its end.

    Args:
      tokenizer: makes the tokens.
      sequence_length: S.
      example: with `text` and `answer`.

    Returns:
      `inputs` and `targets`, int32 (S,), and `mask`, float32 (S,), 1 where the target is one of the answer.
    """
    prompt, answer = _turns(tokenizer, example)
    answer = answer[:sequence_length]
    prompt = prompt[max(0, len(prompt) + len(answer) - sequence_length - 1) :]
    tokens = np.zeros(sequence_length + 1, np.int32)
    whole = np.concatenate([prompt, answer])
    tokens[: len(whole)] = whole
    places = np.arange(1, sequence_length + 1)
    mask = (places >= len(prompt)) & (places < len(whole))
    return {"inputs": tokens[:-1], "targets": tokens[1:], "mask": mask.astype(np.float32)}


def source_row(tokenizer: Tokenizer, sequence_length: int, start: int, example: Example) -> Row:
    """What an encoder-decoder reads of a text, and the answer that it is to give.

    Args:
      tokenizer: makes the tokens.
      sequence_length: S, of the text and of the answer; what is longer loses its end.
      start: the token that begins every answer.
      example: with `text` and `answer`.

    Returns:
      `source`, int32 (S,), `source_valid`, bool (S,), `inputs` and `targets`, int32 (S,), and `mask`, float32 (S,).
    """
    source = tokenizer.encode_source(example["text"])[:sequence_length]
    answer = _turns(tokenizer, example)[1][:sequence_length]
    row: Row = {name: np.zeros(sequence_length, np.int32) for name in ("source", "inputs", "targets")}
    row["source"][: len(source)] = source
    row["targets"][: len(answer)] = answer
    row["inputs"][0], row["inputs"][1:] = start, row["targets"][:-1]
    places = np.arange(sequence_length)
    return row | {"source_valid": places < len(source), "mask": (places < len(answer)).astype(np.float32)}


def report(examples: Examples, tokenizer: Tokenizer) -> dict[str, Any]:
    """How many examples a split has, how many were left out, and how many of the first are cut, as plain values."""
    config = examples.config
    found = {
        "examples": len(examples),
        **examples.source.left_out,
        "skipped_records": len(examples.skipped),
        "skipped": list(examples.skipped[:5]),
    }
    if config.of_images:
        return found
    measured = examples[:_MEASURED]
    if config.one_answer:
        sizes = [len(tokenizer.encode_source(example["text"])) for example in measured]
    else:
        sizes = [sum(map(len, _turns(tokenizer, example))) - 1 for example in measured]
    return found | {
        "measured_examples": len(measured),
        "truncated_examples": int(np.sum(np.array(sizes) > config.sequence_length)),
        "mean_tokens": float(np.mean(sizes)),
    }


def _turns(tokenizer: Tokenizer, example: Example) -> tuple[np.ndarray, np.ndarray]:
    """The tokens before an answer, of which there is at least one, and those of the answer with its end."""
    if getattr(tokenizer, "chat_template", None):
        prompt = tokenizer.chat([{"role": "user", "content": example["text"]}])
    else:
        prompt = np.concatenate([[tokenizer.separator_id], tokenizer.encode(example["text"])])
    end = (tokenizer.stop_ids or (tokenizer.separator_id,))[0]
    return prompt, np.concatenate([tokenizer.encode(example["answer"]), [end]])


def _label_values(config: DataConfig, source: DocumentSource) -> list[str | int | float]:
    return [source.record(i, (config.label_field,))[config.label_field] for i in range(len(source))]


def _in_order(values: Sequence[str | int | float]) -> tuple[str, ...]:
    """The different values as names: numbers by size, and otherwise by the alphabet."""
    found = {str(value) for value in values}
    numbers = all(name.isdecimal() for name in found)
    return tuple(sorted(found, key=int if numbers else None))
