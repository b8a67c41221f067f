"""Text to token ids and back: bytes, or a byte-level BPE trained on the corpus.

Both write any text exactly, know how many bytes of text each token stands for, and keep one id that no text can
produce, the separator before every document.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxcost.data.config import DataConfig
from jaxcost.data.files import atomic_write
from jaxcost.data.sources import open_source

_LOGGER = logging.getLogger(__name__)

SEPARATOR_SYMBOL = 256
"""The separator in a stream of symbols: 0 to 255 are bytes of text, 256 stands between documents."""

_BPE_TRAINING_BYTES = 100_000_000  # merges settle long before this; more would only cost time and memory
_BYTES_FILE = {"type": "jaxcost_bytes"}


class Tokenizer(Protocol):
    """What the data pipeline, the evaluation and the server ask of a tokeniser."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; the largest is `vocab_size - 1`."""

    @property
    def separator_id(self) -> int:
        """The id before every document: beginning of text, end of text and padding in one."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""

    @property
    def mask_id(self) -> int:
        """The id of the token that stands for a hidden one; that behind the last where there is none."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal name that two tokenisers share only if they give the same ids for every text."""

    @property
    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): bytes of text that each id stands for, 1 for the separator."""

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 (tokens,), without a separator."""

    def encode_source(self, text: str) -> np.ndarray:
        """Returns the ids of a text as an encoder reads it, int32 (tokens,), with what it was trained to see around."""

    def encode_pair(self, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of two texts as an encoder reads them together, int32 (tokens,), and which of the two each is
        of, 0 or 1."""

    def symbols(self, ids: np.ndarray) -> np.ndarray:
        """Returns the bytes and separators, uint16 (bytes,), that ids (tokens,) stand for."""

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of ids (tokens,) without separators; bytes that aren't UTF-8 read as U+FFFD."""

    def save(self, path: Path) -> None:
        """Writes the tokeniser to a JSON file, which `load_tokenizer` reads."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token a byte of UTF-8; 257 ids."""

    vocab_size: int = dataclasses.field(default=257, init=False)
    separator_id: int = dataclasses.field(default=SEPARATOR_SYMBOL, init=False)
    stop_ids: tuple[int, ...] = dataclasses.field(default=(SEPARATOR_SYMBOL,), init=False)
    mask_id: int = dataclasses.field(default=257, init=False)
    fingerprint: str = dataclasses.field(default="bytes", init=False)

    @property
    def token_bytes(self) -> np.ndarray:
        """int32 (257,): ones."""
        return np.ones(self.vocab_size, np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Returns the text's UTF-8 bytes, int32 (bytes,); lone surrogates become '?'."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    encode_source = encode

    def encode_pair(self, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of two texts with the separator between them, and which of the two each is of."""
        return _paired(self.encode(first), self.encode(second), self.separator_id)

    def symbols(self, ids: np.ndarray) -> np.ndarray:
        """Returns the ids themselves, uint16."""
        return np.asarray(ids).astype(np.uint16)

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of ids (tokens,); see `Tokenizer.decode`."""
        return _text(self.symbols(ids))

    def save(self, path: Path) -> None:
        """Writes a JSON file that says that there is nothing to know."""
        with atomic_write(Path(path)) as file:
            file.write(json.dumps(_BYTES_FILE).encode())


@dataclasses.dataclass(frozen=True)
class BpeTokenizer:
    """Byte-pair encoding over bytes (Sennrich et al., arXiv 1508.07909; bytes as in GPT-2, Radford et al. 2019).

    The library's vocabulary holds no separator, so no text can spell one: its id is the one after the last.
    """

    serialized: str
    """The `tokenizers` library's tokenizer.json."""

    @functools.cached_property
    def _library(self) -> Any:
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.serialized)

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of every id but the separator."""
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        ids = range(self._library.get_vocab_size())
        return [bytes(byte_of[character] for character in self._library.id_to_token(i)) for i in ids]

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids of the library's vocabulary and the separator."""
        return len(self._pieces) + 1

    @property
    def separator_id(self) -> int:
        """The last id."""
        return self.vocab_size - 1

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The separator."""
        return (self.separator_id,)

    @property
    def mask_id(self) -> int:
        """The id behind the last."""
        return self.vocab_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of tokenizer.json."""
        return "bpe" + hashlib.sha256(self.serialized.encode()).hexdigest()[:16]

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): bytes of text that each id stands for, 1 for the separator."""
        return np.array([len(piece) for piece in self._pieces] + [1], np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 (tokens,); lone surrogates become '?'."""
        return np.array(self._library.encode(_utf8(text).decode(), add_special_tokens=False).ids, np.int32)

    encode_source = encode

    def encode_pair(self, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of two texts with the separator between them, and which of the two each is of."""
        return _paired(self.encode(first), self.encode(second), self.separator_id)

    def symbols(self, ids: np.ndarray) -> np.ndarray:
        """Returns the bytes and separators, uint16 (bytes,), that ids (tokens,) stand for."""
        pieces = [np.frombuffer(piece, np.uint8).astype(np.uint16) for piece in self._pieces]
        pieces.append(np.array([SEPARATOR_SYMBOL], np.uint16))
        return np.concatenate([np.zeros(0, np.uint16), *(pieces[i] for i in np.asarray(ids).tolist())])

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of ids (tokens,); see `Tokenizer.decode`."""
        return _text(self.symbols(ids))

    def save(self, path: Path) -> None:
        """Writes tokenizer.json, which the `tokenizers` library reads too (without the separator)."""
        with atomic_write(Path(path)) as file:
            file.write(self.serialized.encode())

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Learns merges from documents; the same documents in the same order give the same tokeniser.

        Args:
          documents: texts; merges never cross what GPT-2's pattern takes for the end of a word.
          vocab_size: ids wanted, the separator included; fewer come out if the text has too few distinct pairs.
        """
        import tokenizers

        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=byte_characters(), show_progress=False
        )
        library.train_from_iterator((_utf8(document).decode() for document in documents), trainer)
        return cls(library.to_str())


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokeniser that `save` wrote, ours or that of a checkpoint.

    Raises:
      ValueError: the file is missing, or is not a tokeniser's.
    """
    from jaxcost.data import pretrained  # which builds on this file

    try:
        serialized = Path(path).read_text(encoding="utf-8")
        fields = json.loads(serialized)
        if fields == _BYTES_FILE:
            return ByteTokenizer()
        if fields.get("type") == pretrained.TYPE:
            return pretrained.PretrainedTokenizer.from_json(fields)
        tokenizer = BpeTokenizer(serialized)
        tokenizer.vocab_size  # noqa: B018  (parses it: a file that isn't a tokeniser's fails here and not later)
        return tokenizer
    except Exception as error:  # the library raises plain Exception for JSON that it can't use
        raise ValueError(
            f"'{path}' could not be read as a tokeniser ({type(error).__name__}); give a file written by save()."
        ) from error


def build_tokenizer(config: DataConfig) -> Tokenizer:
    """Returns the tokeniser that `config` asks for; a BPE is trained on the train split once and kept on disk.

    Raises:
      ValueError: the dataset cannot be opened (see `open_source`), or the cache folder cannot be written to.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    source = open_source(config, config.train_split)
    key = hashlib.sha256(f"bpe {config.bpe_vocab_size} {source.identity}".encode()).hexdigest()[:16]
    path = source.cache_dir / f"{source.label}-bpe{config.bpe_vocab_size}-{key}.json"
    if path.exists():
        try:
            return load_tokenizer(path)
        except ValueError:
            _LOGGER.warning("Training the tokeniser again, because %s is damaged.", path)
    tokenizer = BpeTokenizer.train(_first_bytes(source, _BPE_TRAINING_BYTES), config.bpe_vocab_size)
    tokenizer.save(path)
    return tokenizer


def _first_bytes(documents: Iterable[str], limit_bytes: int) -> Iterator[str]:
    """Yields documents until they have passed `limit_bytes` of UTF-8."""
    for document in documents:
        if limit_bytes <= 0:
            return
        limit_bytes -= len(_utf8(document))
        yield document


def _paired(first: np.ndarray, second: np.ndarray, separator_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of two texts with the separator behind the first, of which it is, and which of the two each is of."""
    ids = np.concatenate([first, [separator_id], second]).astype(np.int32)
    return ids, (np.arange(len(ids)) > len(first)).astype(np.int32)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")  # half of a surrogate pair, which JSON can spell, has no UTF-8


def _text(symbols: np.ndarray) -> str:
    return symbols[symbols < SEPARATOR_SYMBOL].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def byte_characters() -> list[str]:
    """Returns the 256 printable characters that byte-level BPE writes bytes 0 to 255 as (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
