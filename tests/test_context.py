"""Sequences split over the `context` axis: the numbers of one device, what is refused, and what it saves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep import sweep

from jaxcost import config, sharding
from jaxcost.config import MeshConfig
from jaxcost.cost import hardware
from jaxcost.data.config import DataConfig
from jaxcost.evaluation.losses import cross_entropy
from jaxcost.models import attention, context
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.transformer import Transformer, axes_of, initialize, output_of
from jaxcost.planning import steps, topology

LENGTH, ROWS, VOCABULARY = 64, 4, 128
MODEL = ModelConfig(
    vocab_size=VOCABULARY, width=64, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16, mlp_width=64
)


def mesh_of(**sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values()) or [1]))]
    return sharding.make_mesh(MeshConfig(**sizes), devices)


def loss_and_gradients(mesh, model, chunks=1):
    """Of one batch with a mask that is not all ones, on a mesh."""
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, VOCABULARY, (ROWS, LENGTH), dtype=np.int32) for name in ("inputs", "targets")}
    batch["mask"] = (rng.random((ROWS, LENGTH)) < 0.8).astype(np.float32)

    def loss(params, batch):
        hidden, _ = model.apply({"params": params}, batch["inputs"])
        output = output_of(model.config, params)
        total, count = cross_entropy(hidden, output, batch["targets"], batch["mask"], chunks=chunks)
        return total / count

    params, _ = initialize(model, jax.random.key(0))
    params = jax.device_put(params, sharding.shardings(params, axes_of(model, params), mesh))
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, sharding.place_batch(batch, mesh)))


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for mine, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


# ---- The same numbers ----


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
@sweep("kv_heads", [2, 8, 1], quick=1)
@sweep("ways", [4, 2, 8], quick=1)
def test_attention_over_a_split_sequence_is_that_over_a_whole_one(method, kv_heads, ways):
    shapes = [(ROWS, LENGTH, 8, 16), (ROWS, LENGTH, kv_heads, 16), (ROWS, LENGTH, kv_heads, 16)]
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    def run(mesh):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attention.self_attention(q, k, v, "reference", method=method)))

        with jax.set_mesh(mesh):
            return jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v))

    assert_same(run(mesh_of(context=ways)), run(mesh_of()))


@sweep(
    ("sizes", "method"),
    [
        ({"context": 8}, "ring"),
        ({"context": 8}, "all_to_all"),
        ({"fsdp": 2, "context": 4}, "ring"),
        ({"data": 2, "tensor": 2, "context": 2}, "all_to_all"),
        ({"fsdp": 2, "tensor": 2, "context": 2}, "ring"),
    ],
    quick=0,
)
def test_a_model_on_a_context_mesh_has_one_devices_loss_and_gradients(sizes, method):
    model = Transformer(MODEL, ExecutionConfig(context=method, remat="attention"))
    assert_same(loss_and_gradients(mesh_of(**sizes), model, chunks=4), loss_and_gradients(mesh_of(), model))


@pytest.mark.slow
def test_the_ring_takes_its_queries_in_pieces(monkeypatch):
    model = Transformer(MODEL, ExecutionConfig(context="ring"))
    expected = loss_and_gradients(mesh_of(context=2), model)
    monkeypatch.setattr(context, "_SCORES", ROWS * 4 * 32 * 8)
    (pieces, firsts) = context._pieces((jnp.zeros((ROWS, 4, 32, 16)),), jnp.zeros((ROWS, 32, 16)))
    assert pieces.shape == (4, ROWS, 4, 8, 16) and firsts.tolist() == [0, 8, 16, 24]
    assert_same(loss_and_gradients(mesh_of(context=2), model), expected)


# ---- Which method, and what is refused ----


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ways", "expected"),
    [
        (32, 8, 8, "all_to_all"),
        (32, 8, 16, "all_to_all"),
        (32, 1, 4, "all_to_all"),
        (6, 6, 4, "ring"),
        (8, 3, 4, "ring"),
    ],
)
def test_auto_trades_where_the_heads_divide(heads, kv_heads, ways, expected):
    assert context.resolve("auto", heads, kv_heads, ways) == expected
    assert context.resolve("ring", heads, kv_heads, ways) == "ring"


def experiment(**changes):
    base = config.Experiment(
        model=MODEL, data=DataConfig(batch_size=8, sequence_length=LENGTH), mesh=MeshConfig(context=8)
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": DataConfig(batch_size=8, sequence_length=60)},
            r"sequence_length \(60\) must be a multiple of mesh.con",
        ),
        ({"mesh": MeshConfig(fsdp=16, context=8)}, r"mesh.fsdp x mesh.context \(128\)"),
        ({"execution": ExecutionConfig(context="all_to_all"), "mesh": MeshConfig(tensor=2, context=8)}, "use 'ring'"),
        ({"execution": ExecutionConfig(context="ring", attention="splash")}, "needs whole sequences"),
    ],
)
def test_what_cannot_be_split_is_one_sentence(changes, message):
    asked = experiment(**changes)
    if changes.get("mesh", MeshConfig()).fsdp > 1:
        asked = dataclasses.replace(asked, data=DataConfig(batch_size=16, sequence_length=LENGTH))
    devices = np.prod([size for size in dataclasses.asdict(asked.mesh).values()])
    with pytest.raises(ValueError, match=message):
        asked.check_devices(int(devices))


# ---- What it saves ----


def temporaries(ways, method, length, mesh, chip, **model):
    """Bytes of a device's temporaries in a train step on one sequence for every `ways` devices."""
    rows = mesh.shape["fsdp"]
    asked = experiment(
        model=dataclasses.replace(MODEL, max_length=length, **model),
        data=DataConfig(batch_size=rows, sequence_length=length),
        mesh=MeshConfig(fsdp=rows, context=ways),
        execution=ExecutionConfig(context=method, compute="bfloat16", remat="full", unroll="never"),
    )
    traced = steps.trace_step("train", asked, VOCABULARY, mesh)
    return topology.plan_step(traced.jitted, traced.arguments, hardware.load_chip(chip)).cost.temp_bytes


@pytest.mark.slow
def test_a_devices_temporaries_fall_with_the_axis():
    one, four = (temporaries(ways, "ring", 1024, mesh_of(fsdp=4 // ways, context=ways), "cpu") for ways in (1, 4))
    assert four < one / 3


@pytest.mark.long
@pytest.mark.parametrize(("method", "ways"), [("all_to_all", (1, 4)), ("ring", (2, 4))])
def test_a_long_sequence_on_a_slice_takes_less_memory_with_the_axis(method, ways):
    """The ring begins at 2: in a model as small as this, its pieces of scores are more than splash attention needs."""
    pytest.importorskip("libtpu")

    def found(context):
        devices, heads = topology.topology_devices("v5e:2x2"), {"num_heads": 4, "num_kv_heads": 4, "head_dim": 128}
        mesh = sharding.make_mesh(MeshConfig(fsdp=4 // context, context=context), list(devices))
        return temporaries(context, method, 16384, mesh, "v5e", width=512, **heads)

    few, many = map(found, ways)
    assert many < 0.7 * few
