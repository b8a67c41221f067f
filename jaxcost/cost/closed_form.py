"""Cost of a transformer from its shapes alone: parameters, FLOPs, bytes, and the chain to money, energy and carbon.

FLOPs are operations (a multiply-add is two) and *model* FLOPs unless a name says hardware: what the mathematics asks
for, without recomputation. D is the width, L the layers, H and K the query and key-value heads, h a head's size, F
the MLP's width, V the vocabulary, S the sequence, B the batch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxcost.cost import hardware as hardware_lib
from jaxcost.cost import roofline
from jaxcost.cost.parameters import (
    answers_per_sequence,
    convolution_entries,
    head_matrices,
    mlp_matrices,
    own_counts,
    parameter_counts,
    source_projections,
)
from jaxcost.models import config as model_config

Attention = Literal["causal", "full"]
Remat = Literal["none", "full"]

_FLOPS_PER_PARAMETER = 2
"""A multiply and an add for each weight and token in the forward pass; the backward pass does both twice."""


def attention_flops_per_token(model: model_config.ModelConfig, sequence_tokens: int, attention: Attention) -> int:
    """Forward FLOPs of QKᵀ and of the weighted sum of values, for one token of a sequence: 4·H·h for each score.

    Full: all scores that plain attention makes, those that the mask hides too: S a layer, and 2·W in a local layer of
    window W, computed in blocks that see themselves and the one before, where that is less (3·W if the model is not
    causal: the one behind as well). Causal: those that are seen, S/2 on average, and W - W²/(2·S) with a window, twice
    that if the model is not causal. Grouped-query attention shrinks the cache and the projections, not these.

    Source: Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), appendix B, for the full form; counting, for the windows.
    """
    made = sum(_scores_per_sequence(model, kind, sequence_tokens, attention) for kind in model.layer_kinds)
    return int(4 * model.num_heads * model.head_dim * made / sequence_tokens)


def _scores_per_sequence(
    model: model_config.ModelConfig, kind: model_config.LayerKind, tokens: int, attention: Attention
) -> float:
    """Pairs of a query and a key in one layer; of those on the diagonal half are counted, as is usual."""
    window = min(model.window, tokens) if kind == "local" else tokens
    one_side = (2 * tokens - window) * window / 2
    if attention == "causal":
        return one_side if model.causal else 2 * one_side
    blocks = 2 if model.causal else 3
    if blocks * window >= tokens:
        return tokens**2
    return -(-tokens // window) * window * blocks * window


def frontend_rows(model: model_config.ModelConfig, sequence_tokens: int) -> dict[str, float]:
    """Path of each kernel that makes tokens of an image or of audio, from the first on → rows that it is multiplied
    with for a sequence of so many; none for a model of tokens.

    Of audio they are the frames that each convolution makes of the shortest one that gives so many, and the convolution
    of positions has a part of a row for each time of its kernel that meets a frame and no zero.
    """
    images, audio = model.images, model.audio
    if model.of_tokens:
        return {}
    if images.patch:
        return {"images/patches": images.patches}
    made = audio.layer_frames(audio.length(sequence_tokens))
    rows = {f"audio/convolution_{i}": frames for i, frames in enumerate(made)}
    if audio.projection != "none":
        rows["audio/projection"] = sequence_tokens
    if audio.position_kernel:
        times = audio.position_kernel
        met = sum(max(0, sequence_tokens - abs(i - times // 2)) for i in range(times))
        rows["audio/positions"] = met / times
    return rows


def _frontend_flops(model: model_config.ModelConfig, sequence_tokens: int) -> list[float]:
    """Forward FLOPs of each product that makes tokens of an image or of audio, for a sequence."""
    rows = frontend_rows(model, sequence_tokens)
    images, audio = model.images, model.audio
    entries = {f"audio/convolution_{i}": count for i, count in enumerate(convolution_entries(audio))}
    entries["images/patches"] = images.patch**2 * images.channels * model.width
    entries["audio/projection"] = (audio.widths or (0,))[-1] * model.width
    entries["audio/positions"] = model.width**2 // audio.position_groups * audio.position_kernel
    return [_FLOPS_PER_PARAMETER * count * entries[path] for path, count in rows.items()]


def forward_flops_per_token(
    model: model_config.ModelConfig, sequence_tokens: int, attention: Attention = "causal"
) -> int:
    """Model FLOPs of a forward pass for one token: 2 · matmul parameters + attention, and its share of what makes
    tokens of an image or of audio.

    The unembedding counts, the embedding's look-up does not; a head that answers for fewer than all tokens is shared
    out over them. With an encoder, a token attends to a source of model.source.max_length tokens, 4·L·H·h FLOPs each,
    and bears its share of `source_flops`. Source: Kaplan et al. 2020 (arXiv:2001.08361), section 2.1, with the
    unembedding added and attention in the named convention.
    """
    matmul = _FLOPS_PER_PARAMETER * parameter_counts(model).matmul
    own = matmul + attention_flops_per_token(model, sequence_tokens, attention)
    own += round(_few_answers_flops(model, sequence_tokens) / sequence_tokens)
    if not model.encoder.num_layers:
        return own + round(sum(_frontend_flops(model, sequence_tokens)) / sequence_tokens)
    return own + cross_attention_flops_per_token(model) + source_flops(model, attention) // sequence_tokens


def _few_answers_flops(model: model_config.ModelConfig, sequence_tokens: int) -> int:
    """Forward FLOPs a sequence of a head that answers for fewer than all of its tokens."""
    answers = answers_per_sequence(model, sequence_tokens)
    return 0 if answers == sequence_tokens else _FLOPS_PER_PARAMETER * answers * head_matrices(model)


def cross_attention_flops_per_token(model: model_config.ModelConfig) -> int:
    """Forward FLOPs of attending from one token to a source of model.source.max_length tokens: 4·L·H·h·S."""
    return 4 * model.num_layers * model.num_heads * model.head_dim * model.source.max_length


def source_flops(model: model_config.ModelConfig, attention: Attention = "causal") -> int:
    """Model FLOPs of reading one source of model.source.max_length tokens: the encoder, and each layer's keys and
    values of its states."""
    source = model.source
    matrices = _FLOPS_PER_PARAMETER * (own_counts(source).matmul + source_projections(model))
    scores = attention_flops_per_token(source, source.max_length, attention)
    return source.max_length * (matrices + scores) + round(sum(_frontend_flops(source, source.max_length)))


def training_flops_per_token(
    model: model_config.ModelConfig, sequence_tokens: int, attention: Attention = "causal"
) -> int:
    """Model FLOPs of training on one token: three forward passes' worth.

    6 · matmul parameters + 6·L·S·H·h if causal, + 12·L·S·H·h if full. Source: as `forward_flops_per_token`; the
    backward pass multiplies each weight twice, for the input's gradient and for the weight's. Nobody asks for the
    gradient of an image or of audio.
    """
    inputs = round(next(iter(_frontend_flops(model, sequence_tokens)), 0) / sequence_tokens)
    return 3 * forward_flops_per_token(model, sequence_tokens, attention) - inputs


def hardware_training_flops_per_token_bound(
    model: model_config.ModelConfig, sequence_tokens: int, remat: Remat, attention: Attention = "causal"
) -> int:
    """Upper bound on the hardware FLOPs of training on one token when activations are recomputed.

    Full rematerialisation adds a forward pass of the layers, 8/6 of the model FLOPs of the layers at most; the
    unembedding is outside them. A compiler drops what the backward pass does not need, so it does less. Source:
    Chen et al. 2016 (arXiv:1604.06174) for one extra forward pass.
    """
    training = training_flops_per_token(model, sequence_tokens, attention)
    if remat == "none":
        return training
    unembedding = _FLOPS_PER_PARAMETER * model.vocab_size * model.width
    return training + forward_flops_per_token(model, sequence_tokens, attention) - unembedding


def adapter_training_flops_per_token(
    model: model_config.ModelConfig,
    sequence_tokens: int,
    adapter_parameters: int,
    trained_layers: int | None = None,
    attention: Attention = "causal",
) -> int:
    """Model FLOPs of training on one token when the base is frozen and only adapters learn.

    A frozen weight skips its own gradient: 4 instead of 6 FLOPs a parameter. The backward pass stops at the lowest
    layer that has an adapter; layers below cost their forward pass only, 2 a parameter. Adapters cost 6 a parameter.
    It holds where the adapter is applied to the activations: `W + AB` materialised costs a full fine-tune.

    Source: the count of multiplications above; Hu et al. 2021 (arXiv:2106.09685) for the adapter.

    Args:
        model: the frozen model.
        sequence_tokens: tokens of a sequence.
        adapter_parameters: trainable parameters of all adapters.
        trained_layers: layers from the top that carry adapters; all of them if None.
        attention: convention for attention's FLOPs.

    Raises:
        ValueError: more trained layers than the model has.
    """
    trained_layers = model.num_layers if trained_layers is None else trained_layers
    if not 0 <= trained_layers <= model.num_layers:
        raise ValueError(f"trained_layers is {trained_layers}; the model has {model.num_layers} layers.")
    forward = forward_flops_per_token(model, sequence_tokens, attention)
    unembedding = _FLOPS_PER_PARAMETER * model.vocab_size * model.width
    frontend = round(sum(_frontend_flops(model, sequence_tokens)) / sequence_tokens)
    forward_of_layers = forward - unembedding - frontend
    attention_flops = attention_flops_per_token(model, sequence_tokens, attention)
    # Attention has no weight to freeze: both of its factors get gradients, twice its forward FLOPs.
    backward_of_layers = (forward_of_layers + attention_flops) * trained_layers // model.num_layers
    backward = backward_of_layers + unembedding if trained_layers else 0
    return forward + backward + 3 * _FLOPS_PER_PARAMETER * adapter_parameters


def kv_cache_bytes(
    model: model_config.ModelConfig,
    batch: int,
    sequence_tokens: int,
    bytes_per_element: float = 2,
    scale_bytes: float = 0,
) -> int:
    """Bytes of the keys and values of `batch` sequences: 2·L·K·(h·bytes + scale)·S·B; local layers keep all as well.

    With an encoder, those of a source of model.source.max_length tokens come on top.

    `scale_bytes` are those beside the elements of each head's key or value: 4 for a quantised cache's float32 scale.

    Source: Pope et al. 2022 (arXiv:2211.05102), with key-value heads in place of heads.
    """
    tokens = sequence_tokens + (model.source.max_length if model.encoder.num_layers else 0)
    vectors = 2 * model.num_layers * model.num_kv_heads * tokens * batch
    return math.ceil(vectors * (model.head_dim * bytes_per_element + scale_bytes))


def storage_bytes(parameters: int, bits_per_parameter: float, block: int | None = None, scale_bits: int = 32) -> int:
    """Bytes of `parameters` on disk or in memory, with one scale of `scale_bits` for each `block` of them if given."""
    scales = math.ceil(parameters / block) if block else 0
    return math.ceil((parameters * bits_per_parameter + scales * scale_bits) / 8)


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training or serving holds over all devices, by category."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    """Estimated: what the backward pass keeps; the compiled program knows better."""
    kv_cache_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All categories together."""
        return sum(dataclasses.astuple(self))


def training_memory(
    model: model_config.ModelConfig,
    batch: int,
    sequence_tokens: int,
    *,
    trainable_parameters: int | None = None,
    bytes_per_weight: float = 4,
    bytes_per_gradient: float = 4,
    optimizer_bytes_per_parameter: float = 8,
    bytes_per_activation: float = 2,
    remat: Remat = "none",
    stored_attention_matrix: bool = True,
) -> MemoryEstimate:
    """Memory of a training step over all devices, for a state that is sharded without copies.

    Args:
        model: the model.
        batch: sequences a step.
        sequence_tokens: tokens of a sequence.
        trainable_parameters: those with gradients and optimizer state; all if None. Parameters beyond the model's
            (adapters) are not added to the weights.
        bytes_per_weight: 4 for f32 weights.
        bytes_per_gradient: 4 for f32 gradients.
        optimizer_bytes_per_parameter: 8 for Adam's two f32 moments, 4 for momentum, 0 for plain SGD.
        bytes_per_activation: 2 for bf16 activations.
        remat: `full` keeps one residual a layer and one layer's activations.
        stored_attention_matrix: whether the S x S weights are kept; not with fused attention.
    """
    parameters = parameter_counts(model).total
    trainable = parameters if trainable_parameters is None else trainable_parameters
    tokens = batch * sequence_tokens
    per_layer = activation_elements_per_token(model, sequence_tokens, stored_attention_matrix)
    kept = tokens * {"none": model.num_layers * per_layer, "full": model.num_layers * model.width + per_layer}[remat]
    if model.encoder.num_layers:
        source = model.source
        per_layer = activation_elements_per_token(source, source.max_length, stored_attention_matrix)
        keys = 2 * model.num_layers * model.num_kv_heads * model.head_dim
        read = {"none": source.num_layers * per_layer + keys, "full": source.num_layers * source.width + per_layer}
        kept += batch * source.max_length * read[remat]
    return MemoryEstimate(
        weights_bytes=math.ceil(parameters * bytes_per_weight),
        gradients_bytes=math.ceil(trainable * bytes_per_gradient),
        optimizer_bytes=math.ceil(trainable * optimizer_bytes_per_parameter),
        activations_bytes=math.ceil(kept * bytes_per_activation + batch * _logits_bytes(model, sequence_tokens)),
    )


def _logits_bytes(model: model_config.ModelConfig, sequence_tokens: int) -> int:
    """The loss keeps f32 logits and their gradient, of each answer that the head gives of a sequence."""
    outputs = model.vocab_size if model.head.of_vocabulary else model.head.outputs
    return 2 * 4 * answers_per_sequence(model, sequence_tokens) * outputs


def activation_elements_per_token(
    model: model_config.ModelConfig, sequence_tokens: int, stored_attention_matrix: bool = True
) -> int:
    """Elements that one layer keeps for the backward pass of one token.

    Inputs and outputs of both norms (4·D), query, key, value and attention output ((2·H + 2·K)·h), scores and
    weights of attention if stored (2·H·S, on average over local and global layers), and the MLP's inner tensors (4·F
    gated, 2·F plain), those of experts for each that a token meets, with their input and output (2·D). With an encoder,
    another norm, query and attention output, and the scores and weights over the source. Source: the
    counting of Korthikanti et al. 2022 (arXiv:2205.05198), section 4, for this block, without dropout.
    """
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    scores = sum(_scores_per_sequence(model, kind, sequence_tokens, "full") for kind in model.layer_kinds)
    scores_per_token = scores / (sequence_tokens * model.num_layers)
    matrix = round(2 * model.num_heads * scores_per_token) if stored_attention_matrix else 0
    inner = 4 if model.gated else 2
    mlp = inner * model.mlp_width
    if model.experts:
        mlp = model.experts_per_token * (mlp + 2 * model.width) + inner * model.shared_width
    cross = 0
    if model.encoder.num_layers:
        cross = 2 * model.width + 2 * model.num_heads * model.head_dim
        cross += 2 * model.num_heads * model.source.max_length if stored_attention_matrix else 0
    return 4 * model.width + heads + matrix + mlp + cross


def decode_step_bound(
    model: model_config.ModelConfig,
    chip: hardware_lib.Chip,
    batch: int,
    cached_tokens: int,
    *,
    num_chips: int = 1,
    bytes_per_weight: float = 2,
    bytes_per_cache_element: float = 2,
    cache_scale_bytes: float = 0,
    operand_type: str = "bf16",
) -> roofline.Bound:
    """Lower bound on the seconds of one decode step, which makes `batch` tokens.

    max((matmul weights + cache) / bandwidth, FLOPs / peak), spread evenly over the chips, links free. Local layers
    read and multiply their window alone. Of E experts those are read that any token of the batch was sent to,
    E·(1 - (1 - k/E)^B) where the router sends evenly. Source: Pope et al. 2022 (arXiv:2211.05102), section 2.

    Args:
        model: the model.
        chip: figures of one chip.
        batch: sequences decoded together.
        cached_tokens: tokens that each sequence's cache holds.
        num_chips: chips that share the weights and the cache.
        bytes_per_weight: 2 for bf16 weights, 1 for int8, 0.5 for int4.
        bytes_per_cache_element: 2 for a bf16 cache, 1 for an int8 one.
        cache_scale_bytes: beside the elements of each head's key or value, 4 for an int8 cache.
        operand_type: type whose peak the matmuls run at.
    """
    seen = sum(min(model.window, cached_tokens) if kind == "local" else cached_tokens for kind in model.layer_kinds)
    matmul = parameter_counts(model).matmul
    flops = batch * (_FLOPS_PER_PARAMETER * matmul + 4 * model.num_heads * model.head_dim * seen)
    weights = (matmul + _further_experts(model, batch)) * bytes_per_weight
    cache = 2 * model.num_kv_heads * (model.head_dim * bytes_per_cache_element + cache_scale_bytes) * seen * batch
    devices = num_chips * chip.devices_per_chip
    return roofline.lower_bound(chip, {operand_type: flops / devices}, (weights + cache) / devices)


def _further_experts(model: model_config.ModelConfig, batch: int) -> float:
    """Parameters of the experts that a batch of tokens meets on average, beyond those of one token."""
    if not model.experts:
        return 0
    met = model.experts * (1 - (1 - model.experts_per_token / model.experts) ** batch)
    one = mlp_matrices(model) * model.width * model.mlp_width
    return model.num_layers * (met - model.experts_per_token) * one


@dataclasses.dataclass(frozen=True)
class Cost:
    """A stretch of work on some hardware; None where a figure of the hardware is unknown."""

    seconds: float
    chip_hours: float
    usd: float | None
    kwh: float | None
    kg_co2: float | None


def cost_of_seconds(seconds: float, hardware: hardware_lib.Hardware) -> Cost:
    """Seconds on all chips to chip-hours, to money (x price), to energy (x W x PUE), to carbon (x grid intensity)."""
    kwh = hardware.kwh(seconds)
    return Cost(seconds, hardware.chip_hours(seconds), hardware.usd(seconds), kwh, hardware.kg_co2(kwh))


def cost_of_flops(
    flops: float, hardware: hardware_lib.Hardware, operand_type: str = "bf16", utilization: float = 1.0
) -> Cost | None:
    """Cost of `flops` of work at a share of the chips' peak; a lower bound at a utilization of 1.

    The work is fixed: more chips divide its time and leave its chip-hours, price and energy as they are.

    Args:
        flops: operations over all chips.
        hardware: the chips.
        operand_type: type whose peak counts.
        utilization: share of the peak that the run reaches, between 0 and 1.

    Returns:
        The cost, or None if the chip's peak is unknown.

    Raises:
        ValueError: the utilization is not in (0, 1].
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization is {utilization}; it must be above 0 and at most 1.")
    peak = hardware.chip.peak(operand_type)
    if peak is None:
        return None
    return cost_of_seconds(flops / (peak * hardware.num_chips * utilization), hardware)
