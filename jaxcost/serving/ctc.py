"""What a model of CTC heard: the labels of its best path."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def greedy_decode(
    logits_BTV: jax.Array, valid_BT: jax.Array | None = None, *, blank: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The labels of the most likely path through the frames: its repeats collapsed to one, then its blanks dropped.

    Source: Graves et al. 2006, Connectionist temporal classification, ICML, best path decoding.

    Args:
      logits_BTV: of each frame.
      valid_BT: frames of no padding; all if not given.
      blank: id of the blank.

    Returns:
      The labels, int32 (B, T), followed by blanks, and how many they are, int32 (B,).
    """
    best_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
    before_BT = jnp.pad(best_BT[:, :-1], ((0, 0), (1, 0)), constant_values=blank)
    kept_BT = (best_BT != blank) & (best_BT != before_BT)
    if valid_BT is not None:
        kept_BT &= valid_BT
    # What is not kept goes behind the end, where it is dropped.
    places_BT = jnp.where(kept_BT, jnp.cumsum(kept_BT, axis=1) - 1, best_BT.shape[1])
    rows_B1 = jnp.arange(len(best_BT))[:, None]
    labels_BT = jnp.full_like(best_BT, blank).at[rows_B1, places_BT].set(best_BT, mode="drop")
    return labels_BT, jnp.sum(kept_BT, axis=1, dtype=jnp.int32)
