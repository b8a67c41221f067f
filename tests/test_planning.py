"""Planning for slices that are not here."""

import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcost.cost import hardware, trace
from jaxcost.planning import topology
from jaxcost.sharding import MeshConfig, make_mesh

P = PartitionSpec
LAYERS, WIDTH, BATCH, VOCABULARY = 6, 1024, 512, 32000
MATMUL_FLOPS = 2 * BATCH * WIDTH * WIDTH


@functools.partial(jax.jit, donate_argnums=0)
def step(w, table, tokens):
    """A train-like step: looks tokens up (offloaded on newer TPUs), scans matmuls, applies the gradient."""

    def loss(w):
        def layer(x, w):
            return jnp.tanh(jnp.dot(x, w, preferred_element_type=jnp.float32)).astype(jnp.bfloat16), None

        return jax.lax.scan(layer, table[tokens], w)[0].astype(jnp.float32).sum()

    return w - 0.1 * jax.grad(loss)(w).astype(w.dtype)


def arguments(mesh, batch=BATCH):
    def spec(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    return (
        spec((LAYERS, WIDTH, WIDTH), jnp.bfloat16, None, "tensor", None),
        spec((VOCABULARY, WIDTH), jnp.bfloat16),
        spec((batch,), jnp.int32, "data"),
    )


def planned(name, mesh, **options):
    mesh = make_mesh(mesh, list(topology.topology_devices(name)))
    return topology.plan_step(step, arguments(mesh, **options), topology.topology_chip(name))


def test_plan_of_real_devices():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))
    plan = topology.plan_step(step, arguments(mesh), hardware.load_chip("cpu"))
    assert (plan.chip, plan.num_devices) == ("cpu", 8)
    assert plan.cost.total_flops == 3 * LAYERS * MATMUL_FLOPS
    assert plan.fits is None and plan.usable_bytes is None
    assert plan.peak_bytes > plan.cost.argument_bytes
    assert plan.estimate.bound.seconds > 0


def test_plan_needs_shardings():
    with pytest.raises(ValueError, match="has a NamedSharding"):
        topology.plan_step(step, (jax.ShapeDtypeStruct((2,), jnp.float32),), hardware.load_chip("cpu"))


def test_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(topology.PlanningUnavailable, match=r"pip install 'jaxcost\[plan\]'"):
        topology.topology_devices("v5e:8x16")


@pytest.mark.parametrize(("version", "refused"), [("0.0.9", True), ("0.0.42", False), ("0.1", False)])
def test_a_libtpu_older_than_jax_is_refused_before_it_crashes(version, refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(topology, "_libtpu_of_jax", lambda: "0.0.42")
    if refused:
        with pytest.raises(topology.PlanningUnavailable, match=r"libtpu 0.0.9 is older.*pip install 'libtpu>=0.0.42'"):
            topology._require_libtpu()
    else:
        topology._require_libtpu()


def test_jax_names_the_libtpu_that_it_was_made_for():
    assert topology._numbers(topology._libtpu_of_jax()) >= (0, 0, 40)


@pytest.mark.slow
def test_a_libtpu_that_another_process_holds_is_one_sentence(tmp_path):
    pytest.importorskip("libtpu")
    ask = "from jaxcost.planning.topology import topology_devices as t; print(len(t('v5e:2x2')), flush=True)"
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c"]
    holder = subprocess.Popen(
        [*command, f"{ask}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    try:
        assert holder.stdout.readline() == b"4\n"
        second = subprocess.run([*command, ask], capture_output=True, text=True, env=environment)
        assert "PlanningUnavailable: another process holds libtpu; wait for it" in second.stderr
        environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        third = subprocess.run([*command, ask], capture_output=True, text=True, env=environment)
        assert (third.stdout, third.stderr) == ("4\n", "")
    finally:
        holder.communicate(b"\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "write a chip and a shape"),
        ("0xv5e:2x2", "has no chips"),
        ("2xh100:1x8", "hosts x GPUs a host"),
        ("v9:2x2", "hardware.chip is 'v9'"),
        ("cpu:8", "of no TPU or GPU"),
        ("h100:8", "hosts x GPUs a host"),
        ("v5e:2x2x2", "3 axes, and v5e chips make a torus of 2"),
        ("v6e:16x32", "512 chips, and a pod of v6e has 256"),
    ],
)
def test_wrong_topologies_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        topology.topology_devices(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_step_compiled_for_a_slice(name):
    """On v5p, v6e and tpu7x a look-up or an exchange goes to a SparseCore, and `as_text()` fails."""
    pytest.importorskip("libtpu")
    plan = planned(name, MeshConfig(data=-1, tensor=2))
    devices = 8 if name.startswith(("v3", "tpu7x")) else 4
    assert plan.num_devices == plan.cost.num_devices == devices
    assert plan.fits
    assert plan.cost.argument_bytes <= plan.peak_bytes < plan.usable_bytes
    assert plan.cost.flops_by_type == {"bf16": 3 * LAYERS * MATMUL_FLOPS // devices}
    assert plan.cost.unestimated == ()
    assert {c.times for c in plan.cost.collectives} == {LAYERS}
    assert plan.estimate.bound.seconds >= plan.cost.flops / hardware.load_chip(plan.chip).peak("bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("equation", ["bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "bhqk,bqhd->bkhd"])
def test_batched_matmul_on_a_tpu_counts_like_the_trace(name, equation):
    """A TPU writes batched matmuls as convolutions whose windows mostly meet holes."""
    pytest.importorskip("libtpu")
    sharding = NamedSharding(make_mesh(MeshConfig(data=-1), list(topology.topology_devices(name))), P("data"))
    shapes = {"bqhd": (8, 256, 4, 128), "bkhd": (8, 512, 4, 128), "bhqk": (8, 4, 256, 512)}
    operands = [
        jax.ShapeDtypeStruct(shapes[labels], jnp.bfloat16, sharding=sharding)
        for labels in equation.split("->")[0].split(",")
    ]
    product = jax.jit(functools.partial(jnp.einsum, equation))
    plan = topology.plan_step(product, tuple(operands), topology.topology_chip(name))
    assert plan.cost.total_flops == trace.flops_of(product, *operands).flops == 2 * 8 * 4 * 256 * 512 * 128
    assert plan.cost.unestimated == ()


@pytest.mark.slow
def test_step_that_does_not_fit():
    pytest.importorskip("libtpu")
    plan = planned("v5e:2x2", MeshConfig(tensor=4), batch=4096 * BATCH)
    assert plan.fits is False
    assert "memory" in plan.message
    assert plan.cost is None and plan.estimate is None
    assert plan.needed_bytes > plan.usable_bytes


@pytest.mark.slow
def test_a_shape_that_no_slice_has():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="the compiler knows no topology"):
        topology.topology_devices("v5e:3x3")
