"""Losses and the sums that scores are made of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcost import weights
from jaxcost.models.layers import soft_capped
from jaxcost.sharding import context_ways


def cross_entropy(
    hidden_BTD: jax.Array,
    unembedding: Any,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    chunks: int = 1,
    key: jax.Array | None = None,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """The summed negative log-likelihood in nats, and the number of targets that counted; both float32 scalars.

    Args:
      hidden_BTD: final hidden states in the compute dtype.
      unembedding: a weight (D, V) of any kind.
      targets_BT: int32 token ids.
      mask_BT: 1 where the target counts and 0 where it is padding.
      chunks: pieces that the time axis is cut into, at most; each piece's logits are made again in the backward pass,
        so the full (B, T, V) logits never exist. A number that does not divide T is lowered to one that does. Where
        the mesh splits T, a piece takes tokens from every device's part.
      key: random key for an unembedding whose arithmetic is random.
      soft_cap: bound on the logits, as in `ModelConfig.logit_soft_cap`; 0 is none.
    """
    length = targets_BT.shape[1]
    ways = context_ways(length)
    part = length // ways
    chunks = max(n for n in range(1, min(chunks, part) + 1) if part % n == 0)

    def piece(hidden_BtD, targets_Bt, mask_Bt):
        logits_BtV = soft_capped(weights.contract(hidden_BtD, unembedding, key).astype(jnp.float32), soft_cap)
        chosen_Bt = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits_BtV, axis=-1) - chosen_Bt) * mask_Bt)

    if chunks == 1:
        return piece(hidden_BTD, targets_BT, mask_BT), jnp.sum(mask_BT)

    def split(x):
        pieces = jnp.moveaxis(x.reshape(x.shape[0], ways, chunks, part // chunks, *x.shape[2:]), 2, 0)
        return pieces.reshape(chunks, x.shape[0], length // chunks, *x.shape[2:])

    def step(total, chunk):
        return total + jax.checkpoint(piece)(*chunk), None

    total, _ = jax.lax.scan(step, jnp.zeros((), jnp.float32), (split(hidden_BTD), split(targets_BT), split(mask_BT)))
    return total, jnp.sum(mask_BT)
