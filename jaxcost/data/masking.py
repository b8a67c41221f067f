"""Tokens that are hidden in a text for an encoder to find again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from jaxcost.data.tokenizers import Tokenizer

_HIDDEN, _REPLACED = 0.8, 0.1


@dataclasses.dataclass(frozen=True)
class Masking:
    """Hides a share of the tokens: 80 % behind a mask, 10 % behind a token at random; 10 % stay, and are asked for too.

    Source: Devlin et al. 2019 (BERT), arXiv:1810.04805, section 3.1.
    """

    fraction: float
    """Share of the tokens that are asked for; separators never are."""
    mask_id: int
    """Id of the mask."""
    separator_id: int
    """Id of the separator."""
    vocab_size: int
    """Ids that a token at random is one of."""

    @classmethod
    def of(cls, fraction: float, tokenizer: Tokenizer) -> Masking:
        """That of a tokeniser."""
        return cls(fraction, tokenizer.mask_id, tokenizer.separator_id, tokenizer.vocab_size)

    def __call__(self, row: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A row, or a batch, of `inputs` and `mask` (..., S), whose own tokens are the targets where asked for."""
        tokens = row["inputs"]
        asked = (rng.random(tokens.shape) < self.fraction) & (row["mask"] > 0) & (tokens != self.separator_id)
        kind = rng.random(tokens.shape)
        inputs = np.where(asked & (kind < _HIDDEN), self.mask_id, tokens)
        random = rng.integers(0, self.vocab_size, tokens.shape)
        inputs = np.where(asked & (kind >= _HIDDEN) & (kind < _HIDDEN + _REPLACED), random, inputs)
        return row | {"inputs": inputs.astype(np.int32), "targets": tokens, "mask": asked.astype(np.float32)}

    def hidden(self, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """Batches to score on: the same tokens are hidden every time, and padding says that it is none."""
        for number, batch in enumerate(batches):
            valid = {} if "segments" in batch else {"valid": batch["mask"] > 0}
            yield self(batch, np.random.default_rng(number)) | valid
