"""A closed form for a step laid out on a slice: bytes of a device and seconds, roughly, which only rank layouts.

Its activations are those that the traced step keeps. What `search` compiles of the best corrects it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.config import Experiment
from jaxcost.cost import closed_form, hardware, links
from jaxcost.models import attention, context
from jaxcost.models.config import ModelConfig
from jaxcost.models.experts import KERNELS
from jaxcost.models.stacks import resized
from jaxcost.models.transformer import Transformer, abstract
from jaxcost.planning.steps import StepName, inputs_of
from jaxcost.sharding import MeshConfig, make_mesh
from jaxcost.transforms import chain

REMATS = ("none", "attention", "projections", "full")
_REACHED_PEAK, _EXPOSED = 0.55, 0.25
"""Shares of the peak that a step reaches and of its communication that is exposed; they rank, nothing more."""
_GATHERED_LAYERS = 2
_MEBI = 2**20


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the closed form needs to know of the transformed weights and of the traced step."""

    model: ModelConfig
    """What is left of the model."""
    weight_bytes: int
    trainable: int
    trainable_experts: int
    parameters: int
    kept_bytes: Mapping[str, float]
    """For each rematerialisation, bytes that the blocks keep for the backward pass of one token."""

    @property
    def experts(self) -> int:
        """Parameters of the experts, which the devices of an expert axis share instead of gathering them."""
        return closed_form.parameter_counts(self.model).by_part["experts"]


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
    """The devices that a step is laid out on."""

    chip: hardware.Chip
    devices: Sequence[Any]
    """Described or real, in any order."""
    step: StepName

    @functools.cached_property
    def network(self) -> links.Network:
        """What joins the devices, in their order."""
        return links.network_of(self.devices, self.chip)

    def peak(self, item: int) -> float:
        """FLOP/s of a device, or a guess that ranks as well where it is unknown."""
        peak = self.chip.peak("bf16" if item == 2 else "f32") or self.chip.peak("bf16") or 1e12
        return peak / self.chip.devices_per_chip

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a device's memory."""
        return (self.chip.hbm_bytes_per_second.value or 1e12) / self.chip.devices_per_chip

    def exchange_seconds(
        self,
        mesh: MeshConfig,
        gathered: float = 0,
        scattered: float = 0,
        experts_gathered: float = 0,
        experts_scattered: float = 0,
        dispatched: float = 0,
        collected: float = 0,
        reduced: float = 0,
        summed: float = 0,
        traded: float = 0,
        rotated: float = 0,
    ) -> float:
        """Seconds of a step's exchanges, without those over links of unknown bandwidth.

        Args:
            mesh: sizes of the mesh's axes.
            gathered: bytes of a device's shards of the weights that `fsdp`, `expert` and `context` gather.
            scattered: bytes of the gradients that `fsdp`, `expert` and `context` sum and scatter.
            experts_gathered: bytes of a device's shards of the experts, which `fsdp` and `context` alone gather.
            experts_scattered: bytes of the gradients of a device's experts.
            dispatched: bytes of the tokens that `expert` trades for rows of its experts, and of what comes back.
            collected: bytes of the tokens that a device gives to the dropless experts of all others.
            reduced: bytes of the gradients that `data` sums.
            summed: bytes of the activations that `tensor` sums.
            traded: bytes of the activations that `context` trades between tokens and heads.
            rotated: bytes of the keys, values and their gradients that `context` passes on round the ring.
        """
        return (
            gathered * self._seconds_a_byte("all-gather", mesh, "fsdp", "context", "expert")
            + scattered * self._seconds_a_byte("reduce-scatter", mesh, "fsdp", "context", "expert")
            + experts_gathered * self._seconds_a_byte("all-gather", mesh, "fsdp", "context")
            + experts_scattered * self._seconds_a_byte("reduce-scatter", mesh, "fsdp", "context")
            + dispatched * self._seconds_a_byte("all-to-all", mesh, "expert")
            + collected * self._seconds_a_byte("all-gather", mesh, "expert")
            + reduced * self._seconds_a_byte("all-reduce", mesh, "data")
            + summed * self._seconds_a_byte("all-reduce", mesh, "tensor")
            + traded * self._seconds_a_byte("all-to-all", mesh, "context")
            + rotated * self._seconds_a_byte("collective-permute", mesh, "context")
        )

    @functools.cache  # noqa: B019 - a slice lives as long as its search
    def _seconds_a_byte(self, kind: str, mesh: MeshConfig, *axes: str) -> float:
        sizes = dataclasses.asdict(mesh)
        if all(sizes[axis] == 1 for axis in axes):
            return 0.0
        first = self._arranged(mesh)[tuple(slice(None) if name in axes else 0 for name in sizes)].reshape(-1).tolist()
        collective = links.Collective(kind, _MEBI, tuple(first[:2] if kind == "collective-permute" else first), 1)
        return (links.exchange(collective, self.chip, self.network).seconds or 0.0) / _MEBI

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a slice lives as long as its search
    def _arranged(self, mesh: MeshConfig) -> np.ndarray:
        """The devices' numbers in the shape of a mesh."""
        numbers = {device: number for number, device in enumerate(self.devices)}
        return np.vectorize(numbers.__getitem__, otypes=[int])(make_mesh(mesh, list(self.devices)).devices)


def sizes_of(experiment: Experiment, vocab_size: int) -> Sizes:
    """Sizes of the transformed weights, and of what each rematerialisation keeps, from traces alone.

    ValueError for a model with an encoder, of which no layouts are ranked.
    """
    if experiment.model.encoder.num_layers:
        raise ValueError("model.encoder is on, and a search is over layouts of decoders; plan a mesh of your choice.")
    config = dataclasses.replace(experiment.model, vocab_size=vocab_size)
    transform = chain(*experiment.transforms)
    model = Transformer(config, experiment.execution)
    params = transform.abstract(abstract(model)[0])
    trainable, _ = weights.partition(params)
    leaves = jax.tree.leaves(params)
    kept = {
        remat: _kept_bytes(Transformer(config, _scanned(experiment, remat)), params, _length(experiment))
        for remat in REMATS
    }
    left = resized(config, params)
    return Sizes(
        model=left,
        weight_bytes=sum(weights.storage_bytes(a) for a in leaves),
        trainable=sum(a.size for a in trainable.values()),
        trainable_experts=sum(a.size for path, a in trainable.items() if KERNELS.search(path)) if left.experts else 0,
        parameters=closed_form.parameter_counts(left).total,
        kept_bytes=kept,
    )


def _length(experiment: Experiment) -> int:
    return experiment.model.row_tokens(experiment.data.sequence_length)


def _scanned(experiment: Experiment, remat: str):
    # A kernel that never stores the scores, as on the chips; which one is all the same to what it keeps.
    length, execution = _length(experiment), experiment.execution
    implementation = attention.resolve("auto", "tpu", length, experiment.model.head_dim, 16)
    return dataclasses.replace(execution, remat=remat, unroll="never", attention=implementation)


def _kept_bytes(model: Transformer, params: weights.Params, length: int) -> float:
    """Bytes that the forward pass keeps for the backward pass of one token, the weights themselves left out."""

    def residuals(rows: int) -> int:
        def backward(params):
            trainable, frozen = weights.partition(params)

            def hidden(trainable):
                read = inputs_of(model.config, rows, length)
                inputs, key = jnp.zeros(read.shape, read.dtype), jax.random.key(0)
                return model.apply({"params": weights.combine(params, trainable, frozen)}, inputs, key=key)[0]

            return jax.vjp(hidden, trainable)[1]

        return sum(weights.storage_bytes(a) for a in jax.tree.leaves(jax.eval_shape(backward, params)))

    return (residuals(2) - residuals(1)) / length


def training_form(experiment: Experiment, slice_: Slice, vocab_size: int, sizes: Sizes) -> tuple[float, float]:
    """Bytes of a device and seconds of a train step, roughly."""
    e, model = experiment, sizes.model
    shards = e.mesh.fsdp * e.mesh.context * e.mesh.expert
    ways = shards * e.mesh.tensor
    devices = ways * e.mesh.data
    length, width = _length(e), model.width
    tokens = e.data.batch_size * length / (e.mesh.data * shards)
    live = tokens / e.training.accumulation
    item = e.execution.dtype.itemsize

    kept, layer = sizes.kept_bytes[e.execution.remat], sizes.kept_bytes["none"] / model.num_layers
    logits = 2 * 4 * vocab_size / e.training.loss_chunks
    experts, common = sizes.experts, sizes.parameters - sizes.experts
    whole = (common + experts / e.mesh.expert) / e.mesh.tensor
    gathered = _GATHERED_LAYERS * whole / model.num_layers * item
    held = (sizes.weight_bytes + 12 * sizes.trainable) / ways + gathered
    accumulated = 4 * sizes.trainable / ways if e.training.accumulation > 1 else 0
    num_bytes = held + accumulated + live * (kept + layer + logits) / e.mesh.tensor

    again = {"none": 0.0, "projections": 0.1, "attention": 0.9, "full": 1.0}[e.execution.remat]
    model_flops = closed_form.training_flops_per_token(model, length)
    full_flops = closed_form.hardware_training_flops_per_token_bound(model, length, "full")
    repeated_loss = 2 * vocab_size * width if e.training.loss_chunks > 1 else 0
    flops = (model_flops + again * (full_flops - model_flops) + repeated_loss) * e.data.batch_size * length / devices
    frozen = 1 - sizes.trainable / max(sizes.trainable, sizes.parameters)
    flops *= 1 - frozen / 3

    passes, accumulation = 3 if e.execution.remat != "none" else 2, e.training.accumulation
    gradients = 2 if e.execution.gradients == "bfloat16" else 4
    repeated = passes * accumulation * item / ways
    trained = sizes.trainable / e.mesh.tensor
    trained_experts = sizes.trainable_experts / e.mesh.tensor
    exchanged = slice_.exchange_seconds(
        e.mesh,
        gathered=repeated * common,
        scattered=gradients * accumulation * (trained - trained_experts),
        experts_gathered=repeated * experts,
        experts_scattered=gradients * accumulation * trained_experts / e.mesh.expert,
        reduced=gradients * trained / shards,
        # Both projections out of a block, forwards and backwards, and forwards again where that is made again.
        summed=(4 + 2 * again) * model.num_layers * tokens * width * item,
        **_context_bytes(e, model, model.num_layers * tokens * item * (2 + again)),
        **_expert_bytes(e, model, model.num_layers * tokens * item * (2 + again), drops=True),
    )
    return num_bytes, flops / (slice_.peak(item) * _REACHED_PEAK) + _EXPOSED * exchanged


def _context_bytes(e: Experiment, model: ModelConfig, passed: float) -> dict[str, float]:
    """What attention exchanges over `context`, of `passed` bytes for each element of a token in all passes."""
    ways = e.mesh.context
    if ways == 1:
        return {}
    heads, kv_heads = model.num_heads / e.mesh.tensor, model.num_kv_heads / e.mesh.tensor
    if context.resolve(e.execution.context, int(heads), int(kv_heads), ways) == "ring":
        return {"rotated": 2 * kv_heads * model.head_dim * (ways - 1) * passed}
    return {"traded": 2 * (heads + math.lcm(int(kv_heads), ways)) * model.head_dim * passed}


def _expert_bytes(e: Experiment, model: ModelConfig, passed: float, drops: bool) -> dict[str, float]:
    """What tokens travel over `expert`, of `passed` bytes for each element of a token in all passes."""
    if e.mesh.expert == 1:
        return {}
    if model.capacity_factor and drops:
        return {"dispatched": 2 * model.capacity_factor * model.experts_per_token * model.width * passed}
    # Every device gets the tokens of all others, and its sums go back: twice an all-gather.
    return {"collected": 2 * model.width * passed}


def serving_form(experiment: Experiment, slice_: Slice, vocab_size: int, sizes: Sizes) -> tuple[float, float]:
    """Bytes of a device and seconds of a prefill or a decode step, roughly."""
    e, model = experiment, sizes.model
    shards = e.mesh.fsdp * e.mesh.expert
    ways = shards * e.mesh.tensor
    devices = ways * e.mesh.data
    item, length = e.execution.dtype.itemsize, e.data.sequence_length
    read = 1 if slice_.step == "decode" else length
    rows = e.data.batch_size / (e.mesh.data * shards)
    held = (e.execution.cache_dtype.itemsize, e.execution.cache_scale_bytes)
    cache = closed_form.kv_cache_bytes(model, e.data.batch_size, length, *held) / devices
    working = rows * read * (2 * model.width + 2 * model.mlp_width / e.mesh.tensor) * item
    num_bytes = sizes.weight_bytes / ways + cache + working + rows * 4 * vocab_size / e.mesh.tensor
    flops = e.data.batch_size * read * closed_form.forward_flops_per_token(model, length, "full") / devices
    experts = sizes.weight_bytes * sizes.experts / sizes.parameters
    common = sizes.weight_bytes - experts
    moved = (common + experts / e.mesh.expert) / e.mesh.tensor + cache
    exchanged = slice_.exchange_seconds(
        e.mesh,
        gathered=common / ways,
        experts_gathered=experts / ways,
        summed=2 * model.num_layers * rows * read * model.width * item,
        **_expert_bytes(e, model, model.num_layers * rows * read * item, drops=False),
    )
    return num_bytes, max(flops / slice_.peak(item), moved / slice_.bandwidth) + exchanged
