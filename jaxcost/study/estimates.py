"""What a trial will cost, known before it is started: the closed form, at the speed of the base's own first steps.

The first steps of the base's training are the measurement: they are not done twice, and everything that is estimated
from them is written down before the rest of the study begins.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxcost import weights
from jaxcost.cost import closed_form
from jaxcost.cost.transformed import training_step_flops
from jaxcost.session import Session
from jaxcost.study.accounts import Price
from jaxcost.study.measure import weight_bytes
from jaxcost.study.recipes import Recipe
from jaxcost.study.trials import fingerprint, write_json
from jaxcost.training.checkpoints import Checkpoints
from jaxcost.transforms import chain

_PROBED_STEPS = 4
"""Of the base's training; the first of them pays for what is made on first use and does not count."""
_SCORINGS_OF_A_VERIFICATION = 4
"""Passes over the held-out data that a verification is taken to cost: two, of two sets of weights, and as much for the
tests and the text that is generated."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """The speed of the study's machine, from the first steps of the base's training."""

    step_seconds: float
    """Median of a step."""
    step_flops: float
    """Of the compiled step."""
    closed_flops: float
    """Of the same step by the closed form."""
    compile_seconds: float
    """Compiling it, and making its first state."""
    scoring_seconds: float
    """One pass over the held-out data."""
    checkpoint_seconds: float
    """Writing a checkpoint."""


def probe(base: Session, folder: Path, path: Path, machine: dict[str, Any]) -> Probe:
    """Does the first steps of the base's training in its folder, or finds at `path` what they came to.

    Of a training that is further already, all that it did is the measurement. Raises what `Session.train` raises.
    """
    key = fingerprint(base.experiment, machine)
    if path.exists():
        found = json.loads(path.read_text())
        if found.pop("fingerprint") == key:
            return Probe(**found)
    training, checkpoint = base.experiment.training, base.experiment.checkpoint
    steps = max(min(_PROBED_STEPS, training.steps), _done(folder))
    fitted = base.train(folder, title="base, first steps", until=steps)
    lost = fitted.lost_seconds
    scorings = 1 + (steps // training.evaluate_every if training.evaluate_every else 0)
    found = Probe(
        step_seconds=fitted.step_seconds,
        step_flops=fitted.cost.total_flops,
        closed_flops=_step_flops(base, base.abstract_params()),
        compile_seconds=lost["compile"] + lost["start"],
        scoring_seconds=lost["evaluation"] / scorings,
        checkpoint_seconds=lost["checkpoint"] / (1 + steps // checkpoint.every_steps),
    )
    write_json(path, dataclasses.asdict(found) | {"fingerprint": key})
    return found


@dataclasses.dataclass(frozen=True)
class Counted:
    """A recipe, counted before anything is trained."""

    weight_bytes: int
    """Of the finished weights."""
    step_flops: float
    """Of a recovery's step, by the closed form; the teacher's included."""


def count(base: Session, recipe: Recipe, dense: weights.Params) -> Counted:
    """Counts a recipe from shapes alone; ValueError if it cannot be done to the model.

    `dense` are the shapes of the base's weights.
    """
    learned = chain(*recipe.transforms).abstract(dense)
    finished = chain(*recipe.finish).abstract(learned)
    flops = _step_flops(base, learned)
    if recipe.distill is not None:
        data = base.experiment.data
        tokens = data.batch_size * data.sequence_length
        flops += tokens * closed_form.forward_flops_per_token(base.model.config, data.sequence_length, "full")
    return Counted(weight_bytes(finished), flops)


class Estimator:
    """Prices of what a study is going to do."""

    def __init__(self, base: Session, found: Probe):
        """`found` is the speed that the prices rest on."""
        self._base, self._probe = base, found

    def base(self) -> Price:
        """The base's whole training."""
        training, checkpoint = self._base.experiment.training, self._base.experiment.checkpoint
        scorings = 2 + (training.steps // training.evaluate_every if training.evaluate_every else 0)
        fixed = 2 * self._probe.compile_seconds + scorings * self._probe.scoring_seconds
        fixed += (2 + training.steps // checkpoint.every_steps) * self._probe.checkpoint_seconds
        return Price(fixed + training.steps * self._probe.step_seconds, training.steps * self._probe.step_flops)

    def stage(self, counted: Counted, recipe: Recipe, steps: int) -> Price:
        """So many steps of a recipe's recovery, in one go: started, done, scored and saved."""
        step = self.steps(counted, steps)
        scorings = 2 if recipe.finish else 1
        fixed = self._probe.compile_seconds + self._probe.checkpoint_seconds
        return Price(step.seconds + fixed + scorings * self._probe.scoring_seconds, step.flops)

    def scoring(self) -> Price:
        """Scoring the finish of a training that is paid for."""
        return Price(self._probe.scoring_seconds)

    def measuring(self) -> Price:
        """What a row wants beside its score: the score before the recovery, and the speed of decoding."""
        return Price(self._probe.compile_seconds + 2 * self._probe.scoring_seconds)

    def steps(self, counted: Counted, steps: int) -> Price:
        """So many steps alone."""
        ratio = steps * counted.step_flops / self._probe.closed_flops
        return Price(ratio * self._probe.step_seconds, ratio * self._probe.step_flops)

    def verification(self) -> Price:
        """Comparing the finalist with the control."""
        return self.scoring() * _SCORINGS_OF_A_VERIFICATION


def _done(folder: Path) -> int:
    """The step that a training's newest checkpoint is of; 0 without one."""
    path = folder / "checkpoints"
    if not path.is_dir():
        return 0
    with Checkpoints(path) as checkpoints:
        return checkpoints.latest() or 0


def _step_flops(base: Session, params: weights.Params) -> float:
    """Of a training step with attention as it is computed: all scores, those that the mask hides too."""
    data = base.experiment.data
    return training_step_flops(base.model.config, params, data.batch_size, data.sequence_length, "full")
