"""The characters that a model of CTC writes: the vocabulary that its checkpoint comes with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxcost.data.pretrained import BadTokenizer, read_fields, spelled

_VOCABULARY = "vocab.json"


@dataclasses.dataclass(frozen=True)
class Characters:
    """What each output stands for."""

    pieces: tuple[str, ...]
    """The text of each label, empty for one that stands for none, such as the blank."""
    blank: int
    """The label between two characters."""

    def text(self, labels: Sequence[int]) -> str:
        """The text of labels, without spaces at its ends."""
        return "".join(self.pieces[label] for label in labels).strip()


def read_characters(folder: Path, outputs: int) -> Characters:
    """The characters of a checkpoint's folder; `outputs` are the numbers that its model gives for each frame.

    Raises:
      BadTokenizer: there are none, they cannot be read, or are not so many.
    """
    vocabulary = read_fields(folder, _VOCABULARY)
    if not vocabulary:
        raise BadTokenizer(f"{folder} holds no {_VOCABULARY}, which says what characters the outputs are; add it.")
    if not all(type(i) is int and 0 <= i < outputs for i in vocabulary.values()):
        raise BadTokenizer(
            f"{folder / _VOCABULARY} does not give each character a number below the model's {outputs} outputs; mend "
            "it, or cut it to one language."
        )
    named, model = read_fields(folder, "tokenizer_config.json"), read_fields(folder, "config.json")
    special = {name: spelled(named.get(name, f"<{short}>")) for name, short in _SPECIAL.items()}
    blank = model.get("pad_token_id", vocabulary.get(special["pad_token"]))
    if type(blank) is not int or not 0 <= blank < outputs:
        raise BadTokenizer(f"{folder} names no pad_token_id, which is the blank between characters; write its number.")
    space = spelled(named.get("word_delimiter_token", "|"))
    lower = bool(named.get("do_lower_case", False))
    pieces = [""] * outputs
    for character, i in vocabulary.items():
        if i != blank and character not in special.values():
            pieces[i] = " " if character == space else character.lower() if lower else character
    return Characters(tuple(pieces), blank)


_SPECIAL = {"pad_token": "pad", "unk_token": "unk", "bos_token": "s", "eos_token": "/s"}
