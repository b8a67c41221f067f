"""The trainer: from a description of the weights to trained ones, through kills and restarts, reading top to bottom."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import optax
from jax.sharding import Mesh

from jaxcost import sharding, weights
from jaxcost.cost.hlo import ProgramCost, compiled_cost
from jaxcost.cost.ledger import Ledger
from jaxcost.models.transformer import Transformer, axes_of
from jaxcost.training.checkpoints import Checkpoints
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from jaxcost.training.distill import Distiller, StoredLogits
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.progress import Progress
from jaxcost.training.step import TrainState, init_state, make_train_step
from jaxcost.transforms import Transform
from jaxcost.transforms.manifest import check, manifest


class NonFiniteError(RuntimeError):
    """The loss or a gradient became infinite or not a number."""


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
    """The compiled step, read."""
    losses: tuple[float, ...]
    """Training loss of the steps done in this process, nats a token."""
    totals: dict[str, float]
    """The ledger's totals: seconds, tokens, flops, bytes."""
    metrics: dict[str, float]
    """The last evaluation."""


def fit(
    model: Transformer,
    abstract_params: weights.Params,
    make_params: Callable[[], weights.Params],
    batches: grain.DatasetIterator,
    evaluate: Callable[[weights.Params], dict[str, float]],
    *,
    directory: Path,
    mesh: Mesh,
    transform: Transform,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    checkpoint: CheckpointConfig,
    ledger: Ledger,
    progress: Progress,
    distiller: Distiller | None = None,
    teacher: weights.Params | None = None,
    stored: StoredLogits | None = None,
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
      distiller: what is learned from a teacher; then one of the next two is given.
      teacher: the weights of a teacher that runs inside of the step, on the mesh.
      stored: what a teacher said of every batch.

    Raises:
      BrokenError: the training broke an invariant of the weights (see `transforms.manifest`), or a checkpoint does.
      NonFiniteError: the loss or the gradient is no longer finite; the checkpoints are left as they are.
      CheckpointError: a checkpoint cannot be written or read.
      ValueError: the weights or the batch do not divide the mesh, or nothing in the weights trains.
    """
    started = time.perf_counter()

    # ---- State: its shapes and where it lives ----
    tx = make_optimizer(optimizer, training.steps)
    jitted, abstract = jitted_step(model, abstract_params, tx, transform, training, mesh, distiller)
    places = jax.tree.map(lambda a: a.sharding, abstract)
    taught = () if teacher is None else (teacher,)

    def next_batch(step):
        batch = next(batches)
        return sharding.place_batch(batch if stored is None else stored.read(step, batch), mesh)

    with jax.set_mesh(mesh), progress, Checkpoints(directory / "checkpoints", checkpoint) as checkpoints:
        # ---- Step: compiled ahead of time, so that its cost is known before it runs ----
        fresh_position = batches.get_state()
        example = next_batch(1)
        batches.set_state(fresh_position)
        compiled = jitted.lower(abstract, example, *taught).compile(compiler_options=sharding.compiler_options(mesh))
        cost = compiled_cost(compiled)
        tokens_per_step = example["inputs"].size

        # ---- Start, or restart ----
        latest = checkpoints.latest()
        if latest is None:
            start = jax.jit(_initializer(model, tx, training, distiller), out_shardings=places)
            state = start(make_params())
            metrics: dict[str, float] = {}
            measured = None
            promised = manifest(state.params)
        else:
            state, saved = checkpoints.restore(latest, abstract)
            promised = check(saved.get("manifest", {}), state.params, step=f"reading {directory}")
            batches.set_state(saved["position"])
            ledger.restore(saved["totals"])
            metrics, measured = saved["metrics"], saved["step_seconds"]
        done = latest or 0
        ledger.rewind(done)

        # ---- Loop ----
        clock = _Clock(ledger, started)
        losses: list[float] = []
        pending = None
        run = sharding.runnable(jitted, compiled, state)
        progress.start(training.steps, done, tokens_per_step)
        for step in range(done + 1, training.steps + 1):
            state, result = run(state, next_batch(step), *taught)
            # The step before is read only now, so that the devices never wait for the host.
            if pending is not None:
                losses.append(_finite(pending, checkpoints, directory))
                clock.step_done(tokens_per_step, cost.total_flops)
                progress.advance(losses[-1], clock.recent_seconds())
            pending = (step, result)

            evaluates = step == training.steps or (training.evaluate_every and step % training.evaluate_every == 0)
            saves = step == training.steps or step % checkpoint.every_steps == 0
            if evaluates or saves:
                losses.append(_finite(pending, checkpoints, directory))
                clock.step_done(tokens_per_step, cost.total_flops)
                progress.advance(losses[-1], clock.recent_seconds())
                pending = None
            if evaluates:
                metrics = {"train_loss": losses[-1], **evaluate(state.params)}
                clock.charge()
                ledger.record(step, **metrics)
            if saves:
                clock.charge()
                measured = clock.median_seconds()
                promised = check(promised, state.params, transform.waived(), "training")
                saved = {"position": batches.get_state(), "totals": ledger.totals, "metrics": metrics}
                saved |= {"manifest": promised}
                checkpoints.save(step, state, saved | {"step_seconds": measured})
            clock.resume()
        checkpoints.wait()
    return Fitted(state.params, training.steps, measured, cost, tuple(losses), ledger.totals, metrics)


def jitted_step(
    model: Transformer,
    abstract_params: weights.Params,
    optimizer: optax.GradientTransformation,
    transform: Transform,
    training: TrainingConfig,
    mesh: Mesh,
    distiller: Distiller | None = None,
) -> tuple[Any, TrainState]:
    """The train step under `jax.jit`, its state donated, and that state's shapes and shardings; nothing is computed.

    The mesh may be of devices that are only described, so a planner compiles the very step that a trainer runs.
    """
    abstract = jax.eval_shape(_initializer(model, optimizer, training, distiller), abstract_params)
    places = _state_shardings(abstract, model, mesh)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, places)
    step = make_train_step(
        model,
        optimizer,
        transform,
        accumulation=training.accumulation,
        loss_chunks=training.loss_chunks,
        router_losses={"load_balancing": training.load_balancing, "router_z": training.router_z},
        distiller=distiller,
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


class _Clock:
    """Charges the run's seconds to the ledger, and times the steps without what happens between them.

    A killed run's seconds since its last checkpoint are lost with its steps.
    """

    def __init__(self, ledger: Ledger, started: float):
        self._ledger = ledger
        self._charged = started
        self._mark = time.perf_counter()
        self._seconds: list[float] = []

    def charge(self) -> None:
        now = time.perf_counter()
        self._ledger.charge(seconds=now - self._charged)
        self._charged = now

    def step_done(self, tokens: int, flops: int) -> None:
        now = time.perf_counter()
        self._seconds.append(now - self._mark)
        self._mark = now
        self._ledger.charge(tokens=tokens, flops=flops)

    def resume(self) -> None:
        if self._charged > self._mark:
            self._mark = time.perf_counter()

    def recent_seconds(self) -> float:
        return statistics.median(self._seconds[-20:])

    def median_seconds(self) -> float:
        # The first step also pays for what is made on first use.
        return statistics.median(self._seconds[1:] or self._seconds)


def _state_shardings(abstract: TrainState, model: Transformer, mesh: Mesh) -> TrainState:
    params = sharding.shardings(abstract.params, axes_of(model, abstract.params), mesh)
    by_path = {weights.path_name(path): place for path, place in jax.tree_util.tree_leaves_with_path(params)}

    def place(path, leaf):
        # Moments are kept in dicts with the paths of the arrays that they belong to.
        name = getattr(path[-1], "key", None)
        return by_path.get(name, sharding.replicated(mesh))

    moments = jax.tree_util.tree_map_with_path(place, abstract.optimizer)
    one = sharding.replicated(mesh)
    return TrainState(one, params, moments, one, jax.tree.map(lambda _: one, abstract.beside))


def _finite(pending: tuple[int, Any], checkpoints: Checkpoints, directory: Path) -> float:
    step, result = pending
    loss, norm = float(result["loss"]), float(result["gradient_norm"])
    if math.isfinite(loss) and math.isfinite(norm):
        return loss
    last = checkpoints.latest()
    kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is step {last} in {directory}"
    raise NonFiniteError(
        f"The {'loss' if not math.isfinite(loss) else 'gradient'} is not finite at step {step}; {kept}. "
        "Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or lower optimizer.clip_norm."
    )
