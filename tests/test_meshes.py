"""Training on a mesh is training on one device: every axis alone, mixtures, each kind of model and transform."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import small
from quick import QUICK_TO_COMPILE
from sweep import sweep
from test_every_family import TRANSFORMS

from jaxcost import sharding, weights
from jaxcost.config import Experiment
from jaxcost.data import DataConfig
from jaxcost.models import pipeline
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.parts import EncoderConfig
from jaxcost.models.transformer import Transformer, axes_of, initialize
from jaxcost.sharding import MeshConfig
from jaxcost.training.config import OptimizerConfig, TrainingConfig
from jaxcost.training.loop import jitted_step
from jaxcost.training.optimizer import make_optimizer
from jaxcost.transforms import chain, lora, prune

DENSE = ModelConfig(
    vocab_size=64, width=32, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=8, mlp_width=64, max_length=32
)
BIASED = dataclasses.replace(DENSE, mlp_bias=True)
MODELS = {
    "dense": DENSE,
    "biased": BIASED,
    "experts": dataclasses.replace(DENSE, experts=4, experts_per_token=2),
    "encoder-decoder": dataclasses.replace(DENSE, encoder=EncoderConfig(num_layers=4)),
}
ALONE = [{"data": 8}, {"fsdp": 8}, {"tensor": 4}, {"context": 4}, {"stage": 4}]
MIXED = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "context": 4},
    {"fsdp": 2, "tensor": 2, "context": 2},
    {"fsdp": 4, "stage": 2},
    {"data": 2, "stage": 4},
    {"data": 2, "tensor": 2, "stage": 2},
    {"fsdp": 2, "tensor": 2, "stage": 2},
    {"fsdp": 2, "context": 2, "stage": 2},
    {"tensor": 2, "context": 2, "stage": 2},
]
CASES = [("dense", axes) for axes in (MIXED[7], *ALONE, *MIXED[:7], *MIXED[8:])]
CASES += [
    ("experts", axes) for axes in ({"expert": 4}, {"expert": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2})
]
CASES += [("experts", axes) for axes in ({"data": 2, "expert": 4}, {"expert": 2, "stage": 2, "fsdp": 2})]
CASES += [("encoder-decoder", axes) for axes in (MIXED[0], MIXED[6], MIXED[7], {"stage": 4})]
LARGE = [("dense", {"data": 2, "fsdp": 2, "tensor": 2, "stage": 2}), ("dense", {"fsdp": 8, "tensor": 2})]
LARGE += [("dense", {"data": 2, "fsdp": 2, "context": 4}), ("experts", {"data": 2, "expert": 2, "tensor": 4})]
"""Mixtures of sixteen devices."""
STEPS = 20


def named(axes):
    return " x ".join(f"{axis} {size}" for axis, size in axes.items())


@functools.cache
def batches(kind, steps=STEPS):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(steps):
        tokens = rng.integers(0, 64, (16, 17)).astype(np.int32)
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((16, 16), np.float32)}
        # Rows of different lengths, so that a loss over microbatches cannot be a mean of means.
        batch["mask"][np.arange(16) < rng.integers(4, 16, (16, 1))] = 0
        if kind == "encoder-decoder":
            batch["source"] = rng.integers(0, 64, (16, 8)).astype(np.int32)
            batch["source_valid"] = np.arange(8) < rng.integers(1, 9, (16, 1))
        made.append(batch)
    return made


def losses(kind, axes, transform=None, steps=STEPS, accumulation=1, **execution):
    mesh_config = MeshConfig(**axes)
    model = Transformer(MODELS[kind], ExecutionConfig(unroll="never", **execution))
    params = initialize(Transformer(MODELS[kind]), jax.random.key(0))[0]
    params = params if transform is None else transform(params, jax.random.key(1))
    devices = jax.devices()[: math.prod(dataclasses.asdict(mesh_config).values())]
    mesh = sharding.make_mesh(mesh_config, devices)
    how = {"transform": transform, "accumulation": accumulation, "learning_rate": 2e-3}
    found, _ = small.trained(model, params, batches(kind, steps), mesh, **how)
    return [metrics["loss"] for metrics in found]


@functools.cache
def alone(kind, accumulation=1):
    return losses(kind, {}, accumulation=accumulation)


def assert_as_alone(kind, axes, found):
    # The router's losses are of each microbatch, as those of accumulation are.
    stages = MeshConfig(**axes).stage if kind == "experts" else 1
    rows = math.prod(size for axis, size in axes.items() if axis in ("data", "fsdp", "expert"))
    parts = pipeline.microbatches(0, stages, 16, rows) if stages > 1 else 1
    np.testing.assert_allclose(found, alone(kind, parts), rtol=1e-5)


@sweep(("kind", "axes"), CASES, ids=[f"{kind}: {named(axes)}" for kind, axes in CASES], quick=0)
def test_a_mesh_gives_the_losses_of_one_device(kind, axes):
    assert_as_alone(kind, axes, losses(kind, axes))


@pytest.mark.slow
def test_sixteen_devices_give_the_losses_of_one():
    flags = f"{QUICK_TO_COMPILE} {os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=16')}"
    run = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for (kind, axes), found in zip(LARGE, json.loads(run.stdout.splitlines()[-1]), strict=True):
        assert_as_alone(kind, axes, found)


CALIBRATED = {"wanda", "sparsegpt", "factorize whitened", "gptq", "awq", "smooth"}
"""What looks at data first; its weights are of the same kinds as those of a transform that does not."""


@sweep("name", [name for name in TRANSFORMS if name not in CALIBRATED], quick=0, slow=0)
def test_a_transform_trains_on_a_mesh_as_on_one_device(name):
    transform = TRANSFORMS[name]
    params = jax.eval_shape(lambda: initialize(Transformer(BIASED), jax.random.key(0))[0])
    if not any(jax.tree.leaves(weights.trainable_tree(transform.abstract(params)))):
        transform = chain(transform, lora(rank=2))
    if name == "freeze":
        pytest.skip("its two stacks have 3 layers and 1, which no stages divide; the next test has what they do")
    want, got = losses("biased", {}, transform), losses("biased", MIXED[7], transform)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    # Where activations are rounded, a sum that ends a bit to the other side moves a code by a whole step.
    np.testing.assert_allclose(got, want, rtol=5e-3 if name in ("w8a8", "training") else 1e-5)


@sweep("rounds", [1, 2], quick=1)
def test_rounds_and_microbatches_change_nothing(rounds):
    want = losses("dense", {}, steps=2)
    found = losses("dense", {"stage": 2}, steps=2, rounds=rounds, microbatches=4, remat="full")
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_the_pipeline_waits_as_long_as_its_schedule_says():
    assert pipeline.bubble(1, 4) == 0
    assert pipeline.bubble(4, 4) == pytest.approx(3 / 7)
    assert pipeline.bubble(4, 16, rounds=2) == pytest.approx(3 / 35)
    assert pipeline.microbatches(0, 4, 64, 4) == 16 and pipeline.microbatches(0, 4, 16, 4) == 4
    with pytest.raises(ValueError, match="cannot cut 8 sequences, split 4 ways, into as many microbatches as stages"):
        pipeline.microbatches(0, 4, 8, 4)
    with pytest.raises(ValueError, match=r"into execution.microbatches \(2\)"):
        pipeline.microbatches(2, 4, 64, 1)


def test_stages_that_do_not_divide_the_layers_are_refused():
    def check(depth, **execution):
        model = dataclasses.replace(DENSE, num_layers=depth)
        data = DataConfig(sequence_length=32, batch_size=16)
        value = Experiment(model=model, data=data, mesh=MeshConfig(stage=2), execution=ExecutionConfig(**execution))
        value.check_devices(2)

    check(4)
    with pytest.raises(ValueError, match=r"model.num_layers \(3\) must be a multiple of mesh.stage x execution.rounds"):
        check(3)
    with pytest.raises(ValueError, match=r"\(4\) must be a multiple of .* \(8\)"):
        check(4, rounds=4)
    with pytest.raises(ValueError, match="execution.rounds 0; the first cannot be negative"):
        ExecutionConfig(rounds=0)


def _moments(layout):
    """Numbers of each moment on a device of data 2 x fsdp 2 x tensor 2, and the kinds of memory that they are in."""
    model = Transformer(DENSE, ExecutionConfig(unroll="never"))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    params = jax.eval_shape(lambda: initialize(model, jax.random.key(0))[0])
    step, state = jitted_step(model, params, make_optimizer(layout, 4), chain(), TrainingConfig(), mesh, None, layout)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    sizes = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in moments]
    return sum(sizes), {leaf.sharding.memory_kind for leaf in moments}


def test_moments_are_split_over_data_and_kept_on_the_host_where_the_config_says_so():
    whole, kinds = _moments(OptimizerConfig())
    split, _ = _moments(OptimizerConfig(split_over_data=True))
    _, hosted = _moments(OptimizerConfig(offload=True))
    assert kinds == {"device"} and hosted == {"pinned_host"}
    assert split == pytest.approx(whole / 2, rel=0.01)


def test_the_table_of_places_says_what_a_device_holds():
    model = Transformer(DENSE)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2, stage=2), jax.devices())
    params = jax.eval_shape(lambda key: lora(rank=2)(initialize(model, key)[0], key), jax.random.key(0))
    places = sharding.shardings(params, axes_of(model, params), mesh)
    rows = sharding.placed(params, places)
    held = jax.device_put(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), params), places)
    want = {
        weights.path_name(path): a.addressable_shards[0].data.nbytes
        for path, a in jax.tree_util.tree_leaves_with_path(held)
    }
    assert {row.path: row.device_bytes for row in rows} == want
    by_path = {row.path: tuple(row.spec) for row in rows}
    assert by_path["layers/attention/query/kernel/base"] == ("stage", "fsdp", "tensor")
    assert by_path["layers/attention/query/kernel/a"] == ("stage", "fsdp", None)


@pytest.mark.slow
def test_masks_pass_through_the_pipeline():
    transform = prune(method="random", sparsity=0.5)
    want = losses("dense", {}, transform, steps=2)
    np.testing.assert_allclose(losses("dense", {"stage": 2}, transform, steps=2), want, rtol=1e-5)


if __name__ == "__main__":
    print(json.dumps([losses(kind, axes) for kind, axes in LARGE]))
