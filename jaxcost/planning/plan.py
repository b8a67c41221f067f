"""The planner's front door: what an experiment's steps take on a slice, and what the whole run costs."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from jaxcost import sharding
from jaxcost.config import Experiment
from jaxcost.cost import closed_form, hardware, links
from jaxcost.data import build_tokenizer
from jaxcost.objectives import chosen_vocabulary
from jaxcost.planning import cache, memory
from jaxcost.planning.steps import StepName, teacher_of, trace_step
from jaxcost.planning.topology import StepPlan, compile_step, read_step, topology_chip, topology_devices

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step of an experiment on a topology."""

    step: StepName
    topology: str
    hardware: hardware.Hardware
    compiled: StepPlan
    split: memory.Split | None
    """The peak by what it holds; None if the step was too large to be compiled."""
    tokens: int
    """Tokens of one run of the step."""
    runs: int
    """How often the experiment runs the step; 1 for serving."""

    @property
    def cost(self) -> closed_form.Cost | None:
        """All runs of the step by the best figure there is for its seconds; None without one."""
        estimate = self.compiled.estimate
        if estimate is None or estimate.seconds is None:
            return None
        return closed_form.cost_of_seconds(estimate.seconds * self.runs, self.hardware)

    @property
    def usd_per_million_tokens(self) -> float | None:
        """Money for a million tokens of this step."""
        cost = self.cost
        return None if cost is None or cost.usd is None else cost.usd / (self.tokens * self.runs) * 1e6

    def memory_sentence(self) -> str:
        """Whether the step fits, in one sentence."""
        plan = self.compiled
        if plan.needed_bytes is None or plan.usable_bytes is None:
            return f"the usable memory of a {plan.chip} device is unknown, so whether it fits is too."
        figures = f"{plan.needed_bytes / _GIB:.2f} of {plan.usable_bytes / _GIB:.2f} GiB a device"
        if plan.fits:
            return f"fits: needs {figures}."
        buffers = ", ".join(f"{b.size_bytes / _GIB:.2f} GiB {b.shape} ({b.made_by})" for b in plan.largest[:3])
        return f"does not fit: needs {figures}" + (f"; the largest are {buffers}." if buffers else ".")

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON: seconds, bytes, money and energy, each named for what it is."""
        compiled, estimate, cost = self.compiled, self.compiled.estimate, self.cost
        program = compiled.cost
        return {
            "step": self.step,
            "topology": self.topology,
            "chip": compiled.chip,
            "chips": self.hardware.num_chips,
            "devices": compiled.num_devices,
            "fits": compiled.fits,
            "needed_bytes": compiled.needed_bytes,
            "peak_bytes": compiled.peak_bytes,
            "usable_bytes": compiled.usable_bytes,
            "memory_split_bytes": None if self.split is None else dataclasses.asdict(self.split),
            "largest_buffers": [dataclasses.asdict(buffer) for buffer in compiled.largest],
            "tokens_per_step": self.tokens,
            "steps": self.runs,
            "lower_bound_seconds": estimate and estimate.bound.seconds,
            "bound_by": estimate and estimate.bound.limit,
            "bound_terms_seconds": estimate and estimate.bound.terms,
            "compiler_seconds": estimate and estimate.compiler_seconds,
            "compiler_exposed_seconds": estimate and estimate.compiler_exposed_seconds,
            "compiler_source": estimate and estimate.compiler_source,
            "calibrated_seconds": estimate and estimate.calibrated_seconds,
            "calibrated_error_fraction": estimate and estimate.calibrated_error,
            "seconds_are": estimate and estimate.kind,
            "flops_per_device_by_type": estimate and estimate.flops_by_type,
            "hbm_bytes_per_device": program and program.work.hbm_bytes,
            "link_bytes_per_device": program and program.collective_bytes,
            "exchanges": [_exchange(*pair) for pair in estimate.exchanges] if estimate else [],
            "unestimated_ops": list(estimate.unestimated) if estimate else [],
            "run": cost and dataclasses.asdict(cost),
            "usd_per_million_tokens": self.usd_per_million_tokens,
            "tokens_per_second": cost and self.tokens * self.runs / cost.seconds,
            # Of a request that comes alone: it waits for its own prompt and for no other.
            "time_to_first_token_seconds": cost.seconds if cost and self.step == "prefill" else None,
            "sources": {name: dataclasses.asdict(figure) for name, figure in self.hardware.figures().items()},
            "message": compiled.message,
        }


def _exchange(collective: links.Collective, each: links.Exchange) -> dict[str, Any]:
    return {
        "kind": collective.kind,
        "operand_bytes": collective.operand_bytes,
        "devices": collective.group_size,
        "times": collective.times,
        "over": [*each.axes, *([links.NETWORK] if each.network_seconds != 0.0 else [])],
        "seconds": None if each.seconds is None else each.seconds * collective.times,
    }


def vocabulary_of(experiment: Experiment) -> int:
    """Rows of the embedding table: the model's, or those of the tokenizer that the data config names; 0 of a model of
    images or of audio, which has none."""
    if not experiment.model.of_tokens:
        return 0
    data = experiment.data
    return experiment.model.vocab_size or chosen_vocabulary(data.objective, build_tokenizer(data))


def plan(experiment: Experiment, topology: str, step: StepName = "train", vocab_size: int | None = None) -> Plan:
    """Compiles a step of the experiment, with its transforms, for a topology such as 'v5e:16x16'.

    A program that was compiled before, by the same code and libraries, comes from the cache.

    Raises:
        PlanningUnavailable: the compiler for the chip is not installed.
        ValueError: the topology does not exist, or the experiment does not divide over its devices.
    """
    vocab_size = vocabulary_of(experiment) if vocab_size is None else vocab_size
    chip = topology_chip(topology)
    teacher = teacher_of(experiment) if step == "train" else None
    question = repr((experiment.trained_part(), teacher, experiment.mesh, topology, step, vocab_size))
    mesh = sharding.make_mesh(experiment.mesh, list(topology_devices(topology)))
    program, categories, tokens = cache.cached(question, lambda: _compile(experiment, mesh, step, vocab_size))
    # Partitions of the program are numbered in the order of the mesh.
    compiled = read_step(program, chip, links.network_of(list(mesh.devices.flat), chip))
    given = dataclasses.replace(
        experiment.hardware, chip=chip.name, num_chips=max(1, compiled.num_devices // chip.devices_per_chip)
    )
    split = None if compiled.peak_bytes is None else memory.split_peak(compiled.peak_bytes, categories)
    runs = experiment.training.steps if step == "train" else 1
    return Plan(step, topology, hardware.resolve(given), compiled, split, tokens, runs)


def _compile(experiment: Experiment, mesh: Mesh, step: StepName, vocab_size: int):
    traced = trace_step(step, experiment, vocab_size, mesh)
    return compile_step(traced.jitted, traced.arguments, traced.static), traced.bytes_by_category, traced.tokens


def cheapest_fix(experiment: Experiment, topology: str, vocab_size: int) -> tuple[str, Plan] | None:
    """The first change, from the cheapest in seconds on, with which a train step fits; None if none of them helps."""
    for flags, changed in _changes(experiment):
        try:
            made = plan(changed, topology, "train", vocab_size)
        except ValueError:
            continue  # such a batch does not divide over the mesh
        if made.compiled.fits:
            return flags, made
    return None


def _changes(experiment: Experiment):
    chunks = max(8, experiment.training.loss_chunks)
    training = dataclasses.replace(experiment.training, loss_chunks=chunks)
    yield f"--training.loss-chunks {chunks}", dataclasses.replace(experiment, training=training)
    execution = dataclasses.replace(experiment.execution, remat="full")
    for accumulation in (1, 2, 4, 8):
        ways = experiment.training.accumulation * accumulation
        if experiment.data.batch_size % ways:
            return
        yield (
            f"--execution.remat full --training.loss-chunks {chunks} --training.accumulation {ways}",
            dataclasses.replace(
                experiment, training=dataclasses.replace(training, accumulation=ways), execution=execution
            ),
        )
