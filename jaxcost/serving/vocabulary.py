"""A tokenizer as a server needs it: safe for any id that a model may give, and able to spell single tokens."""

from __future__ import annotations

import numpy as np

from jaxcost.data.tokenizers import SEPARATOR_SYMBOL, Tokenizer


class Vocabulary:
    """The words of a model, which may have more ids than its tokenizer, as vocabularies are padded."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._longest_bytes = int(np.max(tokenizer.token_bytes))

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids (tokens,); those that are no words have none."""
        ids = np.asarray(ids, np.int32)
        return self.tokenizer.decode(ids[(ids >= 0) & (ids < self.tokenizer.vocab_size)])

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one token, none for a special one."""
        if not 0 <= token < self.tokenizer.vocab_size:
            return b""
        symbols = self.tokenizer.symbols(np.array([token], np.int32))
        return symbols[symbols < SEPARATOR_SYMBOL].astype(np.uint8).tobytes()

    def spelled(self, token: int) -> str:
        """One token as text; `bytes:\\xe2\\x82` where its bytes are not whole characters, `<|token_7|>` without any."""
        own = self.bytes_of(token)
        if not own:
            return f"<|token_{token}|>"
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def surely_longer(self, text: str, tokens: int) -> bool:
        """Whether a text has more than so many tokens whatever they are, found without making them."""
        return len(text) > tokens * self._longest_bytes
