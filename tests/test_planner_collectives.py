"""What devices exchange in a train step that is compiled for TPU slices, and what each of them holds.

The weights' bytes are those of the computation, bfloat16; embeddings are looked up without being gathered.
"""

import collections
import functools
import tempfile

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcost.config import Experiment
from jaxcost.cost import hlo
from jaxcost.data.config import DataConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.planning import steps, topology
from jaxcost.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.long

# As large as a model for so many chips is: the compiler gathers by all-reduces what is small on each.
VOCABULARY, WIDTH, MLP, LAYERS, LENGTH, HEADS, HEAD_DIM = 16384, 4096, 4096, 2, 1024, 32, 128
MODEL = ModelConfig(
    width=WIDTH,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_dim=HEAD_DIM,
    mlp_width=MLP,
    max_length=LENGTH,
)
ITEM = 2
BLOCKS = ITEM * LAYERS * (4 * WIDTH * HEADS * HEAD_DIM + 3 * WIDTH * MLP)
UNEMBEDDING = ITEM * VOCABULARY * WIDTH
REDUCTIONS = ("all-reduce", "reduce-scatter")


@functools.cache
def compiled(name, rows, mesh):
    pytest.importorskip("libtpu")
    devices = topology.topology_devices(name)
    experiment = Experiment(
        model=MODEL,
        data=DataConfig(batch_size=rows, sequence_length=LENGTH),
        mesh=mesh,
        execution=ExecutionConfig(compute="bfloat16", gradients="bfloat16", remat="full", unroll="never"),
    )
    traced = steps.trace_step("train", experiment, VOCABULARY, make_mesh(mesh, list(devices)))
    return topology.plan_step(traced.jitted, traced.arguments, topology.topology_chip(name)).cost


def exchanged(cost):
    """Bytes of whole arrays by kind of exchange and number of devices."""
    found = collections.Counter()
    for one in cost.collectives:
        pieces = one.group_size if one.kind == "all-gather" else 1
        found[one.kind, one.group_size] += one.operand_bytes * pieces * one.times
    return found


@pytest.mark.parametrize(("name", "devices"), [("v5e:16x16", 256), ("v5p:4x4x4", 64)])
def test_fsdp_gathers_weights_once_a_pass_and_sums_gradients_once(name, devices):
    found = exchanged(compiled(name, devices, MeshConfig(fsdp=devices)))
    gathered = found["all-gather", devices]
    # Forwards, and backwards with what is made again; the unembedding is kept for its backward pass.
    assert 2 * BLOCKS + UNEMBEDDING <= gathered < 1.02 * (2 * BLOCKS + 2 * UNEMBEDDING)
    summed = sum(found[kind, devices] for kind in REDUCTIONS)
    assert BLOCKS + UNEMBEDDING <= summed < 1.02 * (BLOCKS + 2 * UNEMBEDDING)


@pytest.mark.parametrize(("name", "sizes"), [("v5e:16x16", (16, 16)), ("v5p:4x4x4", (4, 16))])
def test_gradients_are_scattered_where_fsdp_is_a_part_of_the_mesh(name, sizes):
    data, fsdp = sizes
    found = exchanged(compiled(name, data * fsdp, MeshConfig(data=data, fsdp=fsdp)))
    assert found["reduce-scatter", fsdp] >= BLOCKS
    if data != fsdp:
        assert found["all-reduce", fsdp] < 1.02 * 2 * UNEMBEDDING
        # Replicas sum the shards that they hold, not whole gradients.
        assert found["all-reduce", data] < 1.02 * (BLOCKS + 2 * UNEMBEDDING) / fsdp


def test_the_compiler_makes_all_reduces_of_what_is_scattered_over_a_whole_torus():
    """Why the gradients of `fsdp` alone are all-reduced: the compiler (libtpu 0.0.52) does it to any reduce-scatter."""
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(fsdp=16), list(topology.topology_devices("v5e:4x4")))

    def scattered(x, y):
        return jax.lax.psum_scatter(x[0].T @ y[0], "fsdp", scatter_dimension=0, tiled=True)

    apart = NamedSharding(mesh, P("fsdp"))
    step = jax.jit(jax.shard_map(scattered, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False))
    matrices = [jax.ShapeDtypeStruct((16, 512, WIDTH), jnp.bfloat16, sharding=apart)] * 2
    with tempfile.TemporaryDirectory() as dump:
        (one,) = hlo.program_cost(topology._compile(step.lower(*matrices), mesh, dump)[1]).collectives
    assert (one.kind, one.group_size) == ("all-reduce", 16)


@pytest.mark.parametrize(("name", "fsdp"), [("v5e:16x16", 64), ("v5p:4x4x4", 16)])
def test_tensor_reduces_activations_twice_a_layer_and_pass(name, fsdp):
    tensor, rows = 4, 2 * fsdp
    cost = compiled(name, rows, MeshConfig(fsdp=fsdp, tensor=tensor))
    activation = rows // fsdp * LENGTH * WIDTH
    reductions = sum(
        one.times
        for one in cost.collectives
        if one.kind in REDUCTIONS and one.group_size == tensor and one.operand_bytes >= ITEM * activation
    )
    passes = 3  # forwards, again, backwards
    assert 4 * LAYERS <= reductions <= 2 * passes * LAYERS + 2


def test_bytes_of_a_device_fall_with_fsdp():
    held = {n: compiled(f"v5e:{x}x{x}", n, MeshConfig(fsdp=n)).argument_bytes for x, n in ((4, 16), (8, 64), (16, 256))}
    weights_and_moments = 3 * 4 * (BLOCKS + 2 * UNEMBEDDING) / ITEM
    for devices, found in held.items():
        assert weights_and_moments / devices <= found < 1.05 * weights_and_moments / devices + 2**20, held
