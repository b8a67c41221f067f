"""The tokenizer that comes with a checkpoint: its `tokenizer.json` or SentencePiece model, and its chat template.

Text never becomes a special token, whatever it spells; only a chat's template may write them. Sequences begin with the
checkpoint's first special token (`bos`, an encoder's `cls`, or `eos` where there is neither), which separates documents
here.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxcost.data.files import atomic_write
from jaxcost.data.tokenizers import SEPARATOR_SYMBOL, BpeTokenizer, ByteTokenizer, Tokenizer, byte_characters

TYPE = "jaxcost_pretrained"
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a checkpoint may hold of its tokenizer, to be copied with it."""
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_SEPARATOR = "<|separator|>"


class BadTokenizer(ValueError):
    """A folder without a tokenizer, or with one that cannot be read."""


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
    """The tokenizer of a checkpoint; a `Tokenizer` like ours."""

    kind: Literal["tokenizers", "sentencepiece"]
    """The library that reads it."""
    serialized: str
    """tokenizer.json, or the SentencePiece model in base64."""
    specials: Mapping[str, str]
    """The text of each special token that has a name, such as `bos_token`."""
    separator_id: int
    stop_ids: tuple[int, ...]
    """Ids that end a text."""
    chat_template: str | None = None
    """Jinja source."""

    @functools.cached_property
    def _library(self) -> Any:
        return _Tokenizers(self.serialized) if self.kind == "tokenizers" else _SentencePiece(self.serialized)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._library.size

    @property
    def mask_id(self) -> int:
        """The id of the checkpoint's own mask, or the one behind the last."""
        found = self._library.id_of(self.specials["mask_token"]) if "mask_token" in self.specials else None
        return self.vocab_size if found is None else found

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of what fixes the ids."""
        return "pretrained" + hashlib.sha256(f"{self.separator_id} {self.serialized}".encode()).hexdigest()[:16]

    @functools.cached_property
    def _pieces(self) -> list[bytes | None]:
        """The bytes of every id, None for one that stands for no text."""
        return [self._library.piece(i) for i in range(self.vocab_size)]

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): bytes of text that each id stands for, 1 for special tokens."""
        return np.array([1 if piece is None else len(piece) for piece in self._pieces], np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 (tokens,), of which none is special; lone surrogates become '?'."""
        return np.array(self._library.encode(_writable(text)), np.int32)

    def encode_source(self, text: str) -> np.ndarray:
        """Returns the ids of a text as an encoder reads it, int32 (tokens,), with the special tokens around it."""
        return np.array(self._library.encode_whole(_writable(text), self.stop_ids[:1]), np.int32)

    def encode_pair(self, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of two texts as an encoder reads them together, with the special tokens around and between
        them, and which of the two the checkpoint takes each for."""
        ids, types = self._library.encode_pair(_writable(first), _writable(second), self.stop_ids[:1])
        return np.array(ids, np.int32), np.array(types, np.int32)

    def symbols(self, ids: np.ndarray) -> np.ndarray:
        """Returns the bytes, and a separator for each special token, uint16, that ids (tokens,) stand for."""
        special = np.array([SEPARATOR_SYMBOL], np.uint16)
        pieces = [self._pieces[i] for i in np.asarray(ids).tolist()]
        arrays = [special if p is None else np.frombuffer(p, np.uint8).astype(np.uint16) for p in pieces]
        return np.concatenate([np.zeros(0, np.uint16), *arrays])

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of ids (tokens,) without special tokens."""
        return self._library.decode(np.asarray(ids).tolist())

    def chat(self, messages: Sequence[Mapping[str, Any]], answer: bool = True, **variables: Any) -> np.ndarray:
        """The ids of a conversation, int32 (tokens,), written by the checkpoint's template.

        Args:
          messages: each with a `role` and its `content`.
          answer: end with the beginning of an answer.
          variables: what else the template asks for, such as `tools`.

        Raises:
          BadTokenizer: there is no template, or it refuses the conversation.
        """
        text = self.render(messages, answer, **variables)
        return np.array(self._library.encode_with_specials(text), np.int32)

    def render(self, messages: Sequence[Mapping[str, Any]], answer: bool = True, **variables: Any) -> str:
        """The text of a conversation, special tokens spelled out; as `chat`."""
        import jinja2

        if self.chat_template is None:
            raise BadTokenizer("The checkpoint has no chat template; encode the text of a prompt instead.")
        try:
            template = _environment().from_string(self.chat_template)
            known = {"messages": messages, "add_generation_prompt": answer, "tools": None, "documents": None}
            return template.render(**(known | dict(self.specials) | variables))
        except jinja2.TemplateError as error:
            raise BadTokenizer(f"The chat template refuses this conversation: {error}") from error

    def save(self, path: Path) -> None:
        """Writes the tokenizer to a JSON file, which `load_tokenizer` reads."""
        with atomic_write(Path(path)) as file:
            file.write(json.dumps({"type": TYPE, **dataclasses.asdict(self)}).encode())

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> PretrainedTokenizer:
        """The inverse of `save`."""
        rest = {name: value for name, value in fields.items() if name not in ("type", "stop_ids")}
        return cls(stop_ids=tuple(fields["stop_ids"]), **rest)


def read_tokenizer(folder: Path) -> PretrainedTokenizer:
    """The tokenizer of a checkpoint's folder; BadTokenizer if there is none, or it cannot be read."""
    found = [folder / name for name in ("tokenizer.json", *_SENTENCEPIECE) if (folder / name).is_file()]
    if not found:
        raise BadTokenizer(f"{folder} holds neither a tokenizer.json nor a SentencePiece model.")
    path = found[0]
    kind = "tokenizers" if path.suffix == ".json" else "sentencepiece"
    config, model, generation = (
        read_fields(folder, f"{name}config.json") for name in ("tokenizer_", "", "generation_")
    )
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    specials = {name: text for name, value in named.items() if (text := spelled(value)) is not None}
    try:
        content = path.read_bytes()
        serialized = content.decode() if kind == "tokenizers" else base64.b64encode(content).decode()
        library = _Tokenizers(serialized) if kind == "tokenizers" else _SentencePiece(serialized)
    except Exception as error:  # both libraries raise plain exceptions for what they cannot read
        raise BadTokenizer(f"{path} could not be read as a tokenizer ({error}).") from error

    def ids(name):
        given = [source[f"{name}_id"] for source in (generation, model) if source.get(f"{name}_id") is not None]
        spelled = [library.id_of(specials[name])] if name in specials else []
        first = next((value for value in (*given, *spelled) if value is not None), [])
        found = first if isinstance(first, list) else [first]
        if not all(type(i) is int and i >= 0 for i in found):
            raise BadTokenizer(f"{folder}: {name}_id is {json.dumps(first)}, which is no id; write the token's number.")
        return found

    begins, ends = ids("bos_token") or ids("cls_token"), ids("eos_token") or ids("sep_token")
    if not begins and not ends:
        raise BadTokenizer(f"{folder} names neither a bos_token (cls_token) nor an eos_token (sep_token); name one.")
    template = folder / "chat_template.jinja"
    chat = template.read_text() if template.is_file() else _default_template(config.get("chat_template"))
    return PretrainedTokenizer(kind, serialized, specials, (begins or ends)[0], tuple(ends), chat)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Writes a tokenizer of ours as transformers reads it; returns the fields of a `config.json` that name its ids."""
    import tokenizers

    if isinstance(tokenizer, ByteTokenizer):
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = tokenizers.decoders.ByteLevel()
    elif isinstance(tokenizer, BpeTokenizer):
        library = tokenizers.Tokenizer.from_str(tokenizer.serialized)
    else:
        raise ValueError(f"{type(tokenizer).__name__} is not a tokenizer of ours; copy the files that it came from.")
    library.add_special_tokens([tokenizers.AddedToken(_SEPARATOR, special=True)])
    assert library.token_to_id(_SEPARATOR) == tokenizer.separator_id
    library.save(str(folder / "tokenizer.json"))
    names = {"bos_token": _SEPARATOR, "eos_token": _SEPARATOR, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
    return {"bos_token_id": tokenizer.separator_id, "eos_token_id": tokenizer.separator_id}


# ---- Libraries ----


class _Tokenizers:
    """A tokenizer.json."""

    def __init__(self, serialized: str):
        import tokenizers

        self._plain, self._special = (tokenizers.Tokenizer.from_str(serialized) for _ in range(2))
        # Special tokens that a text spells out are text.
        self._plain.encode_special_tokens = True
        self.size = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1
        self._added = self._plain.get_added_tokens_decoder()
        decoders = re.findall(r'"type":\s*"(\w+)"', json.dumps(json.loads(serialized).get("decoder")))
        self._byte_level, self._word_pieces = "ByteLevel" in decoders, "WordPiece" in decoders
        self._byte_of = {character: byte for byte, character in enumerate(byte_characters())}

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_with_specials(self, text: str) -> list[int]:
        return self._special.encode(text, add_special_tokens=False).ids

    def encode_whole(self, text: str, ends: Sequence[int]) -> list[int]:
        return self._plain.encode(text).ids

    def encode_pair(self, first: str, second: str, ends: Sequence[int]) -> tuple[list[int], list[int]]:
        made = self._plain.encode(first, second)
        return made.ids, made.type_ids

    def decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def piece(self, i: int) -> bytes | None:
        token = self._plain.id_to_token(i)
        if token is None or (i in self._added and self._added[i].special):
            return None
        if i in self._added:
            return token.encode()
        if self._byte_level:
            return bytes(self._byte_of[character] for character in token)
        if self._word_pieces:
            return (token[2:] if token.startswith("##") else f" {token}").encode()
        return _unescaped(token)


class _SentencePiece:
    """A SentencePiece model."""

    def __init__(self, serialized: str):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(serialized))
        self.size = self._model.get_piece_size()
        controls = [i for i in range(self.size) if self._model.is_control(i)]
        self._controls = {self._model.id_to_piece(i): i for i in controls}

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_with_specials(self, text: str) -> list[int]:
        if not self._controls:
            return self.encode(text)
        parts = re.split(f"({'|'.join(map(re.escape, self._controls))})", text)
        each = ([self._controls[part]] if part in self._controls else self.encode(part) for part in parts if part)
        return [i for ids in each for i in ids]

    def encode_whole(self, text: str, ends: Sequence[int]) -> list[int]:
        # A SentencePiece model does not say what stands around a text; those of encoder-decoders end it.
        return [*self.encode(text), *ends]

    def encode_pair(self, first: str, second: str, ends: Sequence[int]) -> tuple[list[int], list[int]]:
        one, other = self.encode_whole(first, ends), self.encode_whole(second, ends)
        return [*one, *other], [0] * len(one) + [1] * len(other)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if not self._model.is_control(i)])

    def id_of(self, token: str) -> int | None:
        i = self._model.piece_to_id(token)
        return i if self._model.id_to_piece(i) == token else None

    def piece(self, i: int) -> bytes | None:
        special = self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i)
        return None if special else _unescaped(self._model.id_to_piece(i))


def _writable(text: str) -> str:
    """The text with half surrogate pairs, which have no UTF-8, as '?'."""
    return text.encode("utf-8", errors="replace").decode()


def _unescaped(token: str) -> bytes:
    """The bytes of a piece as SentencePiece writes it: ▁ for a space, <0x41> for a byte."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()


# ---- Files ----


def read_fields(folder: Path, name: str) -> dict[str, Any]:
    """The fields of a JSON file of a checkpoint, none if it is not there; BadTokenizer if it cannot be read."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadTokenizer(f"{path} cannot be read as JSON ({error}).") from None
    return content if isinstance(content, dict) else {}


def spelled(token: Any) -> str | None:
    """The text of a special token, which may stand alone or with its options."""
    return token.get("content") if isinstance(token, dict) else token


def _default_template(found: Any) -> str | None:
    """The chat template among those of a tokenizer_config.json: a text, or a list of named ones."""
    if isinstance(found, list):
        return next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found


@functools.cache
def _environment() -> Any:
    """Where templates, which come from strangers, are rendered, with the functions that they expect."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
