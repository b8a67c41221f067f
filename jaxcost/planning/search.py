"""The best way to lay a training step out on a slice: meshes, rematerialisation, accumulation and loss pieces.

Thousands of candidates go through a closed form in seconds; it only ranks them and leaves out what cannot fit. The best
few are compiled, and what is reported of those is the compiler's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import jax

from jaxcost import weights
from jaxcost.config import Experiment
from jaxcost.cost import closed_form, hardware
from jaxcost.models.transformer import Transformer, initialize
from jaxcost.planning.plan import Plan, plan
from jaxcost.planning.topology import topology_chip, topology_devices
from jaxcost.sharding import MeshConfig
from jaxcost.transforms import chain

REMATS = ("none", "attention", "projections", "full")
ACCUMULATIONS = (1, 2, 4, 8, 16, 32)
LOSS_CHUNKS = (1, 2, 4, 8, 16)
_MARGIN = 1.15
"""A candidate whose closed form needs this many times the usable memory is left out; the closed form is rough."""
_REACHED_PEAK, _EXPOSED = 0.55, 0.25
"""Shares of the peak that a step reaches and of its communication that is exposed; they rank, nothing more."""
_GATHERED_LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the step, and the closed form's view of it."""

    experiment: Experiment
    bytes_per_device: float
    seconds: float

    def flags(self) -> str:
        """The command-line flags that ask for it."""
        e = self.experiment
        mesh = " ".join(f"--mesh.{axis} {size}" for axis, size in dataclasses.asdict(e.mesh).items())
        return (
            f"{mesh} --execution.remat {e.execution.remat} "
            f"--training.accumulation {e.training.accumulation} --training.loss-chunks {e.training.loss_chunks}"
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a search."""

    considered: int
    """Candidates that divide over the devices and went through the closed form."""
    fitting: int
    """Those that the closed form lets fit."""
    compiled: tuple[tuple[Candidate, Plan], ...]
    """Compiled candidates, those that fit first, the fastest of them first."""


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the closed form needs to know of the transformed weights."""

    weight_bytes: int
    trainable: int
    parameters: int


def search(
    experiment: Experiment,
    topology: str,
    vocab_size: int,
    count: int = 3,
    report: Callable[[str], None] = lambda message: None,
) -> Found:
    """Ranks every layout and compiles the best until `count` of them fit, or twice as many do not.

    Raises:
        PlanningUnavailable: the compiler for the chip is not installed.
        ValueError: the topology does not exist, or no layout divides over its devices.
    """
    chip = topology_chip(topology)
    devices = len(topology_devices(topology))
    sizes = _sizes_of(experiment, vocab_size)
    considered = list(candidates(experiment, chip, devices, vocab_size, sizes))
    if not considered:
        raise ValueError(
            f"no mesh of {devices} devices divides this model and a batch of {experiment.data.batch_size}; "
            "change data.batch_size or the topology."
        )
    usable = chip.usable_bytes_per_device.value or math.inf
    fitting = sorted((c for c in considered if c.bytes_per_device <= usable * _MARGIN), key=lambda c: c.seconds)
    report(f"{len(considered)} candidates, {len(fitting)} may fit")
    made: list[tuple[Candidate, Plan]] = []
    for candidate in fitting[: 3 * count]:
        report(f"compiling {candidate.flags()}")
        made.append((candidate, plan(candidate.experiment, topology, "train", vocab_size)))
        if sum(p.compiled.fits is not False for _, p in made) == count:
            break
    made.sort(key=lambda pair: (pair[1].compiled.fits is False, _seconds(pair[1])))
    return Found(len(considered), len(fitting), tuple(made))


def candidates(
    experiment: Experiment, chip: hardware.Chip, devices: int, vocab_size: int, sizes: _Sizes
) -> Iterator[Candidate]:
    """Every layout that divides over the devices."""
    for mesh in _meshes(devices):
        for remat, accumulation, chunks in itertools.product(REMATS, ACCUMULATIONS, LOSS_CHUNKS):
            if experiment.data.batch_size % accumulation or experiment.data.sequence_length % chunks:
                continue
            training = dataclasses.replace(experiment.training, accumulation=accumulation, loss_chunks=chunks)
            execution = dataclasses.replace(experiment.execution, remat=remat)
            changed = dataclasses.replace(experiment, mesh=mesh, execution=execution, training=training)
            try:
                changed.check_devices(devices, vocab_size)
            except ValueError:
                continue  # does not divide
            yield Candidate(changed, *_closed_form(changed, chip, vocab_size, sizes))


def _meshes(devices: int) -> Iterator[MeshConfig]:
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for data, fsdp in itertools.product(divisors, divisors):
        if devices % (data * fsdp) == 0:
            yield MeshConfig(data=data, fsdp=fsdp, tensor=devices // (data * fsdp))


def _sizes_of(experiment: Experiment, vocab_size: int) -> _Sizes:
    model = Transformer(dataclasses.replace(experiment.model, vocab_size=vocab_size), experiment.execution)
    transform = chain(*experiment.transforms)
    params = jax.eval_shape(lambda: transform(initialize(model, jax.random.key(0))[0]))
    trainable, _ = weights.partition(params)
    leaves = jax.tree.leaves(params)
    return _Sizes(
        weight_bytes=sum(a.size * a.dtype.itemsize for a in leaves),
        trainable=sum(a.size for a in trainable.values()),
        parameters=closed_form.parameter_counts(model.config).total,
    )


def _closed_form(experiment: Experiment, chip: hardware.Chip, vocab_size: int, sizes: _Sizes) -> tuple[float, float]:
    """Bytes of a device and seconds of a step, roughly."""
    e, model = experiment, dataclasses.replace(experiment.model, vocab_size=vocab_size)
    ways = e.mesh.fsdp * e.mesh.tensor
    devices = ways * e.mesh.data
    length, width = e.data.sequence_length, model.width
    tokens = e.data.batch_size * length / (e.mesh.data * e.mesh.fsdp)
    live = tokens / e.training.accumulation
    item = e.execution.dtype.itemsize
    layer = sizes.parameters / model.num_layers * item / e.mesh.tensor

    elements = closed_form.activation_elements_per_token(model, length, stored_attention_matrix=False)
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    kept = {
        "none": model.num_layers * elements,
        "projections": model.num_layers * (3 * width + heads + 2 * model.mlp_width) + elements,
        "attention": model.num_layers * (width + model.num_heads * model.head_dim) + elements,
        "full": model.num_layers * width + elements,
    }[e.execution.remat]
    logits = 2 * 4 * vocab_size / e.training.loss_chunks
    held = (sizes.weight_bytes + 12 * sizes.trainable) / ways + _GATHERED_LAYERS * layer
    accumulated = 4 * sizes.trainable / ways if e.training.accumulation > 1 else 0
    num_bytes = held + accumulated + live * (kept * item + logits) / e.mesh.tensor

    again = {"none": 0.0, "projections": 0.1, "attention": 0.9, "full": 1.0}[e.execution.remat]
    model_flops = closed_form.training_flops_per_token(model, length)
    full_flops = closed_form.hardware_training_flops_per_token_bound(model, length, "full")
    repeated_loss = 2 * vocab_size * width if e.training.loss_chunks > 1 else 0
    flops = (model_flops + again * (full_flops - model_flops) + repeated_loss) * e.data.batch_size * length / devices
    frozen = 1 - sizes.trainable / max(sizes.trainable, sizes.parameters)
    flops *= 1 - frozen / 3
    peak = (chip.peak("bf16" if item == 2 else "f32") or chip.peak("bf16") or 1e12) / chip.devices_per_chip

    gathers = (3 if e.execution.remat != "none" else 2) * item * e.training.accumulation
    shard = sizes.parameters / e.mesh.tensor
    trained = sizes.trainable / e.mesh.tensor
    sent = (gathers * shard + 4 * trained * e.training.accumulation) * (1 - 1 / e.mesh.fsdp)
    sent += 2 * 4 * trained / e.mesh.fsdp * (1 - 1 / e.mesh.data)
    sent += 8 * model.num_layers * tokens * width * item * (1 - 1 / e.mesh.tensor)
    links = (chip.link_bytes_per_second.value or math.inf) / chip.devices_per_chip / 2
    return num_bytes, flops / (peak * _REACHED_PEAK) + _EXPOSED * sent / links


def _seconds(made: Plan) -> float:
    estimate = made.compiled.estimate
    return math.inf if estimate is None or estimate.seconds is None else estimate.seconds
