"""The frozen description of what text a model learns from and how it is cut into batches."""

from __future__ import annotations

import dataclasses
from typing import Literal

MIN_BPE_VOCAB_SIZE = 257
"""256 bytes and the separator: the smallest byte-level vocabulary that can write any text."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A text dataset, its tokeniser and the shape of a batch."""

    name: str = "python_text/library"
    """Any TFDS dataset, as `name`, `name/config` or `name/config:version`; python_text needs no download."""
    train_split: str = "train"
    """Split to learn from, in TFDS's notation (`train`, `train[:95%]`)."""
    validation_split: str = "validation"
    """Split to score on; `train[95%:]` beside `train[:95%]` for a dataset that has no such split."""
    text_field: str = "text"
    """Feature of the dataset that holds the text."""
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
    batch_size: int = 16
    """Sequences in a batch, over all devices (B)."""
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
        if self.tokenizer not in ("bytes", "bpe"):
            raise ValueError(f"data.tokenizer is '{self.tokenizer}'; use 'bytes' or 'bpe'.")
        if self.packing not in ("concatenate", "first_fit"):
            raise ValueError(f"data.packing is '{self.packing}'; use 'concatenate' or 'first_fit'.")
        if self.bpe_vocab_size < MIN_BPE_VOCAB_SIZE:
            raise ValueError(
                f"data.bpe_vocab_size is {self.bpe_vocab_size}; it must be at least {MIN_BPE_VOCAB_SIZE}, "
                "256 bytes and the separator."
            )
        for field in ("sequence_length", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"data.{field} is {getattr(self, field)}; it must be at least 1.")
        if not 0 <= self.shuffle_seed < 2**32:
            raise ValueError(f"data.shuffle_seed is {self.shuffle_seed}; it must lie between 0 and 2**32 - 1.")

    @property
    def of_segments(self) -> bool:
        """Whether batches say which document each token is of."""
        return self.separate_documents or self.packing == "first_fit"
