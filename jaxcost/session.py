"""An experiment made real: its tokens, tokeniser, model, mesh and prices, and one training with them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import jax

from jaxcost import hosts, objectives, serialization, sharding, weights
from jaxcost.config import Experiment
from jaxcost.cost import closed_form
from jaxcost.cost.hardware import Hardware, resolve
from jaxcost.cost.ledger import Ledger
from jaxcost.data import Tokenizer, build_tokenizer, load_tokenizer
from jaxcost.evaluation.batch import Batch, beside_inputs
from jaxcost.models import pipeline
from jaxcost.models.config import ModelConfig
from jaxcost.models.stacks import resized
from jaxcost.models.transformer import Transformer, abstract, axes_of, initialize, output_of
from jaxcost.sharding import MeshConfig
from jaxcost.training.checkpoints import CheckpointError, Checkpoints
from jaxcost.training.distill import Distiller, StoredLogits, Teacher, check_pair, student_params
from jaxcost.training.loop import Fitted, fit
from jaxcost.training.progress import Progress
from jaxcost.training.watch import Watch
from jaxcost.transforms import Calibration, Transform, calibrate, calibrated, chain
from jaxcost.transforms.manifest import check
from jaxcost.workdir import TOKENIZER, alone_in, claim, read_experiment

_STORE = "teacher"


class Session:
    """What the scripts and the study work with. Nothing is read or compiled before it is asked for."""

    def __init__(
        self,
        experiment: Experiment,
        tokenizer: Tokenizer | None = None,
        quiet: bool = False,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Opens an experiment.

        Args:
          experiment: what to open.
          tokenizer: takes the place of the one that the data config names.
          quiet: show no progress.
          devices: what the mesh is made of; all devices if none are given.

        Raises:
          ValueError: the model or the batch does not divide over the devices, or there is nothing to start from.
        """
        self.devices = list(jax.devices() if devices is None else devices)
        if tokenizer is None and experiment.start:
            experiment = started(experiment)
            tokenizer = load_tokenizer(Path(experiment.start) / TOKENIZER)
        self.experiment = experiment
        self.tokenizer = build_tokenizer(experiment.data) if tokenizer is None else tokenizer
        self.quiet = quiet
        config = experiment.model
        tokens = objectives.least_vocabulary(experiment.data.objective, self.tokenizer)
        if config.vocab_size == 0 and config.of_tokens:
            config = dataclasses.replace(
                config, vocab_size=objectives.chosen_vocabulary(experiment.data.objective, self.tokenizer)
            )
        if config.vocab_size < tokens and config.of_tokens:
            raise ValueError(
                f"model.vocab_size ({config.vocab_size}) is smaller than the tokenizer's vocabulary "
                f"({tokens}); raise it, or use 0 to take the tokenizer's size."
            )
        experiment.check_devices(len(self.devices))
        self.model = Transformer(config, experiment.execution)
        self.mesh = sharding.make_mesh(experiment.mesh, self.devices)
        self.transform = chain(*experiment.transforms)

    def reopen(self, experiment: Experiment) -> Session:
        """A session of another experiment with this one's tokenizer."""
        return Session(experiment, self.tokenizer, self.quiet, self.devices)

    def derive(self, experiment: Experiment) -> Session:
        """A session of another experiment on the same model and data, which shares what is open already."""
        other = self.reopen(experiment)
        other._share(self, "hardware", "train_stream", "validation_stream", "scorer")
        return other

    def on(self, devices: Sequence[jax.Device]) -> Session:
        """A session of the same experiment and data on a part of the devices, priced as that part of the chips.

        It shows no progress, as several of them may work at once.

        Raises:
          ValueError: the model or the batch does not divide over the part.
        """
        other = Session(self.experiment, self.tokenizer, True, devices)
        other._share(self, "train_stream", "validation_stream")
        share = len(devices) / len(self.devices)
        other.hardware = dataclasses.replace(self.hardware, num_chips=self.hardware.num_chips * share)
        return other

    def _share(self, other: Session, *names: str) -> None:
        """Takes over what another session has opened already."""
        vars(self).update({name: vars(other)[name] for name in names if name in vars(other)})

    @cached_property
    def hardware(self) -> Hardware:
        """The chips that the run is priced on."""
        return resolve(self.experiment.hardware)

    @cached_property
    def train_stream(self):
        """The training split as tokens, or as examples."""
        return self._split(self.experiment.data.train_split)

    @cached_property
    def validation_stream(self):
        """The validation split as tokens, or as examples."""
        return self._split(self.experiment.data.validation_split)

    def _split(self, split: str) -> objectives.Split:
        return objectives.open_split(self.experiment.data, split, self.tokenizer, self.model.config)

    def train_batches(self, **part: Any) -> grain.DatasetIterator:
        """An endless iterator of the batches of the training split, from its beginning; `part` as `train_batches` has
        it."""
        data, tokenizer = self.experiment.data, self.tokenizer
        return objectives.learned_batches(data, self.train_stream, tokenizer, self.model.config, **part)

    @cached_property
    def scorer(self) -> Callable[[weights.Params], Any]:
        """Scores weights on the validation split."""
        objectives.check_model(self.experiment.data.objective, self.experiment.model, self.experiment.data.of_images)
        limit = self.experiment.evaluation.max_tokens or None
        split = self.validation_stream
        return objectives.make_scorer(self.experiment.data, split, self.tokenizer, self.model, self.mesh, limit)

    def evaluate(self, params: weights.Params) -> dict[str, float | None]:
        """The figures that go into the ledger."""
        return dataclasses.asdict(self.scorer(params))

    def place(self, make: Callable[..., weights.Params], *args) -> weights.Params:
        """make(*args), computed where the mesh rules put its result: no device holds more than its part."""
        abstract = jax.eval_shape(make, *args)
        places = sharding.shardings(abstract, axes_of(self.model, abstract), self.mesh)
        return jax.jit(make, out_shardings=places)(*args)

    def put(self, params: weights.Params) -> weights.Params:
        """Weights from elsewhere, copied to where the mesh rules put them."""
        return jax.device_put(params, sharding.shardings(params, axes_of(self.model, params), self.mesh))

    def base_params(self) -> weights.Params:
        """New weights from the experiment's seed, without transforms."""
        return self.place(lambda key: initialize(self.model, key)[0], self._keys()[0])

    def fresh_params(self, teacher: Teacher | None = None) -> weights.Params:
        """The weights that training starts from, transformed.

        They are new ones from the experiment's seed, or those of the folder that it starts from, or blocks of the
        teacher where it asks for them.
        """
        if self.experiment.start:
            first, params, _ = load_run(Path(self.experiment.start), self.devices)
            if first.model.config.head != self.model.config.head:
                new = self.base_params()
                kept = {name: tree for name, tree in params.items() if name not in ("head", "unembed")}
                params = {name: new[name] for name in new if name not in params} | kept | {"head": new["head"]}
            params = weights.map_weights(self._kept_as, self.put(params))
            own = self.experiment.transforms[len(first.experiment.transforms) :]
            return self.transformed(chain(*own), params, self._keys()[1])
        from_layers = teacher is not None and self.experiment.distill.from_layers
        depth = self.model.config.num_layers
        start = self.place(lambda p: student_params(p, depth), teacher.params) if from_layers else self.base_params()
        return self.transformed(self.transform, start, self._keys()[1])

    def abstract_params(self) -> weights.Params:
        """The shapes of the transformed weights, as ShapeDtypeStructs.

        Raises:
          ValueError: a weight cannot be transformed so, or what is left of the model does not divide over the devices.
        """
        params = self.transform.abstract(abstract(self.model)[0])
        left = dataclasses.replace(self.experiment, model=resized(self.model.config, params))
        left.check_devices(len(self.devices))
        return params

    def placed(self) -> list[sharding.Placed]:
        """Where every array of the transformed weights lives on this mesh; nothing is computed."""
        params = self.abstract_params()
        return sharding.placed(params, sharding.shardings(params, axes_of(self.model, params), self.mesh))

    @property
    def bubble(self) -> float:
        """The share of a step in which the stages of mesh.stage wait for each other."""
        sizes, e = dict(self.mesh.shape), self.experiment.execution
        if sizes["stage"] == 1:
            return 0.0
        rows = self.experiment.data.batch_size // self.experiment.training.accumulation
        ways = math.prod(sizes[axis] for axis in sharding.RULES["batch"])
        return pipeline.bubble(
            sizes["stage"], pipeline.microbatches(e.microbatches, sizes["stage"], rows, ways), e.rounds
        )

    @cached_property
    def transformed_config(self) -> ModelConfig:
        """The model's config with the sizes that the transforms leave."""
        return resized(self.model.config, self.abstract_params())

    def transformed(self, transform: Transform, params: weights.Params, key: jax.Array) -> weights.Params:
        """The transformed weights, calibrated on the training split where a transform asks for it.

        Raises:
          CalibrationError: the data are of no use.
          ValueError: a weight cannot be transformed so.
        """
        with jax.set_mesh(self.mesh):
            return calibrated(transform, params, key, self.forward, self._calibration_batches, self.place)

    def calibration(self, transform: Transform, params: weights.Params) -> Calibration | None:
        """What one transform must know of the inputs of the weights that it picks; None where that is nothing."""
        wanted = {path: settings.statistics() for path, settings in transform.picked(params).items()}
        if all(statistics == "none" for statistics in wanted.values()):
            return None
        return calibrate(self.forward, params, self._calibration_batches(), wanted)

    @property
    def peak_flops_per_second(self) -> float | None:
        """Of all chips, in the compute dtype; None where it is unknown."""
        kind = "bf16" if self.experiment.execution.compute == "bfloat16" else "f32"
        peak = self.hardware.chip.peak(kind) or self.hardware.chip.peak("bf16")
        return None if peak is None else peak * self.hardware.num_chips

    def model_flops_per_token(self) -> float:
        """Training FLOPs of a model of the sizes that the transforms leave, causal attention, no recomputation."""
        return closed_form.training_flops_per_token(self.transformed_config, self.experiment.data.sequence_length)

    def train(
        self,
        directory: Path,
        make_params: Callable[[], weights.Params] | None = None,
        title: str = "train",
        teacher: Teacher | None = None,
        until: int | None = None,
    ) -> Fitted:
        """Trains in a folder, or goes on with the training that it holds; `fit` says what can go wrong.

        Args:
          directory: the folder.
          make_params: makes the weights of a fresh start; `fresh_params` if it is not given.
          title: stands before the progress.
          teacher: takes the place of the one that the experiment's distillation names.
          until: a step to stop at before the last one, as `fit` has it.

        Raises:
          ValueError: the folder holds a run of another experiment, or the teacher cannot teach this student.
        """
        directory = Path(directory)
        # Whatever is wrong with the data is said before the folder is claimed for this experiment.
        self.open()
        rows = sharding.own_rows(self.mesh, self.experiment.data.batch_size)
        batches = self.train_batches(rows=rows, numbered=self.experiment.watch.records)
        with contextlib.closing(batches), alone_in(directory):
            teacher, distilled = self._distilled(directory, teacher)
            make_params = make_params or (lambda: self.fresh_params(teacher))
            claim(directory, self.experiment, self.tokenizer)
            stored = distilled.get("stored")
            if stored is not None and stored.missing():
                stored.write(teacher, self.train_batches(), self.mesh)
            return self._fit(directory, batches, make_params, title, distilled | {"until": until})

    def teacher(self) -> Teacher:
        """The teacher that the experiment's distillation names, on this mesh.

        Raises:
          ValueError: none is named, its folder holds no run, or its tokeniser is another.
          CheckpointError: it has no checkpoint yet, or the newest is damaged.
        """
        folder = self.experiment.distill.teacher
        if not folder:
            raise ValueError("Distillation needs a teacher; give the folder of a training as distill.teacher.")
        session, params, _ = load_run(folder, self.devices)
        if session.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                f"The teacher in {folder} reads text with another tokeniser; give the student the same data.tokenizer."
            )
        places = sharding.shardings(params, axes_of(session.model, params), self.mesh)
        return Teacher(session.model, jax.device_put(params, places))

    def open(self) -> None:
        """Reads both splits and prepares the scorer, so that a session derived from this one need not."""
        objectives.check_model(self.experiment.data.objective, self.experiment.model, self.experiment.data.of_images)
        self.train_stream, self.scorer  # noqa: B018

    def distiller(self, teacher: Transformer | None) -> Distiller | None:
        """What the train step must know of the distillation; None where there is none."""
        config = self.experiment.distill
        return Distiller(config, teacher if config.online else None) if config.active else None

    def _distilled(self, directory: Path, teacher: Teacher | None) -> tuple[Teacher | None, dict[str, Any]]:
        """The teacher, where it was needed, and what `fit` must know of the distillation."""
        config = self.experiment.distill
        if not config.active:
            return None, {}
        store = Path(config.store) if config.store else directory / _STORE
        stored = StoredLogits(store, self._said_by_teacher(), self.experiment.training.steps) if config.top_k else None
        if teacher is None and (config.online or config.from_layers or stored.missing()):
            teacher = self.teacher()
        if teacher is not None:
            check_pair(self.model, teacher.model, config)
        source = {"teacher": teacher.params} if config.online else {"stored": stored}
        return teacher, {"distiller": self.distiller(teacher and teacher.model)} | source

    def _said_by_teacher(self) -> dict[str, Any]:
        """What a teacher's stored logits depend on."""
        data, config = self.experiment.trained_part().data, self.experiment.distill
        said = {"data": serialization.to_json(data), "tokenizer": self.tokenizer.fingerprint}
        said |= {"vocabulary": self.model.config.vocab_size, "teacher": config.teacher}
        return said | {"temperature": config.temperature, "top_k": config.top_k}

    def _fit(
        self,
        directory: Path,
        batches,
        make_params: Callable[[], weights.Params],
        title: str,
        distilled: dict[str, Any],
    ) -> Fitted:
        data = self.experiment.data
        ledger = Ledger(directory / "ledger.jsonl" if hosts.is_first() else None, self.hardware, data=self.purchases)
        self._say_data(ledger)
        return fit(
            self.model,
            self.abstract_params(),
            make_params,
            batches,
            self.evaluate,
            directory=directory,
            mesh=self.mesh,
            transform=self.transform,
            optimizer=self.experiment.optimizer,
            training=self.experiment.training,
            checkpoint=self.experiment.checkpoint,
            ledger=ledger,
            watch=Watch(directory, self.experiment.watch),
            lengths=data.lengths if data.buckets else (),
            batch_size=data.batch_size,
            progress=Progress(
                title,
                self.peak_flops_per_second,
                self.model_flops_per_token() * data.batch_size * data.sequence_length,
                self.quiet or not hosts.is_first(),
            ),
            **distilled,
        )

    @cached_property
    def purchases(self) -> dict[str, Any]:
        """What the examples of the train split cost: `labels`, tokens and sentences, and `data_usd`, None if unknown.

        Nothing where texts alone are learned.
        """
        if not self.experiment.data.of_examples:
            return {}
        bought = self.train_stream.bought()
        return bought | {"data_usd": self.experiment.prices.usd(bought)}

    def _say_data(self, ledger: Ledger) -> None:
        """Writes down, once in a run, what of the data was left out or cut, and how many examples there are."""
        found = objectives.data_report(self.train_stream, self.tokenizer)
        if found and not any(line["event"] == "data" for line in ledger.lines()):
            ledger.record(0, event="data", **found)

    def forward(self, params: weights.Params, batch: Batch) -> jax.Array:
        """What the model gives for a batch: logits of every token, or of its one answer for a row."""
        hidden_BSD, _ = self.model.apply({"params": params}, batch["inputs"], **beside_inputs(batch))
        return output_of(self.model.config, params)(hidden_BSD)

    def _calibration_batches(self) -> Iterator[dict[str, jax.Array]]:
        for batch in itertools.islice(self.train_batches(), self.experiment.calibration.batches):
            yield sharding.place_batch(batch, self.mesh)

    def _kept_as(self, path: str, w: Any) -> Any:
        """A weight in the dtype that this experiment keeps weights in; codes and what belongs to them stay."""
        return w if weights.is_weight(w) else w.astype(self.experiment.execution.weights)

    def check_language_model(self) -> None:
        """ValueError if the model is not one that text alone trains."""
        objectives.check_model("next_token", self.experiment.model)
        if self.experiment.data.objective != "next_token":
            raise ValueError(
                f"data.objective is {self.experiment.data.objective!r}, and this is for the next token of texts; leave "
                "it by default."
            )

    def _keys(self) -> jax.Array:
        return jax.random.split(jax.random.key(self.experiment.training.seed))


def started(experiment: Experiment) -> Experiment:
    """The experiment with the model and the transforms of the folder that it starts from; itself without one.

    Where labels or numbers are learned, the head is the experiment's own.

    Raises:
      ValueError: the folder holds no run, or the model does not suit the experiment.
    """
    if not experiment.start:
        return experiment
    first = read_experiment(Path(experiment.start))
    own = (*first.transforms, *experiment.transforms)
    model = first.model
    if experiment.data.one_answer and experiment.model.head.outputs:
        # They are told by a head of their own, which starts anew where the folder's is another.
        model = dataclasses.replace(model, head=experiment.model.head, tie_embeddings=False)
    return dataclasses.replace(experiment, model=model, transforms=own)


def load_run(directory: Path, devices: Sequence[jax.Device] | None = None) -> tuple[Session, weights.Params, int]:
    """The session, the newest weights and their step of a training's folder.

    They are spread over the devices by the training's mesh where that fits them, or else put on the first one.

    Raises:
      ValueError: the folder holds no run.
      CheckpointError: it has no checkpoint yet, or the newest is damaged.
      BrokenError: the weights are not what the checkpoint's manifest says.
    """
    directory = Path(directory)
    experiment = read_experiment(directory)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    devices = list(jax.devices() if devices is None else devices)
    try:
        session = Session(experiment, tokenizer, devices=devices)
    except ValueError:
        experiment = dataclasses.replace(experiment, mesh=MeshConfig())
        session = Session(experiment, tokenizer, devices=devices[:1])
    with jax.set_mesh(session.mesh):
        params = session.abstract_params()
    places = sharding.shardings(params, axes_of(session.model, params), session.mesh)
    target = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), params, places)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise CheckpointError(f"{directory} has no checkpoint yet; train first, or wait for the first one.")
        found, saved = checkpoints.restore(step, {"params": target}, part=True)
    check(saved.get("manifest", {}), found["params"], step=f"reading {directory}")
    return session, found["params"], step


def load_draft(directory: Path, tokenizer: Tokenizer) -> tuple[Transformer, weights.Params]:
    """The model and the newest weights of a training that is to propose tokens to a model with such a tokenizer.

    Raises:
      ValueError: as `load_run`, or if it reads text with another tokenizer.
    """
    session, params, _ = load_run(directory)
    if session.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"--draft {directory} reads text with another tokenizer; name a training with the same one.")
    return session.model, params
