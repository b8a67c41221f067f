"""The best way to lay a step out on a slice: meshes, batches, rematerialisation, accumulation and loss pieces.

Thousands of candidates go through a closed form in seconds; it only ranks them and leaves out what cannot fit. Its
activations are those that the traced step keeps; its bytes and seconds are corrected by every step that was compiled.
The best few are compiled, and what is reported of those is the compiler's.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.config import Experiment
from jaxcost.cost import closed_form, hardware, links
from jaxcost.models import attention, context
from jaxcost.models.config import ModelConfig
from jaxcost.models.experts import KERNELS
from jaxcost.models.transformer import Transformer, abstract, resized
from jaxcost.planning.plan import Plan, plan
from jaxcost.planning.steps import StepName
from jaxcost.planning.topology import topology_chip, topology_devices
from jaxcost.sharding import MeshConfig
from jaxcost.transforms import chain

REMATS = ("none", "attention", "projections", "full")
ACCUMULATIONS = (1, 2, 4, 8, 16, 32)
LOSS_CHUNKS = (1, 2, 4, 8, 16)
_MOST_COMPILED = 4
"""Candidates compiled at most for each that was asked for."""
_BYTES_A_COMPILER = 6 * 2**30
"""Host memory that one compilation of a large step takes."""
_REACHED_PEAK, _EXPOSED = 0.55, 0.25
"""Shares of the peak that a step reaches and of its communication that is exposed; they rank, nothing more."""
_GATHERED_LAYERS = 2
_SHORTEST_PART = 1024
"""Tokens of a sequence that a device has at least where the search splits sequences; fewer only cost exchanges."""
_MEBI = 2**20


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the step, and the closed form's view of it."""

    experiment: Experiment
    step: StepName
    bytes_per_device: float
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens of one run of the step."""
        data = self.experiment.data
        return data.batch_size * (1 if self.step == "decode" else data.sequence_length)

    def layout(self) -> str:
        """What was chosen, for people."""
        e = self.experiment
        mesh = " x ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(e.mesh).items() if size > 1)
        chosen = [mesh or "one device", f"batch {e.data.batch_size}"]
        if self.step == "train":
            pieces = e.training.loss_chunks
            chosen += [f"remat {e.execution.remat}", f"accumulation {e.training.accumulation}", f"loss in {pieces}"]
        return ", ".join(chosen)

    def flags(self) -> str:
        """The command-line flags that ask for it."""
        e = self.experiment
        flags = [f"--mesh.{axis} {size}" for axis, size in dataclasses.asdict(e.mesh).items()]
        flags.append(f"--data.batch-size {e.data.batch_size}")
        if self.step == "train":
            flags.append(f"--execution.remat {e.execution.remat} --training.accumulation {e.training.accumulation}")
            flags.append(f"--training.loss-chunks {e.training.loss_chunks} --training.steps {e.training.steps}")
        return " ".join(flags)


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a search."""

    considered: int
    """Candidates that divide over the devices and went through the closed form."""
    fitting: int
    """Those that the closed form lets fit, corrected by what was compiled."""
    compiled: tuple[tuple[Candidate, Plan], ...]
    """Compiled candidates, those that fit first, the fewest seconds a token first."""


@dataclasses.dataclass(frozen=True)
class _Sizes:
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
class _Slice:
    """The devices that a step is laid out on."""

    chip: hardware.Chip
    network: links.Network
    step: StepName

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
        devices = np.arange(len(self.network.domains)).reshape(tuple(sizes.values()))
        first = devices[tuple(slice(None) if name in axes else 0 for name in sizes)].reshape(-1).tolist()
        collective = links.Collective(kind, _MEBI, tuple(first[:2] if kind == "collective-permute" else first), 1)
        return (links.exchange(collective, self.chip, self.network).seconds or 0.0) / _MEBI


def search(
    experiment: Experiment,
    topology: str,
    vocab_size: int,
    step: StepName = "train",
    count: int = 3,
    batches: Sequence[int] = (),
    processes: int = 0,
    report: Callable[[str], None] = lambda message: None,
) -> Found:
    """Ranks every layout and compiles the best until `count` of them fit.

    Args:
        experiment: what is laid out; the tokens that it trains on in all stay the same.
        topology: chip and shape, for example `v5e:16x16`.
        vocab_size: rows of the embedding table.
        step: which step is laid out; only training has more to choose than the mesh and the batch.
        count: candidates that fit to compile.
        batches: batch sizes to try beside the experiment's own.
        processes: compilations at once; 0 takes as many as the machine's cores and memory allow.
        report: told of the progress, a line at a time.

    Raises:
        PlanningUnavailable: the compiler for the chip is not installed.
        ValueError: the topology does not exist, or no layout divides over its devices.
    """
    chip = topology_chip(topology)
    devices = topology_devices(topology)
    sizes = sizes_of(experiment, vocab_size)
    considered = list(candidates(experiment, chip, devices, vocab_size, sizes, step, batches))
    if not considered:
        raise ValueError(
            f"no mesh of {len(devices)} devices divides this model and a batch of {experiment.data.batch_size}; "
            "change data.batch_size or the topology."
        )
    usable = chip.usable_bytes_per_device.value or math.inf
    processes = processes or _processes()
    made: list[tuple[Candidate, Plan]] = []
    while sum(p.compiled.fits is not False for _, p in made) < count and len(made) < _MOST_COMPILED * count:
        fitting = _corrected(considered, made, usable)
        if not made:
            report(f"{len(considered)} candidates, {len(fitting)} may fit")
        tried = {id(candidate) for candidate, _ in made}
        best = [c for c in _frontier(fitting) if id(c) not in tried][:processes]
        if not best:
            break
        for candidate in best:
            report(f"compiling {candidate.flags()}")
        made += zip(best, _compile(best, topology, vocab_size, processes), strict=True)
    made.sort(key=lambda pair: (pair[1].compiled.fits is False, _seconds(pair[1]) / pair[0].tokens))
    return Found(len(considered), len(_corrected(considered, made, usable)), tuple(made))


def candidates(
    experiment: Experiment,
    chip: hardware.Chip,
    devices: Sequence[jax.Device],
    vocab_size: int,
    sizes: _Sizes,
    step: StepName = "train",
    batches: Sequence[int] = (),
) -> Iterator[Candidate]:
    """Every layout that divides over the devices, in the order of the slice."""
    slice_ = _Slice(chip, links.network_of(devices, chip), step)
    splits = experiment.data.sequence_length // _SHORTEST_PART if step == "train" else 1
    meshes = _meshes(len(devices), max(1, splits), sizes.model.experts)
    for mesh, batch in itertools.product(meshes, dict.fromkeys([experiment.data.batch_size, *batches])):
        data = dataclasses.replace(experiment.data, batch_size=batch)
        steps = -(-experiment.training.steps * experiment.data.batch_size // batch)
        for remat, accumulation, chunks in itertools.product(REMATS, ACCUMULATIONS, LOSS_CHUNKS):
            if step != "train":
                remat, accumulation, chunks = experiment.execution.remat, 1, 1
            if batch % accumulation or experiment.data.sequence_length % chunks:
                continue
            training = dataclasses.replace(
                experiment.training, accumulation=accumulation, loss_chunks=chunks, steps=steps
            )
            execution = dataclasses.replace(experiment.execution, remat=remat)
            changed = dataclasses.replace(experiment, mesh=mesh, data=data, execution=execution, training=training)
            try:
                changed.check_devices(len(devices), vocab_size)
                dataclasses.replace(changed, model=sizes.model).check_devices(len(devices), vocab_size)
            except ValueError:
                continue  # does not divide
            form = _training_form if step == "train" else _serving_form
            yield Candidate(changed, step, *form(changed, slice_, vocab_size, sizes))
            if step != "train":
                break


def _corrected(
    considered: Sequence[Candidate], made: Sequence[tuple[Candidate, Plan]], usable: float
) -> list[Candidate]:
    """The candidates that may fit, their closed form corrected by what compiled ones of the same kind needed."""
    byte_ratios: dict[tuple, list[float]] = {}
    second_ratios: dict[tuple, list[float]] = {}
    for candidate, compiled in made:
        if compiled.compiled.needed_bytes:
            ratio = compiled.compiled.needed_bytes / candidate.bytes_per_device
            byte_ratios.setdefault(_kind(candidate), []).append(ratio)
        if math.isfinite(_seconds(compiled)):
            second_ratios.setdefault(_kind(candidate), []).append(_seconds(compiled) / candidate.seconds)
    known = [ratio for ratios in second_ratios.values() for ratio in ratios]
    usual = sum(known) / len(known) if known else 1.0
    fitting = []
    for candidate in considered:
        needed = candidate.bytes_per_device * max(byte_ratios.get(_kind(candidate), [1.0]))
        if needed <= usable:
            ratios = second_ratios.get(_kind(candidate), [usual])
            seconds = candidate.seconds * sum(ratios) / len(ratios)
            fitting.append((seconds / candidate.tokens, candidate))
    return [candidate for _, candidate in sorted(fitting, key=lambda pair: pair[0])]


def _kind(candidate: Candidate) -> tuple:
    """What the closed form is wrong about in the same way."""
    mesh = candidate.experiment.mesh
    return candidate.experiment.execution.remat, mesh.tensor > 1, mesh.context > 1, mesh.expert > 1


def _frontier(fitting: Sequence[Candidate]) -> Iterator[Candidate]:
    """The first of those that differ in nothing that matters: pieces and accumulation are there to save memory."""
    seen = set()
    for candidate in fitting:
        e = candidate.experiment
        key = (e.mesh, e.data.batch_size, e.execution.remat)
        if key not in seen:
            seen.add(key)
            yield candidate


def _compile(chosen: Sequence[Candidate], topology: str, vocab_size: int, processes: int) -> list[Plan]:
    questions = [(candidate.experiment, topology, candidate.step, vocab_size) for candidate in chosen]
    if processes > 1 and len(questions) > 1:
        # The workers leave their programs in the cache; a plan itself is quickly made again.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, spawn, initializer=_end_with_parent) as pool:
            list(pool.map(_plan, questions))
    return [_plan(question) for question in questions]


def _end_with_parent() -> None:
    """Ends this process when the one that started it is killed; it would wait for work for ever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _plan(question) -> Plan:
    return plan(*question)


def _processes() -> int:
    """Compilations that this machine can run side by side; one keeps about two cores busy."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() // 2, memory // _BYTES_A_COMPILER))


def _meshes(devices: int, most_context: int, experts: int) -> Iterator[MeshConfig]:
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    contexts = [n for n in divisors if n <= most_context]
    groups = [n for n in divisors if experts % n == 0] if experts else [1]
    for data, fsdp, split, group in itertools.product(divisors, divisors, contexts, groups):
        tensor, left = divmod(devices, data * fsdp * split * group)
        if tensor and not left:
            yield MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=split, expert=group)


def sizes_of(experiment: Experiment, vocab_size: int) -> _Sizes:
    """Sizes of the transformed weights, and of what each rematerialisation keeps, from traces alone."""
    config = dataclasses.replace(experiment.model, vocab_size=vocab_size)
    transform = chain(*experiment.transforms)
    model = Transformer(config, experiment.execution)
    params = transform.abstract(abstract(model)[0])
    trainable, _ = weights.partition(params)
    leaves = jax.tree.leaves(params)
    kept = {
        remat: _kept_bytes(Transformer(config, _scanned(experiment, remat)), params, experiment.data.sequence_length)
        for remat in REMATS
    }
    left = resized(config, params)
    return _Sizes(
        model=left,
        weight_bytes=sum(weights.storage_bytes(a) for a in leaves),
        trainable=sum(a.size for a in trainable.values()),
        trainable_experts=sum(a.size for path, a in trainable.items() if KERNELS.search(path)) if left.experts else 0,
        parameters=closed_form.parameter_counts(left).total,
        kept_bytes=kept,
    )


def _scanned(experiment: Experiment, remat: str):
    # A kernel that never stores the scores, as on the chips; which one is all the same to what it keeps.
    length, execution = experiment.data.sequence_length, experiment.execution
    implementation = attention.resolve("auto", "tpu", length, experiment.model.head_dim, 16)
    return dataclasses.replace(execution, remat=remat, unroll="never", attention=implementation)


def _kept_bytes(model: Transformer, params: weights.Params, length: int) -> float:
    """Bytes that the forward pass keeps for the backward pass of one token, the weights themselves left out."""

    def residuals(rows: int) -> int:
        def backward(params):
            trainable, frozen = weights.partition(params)

            def hidden(trainable):
                tokens = jnp.zeros((rows, length), jnp.int32)
                key = jax.random.key(0)
                return model.apply({"params": weights.combine(params, trainable, frozen)}, tokens, key=key)[0]

            return jax.vjp(hidden, trainable)[1]

        return sum(weights.storage_bytes(a) for a in jax.tree.leaves(jax.eval_shape(backward, params)))

    return (residuals(2) - residuals(1)) / length


def _training_form(experiment: Experiment, slice_: _Slice, vocab_size: int, sizes: _Sizes) -> tuple[float, float]:
    """Bytes of a device and seconds of a train step, roughly."""
    e, model = experiment, sizes.model
    shards = e.mesh.fsdp * e.mesh.context * e.mesh.expert
    ways = shards * e.mesh.tensor
    devices = ways * e.mesh.data
    length, width = e.data.sequence_length, model.width
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


def _serving_form(experiment: Experiment, slice_: _Slice, vocab_size: int, sizes: _Sizes) -> tuple[float, float]:
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


def _seconds(made: Plan) -> float:
    estimate = made.compiled.estimate
    return math.inf if estimate is None or estimate.seconds is None else estimate.seconds
