"""What is made of the last hidden states: logits of tokens, labels, numbers.

A head may pool the hidden states to one of each sequence and put further layers before its output. The output's
matrix is the unembedding or the head's own; it is met last and by itself, so that a loss can meet it in pieces. Boxes
have layers of their own, and are made whole.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax

from jaxcost import weights
from jaxcost.models.config import ModelConfig
from jaxcost.models.layers import Linear, Norm, activation, kernel, soft_capped, vector


class Head(nn.Module):
    """Final hidden states (B, T, D) as the output's matrix meets them, (B, T, D) or, pooled, (B, 1, D).

    With boxes, those of the N detection tokens alone, (B, N, D); and the boxes (B, N, 4), None where there are none.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, hidden_BTD, valid_BT, key):
        head, boxes = self.config.head, None
        key, key_boxes = weights.split_keys(key, 2)
        if head.boxes:
            hidden_BTD = hidden_BTD[:, -self.config.images.detection_tokens :]
            boxes = Boxes(self.config, name="boxes")(hidden_BTD, key_boxes)
        hidden_BTD = pooled(head.pooling, hidden_BTD, valid_BT)
        hidden_BTD = _deepened(self.config, hidden_BTD, key)
        if head.hidden_norm:
            hidden_BTD = Norm(self.config, name="norm")(hidden_BTD)
        if head.outputs and self.is_initializing():
            Linear(head.outputs, ("embed", None), head.bias, name="output")(hidden_BTD)
        return hidden_BTD, boxes


class Boxes(nn.Module):
    """Hidden states (B, N, D) to boxes (B, N, 4), float32: centre from the left and from the top, width and height.

    All are shares of the image's, from 0 to 1. Source: Carion et al. 2020 (DETR), arXiv:2005.12872, section 3.2.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, hidden_BND, key):
        key, key_output = weights.split_keys(key, 2)
        hidden_BND = _deepened(self.config, hidden_BND, key)
        made_BN4 = Linear(4, ("embed", None), self.config.head.bias, name="output")(hidden_BND, key_output)
        return jax.nn.sigmoid(made_BN4.astype(jnp.float32))


def _deepened(config: ModelConfig, hidden_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
    """Hidden states behind the head's further layers, which become parameters of the module that calls."""
    head = config.head
    width = head.hidden_width or config.width
    keys = weights.split_keys(key, head.hidden_layers if head.hidden != "none" else 0)
    for i, one in enumerate(keys):
        layer = Linear(width, ("embed", None), head.hidden_bias, name=f"hidden_{i + 1}" if i else "hidden")
        hidden_BTD = activation(head.hidden)(layer(hidden_BTD, one))
    return hidden_BTD


class Unembedding(nn.Module):
    """The parameters of logits over the vocabulary: a matrix where the embedding does not serve, and a bias if any."""

    config: ModelConfig

    @nn.compact
    def __call__(self):
        c = self.config
        if not c.tie_embeddings:
            kernel(self, (c.width, c.vocab_size), ("embed", "vocab"))
        if c.head.bias:
            vector(self, "bias", nn.initializers.zeros, c.vocab_size, "vocab")


def pooled(pooling: str, hidden_BTD: jax.Array, valid_BT: jax.Array | None) -> jax.Array:
    """All hidden states, or one of each sequence (B, 1, D): its first, its last valid one, or the mean of the valid."""
    if pooling == "none":
        return hidden_BTD
    if pooling == "first":
        return hidden_BTD[:, :1]
    valid_BT = jnp.ones(hidden_BTD.shape[:2], bool) if valid_BT is None else valid_BT
    if pooling == "last":
        last_B = jnp.maximum(jnp.sum(valid_BT, axis=1) - 1, 0)
        return jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    count_B11 = jnp.maximum(jnp.sum(valid_BT, axis=1), 1)[:, None, None]
    total_B1D = jnp.sum(jnp.where(valid_BT[..., None], hidden_BTD, 0), axis=1, keepdims=True, dtype=jnp.float32)
    return (total_B1D / count_B11).astype(hidden_BTD.dtype)


def embeddings(hidden: jax.Array, pooling: str) -> jax.Array:
    """Hidden states (..., D) as embeddings, float32: at unit length where they are of a whole sequence."""
    made = hidden.astype(jnp.float32)
    if pooling == "none":
        return made
    # A sequence without valid tokens is all zeros and stays so.
    squared = jnp.sum(made**2, axis=-1, keepdims=True)
    return made * jnp.where(squared > 0, lax.rsqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


@struct.dataclass
class Output:
    """The last product: float32 outputs (..., V) of hidden states (..., D), times a matrix, plus a bias, bent."""

    matrix: Any
    """A weight (D, V) of any kind."""
    bias: jax.Array | None = None
    """(V,), or None."""
    soft_cap: float = struct.field(pytree_node=False, default=0.0)
    """Bound on the outputs, as in `ModelConfig.logit_soft_cap`; 0 is none."""

    def __call__(self, hidden: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The outputs of what the head made; the key is for a matrix whose arithmetic is random."""
        made = weights.contract(hidden, self.matrix, key).astype(jnp.float32)
        return soft_capped(made if self.bias is None else made + self.bias.astype(jnp.float32), self.soft_cap)

    def of(self, hidden: jax.Array, chosen: jax.Array) -> jax.Array:
        """The outputs (..., n) of chosen columns (int32, ..., n) alone, with the matrix that the weight means."""
        columns = jnp.take(weights.materialize(self.matrix).T, chosen, axis=0)
        made = jnp.einsum("...D,...nD->...n", hidden, columns.astype(hidden.dtype), preferred_element_type=jnp.float32)
        bias = 0.0 if self.bias is None else jnp.take(self.bias.astype(jnp.float32), chosen)
        return soft_capped(made + bias, self.soft_cap)
