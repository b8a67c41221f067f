"""Rotary positions: frequencies of each kind of layer, and the rotation itself."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost.models.config import LayerKind, ModelConfig, RopeScaling


def frequencies(config: ModelConfig, kind: LayerKind = "global") -> np.ndarray:
    """Radians a token of each pair of entries, float32 (rotary_dim / 2,): theta**(-2i / rotary_dim), scaled.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    own = kind == "local" and config.local_rope_theta > 0
    theta = config.local_rope_theta if own else config.rope_theta
    half = config.rotary_dim // 2
    plain = theta ** (-np.arange(half) / half)
    return (plain if own else _scaled(plain, config.rope_scaling)).astype(np.float32)


def _scaled(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Frequencies divided by the factor. Sources: Chen et al. 2023, arXiv:2306.15595 (linear); the Llama 3 report,
    arXiv:2407.21783, and its reference code (llama3)."""
    if scaling.kind == "none":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    # Waves of an original sequence: few of them are a slow frequency, which is stretched, many a fast one.
    waves = scaling.original_length * plain / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((waves - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def rotate(x_BTHh: jax.Array, positions_BT: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotates the first 2n entries of each head by its token's position, for n frequencies; entry i pairs with i + n.

    The rest of the head stays as it is. In x's dtype, computed in float32.
    """
    half = frequencies.shape[0]
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second, rest = jnp.split(x_BTHh, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x_BTHh.dtype), rest], axis=-1)
