"""Plans of models that read images or audio: the arrays of a batch, whole plans for this machine, and searches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import tpus
from sweep import sweep

from jaxcost import sharding
from jaxcost.config import Experiment
from jaxcost.cost import closed_form, hardware
from jaxcost.data import DataConfig
from jaxcost.models.config import AudioConfig, EncoderConfig, HeadConfig, ImageConfig, ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.planning import ranking, search, topology
from jaxcost.planning.plan import vocabulary_of
from jaxcost.planning.steps import trace_step

BASE = ModelConfig(
    vocab_size=0,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=32,
    causal=False,
    max_length=24,
    head=HeadConfig(outputs=5, pooling="mean"),
)
PICTURES = ImageConfig(patch=4, height=8, width=12, class_tokens=1)
WAVEFORM = AudioConfig(1, (8, 16), (10, 3), (5, 2), norm="first")
MELS = AudioConfig(6, (16, 16), (3, 3), (1, 2), padded=True)
MODELS = {
    "labels of images": {"images": PICTURES},
    "labels of patches": {"images": PICTURES, "head": HeadConfig(outputs=5)},
    "objects": {
        "images": dataclasses.replace(PICTURES, detection_tokens=3),
        "head": HeadConfig(outputs=5, boxes=True, hidden="relu"),
    },
    "labels of spectrograms": {"audio": MELS},
    "speech": {"audio": WAVEFORM, "head": HeadConfig(outputs=9)},
}
HEARS = {"vocab_size": 20, "causal": True, "head": HeadConfig(), "encoder": EncoderConfig(2, max_length=10)}


def experiment(**changes):
    return Experiment(
        model=dataclasses.replace(BASE, **changes),
        data=DataConfig(batch_size=8, sequence_length=4),
        execution=ExecutionConfig(unroll="never"),
    )


def traced(value, devices=4):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=devices // 2), jax.devices()[:devices])
    return trace_step("train", value, vocabulary_of(value), mesh)


@pytest.mark.parametrize(
    ("kind", "tokens", "shapes"),
    [
        ("labels of images", 7, {"inputs": (8, 12, 3), "targets": (1,), "mask": (1,)}),
        ("labels of patches", 7, {"inputs": (8, 12, 3), "targets": (7,), "mask": (7,)}),
        ("objects", 10, {"inputs": (8, 12, 3), "targets": (3,), "mask": (3,), "boxes": (3, 4)}),
        ("labels of spectrograms", 24, {"inputs": (47, 6), "targets": (1,), "mask": (1,), "valid": (24,)}),
        ("speech", 24, {"inputs": (250,), "targets": (4,), "mask": (4,), "valid": (24,)}),
    ],
)
def test_a_batch_is_what_the_model_reads_and_what_its_head_is_to_give(kind, tokens, shapes):
    step = traced(experiment(**MODELS[kind]))
    batch = step.arguments[1]
    assert {name: array.shape[1:] for name, array in batch.items()} == shapes
    assert {array.shape[0] for array in batch.values()} == {8}
    assert batch["inputs"].dtype == jnp.float32 and batch["targets"].dtype == jnp.int32
    assert step.tokens == 8 * tokens
    # Nothing of it contradicts the step.
    step.jitted.trace(*step.arguments)


def test_an_encoder_that_hears_for_a_decoder_is_planned():
    step = traced(experiment(audio=MELS, **HEARS))
    assert step.arguments[1]["source"].shape == (8, 19, 6) and step.tokens == 8 * 4
    step.jitted.trace(*step.arguments)


@sweep("kind", ["labels of images", "speech"], quick=1)
def test_a_plan_for_this_machine_says_what_its_step_takes(kind):
    value = experiment(**MODELS[kind])
    step = traced(value, devices=2)
    plan = topology.plan_step(step.jitted, step.arguments, hardware.load_chip("cpu"))
    length = value.model.row_tokens(4)
    model_flops = 8 * length * closed_form.training_flops_per_token(value.model, length, "full")
    # The closed form counts products; the program has its elementwise operations and the optimizer's besides.
    assert 0.9 < plan.cost.flops * 2 / model_flops < 3
    assert plan.peak_bytes > step.bytes_by_category["weights"] + step.bytes_by_category["optimizer"]
    assert plan.estimate.bound.seconds > 0


@sweep("kind", ["labels of images", "speech"], quick=1)
def test_a_search_ranks_layouts_by_the_tokens_of_an_image_or_of_audio(kind):
    value = experiment(**MODELS[kind])
    sizes = ranking.sizes_of(value, 0)
    found = list(search.candidates(value, hardware.load_chip("v5e"), tpus(2, 2), 0, sizes))
    assert found and {one.tokens for one in found} == {8 * value.model.row_tokens(4)}
    assert all(np.isfinite([one.seconds, one.bytes_per_device]).all() and one.seconds > 0 for one in found)
    # To rematerialise keeps less.
    kept = sizes.kept_bytes
    assert kept["full"] < kept["projections"] < kept["none"]


def test_what_cannot_be_planned_is_said():
    with pytest.raises(ValueError, match="model.head.embed is on, so that the model gives hidden states"):
        traced(experiment(images=PICTURES, head=HeadConfig(embed=True)))
    value = experiment(**MODELS["labels of images"])
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    for name in ("prefill", "decode"):
        with pytest.raises(ValueError, match="has no step but that of training"):
            trace_step(name, value, 0, mesh)
