"""One experiment: the rooms' own frozen dataclasses in one, read from configs/ and changed on the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import runpy
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from jaxcost import transforms
from jaxcost.cost.hardware import HardwareConfig
from jaxcost.cost.purchases import PriceConfig
from jaxcost.data.config import DataConfig
from jaxcost.data.synthesis.config import SynthesisConfig
from jaxcost.evaluation.score import EvaluationConfig
from jaxcost.models import context, pipeline
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.sharding import MeshConfig
from jaxcost.study import recipes, space
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig, WatchConfig
from jaxcost.training.distill import DistillConfig
from jaxcost.transforms import CalibrationConfig


class ConfigError(ValueError):
    """A config that cannot be read, or that cannot work."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained on what, where, how long, how it is cut, and what that is priced by."""

    model: ModelConfig = ModelConfig(vocab_size=0)
    """The transformer."""
    data: DataConfig = DataConfig()
    """The text, its tokeniser and the batches."""
    mesh: MeshConfig = MeshConfig(data=-1)
    """How the devices share the work."""
    execution: ExecutionConfig = ExecutionConfig()
    """Precision and rematerialisation."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    training: TrainingConfig = TrainingConfig()
    """Length of the run."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is scored."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept."""
    watch: WatchConfig = WatchConfig()
    """What is written for those who watch the run."""
    hardware: HardwareConfig = HardwareConfig()
    """The chips that the run is priced on."""
    prices: PriceConfig = PriceConfig()
    """What data cost."""
    synthesis: SynthesisConfig = SynthesisConfig()
    """Which language model is asked for new texts with labels, and how; by `scripts/synthesize.py` alone."""
    start: str = ""
    """Folder of a training, or of an imported checkpoint, that this one goes on from: its model, tokenizer and newest
    weights take the place of this one's, and its transforms come before this one's. New weights if it is empty."""
    transforms: tuple[transforms.Transform, ...] = ()
    """Transforms of the weights before training, as Python: 'lora(rank=4), prune(sparsity=0.5)'."""
    calibration: CalibrationConfig = CalibrationConfig()
    """The data that transforms may look at."""
    distill: DistillConfig = DistillConfig()
    """The teacher that is learned from beside the text; none by default."""
    study: recipes.StudyConfig = recipes.StudyConfig()
    """The recipes that a study compares."""

    def __post_init__(self):
        _check_finite(self)
        if self.data.sequence_length > self.model.max_length:
            raise ValueError(
                f"data.sequence_length ({self.data.sequence_length}) is longer than model.max_length "
                f"({self.model.max_length}); lower the one or raise the other."
            )
        tokens = self.model.images.tokens
        if self.data.of_images and tokens and self.data.sequence_length != tokens:
            raise ValueError(
                f"data.sequence_length is {self.data.sequence_length}, and an image makes {tokens} tokens by "
                f"model.images; set it to {tokens}, so that what a step costs is what is computed."
            )
        if self.data.batch_size % self.training.accumulation:
            raise ValueError(
                f"data.batch_size ({self.data.batch_size}) must be a multiple of training.accumulation "
                f"({self.training.accumulation})."
            )
        last = transforms.chain(*self.transforms).last_step()
        if last >= self.training.steps:
            raise ValueError(
                f"A gradual transform ends at step {last}, but training.steps is {self.training.steps}; "
                "train longer or let it end earlier."
            )
        if self.distill.active and self.data.objective == "regression":
            raise ValueError(
                "data.objective is 'regression', and a teacher is learned from by probabilities, of which a number has "
                "none; leave distill out."
            )
        images = self.data.augment.images
        if images.mixes and self.distill.active:
            raise ValueError(
                "data.augment.images mixes images and their labels, and a teacher takes one label for each; set mixup "
                "and cutmix to 0, or leave distill out."
            )
        if images.crop and images.crop >= min(self.model.images.height, self.model.images.width):
            raise ValueError(
                f"data.augment.images.crop is {images.crop}, and the model's images have "
                f"{self.model.images.height} x {self.model.images.width} pixels; move them by fewer."
            )
        if self.data.buckets and self.distill.top_k:
            raise ValueError(
                "distill.top_k stores what a teacher says of batches of one length, and data.buckets makes several; "
                "leave out one of them."
            )
        if self.start and self.distill.from_layers:
            raise ValueError(
                "distill.from_layers makes new weights, and start has some already; leave one of them out."
            )
        recipe_steps = (step for recipe in self.study.recipes for step in (*recipe.transforms, *recipe.finish))
        choices = (choice for one in self.study.spaces for choice in (*one.transforms, *one.finish))
        space_steps = (step for choice in choices for step in choice.values if isinstance(step, transforms.Transform))
        for one in _each((*self.transforms, *recipe_steps, *space_steps)):
            if isinstance(one, transforms.shrink) and one.heads is not None and one.head_dim != self.model.head_dim:
                raise ValueError(
                    f"shrink: head_dim is {one.head_dim}, but model.head_dim is {self.model.head_dim}; make them the "
                    "same."
                )

    def trained_part(self) -> Experiment:
        """The experiment without what does not touch a training: prices, what is kept, what is compared, the place."""
        default = Experiment()
        data = dataclasses.replace(self.data, data_dir=None, cache_dir=None, group_field="", workers=0)
        kept_out = ("hardware", "checkpoint", "watch", "study", "mesh", "prices", "synthesis")
        rest = {name: getattr(default, name) for name in kept_out}
        execution = dataclasses.replace(self.execution, cache=default.execution.cache)
        distill = dataclasses.replace(self.distill, store="")
        optimizer = dataclasses.replace(self.optimizer, split_over_data=False, offload=False)
        changed = {"data": data, "execution": execution, "distill": distill, "optimizer": optimizer}
        return dataclasses.replace(self, **changed, **rest)

    def check_devices(self, num_devices: int) -> None:
        """ValueError, in one sentence, if the model or the batch cannot be split over so many devices."""
        sizes = self.mesh.sizes(num_devices)
        microbatch = self.data.batch_size // self.training.accumulation
        rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        if microbatch % rows:
            raise ValueError(
                f"A microbatch of {microbatch} sequences (data.batch_size / training.accumulation) does not divide "
                f"into mesh.data x mesh.fsdp x mesh.expert = {rows} parts; make data.batch_size a multiple of "
                f"{rows * self.training.accumulation}."
            )
        m = self.model
        for length in self.data.lengths:
            context.check_length(length, sizes["context"])
        splits = [("model.width", m.width, "fsdp"), ("model.num_heads", m.num_heads, "tensor")]
        splits += [("model.num_kv_heads", m.num_kv_heads, "tensor"), ("model.mlp_width", m.mlp_width, "tensor")]
        splits += [("model.width", m.width, "tensor")]
        splits += [("model.experts", m.experts, "expert")]
        if m.encoder.num_layers:
            sizes_of = [(name, getattr(m.source, name)) for name in ("num_heads", "num_kv_heads", "mlp_width")]
            splits += [(f"model.encoder.{name}", size, "tensor") for name, size in sizes_of]
        for name, size, axis in splits:
            if size % sizes[axis]:
                raise ValueError(f"{name} ({size}) must be a multiple of mesh.{axis} ({sizes[axis]}); change either.")
        if sizes["context"] > 1:
            self._check_context(sizes)
        if sizes["stage"] > 1:
            self._check_stages(sizes["stage"], microbatch, rows)

    def _check_stages(self, stages: int, rows: int, ways: int) -> None:
        e, depths = self.execution, [("model", self.model)]
        depths += [("model.encoder", self.model.source)] if self.model.encoder.num_layers else []
        for name, m in depths:
            period = len(m.groups(0, m.num_layers)[0][1])
            if m.num_layers % (stages * e.rounds * period):
                raise ValueError(
                    f"{name}.num_layers ({m.num_layers}) must be a multiple of mesh.stage x execution.rounds"
                    f"{' x the layers of model.pattern' if period > 1 else ''} ({stages * e.rounds * period}); change "
                    "one of them."
                )
        pipeline.microbatches(e.microbatches, stages, rows, ways)

    def _check_context(self, sizes: dict[str, int]) -> None:
        m, ways = self.model, sizes["fsdp"] * sizes["context"]
        if not m.causal or m.encoder.num_layers or m.position == "relative" or self.data.of_segments:
            raise ValueError(
                "mesh.context splits causal sequences alone, without an encoder, relative positions or documents that "
                "are kept apart; set it to 1."
            )
        if m.width % ways:
            raise ValueError(
                f"model.width ({m.width}) must be a multiple of mesh.fsdp x mesh.context ({ways}), which both split "
                "the weights; change one of them."
            )
        heads, kv_heads = m.num_heads // sizes["tensor"], m.num_kv_heads // sizes["tensor"]
        method = context.resolve(self.execution.context, heads, kv_heads, sizes["context"])
        if method == "ring" and self.execution.attention in ("splash", "cudnn"):
            raise ValueError(
                f"execution.attention is {self.execution.attention!r}, which needs whole sequences, and a ring passes "
                "parts of them round; use 'auto', or a mesh.context that divides the heads."
            )


def load(path: str | Path) -> Experiment:
    """The `experiment` of a Python file such as those in configs/; ConfigError in one sentence if there is none."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no config file {path}; the ones that come with jaxcost are in configs/.")
    try:
        found = runpy.run_path(str(path)).get("experiment")
    except (Exception, SystemExit) as error:
        raise ConfigError(f"The config {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(found, Experiment):
        raise ConfigError(f"The config {path} does not define `experiment = Experiment(...)`.")
    return found


def _each(steps: Iterable[transforms.Transform]) -> Iterator[transforms.Transform]:
    """The transforms, with those of chains in their places."""
    for one in steps:
        yield from _each(one.transforms) if isinstance(one, transforms.Chain) else (one,)


def _check_finite(value: Any, path: str = "") -> None:
    """ValueError if any number of a nested dataclass is infinite or not a number."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _check_finite(getattr(value, field.name), f"{path}.{field.name}".removeprefix("."))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}; give a finite number.")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_finite(item, f"{path}[{index}]")


Overrides = Annotated[Experiment, tyro.conf.arg(name="")]
"""The type of a script's `experiment` argument: every field of it is a flag."""

_T = TypeVar("_T")


def parse(arguments_class: type[_T], argv: Sequence[str] | None = None) -> _T:
    """A script's arguments: a dataclass, documented by `--help`.

    If it has an `experiment: Overrides`, one argument must be a config file, whose fields become flags
    (--model.width 512). ConfigError, in one sentence, for anything that cannot be understood.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    default = tyro.MISSING_NONPROP
    if any(field.name == "experiment" for field in dataclasses.fields(arguments_class)):
        named = next((a for a in argv if a.endswith(".py")), None)
        if named is None and not set(argv) & {"-h", "--help"}:
            raise ConfigError("Name a config file first, such as configs/quickstart.py.")
        experiment = Experiment() if named is None else load(named)
        default = arguments_class(config=tyro.MISSING, experiment=experiment)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(arguments_class, args=argv, default=default, registry=_REGISTRY)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_one_line(said.getvalue())) from None


_REGISTRY = tyro.constructors.ConstructorRegistry()

_EXPRESSIONS = {
    tuple[transforms.Transform, ...]: {name: getattr(transforms, name) for name in transforms.__all__},
    tuple[recipes.Recipe, ...]: vars(recipes)
    | {"DistillConfig": DistillConfig}
    | {name: getattr(transforms, name) for name in transforms.__all__},
    tuple[space.Space, ...]: vars(space) | {name: getattr(transforms, name) for name in transforms.__all__},
    tuple[recipes.Budget, ...]: vars(recipes),
}
"""Fields that are written as Python on the command line, and the names that the Python may use."""


@_REGISTRY.primitive_rule
def _python_expression(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    # tyro writes some tuples as typing.Tuple, which is not equal.
    is_tuple = typing.get_origin(info.type) is tuple
    names = _EXPRESSIONS.get(tuple[typing.get_args(info.type)]) if is_tuple else None
    if names is None:
        return None

    def read(texts: list[str]) -> tuple:
        kind = info.type.__args__[0]
        try:
            found = eval(f"({texts[0]},)" if texts[0].strip() else "()", {"__builtins__": {}}, dict(names))
            if not all(isinstance(item, kind) for item in found):
                raise TypeError("write each with its parentheses, as in 'prune(), lora(rank=4)'")
            return found
        except Exception as error:
            raise ValueError(f"{texts[0]!r} is no list of {kind.__name__}s ({error})") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PYTHON",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [", ".join(map(repr, value))],
    )


def _one_line(box: str) -> str:
    """What tyro says in a box, as one line."""
    lines = [re.sub(r"[\u2500-\u257f]", " ", line).strip() for line in box.splitlines()]
    said = [line for line in lines[1:] if line]
    end = next((i for i, line in enumerate(said) if line.startswith(("For full helptext", "Argument helptext"))), None)
    return re.sub(r"\s+", " ", " ".join(said[:end])) + " (--help lists what there is.)"
