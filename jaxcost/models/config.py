"""The frozen description of a transformer: everything that fixes its shapes and arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Literal

LayerKind = Literal["global", "local"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for sequences longer than those of the first training."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """`linear` divides every frequency by `factor`; `llama3` only the slow ones, with a ramp between."""
    factor: float = 1.0
    """What frequencies are divided by."""
    low_frequency_factor: float = 1.0
    """llama3: waves longer than original_length / this are divided by the whole factor."""
    high_frequency_factor: float = 4.0
    """llama3: waves shorter than original_length / this stay as they are."""
    original_length: int = 8192
    """llama3: tokens of a sequence in the first training."""

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"model.rope_scaling.factor is {self.factor}; it must be at least 1.")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"model.rope_scaling.high_frequency_factor ({self.high_frequency_factor}) must be above "
                f"low_frequency_factor ({self.low_frequency_factor})."
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer."""

    # ---- Shape ----
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
    """Hidden size of the feed-forward block, or of one expert (F)."""
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

    # ---- Attention ----
    pattern: tuple[LayerKind, ...] = ("global",)
    """Kinds of the layers from the first on, repeated to the last: what each token of a layer sees."""
    window: int = 0
    """Tokens that a token of a local layer sees, itself included; 0 where no layer is local."""
    attention_scale: float = 0.0
    """Factor of the attention scores; 0 is head_dim**-0.5."""
    attention_soft_cap: float = 0.0
    """Scores are bent to stay within ± this, c·tanh(score / c); 0 leaves them."""
    query_key_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm of queries and keys before they are rotated: of each head, or of the whole projection."""
    qkv_bias: bool = False
    """Biases in the projections to queries, keys and values."""
    output_bias: bool = False
    """A bias in the projection out of the attention."""
    local_rope_theta: float = 0.0
    """Base of the rotary frequencies of local layers, which are then not scaled; 0 is the same as for global ones."""
    rope_scaling: RopeScaling = RopeScaling()
    """Stretching of the rotary frequencies."""
    rotary_fraction: float = 1.0
    """Share of a head's size, from the front, that is rotated."""

    # ---- Feed-forward ----
    mlp_bias: bool = False
    """Biases in the matrices of the MLP."""
    experts: int = 0
    """Experts of every layer's MLP, of which each token meets a few (E); 0 is one MLP that all tokens meet."""
    experts_per_token: int = 2
    """Experts that a token is routed to."""
    capacity_factor: float = 0.0
    """Rows that each expert takes from a sequence while training, over those of an even load; what overflows skips the
    expert. 0 takes all (dropless)."""
    normalize_experts: bool = True
    """The weights of a token's experts sum to 1; otherwise they are those of a softmax over all experts."""
    shared_width: int = 0
    """Hidden size of a further MLP that all tokens meet beside their experts; 0 is none."""

    # ---- Residual stream ----
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Norms on what goes into attention and MLP, on what comes out of them, or on both."""
    norm_unit_offset: bool = False
    """RMSNorm multiplies by 1 + scale, and scales start at 0."""
    scale_embeddings: bool = False
    """Multiply embeddings by width**0.5."""
    logit_soft_cap: float = 0.0
    """Logits are bent to stay within ± this; 0 leaves them."""

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
        if not 0 < self.rotary_fraction <= 1:
            raise ValueError(f"model.rotary_fraction is {self.rotary_fraction}; it must be above 0 and at most 1.")
        if self.position == "rope" and self.rotary_dim % 2:
            raise ValueError(
                f"model.head_dim ({self.head_dim}) must be even for rotary positions, or its rotated part of "
                f"{self.rotary_dim} is."
            )
        for field in ("window", "attention_scale", "attention_soft_cap", "logit_soft_cap", "local_rope_theta"):
            if getattr(self, field) < 0:
                raise ValueError(f"model.{field} is {getattr(self, field)}; it cannot be negative.")
        if ("local" in self.pattern) != (self.window > 0):
            raise ValueError(
                f"model.window is {self.window} and model.pattern is {' '.join(self.pattern) or 'empty'}; local layers "
                "need a window, and a window needs local layers."
            )
        if not self.pattern:
            raise ValueError("model.pattern is empty; name at least one kind of layer.")
        self._check_experts()

    def _check_experts(self):
        for field in ("experts", "capacity_factor", "shared_width"):
            if getattr(self, field) < 0:
                raise ValueError(f"model.{field} is {getattr(self, field)}; it cannot be negative.")
        if not self.experts:
            if self.shared_width or self.capacity_factor:
                raise ValueError("model.shared_width and model.capacity_factor need experts; set model.experts.")
        elif not 0 < self.experts_per_token <= self.experts:
            raise ValueError(
                f"model.experts_per_token is {self.experts_per_token}; it must lie between 1 and model.experts "
                f"({self.experts})."
            )
        elif self.mlp_bias:
            raise ValueError("model.mlp_bias is on; experts have no biases, so turn it off.")

    @property
    def rotary_dim(self) -> int:
        """Leading entries of a head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    def groups(self, start: int, depth: int) -> list[tuple[int, tuple[LayerKind, ...]]]:
        """The scans that run `depth` layers from layer `start` on: how many groups, and the kinds of a group's layers.

        A group is the pattern once, so that a scan's body, compiled once, holds each kind of layer where it belongs;
        what the groups leave over is a last group of its own.
        """
        period = 1 if len(set(self.pattern)) == 1 else len(self.pattern)
        kinds = tuple(self.pattern[(start + i) % len(self.pattern)] for i in range(period))
        whole, rest = divmod(depth, period)
        return [(n, part) for n, part in ((whole, kinds), (1, kinds[:rest])) if n and part]
