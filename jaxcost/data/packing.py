"""Documents to one flat array of token ids, made once and read from disk, and the sequences that a model sees of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxcost.data.config import DataConfig
from jaxcost.data.files import atomic_write
from jaxcost.data.sources import DocumentSource, open_source
from jaxcost.data.tokenizers import Tokenizer

_LOGGER = logging.getLogger(__name__)

_FORMAT = "jaxcost tokens 1"  # a change of what the array means must change the key of its file
_CHECKED_TOKENS = 500_000


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """A split as one array of token ids, with a separator before every document."""

    tokens: np.ndarray
    """uint16 or uint32 (N,), read from disk as it is used; the first is a separator."""
    text_bytes: int
    """UTF-8 bytes of the documents and 1 a document for its separator: what bits per byte divides by."""
    num_documents: int
    """Documents in the split."""
    skipped: tuple[str, ...] = ()
    """Corrupt records that were left out, and why."""
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Documents that `config.select` left out, by the reason."""


def tokenize_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> TokenStream:
    """Tokenises a split of the dataset, or finds it tokenised on disk.

    The file's name is a hash of the dataset's content, the split and the tokeniser's fingerprint. A file that is cut
    short, damaged or another's is made again; writing is atomic, so a killed or a second process does no harm.

    Args:
      config: names the dataset and its folders.
      split: `config.train_split` or `config.validation_split`.
      tokenizer: from `build_tokenizer`.

    Raises:
      ValueError: the split cannot be opened (see `open_source`), or the cache folder cannot be written to.
    """
    source = open_source(config, split)
    key = hashlib.sha256(f"{_FORMAT} {source.identity} {tokenizer.fingerprint}".encode()).hexdigest()
    path = source.cache_dir / f"{source.label}-{tokenizer.fingerprint}-{key[:16]}.npy"
    stream = _read(path, key)
    if stream is not None:
        return dataclasses.replace(stream, skipped=source.skipped, left_out=source.left_out)
    if path.exists():
        _LOGGER.warning("Tokenising again, because %s is damaged.", path)
    with atomic_write(path) as file:
        text_bytes = _write_tokens(file, source, tokenizer)
    tokens = np.lib.format.open_memmap(path, mode="r")
    # The description comes last: an array without one counts as absent.
    with atomic_write(path.with_suffix(".json")) as file:
        description = {"key": key, "text_bytes": text_bytes, "num_documents": len(source), **_description(tokens)}
        file.write(json.dumps(description).encode())
    return TokenStream(tokens, text_bytes, len(source), source.skipped, source.left_out)


class _OfTokens:
    """Sequences of a token array, which worker processes map from its file for themselves, if it has one."""

    _tokens: np.ndarray

    def __getstate__(self) -> dict[str, Any]:
        tokens = self._tokens
        # A part of a mapped array is copied: NumPy does not say where in the file it begins.
        if not isinstance(tokens, np.memmap) or not isinstance(tokens.base, mmap.mmap):
            return vars(self)
        where = (tokens.filename, tokens.dtype, "r", tokens.offset, tokens.shape)
        return vars(self) | {"_tokens": functools.partial(np.memmap, *where)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if callable(self._tokens):
            self._tokens = self._tokens()


class Windows(_OfTokens):
    """The sequences of a token array, by index: window i predicts tokens i·S+1 to i·S+S from those one earlier.

    The stride is S, so over all windows every token but the first is predicted exactly once.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, keep_last: bool = False, separator: int | None = None):
        """Cuts the array.

        Args:
          tokens: integers (N,).
          sequence_length: S.
          keep_last: count the last window even if tokens run out within it; it is padded with zeros.
          separator: the token that begins a document, where documents are kept apart.
        """
        self._tokens = tokens
        self._sequence_length = sequence_length
        self._separator = separator
        predicted = max(len(tokens) - 1, 0)
        self._count = -(-predicted // sequence_length) if keep_last else predicted // sequence_length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `inputs` and `targets`, int32 (S,), and `mask`, float32 (S,), 1 where there is a target.

        Where documents are kept apart, also `segments`, int32 (S,): which document of the window each input is of.
        """
        start = index * self._sequence_length
        piece = np.asarray(self._tokens[start : start + self._sequence_length + 1], np.int32)
        padding = self._sequence_length + 1 - len(piece)
        mask = np.ones(self._sequence_length, np.float32)
        if padding:
            mask[-padding:] = 0
            piece = np.pad(piece, (0, padding))
        window = {"inputs": piece[:-1], "targets": piece[1:], "mask": mask}
        if self._separator is not None:
            window["segments"] = 1 + np.cumsum(window["inputs"] == self._separator, dtype=np.int32)
        return window


class Rows(_OfTokens):
    """The sequences of a token array, by index, of whole documents: each is in the first row that has room for it.

    Documents are placed from the longest to the shortest; one that is longer than a row is cut first, and its pieces
    do not see one another. A token's target is the next one of the array, so that over all rows every token but the
    first is predicted exactly once. Source: first-fit decreasing, Johnson 1973, Near-optimal bin packing algorithms.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int):
        """Packs the array.

        Args:
          tokens: integers (N,), of which the first begins every document.
          sequence_length: S.
        """
        self._tokens, self._sequence_length = tokens, sequence_length
        begins = np.flatnonzero(tokens == tokens[0]) if len(tokens) else np.zeros(0, int)
        sizes = np.diff(begins, append=len(tokens))
        pieces = -(-sizes // sequence_length)
        first = np.cumsum(pieces) - pieces
        within = np.arange(pieces.sum()) - np.repeat(first, pieces)
        self._starts = np.repeat(begins, pieces) + within * sequence_length
        self._lengths = np.minimum(sequence_length, np.repeat(sizes, pieces) - within * sequence_length)
        rows = _first_fit(self._lengths, sequence_length)
        self._order = np.argsort(rows, kind="stable")
        self._ends = np.cumsum(np.bincount(rows)) if len(rows) else np.zeros(0, int)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def fill(self) -> float:
        """Share of all places that hold a token."""
        return len(self._tokens) / max(1, len(self) * self._sequence_length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns `inputs`, `targets` and `segments`, int32 (S,), and `mask`, float32 (S,), 1 where there is a target.

        Segments count the documents of the row from 1; padding, behind the last of them, is 0.
        """
        row = {name: np.zeros(self._sequence_length, np.int32) for name in ("inputs", "targets", "segments")}
        row["mask"] = np.zeros(self._sequence_length, np.float32)
        pieces = self._order[self._ends[index - 1] if index else 0 : self._ends[index]]
        place = 0
        for segment, piece in enumerate(pieces, start=1):
            start, length = self._starts[piece], self._lengths[piece]
            found = np.asarray(self._tokens[start : start + length + 1], np.int32)
            here, known = slice(place, place + length), slice(place, place + len(found) - 1)
            row["inputs"][here], row["segments"][here] = found[:length], segment
            row["targets"][known], row["mask"][known] = found[1:], 1
            place += length
        return row


def _first_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece, int (pieces,): from the longest on, the first with room for it."""
    rows, left = np.zeros(len(lengths), int), np.zeros(0, int)
    if not len(lengths):
        return rows
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(-lengths, return_counts=True)
    # Pieces of one length fill the first row with room for any, then the next, and so on.
    for size, alike in zip(-sizes, np.split(order, np.cumsum(counts)[:-1]), strict=True):
        missing = len(alike) - np.sum(left // size)
        left = np.append(left, np.full(max(0, -(-missing // (room // size))), room))
        fits = left // size
        taken = np.clip(len(alike) - (np.cumsum(fits) - fits), 0, fits)
        rows[alike] = np.repeat(np.arange(len(left)), taken)
        left -= taken * size
    return rows


def _write_tokens(file: BinaryIO, source: DocumentSource, tokenizer: Tokenizer) -> int:
    """Writes an .npy file of all tokens, a document at a time, and returns the text's bytes."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    token_bytes = tokenizer.token_bytes

    def write_header(num_tokens: int) -> None:
        # NumPy leaves room in the header for the first axis to grow, so its length does not depend on the number.
        file.seek(0)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (num_tokens,)}
        np.lib.format.write_array_header_1_0(file, header)

    write_header(0)
    num_tokens = text_bytes = 0
    for document in source:
        ids = np.concatenate([[tokenizer.separator_id], tokenizer.encode(document)])
        file.write(ids.astype(dtype).tobytes())
        num_tokens += len(ids)
        text_bytes += int(token_bytes[ids].sum())
    write_header(num_tokens)
    return text_bytes


def _read(path: Path, key: str) -> TokenStream | None:
    """Returns the stream on disk, or None if it isn't there, isn't whole or is another's."""
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        tokens = np.lib.format.open_memmap(path, mode="r")
        if description["key"] != key or any(description[name] != x for name, x in _description(tokens).items()):
            return None
        return TokenStream(tokens, description["text_bytes"], description["num_documents"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _description(tokens: np.ndarray) -> dict[str, int | str]:
    """What a file must still hold to be the one that was written; of a long array the checksum covers both ends."""
    checksum = zlib.crc32(tokens[:_CHECKED_TOKENS].tobytes())
    checksum = zlib.crc32(tokens[-_CHECKED_TOKENS:].tobytes(), checksum)
    return {"num_tokens": len(tokens), "dtype": tokens.dtype.str, "checksum": checksum}
