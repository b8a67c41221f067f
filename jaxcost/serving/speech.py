"""What a decoder of speech is told before it writes: the language, and whether to translate; and what it never says.

Source: Radford et al. 2022 (Whisper), arXiv:2212.04356, section 2.3; the ids are those of the checkpoint's
`generation_config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxcost.data.pretrained import BadTokenizer, read_fields

_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Instructions:
    """The ids that tell a model what to do; what it does not know is empty or None."""

    start: int
    """Begins every answer."""
    languages: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Codes of languages, such as `en`."""
    transcribe: int | None = None
    translate: int | None = None
    """Writes English whatever it hears."""
    no_timestamps: int | None = None
    """Leaves the times out."""
    before: int | None = None
    """Begins the text that came before a recording."""
    never: tuple[int, ...] = ()
    """Ids that are never said."""
    not_first: tuple[int, ...] = ()
    """Ids that no answer begins with."""

    @property
    def translates(self) -> bool:
        """Whether it knows the way into English."""
        return bool(self.languages) and self.translate is not None

    def prompt(self, language: str | None, translate: bool, before: np.ndarray | None = None) -> np.ndarray:
        """What an answer begins with, int32 (T,).

        Args:
          language: what is spoken, one of `languages`; None where there are none.
          translate: write English.
          before: ids (n,) of what was said before the recording.
        """
        told = [self.start]
        if language is not None:
            told += [self.languages[language]]
            told += [task for task in [self.translate if translate else self.transcribe] if task is not None]
        told += [] if self.no_timestamps is None else [self.no_timestamps]
        earlier = [] if before is None else [self.before, *before.tolist()]
        return np.array(earlier + told, np.int32)


def read_instructions(folder: Path, start: int, vocab_size: int) -> Instructions:
    """The instructions of a checkpoint's folder; of one without any, the start alone.

    Raises:
      BadTokenizer: they cannot be read, or are ids that the model does not have.
    """
    fields = read_fields(folder, _FILE)
    languages, tasks = (fields.get(name) or {} for name in ("lang_to_id", "task_to_id"))
    never, not_first = (fields.get(name) or () for name in ("suppress_tokens", "begin_suppress_tokens"))
    plain, before = fields.get("no_timestamps_token_id"), fields.get("prev_sot_token_id")
    try:
        ids = [start, *languages.values(), *tasks.values(), *never, *not_first]
        ids += [i for i in (plain, before) if i is not None]
        known = all(type(i) is int and 0 <= i < vocab_size for i in ids)
    except (AttributeError, TypeError):
        known = False
    if not known:
        raise BadTokenizer(f"{folder / _FILE} names ids that are none from 0 to {vocab_size - 1}; copy it again.")
    # Behind the token that leaves times out stand the times.
    times = () if plain is None else range(plain, vocab_size)
    return Instructions(
        start,
        {name.strip("<|>"): i for name, i in languages.items()},
        tasks.get("transcribe"),
        tasks.get("translate"),
        plain,
        before,
        tuple(sorted({start, *tasks.values(), *times, *never})) if fields else (),
        tuple(not_first),
    )
