"""The trainer: from a description of the weights to trained ones, through kills and restarts, reading top to bottom."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import optax
from jax.sharding import Mesh

from jaxcost import hosts, sharding, weights
from jaxcost.cost.hlo import ProgramCost, compiled_cost
from jaxcost.cost.ledger import Ledger
from jaxcost.data.pipeline import RECORDS
from jaxcost.models.transformer import Transformer, axes_of
from jaxcost.training.checkpoints import Checkpoints
from jaxcost.training.clock import Clock
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from jaxcost.training.distill import Distiller, StoredLogits
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.progress import Progress
from jaxcost.training.step import TrainState, init_state, make_train_step
from jaxcost.training.watch import Watch
from jaxcost.transforms import Transform
from jaxcost.transforms.manifest import check, manifest


class NonFiniteError(RuntimeError):
    """The loss or a gradient was infinite or not a number in too many steps."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A finished run."""

    params: weights.Params
    """The trained weights."""
    steps: int
    """Optimizer steps, those before a restart included."""
    step_seconds: float
    """Median seconds of a step, without compilation, evaluation and checkpoints, since the last restart."""
    cost: ProgramCost
    """The compiled step, read; that of the longest batches, where there are several."""
    losses: tuple[float, ...]
    """Training loss of the steps done in this process, nats a token."""
    totals: dict[str, float]
    """The ledger's totals: seconds, tokens, flops, bytes."""
    metrics: dict[str, float | None]
    """The last evaluation; None is a figure that is undefined."""
    skipped_steps: int
    """Steps that changed nothing, because their loss or gradient was not finite."""
    lost_seconds: dict[str, float]
    """Seconds that did not train, by what took them; see `clock.LOSSES`."""
    goodput: float
    """The share of the run's seconds that trained."""


def fit(
    model: Transformer,
    abstract_params: weights.Params,
    make_params: Callable[[], weights.Params],
    batches: grain.DatasetIterator,
    evaluate: Callable[[weights.Params], dict[str, float | None]],
    *,
    directory: Path,
    mesh: Mesh,
    transform: Transform,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    checkpoint: CheckpointConfig,
    ledger: Ledger,
    progress: Progress,
    watch: Watch,
    batch_size: int,
    lengths: Sequence[int] = (),
    distiller: Distiller | None = None,
    teacher: weights.Params | None = None,
    stored: StoredLogits | None = None,
    until: int | None = None,
) -> Fitted:
    """Trains, or goes on with the training that `directory` holds; what was finished comes back at once.

    Args:
      model: what the weights are of.
      abstract_params: the shapes of the weights, transforms applied, as ShapeDtypeStructs.
      make_params: makes those weights; called only for a fresh start.
      batches: an endless iterator of `inputs`, `targets` (int32) and `mask` (float32), each (B, S), whose position
        can be saved and set.
      evaluate: scores weights; its figures go to the ledger.
      directory: holds `checkpoints/`.
      mesh: the devices.
      transform: its `update` runs inside the step.
      optimizer, training, checkpoint: as their own docstrings say.
      ledger: charged with the seconds, tokens and FLOPs of the run.
      progress: shows the run to a person.
      watch: writes what each step came to.
      lengths: the lengths that batches have, ascending; that of the first batch if none are given.
      batch_size: B; where several processes share the job, each one's batches are its `sharding.own_rows` alone.
      distiller: what is learned from a teacher; then one of the next two is given.
      teacher: the weights of a teacher that runs inside of the step, on the mesh.
      stored: what a teacher said of every batch.
      until: a step to evaluate, save and stop at before the last one, whose schedule is kept to; a later call goes on.

    Raises:
      BrokenError: the training broke an invariant of the weights (see `transforms.manifest`), or a checkpoint does.
      NonFiniteError: the loss or the gradient is no longer finite; the checkpoints are left as they are.
      Preempted: SIGTERM asked to end, and what was done is saved.
      LostHostError: another process of the job no longer answers.
      CheckpointError: a checkpoint cannot be written or read.
      ValueError: the weights or the batch do not divide the mesh, nothing in the weights trains, or `until` is none of
        the steps that are left.
    """
    last_step = training.steps if until is None else until
    if not 1 <= last_step <= training.steps:
        raise ValueError(f"A training of {training.steps} steps cannot stop at step {until}; give one of its steps.")
    clock = Clock(ledger)

    # ---- State: its shapes and where it lives ----
    tx = make_optimizer(optimizer, training.steps)
    jitted, abstract = jitted_step(model, abstract_params, tx, transform, training, mesh, distiller, optimizer)
    places = jax.tree.map(lambda a: a.sharding, abstract)
    taught = () if teacher is None else (teacher,)

    def next_batch(step):
        batch = next(batches)
        records = batch.pop(RECORDS, None)
        batch = batch if stored is None else stored.read(step, batch)
        return sharding.place_batch(batch, mesh, batch_size), records

    with (
        jax.set_mesh(mesh),
        progress,
        watch,
        Checkpoints(directory / "checkpoints", checkpoint) as checkpoints,
        hosts.together(),
        hosts.Preemption() as preemption,
    ):
        # ---- Step: compiled ahead of time, so that its cost is known before it runs ----
        with clock.losing("compile"):
            fresh_position = batches.get_state()
            example, _ = next_batch(1)
            batches.set_state(fresh_position)
            options = sharding.compiler_options(mesh)
            programs = {}
            for length in lengths or example["inputs"].shape[1:2]:
                given = _of_length(example, length)
                compiled = jitted.lower(abstract, given, *taught).compile(compiler_options=options)
                tokens = batch_size * model.config.row_tokens(length)
                programs[given["inputs"].shape] = _Program(compiled, compiled_cost(compiled), tokens)
            longest = programs[given["inputs"].shape]

        # ---- Start, or restart ----
        with clock.losing("start"):
            latest = checkpoints.latest()
            metrics: dict[str, float | None] = {}
            measured, skipped, promised = None, 0, None
            if latest is None:
                start = jax.jit(_initializer(model, tx, training, distiller), out_shardings=places)
                state = start(make_params())
                promised = manifest(state.params)
            else:
                state, saved = checkpoints.restore(latest, abstract)
                promised = check(saved.get("manifest", {}), state.params, step=f"reading {directory}")
                batches.set_state(saved["position"])
                ledger.restore(saved["totals"])
                metrics, measured, skipped = saved["metrics"], saved["step_seconds"], saved.get("skipped", 0)
            done = latest or 0
            if done > last_step:
                raise ValueError(
                    f"{directory} holds a training that is at step {done} already, and step {last_step} is asked for; "
                    "choose another --workdir."
                )
            ledger.rewind(done)
            clock.restore(saved.get("lost", {}) if latest else {}, watch.rewind(done))

        # ---- Loop ----
        losses: list[float] = []
        in_a_row = 0

        def finish(step, result, records, program):
            """Reads what a step came to, which waits for it."""
            nonlocal skipped, in_a_row
            figures = {name: float(value) for name, value in jax.device_get(result).items()}
            seconds = clock.step_done(program.tokens, program.cost.total_flops)
            losses.append(figures["loss"])
            in_a_row = in_a_row + 1 if figures.pop("skipped") else 0
            skipped += in_a_row > 0
            if in_a_row > training.skip_limit:
                raise NonFiniteError(_not_finite(step, figures, in_a_row, checkpoints.latest(), directory))
            figures |= {"skipped": skipped, "seconds": seconds, **progress.figures(seconds, program.tokens)}
            figures |= {"goodput": clock.goodput, "usd": ledger.usd, "memory_bytes": _memory_bytes(mesh)}
            watch.write(step, figures if records is None else figures | {"records": records.tolist()})
            progress.advance(losses[-1], seconds if lengths else clock.recent_seconds(), program.tokens)

        pending = None
        runs = {shape: sharding.runnable(jitted, one.compiled, state) for shape, one in programs.items()}
        progress.start(training.steps, done, longest.tokens)
        for step in range(done + 1, last_step + 1):
            watch.begin(step)
            with clock.waiting(pending and pending[1]):
                batch, records = next_batch(step)
            shape = batch["inputs"].shape
            state, result = runs[shape](state, batch, *taught)
            # The step before is read only now, so that the devices never wait for the host.
            if pending is not None:
                finish(*pending)
            pending = (step, result, records, programs[shape])

            stops = preemption.reached(step)
            evaluates = step == last_step or (training.evaluate_every and step % training.evaluate_every == 0)
            saves = stops or step == last_step or step % checkpoint.every_steps == 0
            if evaluates or saves:
                finish(*pending)
                pending = None
            if evaluates:
                with clock.losing("evaluation"):
                    metrics = {"train_loss": losses[-1], **evaluate(state.params)}
                clock.charge()
                ledger.record(step, **metrics)
            # What precedes a skipped step may be what broke it: the checkpoint before is the better one to keep.
            if saves and (in_a_row == 0 or stops or step == last_step):
                clock.charge()
                with clock.losing("checkpoint"):
                    measured = clock.median_seconds()
                    promised = check(promised, state.params, transform.waived(), "training")
                    saved = {"position": batches.get_state(), "totals": ledger.totals, "metrics": metrics}
                    saved |= {"manifest": promised, "step_seconds": measured, "skipped": skipped, "lost": clock.lost}
                    checkpoints.save(step, state, saved)
            if stops and step < last_step:
                checkpoints.wait()
                raise hosts.Preempted(
                    f"Asked to end; step {step} of {training.steps} is saved in {directory}, and the same command goes "
                    "on from there."
                )
        checkpoints.wait()
        lost, goodput = clock.lost, clock.goodput
    return Fitted(
        state.params, last_step, measured, longest.cost, tuple(losses), ledger.totals, metrics, skipped, lost, goodput
    )


@dataclasses.dataclass(frozen=True)
class _Program:
    """The step for batches of one shape."""

    compiled: Any
    cost: ProgramCost
    tokens: int
    """Tokens of a batch, padding included."""


def _of_length(batch: dict[str, jax.Array], length: int) -> dict[str, Any]:
    """A batch, or the shapes of one that is as long."""
    inputs = batch["inputs"]
    if inputs.shape[1] == length:
        return batch

    def resized(a):
        return jax.ShapeDtypeStruct((len(a), length), a.dtype, sharding=a.sharding)

    return {name: resized(a) if a.shape == inputs.shape else a for name, a in batch.items()}


def jitted_step(
    model: Transformer,
    abstract_params: weights.Params,
    optimizer: optax.GradientTransformation,
    transform: Transform,
    training: TrainingConfig,
    mesh: Mesh,
    distiller: Distiller | None = None,
    layout: OptimizerConfig | None = None,
    ctc_blank: int | None = None,
) -> tuple[Any, TrainState]:
    """The train step under `jax.jit`, its state donated, and that state's shapes and shardings; nothing is computed.

    `layout` says where the moments live; with the weights that they belong to, if it is not given. With `ctc_blank`,
    the loss is that of CTC.
    The mesh may be of devices that are only described, so a planner compiles the very step that a trainer runs.
    """
    layout = layout or OptimizerConfig()
    abstract = jax.eval_shape(_initializer(model, optimizer, training, distiller), abstract_params)
    places = _state_shardings(abstract, model, mesh, layout)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, places)
    step = make_train_step(
        model,
        optimizer,
        transform,
        accumulation=training.accumulation,
        loss_chunks=training.loss_chunks,
        router_losses={"load_balancing": training.load_balancing, "router_z": training.router_z},
        distiller=distiller,
        ctc_blank=ctc_blank,
        offload=layout.offload,
    )
    return jax.jit(step, out_shardings=(places, sharding.replicated(mesh)), donate_argnums=0), abstract


def _initializer(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    training: TrainingConfig,
    distiller: Distiller | None,
) -> Callable[[weights.Params], TrainState]:
    def start(params):
        beside = {} if distiller is None else distiller.beside(model.config.width, training.seed)
        return init_state(params, optimizer, training.seed, beside)

    return start


def _state_shardings(abstract: TrainState, model: Transformer, mesh: Mesh, layout: OptimizerConfig) -> TrainState:
    params = sharding.shardings(abstract.params, axes_of(model, abstract.params), mesh)
    by_path = {weights.path_name(path): place for path, place in jax.tree_util.tree_leaves_with_path(params)}

    def place(path, leaf):
        # Moments are kept in dicts with the paths of the arrays that they belong to.
        own = by_path.get(getattr(path[-1], "key", None))
        if own is None:
            return sharding.replicated(mesh)
        own = sharding.split_further(own, leaf.shape, "data") if layout.split_over_data else own
        return own.with_memory_kind("pinned_host") if layout.offload else own

    moments = jax.tree_util.tree_map_with_path(place, abstract.optimizer)
    one = sharding.replicated(mesh)
    return TrainState(one, params, moments, one, jax.tree.map(lambda _: one, abstract.beside))


def _not_finite(step: int, figures: dict[str, float], in_a_row: int, last: int | None, directory: Path) -> str:
    what = "gradient" if math.isfinite(figures["loss"]) else "loss"
    kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is step {last} in {directory}"
    before = f", the last of {in_a_row} in a row" if in_a_row > 1 else ""
    return (
        f"The {what} is not finite at step {step}{before}; {kept}. Lower optimizer.learning_rate, lengthen "
        "optimizer.warmup_steps, or lower optimizer.clip_norm."
    )


def _memory_bytes(mesh: Mesh) -> int | None:
    """The most that was held so far on one of this process's devices; None where the platform does not count."""
    stats = mesh.local_devices[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")
