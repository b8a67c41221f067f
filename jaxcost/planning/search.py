"""The best way to lay a step out on a slice: meshes, batches, rematerialisation, accumulation and loss pieces.

Thousands of candidates go through the closed form of `ranking` in seconds; it only ranks them and leaves out what
cannot fit, corrected by every step that was compiled. The best few are compiled, and what is reported of those is the
compiler's.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import jax

from jaxcost.config import Experiment
from jaxcost.cost import hardware
from jaxcost.planning import ranking
from jaxcost.planning.plan import Plan, plan
from jaxcost.planning.steps import StepName
from jaxcost.planning.topology import topology_chip, topology_devices
from jaxcost.sharding import MeshConfig

ACCUMULATIONS = (1, 2, 4, 8, 16, 32)
LOSS_CHUNKS = (1, 2, 4, 8, 16)
_MOST_COMPILED = 4
"""Candidates compiled at most for each that was asked for."""
_BYTES_A_COMPILER = 6 * 2**30
"""Host memory that one compilation of a large step takes."""
_SHORTEST_PART = 1024
"""Tokens of a sequence that a device has at least where the search splits sequences; fewer only cost exchanges."""


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
        data, model = self.experiment.data, self.experiment.model
        return data.batch_size * (1 if self.step == "decode" else model.row_tokens(data.sequence_length))

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
    sizes = ranking.sizes_of(experiment, vocab_size)
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
    sizes: ranking.Sizes,
    step: StepName = "train",
    batches: Sequence[int] = (),
) -> Iterator[Candidate]:
    """Every layout that divides over the devices, in the order of the slice."""
    slice_ = ranking.Slice(chip, devices, step)
    splits = experiment.data.sequence_length // _SHORTEST_PART if step == "train" else 1
    meshes = _meshes(len(devices), max(1, splits), sizes.model.experts)
    for mesh, batch in itertools.product(meshes, dict.fromkeys([experiment.data.batch_size, *batches])):
        data = dataclasses.replace(experiment.data, batch_size=batch)
        steps = -(-experiment.training.steps * experiment.data.batch_size // batch)
        for remat, accumulation, chunks in itertools.product(ranking.REMATS, ACCUMULATIONS, LOSS_CHUNKS):
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
                changed.check_devices(len(devices))
                dataclasses.replace(changed, model=sizes.model).check_devices(len(devices))
            except ValueError:
                continue  # does not divide
            form = ranking.training_form if step == "train" else ranking.serving_form
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


def _seconds(made: Plan) -> float:
    estimate = made.compiled.estimate
    return math.inf if estimate is None or estimate.seconds is None else estimate.seconds
