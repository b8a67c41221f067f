"""Published training steps: what the planner is calibrated on and checked against.

A file of them is described by `published-runs-1`: each run has a model's shape, a topology, a batch, a mesh, what was
kept or offloaded, and the seconds that a step took.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize

from jaxcost.config import Experiment
from jaxcost.cost.estimate import Calibration, Parts
from jaxcost.data.config import DataConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import TENSORS, ExecutionConfig
from jaxcost.planning.plan import Plan, plan
from jaxcost.planning.topology import PlanningUnavailable, topology_chip
from jaxcost.sharding import MeshConfig
from jaxcost.training.config import OptimizerConfig, TrainingConfig

SCHEMA = "published-runs-1"
# Which axis of a weight fsdp splits is all the same to the compiler's cycles (7.78 and 7.83 seconds of matmuls for
# Llama-2-70B on v6e:16x16), so the transposed kind is planned as the plain one.
_AXIS = re.compile(r"\b(data|fsdp|expert|tensor|context)(?:_transpose)?\b(?:\s*=?\s*(\d+))?")
_WEIGHT_DTYPES = {"bf16 activations, f32 weights and moments": "float32", "bf16 weights": "bfloat16"}
_LOSS_TILES = re.compile(r"vocabulary loss in (\d+) tiles")
_TENSOR_NAMES = {"decoder_layer_input": "layer_input", "out_proj": "attention_projection"}
_SHAPE_FIELDS = {
    "layers": "num_layers",
    "width": "width",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "mlp": "mlp_width",
    "vocab": "vocab_size",
    "gated": "gated",
    "experts": "experts",
    "experts_per_token": "experts_per_token",
    "capacity_factor": "capacity_factor",
    "sliding_window": "window",
}
"""A field of a run's shape → the model's. `local_to_global`, the local layers to each global one, is the pattern."""
_NEEDED_FIELDS = {"layers", "width", "heads", "kv_heads", "head_dim", "mlp", "vocab", "gated"}
_PRIOR = Calibration(matmul=0.9, elementwise=0.4, kernel=2.0, exposed=0.3)
"""Where the fit starts, and what it keeps to where the runs say nothing: the matrix unit about as the compiler has it,
memory at 1 / 2.5 of its figure, attention at half of the peak, a third of the communication exposed."""
_PRIOR_WEIGHT = 0.05


class CannotPlan(ValueError):
    """A published run of a kind that cannot be compiled yet."""


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """One published step and the experiment that it was."""

    model: str
    topology: str
    chips: int
    step_seconds: float
    row: Mapping[str, Any]


def read_runs(path: pathlib.Path) -> list[PublishedRun]:
    """The runs of a file.

    Raises:
        ValueError: the file is not JSON of this schema, or a run lacks a field.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); give a file of published runs.") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("runs"), list):
        raise ValueError(f"{path} is not a list of published runs; its schema must be {SCHEMA!r}.")
    runs = []
    for number, row in enumerate(content["runs"]):
        try:
            runs.append(PublishedRun(row["model"], row["topology"], int(row["chips"]), float(row["step_seconds"]), row))
            row["shape"], row["sequences_per_device"], row["sequence"], row["mesh"], row["remat"], row["dtype"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: run {number} lacks or garbles {error}; complete it.") from None
    return runs


def experiment_of(run: PublishedRun, loss_chunks: int = 1) -> Experiment:
    """The experiment that a run was.

    Raises:
        CannotPlan: it has something that this framework's models or meshes do not, named in the sentence.
    """
    row, shape = run.row, run.row["shape"]
    unknown = sorted(set(shape) - {*_SHAPE_FIELDS, "local_to_global"})
    if unknown:
        raise CannotPlan(f"the model has {', '.join(unknown)}, which the transformer does not have yet")
    missing = sorted(_NEEDED_FIELDS - set(shape))
    if missing:
        raise CannotPlan(f"the model's shape lacks {', '.join(missing)}")
    if row["dtype"] not in _WEIGHT_DTYPES:
        raise CannotPlan(f"the number formats are {row['dtype']!r}; only {' and '.join(_WEIGHT_DTYPES)} are known")
    kept = {kind: tuple(_TENSOR_NAMES.get(name, name) for name in row["remat"][kind]) for kind in ("save", "offload")}
    strangers = sorted({name for names in kept.values() for name in names} - set(TENSORS))
    if strangers:
        raise CannotPlan(f"the activations {', '.join(strangers)} have no name here")
    if row["remat"].get("else") != "recompute":
        raise CannotPlan(f"what is not kept is {row['remat'].get('else')!r}, not recomputed")
    batch_size = row["sequences_per_device"] * run.chips * topology_chip(run.topology).devices_per_chip
    if batch_size != int(batch_size):
        raise CannotPlan(f"{row['sequences_per_device']} sequences a device are {batch_size} in all, no whole number")
    return Experiment(
        model=_model_of(shape, row["sequence"]),
        data=DataConfig(batch_size=int(batch_size), sequence_length=row["sequence"]),
        mesh=_mesh_of(row["mesh"]),
        execution=ExecutionConfig(
            compute="bfloat16",
            weights=_WEIGHT_DTYPES[row["dtype"]],
            gradients="bfloat16",
            remat="full",
            **kept,
        ),
        optimizer=OptimizerConfig(first_moment="bfloat16" if "first moment in bf16" in _note(run) else "float32"),
        training=TrainingConfig(loss_chunks=loss_chunks),
    )


def _model_of(shape: Mapping[str, Any], sequence: int) -> ModelConfig:
    fields = {_SHAPE_FIELDS[name]: value for name, value in shape.items() if name in _SHAPE_FIELDS}
    if "sliding_window" in shape:
        local = shape.get("local_to_global")
        fields["pattern"] = ("local",) if local is None else ("local",) * local + ("global",)
    return ModelConfig(max_length=sequence, **fields)


def _note(run: PublishedRun) -> str:
    return str(run.row.get("note") or "")


def _mesh_of(text: str) -> MeshConfig:
    """The mesh of a description such as `fsdp over 128 devices` or `fsdp 64, tensor 4`."""
    described = re.sub(r"\(.*?\)|\bover \d+ devices", "", str(text))
    axes = _AXIS.findall(described)
    if not axes or re.sub(r"[\s,x*×+]", "", _AXIS.sub("", described)):
        raise CannotPlan(f"the mesh {text!r} is not one of data, fsdp, expert, tensor and context")
    try:
        return MeshConfig(**{axis: int(size or -1) for axis, size in axes})
    except ValueError:
        raise CannotPlan(f"the mesh {text!r} does not say how large its axes are") from None


def plan_run(run: PublishedRun) -> Plan:
    """The plan of a published run; its loss is made in as many pieces as its note says, or as it takes to fit.

    A run that was published as fitting and that no number of pieces makes fit is planned all the same.

    Raises:
        CannotPlan: the run cannot be compiled, with the reason.
    """
    compiled = None
    tiles = _LOSS_TILES.search(_note(run))
    for chunks in (int(tiles[1]),) if tiles else (1, 4):
        try:
            made = plan(experiment_of(run, chunks), run.topology)
        except PlanningUnavailable:
            raise
        except ValueError as error:
            raise CannotPlan(str(error)) from error
        if made.compiled.fits is not False:
            return made
        compiled = made if made.compiled.estimate is not None else compiled
    if compiled is None:
        raise CannotPlan(made.memory_sentence())
    return compiled


def fit(parts: Sequence[Parts], seconds: Sequence[float]) -> Calibration:
    """The constants that make the calibrated estimate closest to published seconds, in relative error.

    Least squares of log constants around `_PRIOR`, which keeps few runs from driving a constant where it has no
    meaning; the exposed share is at most 1.
    """
    prior = np.log(dataclasses.astuple(_PRIOR))

    def residuals(logs):
        calibration = Calibration(*np.exp(logs))
        errors = [calibration.seconds(p) / s - 1 for p, s in zip(parts, seconds, strict=True)]
        return np.concatenate([errors, _PRIOR_WEIGHT * (logs - prior)])

    upper = np.full(4, np.inf)
    upper[3] = 0.0
    found = optimize.least_squares(residuals, prior, bounds=(-np.inf, upper), loss="soft_l1", f_scale=0.05)
    return Calibration(*(float(constant) for constant in np.exp(found.x)))


def leave_one_out(parts: Sequence[Parts], seconds: Sequence[float]) -> list[float]:
    """Each run's seconds as predicted with constants fitted on all the others."""
    return [
        fit([*parts[:i], *parts[i + 1 :]], [*seconds[:i], *seconds[i + 1 :]]).seconds(parts[i])
        for i in range(len(parts))
    ]
