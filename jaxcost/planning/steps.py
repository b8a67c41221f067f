"""An experiment's own steps (train, prefill, decode), traced for a mesh that this machine need not have.

They are the steps that the trainer and the engine run, with the experiment's transforms and its teacher; nothing is a
model of them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcost import sharding, weights
from jaxcost.config import Experiment
from jaxcost.models.config import ModelConfig
from jaxcost.models.inputs import largest_input
from jaxcost.models.stacks import resized
from jaxcost.models.transformer import Transformer, abstract, axes_of, start_cache
from jaxcost.serving.engine import Engine
from jaxcost.serving.sampling import Sampling, rows_of
from jaxcost.training.distill import Distiller, check_pair
from jaxcost.training.loop import jitted_step
from jaxcost.training.optimizer import make_optimizer
from jaxcost.transforms import chain
from jaxcost.workdir import read_experiment

StepName = Literal["train", "prefill", "decode"]
STEPS: tuple[StepName, ...] = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step ready to be compiled."""

    jitted: Any
    """The step under `jax.jit`."""
    arguments: tuple[Any, ...]
    """Trees of `jax.ShapeDtypeStruct` with shardings."""
    static: dict[str, Any]
    """Static keyword arguments."""
    bytes_by_category: dict[str, int]
    """Bytes of one device that the arguments take: weights, teacher, optimizer, cache, batch."""
    tokens: int
    """Tokens that one run of the step trains on, reads or writes: of an image its patches, of audio its frames."""


def _model(experiment: Experiment, vocab_size: int) -> Transformer:
    return Transformer(dataclasses.replace(experiment.model, vocab_size=vocab_size), experiment.execution)


def _shapes(experiment: Experiment, model: Transformer, devices: int) -> weights.Params:
    """The transformed weights; ValueError if what is left of the model does not divide over the devices."""
    params = chain(*experiment.transforms).abstract(abstract(model)[0])
    left = dataclasses.replace(experiment, model=resized(model.config, params))
    left.check_devices(devices)
    return params


def trace_step(name: StepName, experiment: Experiment, vocab_size: int, mesh: Mesh) -> TracedStep:
    """One of the experiment's steps for a mesh. For serving, the batch and the context are the data config's.

    Of images and audio, `data.sequence_length` is the most that is to be told of one: objects, or characters.

    Raises:
        ValueError: the experiment does not divide over the mesh's devices, its teacher cannot teach it, or its model
            has no such step.
    """
    experiment.check_devices(mesh.size)
    with jax.set_mesh(mesh):
        if name == "train":
            return _train(experiment, vocab_size, mesh)
        return _serve(name, experiment, vocab_size, mesh)


def _train(experiment: Experiment, vocab_size: int, mesh: Mesh) -> TracedStep:
    model = _model(experiment, vocab_size)
    transform = chain(*experiment.transforms)
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    distiller, taught = _taught(experiment, model, mesh)
    data = experiment.data
    rows = (data.batch_size, model.config.row_tokens(data.sequence_length))
    place = sharding.batch_sharding(mesh)
    batch = _learned(experiment, model) | (distiller.stored(*rows) if distiller else {})
    batch = {name: _shaped(array, place) for name, array in batch.items()}
    shapes = _shapes(experiment, model, mesh.size)
    # Of audio, answers to every frame are those of CTC.
    speech = model.config.audio.channels and not model.config.of_tokens and model.config.head.pooling == "none"
    blank = 0 if speech else None
    step, state = jitted_step(
        model, shapes, optimizer, transform, experiment.training, mesh, distiller, experiment.optimizer, blank
    )
    trainable, _ = weights.partition(state.params)
    categories = {
        "weights": _device_bytes((state.params, state.beside)),
        "teacher": _device_bytes(taught),
        "optimizer": _device_bytes(state.optimizer),
        "gradients": _device_bytes((trainable, state.beside)),
        "batch": _device_bytes(batch),
    }
    return TracedStep(step, (state, batch, *taught), {}, categories, math.prod(rows))


def _learned(experiment: Experiment, model: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch that the model learns from."""
    data, c = experiment.data, model.config
    if not c.of_tokens:
        mixed = (data.batch_size, 1, c.head.outputs)
        shares = {"shares": jax.ShapeDtypeStruct(mixed, jnp.float32)} if data.augment.images.mixes else {}
        return _seen_or_heard(c, data.batch_size, data.sequence_length) | shares
    shape = (data.batch_size, data.sequence_length)
    answers = shape if c.head.pooling == "none" else (shape[0], 1)
    numbers = jnp.float32 if data.objective == "regression" else jnp.int32
    batch = {"inputs": inputs_of(c, *shape)} | _targets(answers, numbers)
    if data.one_answer:
        batch["valid"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    if data.of_segments:
        batch["segments"] = jax.ShapeDtypeStruct(shape, jnp.int32)
    if c.encoder.num_layers:
        texts = {
            "source": jax.ShapeDtypeStruct(shape, jnp.int32),
            "source_valid": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }
        batch |= texts if data.of_examples and c.source.of_tokens else {"source": _source(model, shape[0])}
    return batch


def _seen_or_heard(c: ModelConfig, rows: int, most: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch of images, or of audio at its longest, and what its head is to give of each.

    That is a label, `most` objects and their boxes, a label for every patch, or `most` characters of a transcript.
    """
    head = c.head
    if head.embed:
        raise ValueError(
            "model.head.embed is on, so that the model gives hidden states, of which nothing is learned; set "
            "model.head.outputs to plan its training."
        )
    batch = {"inputs": inputs_of(c, rows, most)}
    if head.pooling != "none":
        batch |= _targets((rows, 1))
    elif head.boxes:
        objects = min(most, c.images.detection_tokens)
        batch |= _targets((rows, objects)) | {"boxes": jax.ShapeDtypeStruct((rows, objects, 4), jnp.float32)}
    else:
        batch |= _targets((rows, c.images.tokens or most))
    if c.audio.channels:
        batch["valid"] = jax.ShapeDtypeStruct((rows, c.max_length), jnp.bool_)
    return batch


def inputs_of(c: ModelConfig, rows: int, length: int) -> jax.ShapeDtypeStruct:
    """What a model reads: rows of so many tokens, or of images, or of audio at its longest."""
    if c.of_tokens:
        return jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return jax.ShapeDtypeStruct(*largest_input(c, rows))


def _targets(shape: tuple[int, ...], dtype=jnp.int32) -> dict[str, jax.ShapeDtypeStruct]:
    return {"targets": jax.ShapeDtypeStruct(shape, dtype), "mask": jax.ShapeDtypeStruct(shape, jnp.float32)}


def teacher_of(experiment: Experiment) -> Experiment | None:
    """The experiment whose model teaches inside of the train step; None where there is none, or it has written."""
    if not experiment.distill.online:
        return None
    if not experiment.distill.teacher:
        raise ValueError("A step with a teacher needs its model; give the folder of a training as distill.teacher.")
    return read_experiment(experiment.distill.teacher)


def _taught(
    experiment: Experiment, student: Transformer, mesh: Mesh
) -> tuple[Distiller | None, tuple[weights.Params, ...]]:
    """What the step must know of the distillation, and the teacher's weights where the step takes them."""
    teacher = teacher_of(experiment)
    if teacher is None:
        return Distiller(experiment.distill) if experiment.distill.active else None, ()
    model = _model(teacher, teacher.model.vocab_size or student.config.vocab_size)
    check_pair(student, model, experiment.distill)
    shapes = chain(*teacher.transforms).abstract(abstract(model)[0])
    return Distiller(experiment.distill, model), (_on_mesh(model, shapes, mesh),)


def _serve(name: StepName, experiment: Experiment, vocab_size: int, mesh: Mesh) -> TracedStep:
    model = _model(experiment, vocab_size)
    if not model.config.of_tokens:
        raise ValueError(
            "The model reads images or audio and writes nothing, so that it has no step but that of training; leave "
            "--step by default."
        )
    batch, length = experiment.data.batch_size, experiment.data.sequence_length
    shapes = _shapes(experiment, model, mesh.size)
    params = _on_mesh(model, shapes, mesh)
    rows = _place(mesh, "batch")
    source = _source(model, batch) if model.config.encoder.num_layers else None
    empty = jax.eval_shape(lambda params, source: start_cache(model, params, batch, length, source), shapes, source)
    kv = _place(mesh, None, "batch", None, "kv_heads", None)
    cache = jax.tree.map(lambda a: _shaped(a, kv if a.ndim == 5 else rows), empty)
    engine = Engine(model)
    categories = {"weights": _device_bytes(params), "cache": _device_bytes(cache)}
    if name == "prefill":
        prompts = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=_place(mesh, "batch", None))
        lengths = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)
        return TracedStep(engine.prefill, (params, prompts, lengths, cache), {}, categories, batch * length)
    logits = jax.ShapeDtypeStruct((batch, vocab_size), jnp.float32, sharding=_place(mesh, "batch", None))
    # By shapes alone: nothing can be computed on devices that are only described.
    unwritten, sampling = [np.zeros(0, int)] * batch, [Sampling(temperature=1.0)] * batch
    drawn = jax.eval_shape(lambda: rows_of(sampling, unwritten, vocab_size))
    arguments = (params, logits, cache, jax.tree.map(lambda a: _shaped(a, rows), drawn))
    return TracedStep(engine.decode, arguments, {"steps": 1}, categories, batch)


def _source(model: Transformer, rows: int) -> jax.ShapeDtypeStruct:
    """What an encoder reads at its longest."""
    return jax.ShapeDtypeStruct(*largest_input(model.config.source, rows))


def _on_mesh(model: Transformer, shapes: weights.Params, mesh: Mesh) -> weights.Params:
    return jax.tree.map(_shaped, shapes, sharding.shardings(shapes, axes_of(model, shapes), mesh))


def _place(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, sharding.mesh_spec(PartitionSpec(*axes), mesh.shape))


def _shaped(array: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def _device_bytes(tree: Any) -> int:
    """Bytes of a tree on one device."""

    def one(leaf):
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
        return weights.storage_bytes(jax.ShapeDtypeStruct(shape, leaf.dtype))

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))
