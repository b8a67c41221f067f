"""What a transformer is given: how long it is, the least and the most that there can be, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcost import weights
from jaxcost.models import optional
from jaxcost.models.audio import frames_of
from jaxcost.models.cache import Cache
from jaxcost.models.config import ModelConfig


def length_of(c: ModelConfig, tokens_BT: jax.Array) -> int:
    """Tokens of a sequence, or what stands in their place."""
    if c.of_tokens:
        return tokens_BT.shape[1]
    return c.images.tokens if c.images.patch else frames_of(c.audio, tokens_BT.shape[1])


def smallest_input(c: ModelConfig) -> tuple[int, ...]:
    """Shape of the least that a model takes."""
    if not c.of_tokens:
        return _of_length(c, 1, c.audio.length(1))
    return (1, 1) if c.vocab_size else (1, 1, c.width)


def largest_input(c: ModelConfig, rows: int) -> tuple[tuple[int, ...], jnp.dtype]:
    """Shape and dtype of the most that a model takes: so many rows of tokens, images or audio."""
    if not c.of_tokens:
        return _of_length(c, rows, c.audio.length(c.max_length)), jnp.float32
    return (rows, c.max_length), jnp.int32


def _of_length(c: ModelConfig, rows: int, length: int) -> tuple[int, ...]:
    if c.images.patch:
        return (rows, c.images.height, c.images.width, c.images.channels)
    return (rows, length, *((c.audio.channels,) if c.audio.channels > 1 else ()))


def check_cache(config: ModelConfig, params: weights.Params, length: int, cache: Cache | None) -> None:
    """ValueError if so many tokens are too many, or the cache is not one that was started for these weights."""
    if cache is not None and not config.causal:
        raise ValueError("model.causal is off, and a cache holds what came before a token; run the whole sequence.")
    if cache is not None and config.encoder.num_layers and cache.source is None:
        raise ValueError("The cache holds no source, which model.encoder asks for; make it with start_cache and one.")
    virtual = optional.virtual_tokens(params)
    if cache is None and config.position == "learned" and length > config.max_length:
        raise ValueError(
            f"A sequence of {length} tokens is longer than model.max_length ({config.max_length}); shorten it."
        )
    if virtual and virtual + length > config.max_length:
        raise ValueError(
            f"{virtual} virtual tokens and {length} tokens are longer than model.max_length ({config.max_length}); "
            f"use at most {max(0, config.max_length - length)} virtual tokens or shorten the sequence."
        )
    if cache is not None and cache.virtual != virtual:
        raise ValueError(
            f"The weights have {virtual} virtual tokens, but the cache was started with {cache.virtual}; make it with "
            "start_cache and the same weights."
        )


def check_segments(c: ModelConfig, params: weights.Params, valid_BT, cache: Cache | None) -> None:
    """ValueError if several sequences cannot stand in a row, or something else says what is valid of it."""
    if valid_BT is not None or cache is not None:
        raise ValueError("Segments say what is valid and are of whole rows; leave out valid_BT and the cache.")
    if not c.of_tokens or c.head.pooling != "none":
        raise ValueError(
            "Segments are of several sequences of tokens in one row, and this model reads images or audio or gives one "
            "answer for a row; give each sequence its own."
        )
    if optional.virtual_tokens(params):
        raise ValueError(
            "Virtual tokens stand before a row, and segments are of several in one; give each sequence its own."
        )
