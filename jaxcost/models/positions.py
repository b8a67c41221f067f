"""Positions within attention: rotary ones, of each kind of layer, and relative ones, which scores take as a bias."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxcost import sharding, weights
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


class RelativePositions(nn.Module):
    """The bias that each head adds to the score of a query and a key for their distance: float32 (..., H, T, S).

    One table (buckets, H) serves all layers. Source: Raffel et al. 2019 (T5), arXiv:1910.10683, section 2.1.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, queries_BT: jax.Array, keys_BS: jax.Array) -> jax.Array:
        """For tokens at these positions; B may be 1."""
        c = self.config
        if self.has_variable("params", "table"):
            table = weights.materialize(self.get_variable("params", "table"))
        else:
            # One number for a head, of which projections hold several: the mesh may divide those and not these.
            names = ("position", f"heads{sharding.GROUPS}")
            init = nn.with_logical_partitioning(nn.initializers.normal(c.width**-0.5), names)
            table = self.param("table", init, (c.relative_buckets, c.num_heads))
        bias_BTSH = jnp.take(table, relative_buckets(c, keys_BS[:, None] - queries_BT[..., None]), axis=0)
        return jnp.moveaxis(bias_BTSH, -1, -3).astype(jnp.float32)


def relative_buckets(config: ModelConfig, ahead: jax.Array) -> jax.Array:
    """The row of the table for keys so many tokens ahead of their queries, int32 of the same shape.

    The first half of the rows of a side is of one distance each; in the second their ranges grow by a constant factor.
    """
    rows = config.relative_buckets if config.causal else config.relative_buckets // 2
    side = 0 if config.causal else jnp.where(ahead > 0, rows, 0)
    distance = jnp.maximum(-ahead, 0) if config.causal else jnp.abs(ahead)
    single = rows // 2
    share = jnp.log(jnp.maximum(distance, 1) / single) / math.log(config.relative_distance / single)
    ranged = single + (share * (rows - single)).astype(jnp.int32)
    return (side + jnp.where(distance < single, distance, jnp.minimum(ranged, rows - 1))).astype(jnp.int32)
