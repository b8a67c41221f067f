"""From training to serving: the same bits, sharded or not, in a checkpoint and in a file of half the bytes."""

import functools
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep import sweep

from jaxcost import sharding, weights
from jaxcost.cost import closed_form
from jaxcost.cost.hlo import compiled_cost
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.transformer import Transformer, axes_of, initialize, unembedding
from jaxcost.serving.engine import Engine
from jaxcost.study.export import export
from jaxcost.study.measure import weight_bytes
from jaxcost.training.checkpoints import Checkpoints
from jaxcost.training.config import CheckpointConfig
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import chain, lora, prune, quantize, smooth
from jaxcost.transforms.calibration import calibrated
from jaxcost.weights import QuantAware, Quantized, materialize

CONFIG = ModelConfig(
    vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, max_length=16
)

TRAININGS = {
    "int8": quantize(mode="training", stochastic_rounding=True),
    "int4": quantize(mode="training", bits=4),
    "int8 reference": quantize(mode="training", backend="reference"),
    "int4 reference": quantize(mode="training", bits=4, backend="reference"),
    "int4 weights": quantize(mode="training", bits=4, activations="none", group=8),
    "pruned int8": chain(prune(), quantize(mode="training")),
}


def tokens(rows=8, length=9, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 32)


def logits(compute):
    model = Transformer(CONFIG, ExecutionConfig(compute=compute, unroll="never"))

    @jax.jit
    def forward(params):
        return weights.contract(model.apply({"params": params}, tokens())[0], unembedding(params))

    return forward


@functools.cache
def trained(name, compute):
    """The weights after a few steps of quantised training, and what they were before."""
    model = Transformer(CONFIG, ExecutionConfig(compute=compute, unroll="never"))
    start = TRAININGS[name](initialize(model, jax.random.key(0))[0])
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(model, optimizer, chain()))
    state = init_state(start, optimizer, seed=0)
    losses = []
    for _ in range(6):
        batch = {"inputs": tokens()[:, :-1], "targets": tokens()[:, 1:], "mask": jnp.ones((8, 8))}
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    return state.params


@sweep(
    ("name", "compute"),
    [*((name, "float32") for name in TRAININGS), ("int8", "bfloat16"), ("int4 weights", "bfloat16")],
    quick=0,
    slow=2,
)
def test_a_model_serves_the_bits_that_it_was_trained_with(name, compute):
    params = trained(name, compute)
    served = jax.jit(quantize())(params)
    up = served["layers"]["mlp"]["up"]["kernel"]
    bits = 4 if "int4" in name else 8
    assert isinstance(up, Quantized) and up.grid == f"int{bits}"
    assert up.activation_bits == (None if name == "int4 weights" else bits)
    forward = logits(compute)
    np.testing.assert_array_equal(forward(served), forward(params))
    floats = weights.map_weights(lambda _, w: materialize(w.weight) if isinstance(w, QuantAware) else w, params)
    assert np.mean(forward(floats) != forward(params)) > 0.8


@sweep("name", ["int8", "int4 weights"], quick=0)
def test_what_is_served_on_a_mesh_has_the_same_codes_and_nearly_the_same_logits(name):
    params = trained(name, "float32")
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2, data=2))
    model = Transformer(CONFIG)
    served = quantize()(params)
    placed = jax.device_put(served, sharding.shardings(served, axes_of(model, served), mesh))
    up, down = (placed["layers"]["mlp"][name]["kernel"] for name in ("up", "down"))
    assert up.codes.addressable_shards[0].data.shape == (2, 8, 12)
    assert up.scale.addressable_shards[0].data.shape == (2, 1, 12)
    # Two devices share what three groups there are of the other factor's inputs.
    assert down.scale.addressable_shards[0].data.shape == (2, 1 if name == "int8" else 3, 8)
    with jax.set_mesh(mesh):
        got = logits("float32")(placed)
    np.testing.assert_allclose(got, logits("float32")(served), rtol=1e-4, atol=1e-4)
    prompts = list(np.asarray(tokens(3, 4)))
    want = Engine(model).generate(served, prompts, max_new_tokens=4)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(Engine(model).generate(placed, prompts, max_new_tokens=4), want)


def test_a_compiled_forward_pass_multiplies_what_the_closed_form_says():
    params, length = initialize(Transformer(CONFIG), jax.random.key(0))[0], tokens().shape[1]
    expected = tokens().size * closed_form.forward_flops_per_token(CONFIG, length, "full")
    attention = tokens().size * closed_form.attention_flops_per_token(CONFIG, length, "full")
    for transform, kind in ((quantize(), "f32"), (quantize(activations="dynamic"), "int8")):
        served = transform(params)
        found = compiled_cost(logits("float32").lower(served).compile())
        assert found.total_flops == pytest.approx(expected, rel=0.05)
        # Attention has no weights: it stays in floats.
        share = expected if kind == "f32" else expected - attention
        assert found.flops_by_type[kind] == pytest.approx(share, rel=0.05)


STORED = {
    "int8": quantize(),
    "int4": quantize(bits=4, group=8),
    "nf4": quantize(bits=4, numbers="nf", group=8),
    "fp8": quantize(numbers="fp"),
    "static": chain(smooth(), quantize(activations="static")),
    "awq": quantize(bits=4, method="awq"),
}


@functools.cache
def stored(name):
    model = Transformer(CONFIG)

    def forward(params, tokens):
        return weights.contract(model.apply({"params": params}, tokens)[0], unembedding(params))

    params = initialize(model, jax.random.key(0))[0]
    return calibrated(STORED[name], params, None, forward, lambda: [tokens()], lambda make, *a: jax.jit(make)(*a))


@sweep("name", STORED, quick=2)
def test_a_whole_model_is_quantised_and_means_nearly_what_it_did(name):
    params = initialize(Transformer(CONFIG), jax.random.key(0))[0]
    forward = logits("float32")
    want, got = forward(params), forward(stored(name))
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert 1e-4 < error < {"int8": 0.02, "static": 0.05, "fp8": 0.08}.get(name, 0.35)


@sweep("name", STORED, quick=2)
def test_checkpoints_hold_every_grid(name, tmp_path):
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, stored(name), {})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        back, _ = checkpoints.restore(1, jax.tree.map(jnp.zeros_like, stored(name)))
    assert jax.tree.structure(back) == jax.tree.structure(stored(name))
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(stored(name)), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_codes_of_four_bits_are_written_two_a_byte(tmp_path):
    found = {}
    for name in ("int8", "int4", "nf4", "fp8"):
        kernels = stored(name)["layers"]
        path = tmp_path / f"{name}.npz"
        export(kernels, path)
        with zipfile.ZipFile(path) as file:
            on_disk = sum(entry.compress_size for entry in file.infolist() if "/codes" in entry.filename)
        found[name] = on_disk, weight_bytes(kernels)
        with np.load(path) as file:
            suffix = {"int8": "", "int4": ".int4", "nf4": ".int4", "fp8": ".float8_e4m3fn"}[name]
            written = file[f"mlp/up/kernel/codes{suffix}"]
        codes = np.asarray(kernels["mlp"]["up"]["kernel"].codes)
        if "4" in name:
            halves = np.stack([written & 15, written >> 4], axis=-1).reshape(codes.shape)
            np.testing.assert_array_equal(halves, codes.astype(np.uint8) & 15)
        else:
            np.testing.assert_array_equal(written.view(codes.dtype), codes)
    norms = 2 * 2 * 16 * 4
    for name, (_, in_memory) in found.items():
        held = [w for w in jax.tree.leaves(stored(name)["layers"], is_leaf=weights.is_weight) if weights.is_weight(w)]
        codes, scales = sum(w.codes.size for w in held), sum(w.scale.nbytes for w in held)
        assert in_memory == codes * (0.5 if "4" in name else 1) + scales + norms
    # Random codes hold nearly all their bits: no compression of a byte a code would reach this.
    assert found["int4"][0] < 0.75 * found["int8"][0]


@pytest.mark.slow
def test_an_adapter_trains_on_every_grid():
    for name in ("int8", "nf4", "fp8"):
        params = lora(rank=2)(stored(name))
        model, optimizer = Transformer(CONFIG, ExecutionConfig(unroll="never")), optax.sgd(0.1)
        state = init_state(params, optimizer, seed=0)
        batch = {"inputs": tokens()[:, :-1], "targets": tokens()[:, 1:], "mask": jnp.ones((8, 8))}
        step = jax.jit(make_train_step(model, optimizer, chain()))
        state, first = step(state, batch)
        state, second = step(state, batch)
        assert second["loss"] < first["loss"]
        base = state.params["layers"]["mlp"]["up"]["kernel"].base
        np.testing.assert_array_equal(materialize(base), materialize(stored(name)["layers"]["mlp"]["up"]["kernel"]))


# ---- On a TPU that is not here ----


@pytest.mark.slow
def test_a_tpu_reads_codes_and_multiplies_integers():
    pytest.importorskip("libtpu")
    from jaxcost.planning import topology

    mesh = sharding.make_mesh(sharding.MeshConfig(), list(topology.topology_devices("v5e:1x1")))

    def plan(**options):
        def make():
            dense = jnp.zeros((4096, 16384), jnp.bfloat16)
            return weights.quantized(dense, **options) if options else dense

        shapes = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), jax.eval_shape(make)
        place = sharding.replicated(mesh)
        arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)
        return topology.plan_step(jax.jit(weights.contract), arguments, topology.topology_chip("v5e:1x1"))

    dense = plan()
    plans = {
        "int8": plan(grid="int8"),
        "int4": plan(grid="int4"),
        "int4 in groups": plan(grid="int4", group=128),
        "nf4 in groups": plan(grid="nf4", group=128),
        "integers": plan(grid="int8", activation_bits=8),
    }
    x_bytes, size = 4096 * 4096 * 2, 4096 * 16384
    held = {name: made.cost.argument_bytes - x_bytes for name, made in plans.items()}
    scales = {name: 4 * 16384 * (32 if "groups" in name else 1) for name in plans}
    for name, num_bytes in held.items():
        assert num_bytes == pytest.approx(size * (0.5 if "4" in name else 1) + scales[name], rel=0.001)
        # No dense copy is made: what is read by the product are the codes.
        assert plans[name].cost.temp_bytes < 0.01 * size
    flops = {name: made.cost.flops_by_type for name, made in plans.items()}
    assert set(flops["integers"]) == {"int8"} and set(flops["int4"]) == {"bf16"}
    assert all(sum(found.values()) == sum(dense.cost.flops_by_type.values()) for found in flops.values())
    assert plans["integers"].estimate.compiler_seconds < 0.7 * dense.estimate.compiler_seconds
