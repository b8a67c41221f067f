"""What data cost: labels, tokens that a model read or wrote, sentences that were translated, at the user's prices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

PURCHASES = ("labels", "read_tokens", "generated_tokens", "translated_sentences")
"""What can be bought."""


@dataclasses.dataclass(frozen=True)
class PriceConfig:
    """Prices of data; nobody publishes them, so one that is not given stays unknown, with all that follows from it."""

    label_usd: float | None = None
    """A label that a person gives."""
    read_token_usd: float | None = None
    """A token that a model reads, to label a text or to write a new one."""
    generated_token_usd: float | None = None
    """A token that a model writes of a new text."""
    translated_sentence_usd: float | None = None
    """A sentence that is translated there and back."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 0:
                raise ValueError(f"prices.{field.name} is {value}; a price cannot be negative.")

    def usd(self, bought: Mapping[str, int]) -> float | None:
        """What was bought costs, by the names of `PURCHASES`; None if the price of any of it is unknown."""
        prices = {name: getattr(self, f"{name.removesuffix('s')}_usd") for name in bought if bought[name]}
        if any(price is None for price in prices.values()):
            return None
        return float(sum(price * bought[name] for name, price in prices.items()))
