"""NVIDIA GPUs that are not here, by XLA's own compiler for them; `bash scripts/test.sh slow` puts it on the path."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxcost.config import Experiment, MeshConfig
from jaxcost.cost import hardware
from jaxcost.data.config import DataConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.planning import steps, topology
from jaxcost.planning.plan import plan

ROOT = pathlib.Path(__file__).parent.parent
SIZES = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim")
MODEL = ModelConfig(**dict(zip(SIZES, (512, 128, 3, 4, 2, 32), strict=True)))
BASE = Experiment(
    model=MODEL,
    data=DataConfig(batch_size=16, sequence_length=64),
    execution=ExecutionConfig(compute="bfloat16", attention="reference"),
)
KERNELS = dataclasses.replace(BASE, execution=ExecutionConfig(compute="bfloat16"))


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    pytest.importorskip("jax_plugins.xla_cuda12")
    monkeypatch.setenv("JAXCOST_PLAN_CACHE", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100:1x8", "h100:2x8", "h200:1x8", "b200:1x8", "l4:1x4"])
def test_a_step_compiled_for_gpus_that_are_not_here(name):
    made = plan(BASE, name, vocab_size=512)
    assert made.compiled.num_devices == (16 if name == "h100:2x8" else int(name[-1])) and made.compiled.fits
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    asked = dataclasses.replace(BASE, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    traced = steps.trace_step("train", asked, 512, mesh)
    local = topology.plan_step(traced.jitted, traced.arguments, hardware.load_chip("cpu"), traced.static)
    assert made.compiled.cost.total_flops == pytest.approx(local.cost.total_flops, rel=0.02)
    estimate = made.compiled.estimate
    # Of an L4, nothing says how fast it multiplies float32, as the reference does in the backward pass.
    assert name == "l4:1x4" or estimate.compiler_seconds >= estimate.bound.terms["compute"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=-1), MeshConfig(fsdp=2, tensor=2, context=2)], ids=["data", "mixed"])
def test_cudnn_attention_is_planned_where_cudnn_is_not(mesh):
    asked = dataclasses.replace(KERNELS, mesh=mesh)
    made, reference = plan(asked, "h100:1x8", vocab_size=512), plan(BASE, "h100:1x8", vocab_size=512)
    kernels = [kernel.name.rsplit("/", 2)[1:] for kernel in made.compiled.cost.work.kernels]
    assert sorted(map(tuple, kernels)) == [("causal", "__cudnn$fmhaSoftmax"), ("causal", "__cudnn$fmhaSoftmaxBackward")]
    assert made.compiled.estimate.unestimated == ()
    # The kernels leave out the half of the scores that is masked, and make the rest once more in the backward pass.
    found, full = (sum(m.compiled.estimate.flops_by_type.values()) for m in (made, reference))
    scores = 3 * 2 * 2 * 4 * 64 * 64 * 32
    assert full - found == pytest.approx(scores * (6 - 7 / 2), rel=0.05)


@pytest.mark.slow
def test_tpus_and_gpus_are_one_table(tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "out.json"
    flags = ["--model.vocab-size", "512", "--model.num-layers", "1", "--usd-per-chip-hour", "tpu7x=12", "b200=5"]
    flags += ["--data.batch-size", "8", "--json", str(out), "--topology"]
    topologies = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h100:1x8", "b200:1x8"]
    command = [sys.executable, str(ROOT / "scripts/plan.py"), str(ROOT / "configs/quickstart.py"), *flags, *topologies]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ)
    assert done.returncode == 0, done.stderr
    plans = json.loads(out.read_text())["plans"]
    assert [made["topology"] for made in plans] == topologies
    for made in plans:
        assert made["fits"] and made["run"]["seconds"] > 0 and made["run"]["usd"] > 0
        assert (made["seconds_are"] == "calibrated") == (made["chip"] not in ("h100", "b200"))
        assert (made["run"]["kwh"] is None) == (made["sources"]["watts_per_chip"]["value"] is None)
        assert made["topology"] in done.stdout
