"""The frozen description of what text a model learns from and how it is cut into batches."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxcost.data.augmentation.config import AugmentConfig
from jaxcost.data.selection.config import SelectConfig

MIN_BPE_VOCAB_SIZE = 257
"""256 bytes and the separator: the smallest byte-level vocabulary that can write any text."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A text dataset, its tokeniser and the shape of a batch."""

    name: str = "python_text/library"
    """Any TFDS dataset, as `name`, `name/config` or `name/config:version`; python_text needs no download."""
    sources: tuple[str, ...] = ()
    """What is read in the place of `name`: files or folders of text, .jsonl, .csv, .parquet or .arrow, folders that
    `datasets` saved to disk, and TFDS datasets as `tfds:NAME`; several are read one behind the other."""
    inputs: Literal["texts", "images"] = "texts"
    """What is read of `sources`: texts, or the image files of folders, each with the name of the folder that holds it
    as its label (`train/cat/1.png`)."""
    weights: tuple[float, ...] = ()
    """Shares of each of `sources` in the train split, which are then mixed until the first of them runs out."""
    train_split: str = "train"
    """Split to learn from, in TFDS's notation (`train`, `train[:95%]`)."""
    validation_split: str = "validation"
    """Split to score on; `train[95%:]` beside `train[:95%]` for a dataset that has no such split."""
    text_field: str = "text"
    """Feature of the dataset that holds the text, or the image."""
    objective: Literal["next_token", "masked_tokens", "labels", "regression", "answers"] = "next_token"
    """What is learned: the next token of documents; tokens that are hidden in them, by an encoder; the label of each
    text, or a number; or the next token of the answer to each text."""
    label_field: str = "label"
    """Feature that holds the label of a text, by name or number, or the number that is learned of it; read for these
    objectives alone."""
    labels: tuple[str, ...] = ()
    """Names of the labels in the order of their numbers; those that the dataset tells, or else the different ones of
    the train split in order, if none are given."""
    answer_field: str = "answer"
    """Feature that holds the answer to a text; read for that objective alone."""
    group_field: str = ""
    """Feature that says which group a text is of, such as a dialect: a study says how each is served. None if empty."""
    masked_fraction: float = 0.15
    """Share of the tokens that are hidden for the objective of masked tokens."""
    augment: AugmentConfig = AugmentConfig()
    """How texts with labels or answers, or images, are changed while they are learned from."""
    select: SelectConfig = SelectConfig()
    """Which documents of the train split are left out."""
    max_corrupt_records: int = 10
    """Records of `sources` that may be corrupt; they are named and left out, and more of them are an error."""
    max_record_bytes: int = 1 << 24
    """Size from which on a record of `sources` counts as corrupt."""
    data_dir: str | None = None
    """Folder where TFDS keeps its datasets (TFDS's own default if not given)."""
    cache_dir: str | None = None
    """Local folder for trained tokenisers and token arrays (`jaxcost_cache` in data_dir if not given)."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """One token a byte, or a byte-level BPE trained on the train split."""
    bpe_vocab_size: int = 1024
    """Size of the BPE vocabulary, its separator included; without effect for bytes."""
    sequence_length: int = 256
    """Tokens in a sequence (S)."""
    packing: Literal["concatenate", "first_fit"] = "concatenate"
    """Sequences are cut from all documents in a row, or hold whole documents, each in the first that has room for it;
    what is then left of a sequence, 1 or 2 % of all, is padding."""
    separate_documents: bool = False
    """A token sees those of its own document alone, and counts its position from where that begins; first_fit always
    keeps documents apart."""
    buckets: tuple[int, ...] = ()
    """Lengths below `sequence_length`, ascending: batches are of texts of like lengths, and end at the first of these
    that holds all of them. For the objectives of labels and regression. The step is compiled for each, and a plan is
    of full length, which all batches have without any."""
    batch_size: int = 16
    """Sequences in a batch, over all devices (B)."""
    workers: int = 0
    """Processes that prepare the batches to learn from; with 0, a thread of this one does. The batches are the same."""
    shuffle_seed: int = 0
    """Seed of the order of the training sequences, which is drawn anew every epoch."""

    def __post_init__(self):
        for field in ("name", "train_split", "validation_split", "text_field"):
            if not getattr(self, field).strip():
                raise ValueError(f"data.{field} is empty; leave it out for its default or give a name.")
        if self.train_split == self.validation_split:
            raise ValueError(
                f"data.train_split and data.validation_split are both '{self.train_split}'; give two that don't "
                "overlap, such as 'train[:95%]' and 'train[95%:]'."
            )
        if self.objective not in ("next_token", "masked_tokens", "labels", "regression", "answers"):
            raise ValueError(
                f"data.objective is '{self.objective}'; use 'next_token', 'masked_tokens', 'labels', 'regression' or "
                "'answers'."
            )
        self._check_sources()
        self._check_images()
        if self.augment.changes_texts and not self.of_examples:
            raise ValueError(
                "data.augment changes texts that are learned from one by one; set data.objective to 'labels', "
                "'regression' or 'answers', or leave it out."
            )
        if not 0 < self.masked_fraction < 1:
            raise ValueError(f"data.masked_fraction is {self.masked_fraction}; it must lie between 0 and 1.")
        if self.tokenizer not in ("bytes", "bpe"):
            raise ValueError(f"data.tokenizer is '{self.tokenizer}'; use 'bytes' or 'bpe'.")
        if self.packing not in ("concatenate", "first_fit"):
            raise ValueError(f"data.packing is '{self.packing}'; use 'concatenate' or 'first_fit'.")
        if self.bpe_vocab_size < MIN_BPE_VOCAB_SIZE:
            raise ValueError(
                f"data.bpe_vocab_size is {self.bpe_vocab_size}; it must be at least {MIN_BPE_VOCAB_SIZE}, "
                "256 bytes and the separator."
            )
        ascending = all(one < other for one, other in zip((1, *self.buckets), self.buckets, strict=False))
        if self.buckets and not (ascending and self.buckets[-1] < self.sequence_length):
            raise ValueError(
                f"data.buckets is {self.buckets}; give lengths of 2 tokens and more, ascending, below "
                f"data.sequence_length ({self.sequence_length})."
            )
        if self.buckets and (not self.one_answer or self.of_images):
            raise ValueError(
                "data.buckets is for texts with one answer each; set data.objective to 'labels' or 'regression', or "
                "leave it out."
            )
        if self.workers < 0:
            raise ValueError(
                f"data.workers is {self.workers}; it cannot be negative, and 0 is a thread of this process."
            )
        for field in ("sequence_length", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"data.{field} is {getattr(self, field)}; it must be at least 1.")
        if not 0 <= self.shuffle_seed < 2**32:
            raise ValueError(f"data.shuffle_seed is {self.shuffle_seed}; it must lie between 0 and 2**32 - 1.")

    def _check_sources(self):
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"data.weights has {len(self.weights)} shares for {len(self.sources)} data.sources; give one for each."
            )
        if not all(weight > 0 for weight in self.weights):
            raise ValueError(f"data.weights are {self.weights}; each must be above 0, so leave out the other sources.")
        if self.max_corrupt_records < 0 or self.max_record_bytes < 1:
            raise ValueError("data.max_corrupt_records cannot be negative, and data.max_record_bytes must be above 0.")

    def _check_images(self):
        if self.inputs not in ("texts", "images"):
            raise ValueError(f"data.inputs is '{self.inputs}'; use 'texts' or 'images'.")
        if not self.of_images:
            if self.augment.images.active:
                raise ValueError(
                    f"data.augment.images changes images, and data.inputs is {self.inputs!r}; set it to 'images', or "
                    "leave out the one."
                )
            return
        if self.objective != "labels":
            raise ValueError("data.inputs is 'images', of which labels are learned; set data.objective to 'labels'.")
        if self.augment.changes_texts or self.select.active:
            raise ValueError(
                "data.inputs is 'images', which data.augment.images changes; the other fields of data.augment, and "
                "data.select, are for texts, so leave them out."
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """The features that are read, the text's first."""
        if self.one_answer:
            return (self.text_field, self.label_field)
        return (self.text_field, self.answer_field) if self.objective == "answers" else (self.text_field,)

    @property
    def title(self) -> str:
        """What the data are called: `name`, or where they are read in its place."""
        return ", ".join(self.sources) or self.name

    @property
    def of_examples(self) -> bool:
        """Whether each text is a sequence of its own, and not a piece of a stream of tokens."""
        return self.one_answer or self.objective == "answers"

    @property
    def one_answer(self) -> bool:
        """Whether a label or a number is learned of each text, and no tokens."""
        return self.objective in ("labels", "regression")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that batches of texts have, ascending."""
        return (*self.buckets, self.sequence_length)

    @property
    def of_images(self) -> bool:
        """Whether images are read, and not texts."""
        return self.inputs == "images"

    @property
    def of_segments(self) -> bool:
        """Whether batches say which document each token is of."""
        return not self.of_examples and (self.separate_documents or self.packing == "first_fit")
