"""The frozen description of a transformer: everything that fixes its shapes and arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxcost.models.parts import AudioConfig, EncoderConfig, HeadConfig, ImageConfig, RopeScaling, check_kinds

LayerKind = Literal["global", "local"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A transformer: a decoder, an encoder if it is not causal, or a decoder of what an encoder of its own reads."""

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
    activation: Literal["silu", "gelu", "gelu_exact", "relu"] = "silu"
    """Non-linearity of the MLP; gelu is the tanh approximation."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (a scale) or LayerNorm (a scale and a bias)."""
    norm_bias: bool = True
    """LayerNorm has its bias."""
    norm_epsilon: float = 1e-6
    """Added to the variance in the norm."""
    position: Literal["rope", "learned", "relative", "none"] = "rope"
    """Rotary positions, a learned table of `max_length` rows, or a learned number for each head and distance that is
    added to the scores of attention; or none but those that `audio` tells."""
    relative_buckets: int = 32
    """Numbers of relative positions for each head: half of them for one distance each, the rest for ever wider ranges,
    and half of all for either side where the model is not causal."""
    relative_distance: int = 128
    """Tokens from which on all relative positions are one."""
    position_offset: int = 0
    """Rows of the learned table before the one of the first token, which no token meets."""
    layer_positions: bool = False
    """Behind every layer but the last, positions of a learned table of its own are added too."""
    token_types: int = 0
    """Kinds of tokens, such as those of a first and of a second sentence, each with a learned vector; 0 is one kind
    without a vector."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    max_length: int = 256
    """Longest sequence in tokens (rows of a learned position table; bound on prompt + output)."""
    tie_embeddings: bool = False
    """Unembed with the embedding table transposed instead of a matrix of its own."""

    # ---- Attention ----
    causal: bool = True
    """A token sees itself and what came before it; off, it sees the whole sequence, as in an encoder."""
    pattern: tuple[LayerKind, ...] = ("global",)
    """Kinds of the layers from the first on, repeated to the last: what each token of a layer sees."""
    window: int = 0
    """Tokens that a token of a local layer sees, itself included, and as many on the other side if it is not causal; 0
    where no layer is local."""
    attention_scale: float = 0.0
    """Factor of the attention scores; 0 is head_dim**-0.5."""
    attention_soft_cap: float = 0.0
    """Scores are bent to stay within ± this, c·tanh(score / c); 0 leaves them."""
    query_key_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm of queries and keys before they are rotated: of each head, or of the whole projection."""
    qkv_bias: bool = False
    """Biases in the projections to queries, keys and values."""
    key_bias: bool = True
    """With `qkv_bias`, the projection to keys has one too."""
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
    norm_placement: Literal["pre", "post", "both", "sum", "stream"] = "pre"
    """Norms on what goes into attention and MLP, on what comes out of them, on both, or of the sum of that and the
    stream, of which the last is the final norm; or of the stream itself, to which they are then added: queries are of
    the normed stream, keys and values of what it was before, as in SASRec."""
    embedding_norm: bool = False
    """A norm of the embeddings, before the first block."""
    first_norm: bool = True
    """The first block norms what goes into its attention; off where the norm of the embeddings does for it."""
    norm_unit_offset: bool = False
    """RMSNorm multiplies by 1 + scale, and scales start at 0."""
    scale_embeddings: bool = False
    """Multiply embeddings by width**0.5."""
    scale_outputs: bool = False
    """Multiply the last hidden states by width**-0.5."""
    logit_soft_cap: float = 0.0
    """Logits are bent to stay within ± this; 0 leaves them."""

    # ---- Input and output ----
    encoder: EncoderConfig = EncoderConfig()
    """The encoder of what the model answers to; none by default."""
    images: ImageConfig = ImageConfig()
    """Images in the place of tokens; none by default."""
    audio: AudioConfig = AudioConfig()
    """Audio in the place of tokens; none by default."""
    head: HeadConfig = HeadConfig()
    """What is made of the hidden states."""

    def __post_init__(self):
        check_kinds(self, "model")
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
        if not self.rope_theta > 0:
            raise ValueError(f"model.rope_theta is {self.rope_theta}; it must be above 0.")
        if not self.norm_epsilon >= 0:
            raise ValueError(f"model.norm_epsilon is {self.norm_epsilon}; it cannot be negative.")
        if ("local" in self.pattern) != (self.window > 0):
            raise ValueError(
                f"model.window is {self.window} and model.pattern is {' '.join(self.pattern) or 'empty'}; local layers "
                "need a window, and a window needs local layers."
            )
        if not self.pattern:
            raise ValueError("model.pattern is empty; name at least one kind of layer.")
        for field in ("position_offset", "token_types"):
            if getattr(self, field) < 0:
                raise ValueError(f"model.{field} is {getattr(self, field)}; it cannot be negative.")
        if not (self.first_norm or (self.embedding_norm and self.norm_placement in ("pre", "both"))):
            raise ValueError(
                "model.first_norm is off, which needs model.embedding_norm and norms on what goes into attention."
            )
        if self.position_offset and self.position != "learned":
            raise ValueError("model.position_offset is for learned positions; set it to 0.")
        if self.tie_embeddings and not self.head.of_vocabulary:
            raise ValueError("model.tie_embeddings is on, but what model.head gives is no vocabulary; turn it off.")
        if self.head.boxes and (self.of_tokens or not self.images.detection_tokens):
            raise ValueError("model.head.boxes is on, which needs model.images with detection_tokens.")
        if self.layer_positions and self.position != "learned":
            raise ValueError("model.layer_positions is for learned positions; turn it off.")
        if self.position == "relative":
            self._check_relative()
        if not self.of_tokens:
            self._check_input()
        if self.encoder.num_layers:
            self._check_encoder()
        self._check_experts()

    def _check_relative(self):
        sides = 1 if self.causal and not self.encoder.num_layers else 2
        if self.relative_buckets < 2 * sides or self.relative_buckets % (2 * sides):
            raise ValueError(
                f"model.relative_buckets is {self.relative_buckets}; it must be a positive multiple of {2 * sides}."
            )
        if self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"model.relative_distance is {self.relative_distance}; it must be above half of "
                f"model.relative_buckets ({self.relative_buckets})."
            )
        if self.window or self.attention_soft_cap:
            raise ValueError("model.position is 'relative', which knows no windows and no soft cap; set both to 0.")

    def _check_encoder(self):
        if not self.causal:
            raise ValueError(
                "model.encoder is on, which only a causal decoder has; turn model.causal on or leave it out."
            )
        if self.experts:
            raise ValueError("model.encoder and model.experts are both on; a model has one of them, so leave one out.")
        if self.token_types or self.window:
            raise ValueError("model.encoder is on, which knows no windows and no token types; set both to 0.")
        if self.vocab_size and self.encoder.start >= self.vocab_size:
            raise ValueError(
                f"model.encoder.start is {self.encoder.start}; it must be a token, below model.vocab_size "
                f"({self.vocab_size})."
            )
        # Whatever the encoder cannot be is said now.
        _ = self.source

    def _check_input(self):
        name = "images" if self.images.patch else "audio"
        if self.vocab_size or self.head.of_vocabulary:
            raise ValueError(
                f"model.{name} is on, which leaves no vocabulary; set model.vocab_size to 0 and model.head.outputs or "
                "model.head.embed."
            )
        if self.images.tokens > self.max_length:
            raise ValueError(
                f"An image makes {self.images.tokens} tokens, more than model.max_length ({self.max_length}); raise it."
            )
        audio = self.audio
        if not audio.channels:
            return
        if self.images.patch:
            raise ValueError("model.images and model.audio are both on; turn one of them off.")
        if audio.projection == "none" and audio.widths[-1] != self.width:
            raise ValueError(
                f"model.audio.widths ends with {audio.widths[-1]}, which is not model.width ({self.width}); change it "
                "or set model.audio.projection."
            )
        if audio.position_kernel and self.width % audio.position_groups:
            raise ValueError(
                f"model.audio.position_groups ({audio.position_groups}) does not divide model.width ({self.width}); "
                "change either."
            )

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
    def generates(self) -> bool:
        """Whether the model gives logits of the next token."""
        return self.causal and self.head.of_vocabulary

    @property
    def of_tokens(self) -> bool:
        """Whether the model reads tokens, not images or audio, which an encoder may read for it."""
        return self.encoder.num_layers > 0 or not (self.images.patch or self.audio.channels)

    def row_tokens(self, sequence_length: int) -> int:
        """Tokens that a row of a batch is: of a text of that length, of an image, or frames of the longest audio."""
        if self.of_tokens:
            return sequence_length
        return self.images.tokens or self.max_length

    @property
    def language_model(self) -> bool:
        """Whether the model gives logits of the next token to a text alone."""
        return self.generates and not self.encoder.num_layers

    @property
    def source(self) -> ModelConfig:
        """The config of the encoder: a model of embeddings, images or audio that gives its hidden states."""
        e = self.encoder
        heads = e.num_heads or self.num_heads
        return dataclasses.replace(
            self,
            vocab_size=0,
            num_layers=e.num_layers,
            num_heads=heads,
            num_kv_heads=e.num_kv_heads or (e.num_heads or self.num_kv_heads),
            mlp_width=e.mlp_width or self.mlp_width,
            max_length=e.max_length or self.max_length,
            causal=False,
            tie_embeddings=False,
            # What stands in the place of tokens is not scaled.
            scale_embeddings=self.scale_embeddings and not (self.images.patch or self.audio.channels),
            scale_outputs=False,
            logit_soft_cap=0.0,
            encoder=EncoderConfig(),
            head=HeadConfig(embed=True),
        )

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
