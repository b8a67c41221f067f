"""The frozen description of a transformer: everything that fixes its shapes and arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer."""

    vocab_size: int = 512
    """Rows of the embedding table; 0 takes the tokenizer's size, rounded up to a multiple of 128."""
    width: int = 256
    """Size of the residual stream (D)."""
    num_layers: int = 4
    """Blocks, stacked along the leading `layers` axis of every block parameter (L)."""
    num_heads: int = 4
    """Query heads (H)."""
    num_kv_heads: int = 4
    """Key and value heads; fewer than `num_heads` is grouped-query attention (K)."""
    head_dim: int = 64
    """Size of one head (h)."""
    mlp_width: int = 768
    """Hidden size of the feed-forward block (F)."""
    gated: bool = True
    """Gated MLP (act(x·gate) * x·up, three matrices) instead of a plain one (two matrices)."""
    activation: Literal["silu", "gelu", "relu"] = "silu"
    """Non-linearity of the MLP; gelu is the tanh approximation."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (a scale) or LayerNorm (a scale and a bias)."""
    norm_epsilon: float = 1e-6
    """Added to the variance in the norm."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary positions, or a learned table of `max_length` rows."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    max_length: int = 256
    """Longest sequence in tokens (rows of a learned position table; bound on prompt + output)."""
    tie_embeddings: bool = False
    """Unembed with the embedding table transposed instead of a matrix of its own."""

    def __post_init__(self):
        for field in ("width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "max_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} is {getattr(self, field)}; it must be at least 1.")
        if self.vocab_size < 0:
            raise ValueError(
                f"model.vocab_size is {self.vocab_size}; use 0 for the tokenizer's size or a positive number."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads ({self.num_kv_heads})."
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"model.head_dim ({self.head_dim}) must be even for rotary positions.")
