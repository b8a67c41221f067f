"""Parameters of a transformer from its shapes alone, and which of them a token meets.

D is the width, L the layers, H and K the query and key-value heads, h a head's size, F the MLP's width, V the
vocabulary, S the longest sequence.
"""

from __future__ import annotations

import dataclasses
import math

from jaxcost.models import config as model_config


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model."""

    by_part: dict[str, int]
    """`embedding` (with that of token types, or what images or audio meet in its place), `positions`, `attention` (also
    to a source), `mlp` (of experts those that all tokens share), `experts`, `router`, `biases`, `norms`, `head` (its
    further layers), `unembedding` (or the head's outputs); a tied one counts 0 here. An encoder's are among them."""
    matmul: int
    """Parameters that every token is multiplied with: attention, the MLP or a token's own experts, the router and the
    head with the unembedding, tied or not, unless it answers for fewer than all. Those that meet a source alone are not
    among them."""

    @property
    def total(self) -> int:
        """All parameters, a tied table once."""
        return sum(self.by_part.values())


def parameter_counts(model: model_config.ModelConfig) -> ParameterCounts:
    """Counts a model's parameters.

    Per layer: D·H·h for the query, 2·D·K·h for key and value, H·h·D for the output, 3·D·F for a gated MLP (2·D·F for
    a plain one) or for each of E experts, D·E for their router, and two norms of D scales (and D biases if LayerNorm),
    four where a block has norms on both sides; besides them V·D for the embedding, V·D for an untied unembedding, a
    final norm, and S·D for learned positions, L times that if they stand behind layers too, or a number a bucket and
    head for relative ones. Biases and norms of queries and keys come on top. With an encoder, its own, and each layer
    has attention and the norms of it twice.

    Raises:
        ValueError: the vocabulary's size is still 0.
    """
    if model.vocab_size == 0 and model.of_tokens:
        raise ValueError("model.vocab_size is 0; set it to the tokenizer's size before counting parameters.")
    counts = own_counts(model)
    if not model.encoder.num_layers:
        return counts
    encoder = own_counts(model.source).by_part
    return ParameterCounts({part: n + encoder[part] for part, n in counts.by_part.items()}, counts.matmul)


def own_counts(model: model_config.ModelConfig) -> ParameterCounts:
    """Without an encoder's own."""
    table, layers = model.vocab_size * model.width, model.num_layers
    outputs = _outputs(model)
    attention = layers * _attention_parameters_per_layer(model)
    cross = layers * _attention_parameters_per_layer(model) if model.encoder.num_layers else 0
    one = layers * mlp_matrices(model) * model.width * model.mlp_width
    shared = layers * mlp_matrices(model) * model.width * model.shared_width
    mlp, expert = (shared, one) if model.experts else (one, 0)
    router = layers * model.width * model.experts
    by_part = {
        "embedding": table + model.token_types * model.width + _image_parameters(model) + _audio_parameters(model),
        "positions": _position_parameters(model),
        "attention": attention + cross,
        "mlp": mlp,
        "experts": model.experts * expert,
        "router": router,
        "biases": layers * _biases_per_layer(model) + _head_biases(model),
        "norms": _norm_parameters(model),
        "head": _further_matrices(model),
        "unembedding": 0 if model.tie_embeddings else outputs * _head_width(model),
    }
    active = mlp + model.experts_per_token * expert
    met = attention + cross - source_projections(model) + active + router
    every = model.head.pooling == "none" and not model.head.boxes
    return ParameterCounts(by_part, matmul=met + (head_matrices(model) if every else 0))


def answers_per_sequence(model: model_config.ModelConfig, sequence_tokens: int) -> int:
    """Tokens of a sequence that the head answers for: one where it pools, or an image's detection tokens, or all."""
    if model.head.boxes:
        return model.images.detection_tokens
    return sequence_tokens if model.head.pooling == "none" else 1


def _position_parameters(model: model_config.ModelConfig) -> int:
    if model.position == "relative":
        return model.relative_buckets * model.num_heads
    tables = (model.num_layers if model.layer_positions else 1) if model.position == "learned" else 0
    return tables * (model.max_length + model.position_offset) * model.width


def source_projections(model: model_config.ModelConfig) -> int:
    """Parameters that make keys and values of a source in all layers."""
    if not model.encoder.num_layers:
        return 0
    return 2 * model.num_layers * model.width * model.num_kv_heads * model.head_dim


def mlp_matrices(model: model_config.ModelConfig) -> int:
    return 3 if model.gated else 2


def _attention_parameters_per_layer(model: model_config.ModelConfig) -> int:
    return 2 * model.width * model.head_dim * (model.num_heads + model.num_kv_heads)


def _biases_per_layer(model: model_config.ModelConfig) -> int:
    kv = (1 + model.key_bias) * model.num_kv_heads
    qkv = (model.num_heads + kv) * model.head_dim * model.qkv_bias
    mlp = ((mlp_matrices(model) - 1) * model.mlp_width + model.width) * model.mlp_bias
    attentions = 2 if model.encoder.num_layers else 1
    return attentions * (qkv + model.width * model.output_bias) + mlp


def _head_biases(model: model_config.ModelConfig) -> int:
    head = model.head
    hidden = _further_layers(model) * _head_width(model) if head.hidden_bias else 0
    return hidden + (_outputs(model) if head.bias else 0)


def head_matrices(model: model_config.ModelConfig) -> int:
    return _further_matrices(model) + _outputs(model) * _head_width(model)


def _outputs(model: model_config.ModelConfig) -> int:
    """Numbers of an answer, with the four of a box."""
    return model.vocab_size if model.head.of_vocabulary else model.head.outputs + 4 * model.head.boxes


def _further_layers(model: model_config.ModelConfig) -> int:
    """Those before the outputs, and as many before the boxes."""
    head = model.head
    return head.hidden_layers * (1 + head.boxes) if head.hidden != "none" else 0


def _further_matrices(model: model_config.ModelConfig) -> int:
    """Entries of the further layers' matrices, of which the first of each row meets the hidden states."""
    layers, width = _further_layers(model), _head_width(model)
    first = min(layers, 1 + model.head.boxes)
    return first * model.width * width + (layers - first) * width**2


def _head_width(model: model_config.ModelConfig) -> int:
    """Numbers that the head's output meets."""
    return model.head.hidden_width or model.width


def _image_parameters(model: model_config.ModelConfig) -> int:
    images = model.images
    vectors = images.patch**2 * images.channels + 1 + images.class_tokens + images.detection_tokens
    return 0 if model.of_tokens or not images.patch else vectors * model.width


def _audio_parameters(model: model_config.ModelConfig) -> int:
    audio = model.audio
    if model.of_tokens or not audio.channels:
        return 0
    last, times = audio.widths[-1], audio.position_kernel
    matrices = sum(convolution_entries(audio))
    biases = sum(audio.widths) if audio.bias else 0
    norms = 2 * {"none": 0, "first": audio.widths[0], "each": sum(audio.widths)}[audio.norm]
    projection = (last + 1) * model.width if audio.projection != "none" else 0
    projection += last * _norm_vectors(model) if audio.projection == "normed" else 0
    positions = model.width**2 // audio.position_groups * times + times + model.width if times else 0
    return matrices + biases + norms + projection + positions


def convolution_entries(audio: model_config.AudioConfig) -> list[int]:
    """Entries of each convolution's kernel."""
    return [
        math.prod(sizes) for sizes in zip((audio.channels, *audio.widths), audio.kernels, audio.widths, strict=False)
    ]


def _norm_vectors(model: model_config.ModelConfig) -> int:
    return 2 if model.norm == "layer" and model.norm_bias else 1


def _norm_parameters(model: model_config.ModelConfig) -> int:
    blocks = (3 if model.encoder.num_layers else 2) * (2 if model.norm_placement == "both" else 1)
    heads = {"none": 0, "head": 2, "projection": model.num_heads + model.num_kv_heads}[model.query_key_norm]
    per_layer = blocks * model.width + heads * model.head_dim
    single = (model.norm_placement != "sum") + model.embedding_norm
    head = _head_width(model) * model.head.hidden_norm
    return (model.num_layers * per_layer + single * model.width + head) * _norm_vectors(model)
