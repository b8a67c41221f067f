"""From a compiled program to memory, seconds and money: the reader's work, the estimates, the cache, the scripts."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from sweep import sweep

from jaxcost import config
from jaxcost.cost import estimate, hardware, hlo, hlo_text, hlo_work, kernels
from jaxcost.data.config import DataConfig
from jaxcost.models import attention
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.planning import cache, memory, published, steps, topology
from jaxcost.transforms import freeze, lora, prune, quantize, shrink

ROOT = pathlib.Path(__file__).parent.parent

# A loop of three trips whose kernel's attributes hold a line that starts with a brace, as splash attention's do.
PROGRAM = """HloModule step, is_scheduled=true, num_partitions=1

%fused (a: bf16[4,64,64], b: bf16[64,64]) -> bf16[64,64] {
  %a = bf16[4,64,64]{2,1,0} parameter(0)
  %b = bf16[64,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,64]{2,1,0} dynamic-slice(%a, %zero, %zero, %zero), dynamic_slice_sizes={1,64,64}
  %flat = bf16[64,64]{1,0} bitcast(%slice)
  ROOT %dot = bf16[64,64]{1,0} convolution(%flat, %b), dim_labels=bf_io->bf
}

%body (p: (s32[], bf16[4,64,64], bf16[64,64])) -> (s32[], bf16[4,64,64], bf16[64,64]) {
  %p = (s32[], bf16[4,64,64]{2,1,0}, bf16[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %stack = bf16[4,64,64]{2,1,0} get-tuple-element(%p), index=1
  %x = bf16[64,64]{1,0} get-tuple-element(%p), index=2
  %kernel = bf16[64,64]{1,0:T(8,128)S(1)} custom-call(%x), custom_call_target="tpu_custom_call", attributes={metadata={
"blocks":"8"
}}, metadata={op_name="jit(step)/causal/mystery/pallas_call"}
  %mul = bf16[64,64]{1,0} fusion(%stack, %kernel), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"100"}
  %tanh = bf16[64,64]{1,0} tanh(%mul), backend_config={"estimated_cycles":"7"}
  %sorted = bf16[64,64]{1,0} sort(%tanh), dimensions={0}
  ROOT %out = (s32[], bf16[4,64,64], bf16[64,64]) tuple(%next, %stack, %sorted)
}

%condition (p.1: (s32[], bf16[4,64,64], bf16[64,64])) -> pred[] {
  %p.1 = (s32[], bf16[4,64,64]{2,1,0}, bf16[64,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

ENTRY %main (s: bf16[4,64,64], x.0: bf16[64,64]) -> bf16[64,64] {
  %s = bf16[4,64,64]{2,1,0} parameter(0)
  %x.0 = bf16[64,64]{1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], bf16[4,64,64], bf16[64,64]) tuple(%start, %s, %x.0)
  %loop = (s32[], bf16[4,64,64], bf16[64,64]) while(%init), condition=%condition, body=%body
  %last = bf16[64,64]{1,0} get-tuple-element(%loop), index=2
  %away = (bf16[64,64]{1,0:S(5)}, bf16[64,64]{1,0}, u32[]) copy-start(%last)
  ROOT %result = bf16[64,64]{1,0} copy(%last), backend_config={"estimated_cycles":"5"}
}
"""
MATRIX_BYTES = 64 * 64 * 2


# ---- The reader ----


def test_cycles_are_summed_over_trips():
    cost = hlo.program_cost(PROGRAM)
    assert cost.flops_by_type == {"bf16": 3 * 2 * 64**3}
    assert cost.work.cycles == {hlo_work.MATMUL: 300, hlo_work.ELEMENTWISE: 3 * 7 + 5}


def test_cycles_that_the_compiler_does_not_know_are_no_cycles():
    """It writes the largest integer on some products with ragged groups."""
    unknown = hlo.program_cost(PROGRAM.replace('"estimated_cycles":"7"', f'"estimated_cycles":"{2**63 - 1}"')).work
    assert unknown.cycles == {hlo_work.MATMUL: 300, hlo_work.ELEMENTWISE: 5}
    assert unknown.untimed["tanh"] == 1


def test_bytes_are_those_of_slices_and_not_of_vector_memory():
    work = hlo.program_cost(PROGRAM).work
    kernel, fusion, tanh, sort = 1, 2, 2, 2  # matrices read or written in main memory: S(1) and the stack's rest not
    away, result = 1, 2
    assert work.hbm_bytes == (3 * (kernel + fusion + tanh + sort) + away + result) * MATRIX_BYTES
    assert work.host_bytes == MATRIX_BYTES


def test_what_has_no_estimate_is_listed():
    chip = hardware.load_chip("v5e")
    found = estimate.estimate(chip, hlo.program_cost(PROGRAM))
    assert "sort (x1)" in found.unestimated
    assert "kernel mystery" in found.unestimated
    assert found.parts.matmul_seconds == pytest.approx(300 / chip.clock_hz.value)


def test_splash_kernels_are_priced_by_the_tiles_that_they_run():
    def shape(dtype, *sizes):
        return hlo_text.Shape(dtype, sizes)

    table, queries, keys = shape("s8", 1, 8, 8), shape("bf16", 2, 4, 8192, 128), shape("bf16", 2, 2, 8192, 128)
    full = hlo_work.Kernel("a/splash_mha_fwd_residuals", (table, table, queries, keys, keys), (queries,))
    causal = dataclasses.replace(full, name="a/causal/splash_mha_fwd_residuals")
    scores = 2 * 4 * 8192**2
    assert kernels.kernel_cost(full).flops == 2 * 2 * scores * 128
    assert kernels.kernel_cost(causal).flops == round(2 * 2 * scores * 128 * 9 / 16)
    one_row = (table, shape("bf16", 4, 8192, 128), shape("bf16", 2, 8192, 128))
    single = dataclasses.replace(causal, operands=one_row)
    assert 2 * kernels.kernel_cost(single).flops == kernels.kernel_cost(causal).flops
    # A window of 1024 tokens reaches into one tile before a tile of 1024, and so does one of 1025, whose first token
    # sees a whole tile; one more token reaches into a second.
    tiles = {1024: 7 + 8, 1025: 7 + 8, 1026: 6 + 7 + 8}
    for size, run in tiles.items():
        local = dataclasses.replace(full, name=f"a/causal_window_{size}/splash_mha_fwd")
        assert kernels.kernel_cost(local).flops == round(2 * 2 * scores * 128 * run / 64)
        # Where it is not causal, as many tiles again behind the diagonal.
        both = dataclasses.replace(full, name=f"a/full_window_{size}/splash_mha_fwd")
        assert kernels.kernel_cost(both).flops == round(2 * 2 * scores * 128 * (2 * run - 8) / 64)
    whole = dataclasses.replace(full, name="a/full/splash_mha_fwd")
    assert kernels.kernel_cost(whole).flops == kernels.kernel_cost(full).flops
    backward = dataclasses.replace(full, name="a/splash_mha_dkv_no_residuals")
    assert kernels.kernel_cost(backward).flops == 2 * kernels.kernel_cost(full).flops
    assert kernels.kernel_cost(dataclasses.replace(full, name="a/other")) is None


@pytest.mark.parametrize(("mask", "share"), [("NO_MASK", 1), ("CAUSAL", 0.5)])
def test_cudnn_attention_is_priced_by_its_shapes_and_mask(mask, share):
    line = """  %attend{part} = (bf16[2,4,64,128]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax{part}", metadata={{op_name="jit(f)/custom_partitioning"}}, \
backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "{mask}"}}}}"""
    text = f"""HloModule f, is_scheduled=true, num_partitions=1

ENTRY %main (q: bf16[2,64,4,128], k: bf16[2,64,2,128]) -> bf16[2,4,64,128] {{
  %q = bf16[2,64,4,128]{{3,2,1,0}} parameter(0)
  %k = bf16[2,64,2,128]{{3,2,1,0}} parameter(1)
{line.format(part="", mask=mask)}
{line.format(part="Backward", mask=mask)}
  ROOT %out = bf16[2,4,64,128]{{3,1,2,0}} get-tuple-element(%attend), index=0
}}
"""
    chip, matmul = hardware.load_chip("h100"), 2 * 2 * 4 * 64 * 64 * 128
    found = estimate.estimate(chip, hlo.program_cost(text))
    assert found.flops_by_type == {"bf16": (2 + 5) * share * matmul}
    assert found.unestimated == ()
    operands_and_result = 2 * 64 * (4 + 2 + 2 + 4) * 128 * 2
    assert found.compiler_seconds == pytest.approx(2 * operands_and_result / chip.hbm_bytes_per_second.value)


# ---- Attention ----


@sweep("kv_heads", [4, 2, 1], quick=0)
def test_splash_attention_equals_the_reference(kv_heads, monkeypatch):
    interpreted = functools.partial(attention._splash_kernel, interpret=True)
    monkeypatch.setattr(attention, "_splash_kernel", interpreted)
    shapes = [(2, 256, 4, 128), (2, 256, kv_heads, 128), (2, 256, kv_heads, 128)]
    q, k, v = (jax.random.normal(jax.random.key(i), s, jnp.float32) for i, s in enumerate(shapes))

    def loss(implementation, *args):
        return jnp.sum(jnp.sin(attention.self_attention(*args, implementation)))

    expected = jax.value_and_grad(loss, argnums=(1, 2, 3))("reference", q, k, v)
    found = jax.value_and_grad(loss, argnums=(1, 2, 3))("splash", q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4), found, expected)


def test_splash_refuses_lengths_that_it_cannot_tile():
    x = jnp.zeros((1, 100, 1, 128))
    with pytest.raises(ValueError, match="multiple of 128 tokens, not 100"):
        attention.self_attention(x, x, x, "splash")


@pytest.mark.parametrize(
    ("platform", "length", "head", "bits", "expected"),
    [
        ("tpu", 1024, 128, 16, "splash"),
        ("tpu", 1000, 128, 16, "reference"),
        ("tpu", 1024, 64, 16, "reference"),
        ("gpu", 1000, 64, 16, "cudnn"),
        ("gpu", 1000, 64, 32, "reference"),
        ("cpu", 1024, 128, 16, "reference"),
    ],
)
def test_auto_takes_the_platforms_kernel_where_it_can(platform, length, head, bits, expected):
    assert attention.resolve("auto", platform, length, head, bits) == expected
    assert attention.resolve("reference", platform, length, head, bits) == "reference"


# ---- Memory ----


def test_the_split_adds_up_to_the_peak():
    split = memory.split_peak(100, {"weights": 10, "optimizer": 20, "gradients": 10, "batch": 1})
    assert sum(dataclasses.astuple(split)) == 100 and split.temporaries == 59
    full = memory.split_peak(31, {"weights": 10, "optimizer": 20, "gradients": 10, "batch": 1})
    assert sum(dataclasses.astuple(full)) == 31 and full.gradients == 0


def test_a_program_that_is_too_large_says_how_large():
    message = "the total memory required for HLO temporaries (35.50G) exceeds available HBM (31.24G)."
    assert memory.read_exhausted(message, 2**30) == int(36.5 * 2**30)
    assert memory.read_exhausted("Used 20.5G of 15.75G hbm. Exceeded", 0) == int(20.5 * 2**30)
    assert memory.read_exhausted("no memory", 0) is None


@pytest.mark.parametrize(("stated", "host", "peak"), [(300, 0, 300), (300, 50, 170), (None, None, 170)])
def test_the_peak_leaves_out_the_hosts_memory(stated, host, peak):
    class Compiled:
        @staticmethod
        def memory_analysis():
            sizes = {"argument_size": 100, "output_size": 90, "alias_size": 80, "temp_size": 60, "host_temp_size": host}
            named = {f"{name}_in_bytes": size for name, size in sizes.items()}
            return types.SimpleNamespace(**named, peak_memory_in_bytes=stated)

    assert memory.device_memory(Compiled).peak_memory_in_bytes == peak


def experiment(**changes) -> config.Experiment:
    base = config.Experiment(
        model=ModelConfig(vocab_size=512, width=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32),
        data=DataConfig(batch_size=8, sequence_length=64),
        execution=ExecutionConfig(unroll="never"),
    )
    return dataclasses.replace(base, **changes)


def planned(step="train", **changes):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    asked = experiment(mesh=config.MeshConfig(data=2, fsdp=2, tensor=2), **changes)
    traced = steps.trace_step(step, asked, 512, mesh)
    return traced, topology.plan_step(traced.jitted, traced.arguments, hardware.load_chip("cpu"), traced.static)


@sweep("step", steps.STEPS, quick=1, slow=2)
def test_peak_is_the_compilers_own(step):
    traced, made = planned(step)
    with jax.set_mesh(jax.tree.leaves(traced.arguments)[0].sharding.mesh):
        analysis = traced.jitted.lower(*traced.arguments, **traced.static).compile().memory_analysis()
    assert made.peak_bytes == pytest.approx(analysis.peak_memory_in_bytes, rel=0.01)
    split = memory.split_peak(made.peak_bytes, traced.bytes_by_category)
    held = split.weights + split.optimizer + split.cache + split.batch
    assert held == pytest.approx(made.cost.argument_bytes, rel=0.02)


def test_activations_stay_where_they_are():
    """A pinned layout would gather every named activation on every device."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(8, 1, 1), ("data", "fsdp", "tensor"))
    asked = experiment(mesh=config.MeshConfig(data=8), execution=ExecutionConfig(unroll="never", remat="attention"))
    traced = steps.trace_step("train", asked, 512, mesh)
    made = topology.plan_step(traced.jitted, traced.arguments, hardware.load_chip("cpu"))
    assert {collective.kind for collective in made.cost.collectives} <= {"all-reduce"}


@pytest.mark.slow
def test_transforms_change_the_plan_as_they_should():
    base, adapted, top, masked, smaller, served = (
        planned(**changes)[1].cost
        for changes in (
            {},
            {"transforms": (lora(rank=4),)},
            {"transforms": (freeze(top_layers=1),)},
            {"transforms": (prune(sparsity=0.5),)},
            {"transforms": (shrink(mlp=0.5, layers=2),)},
            {"transforms": (quantize(mode="training"),)},
        )
    )
    assert adapted.total_flops < 0.85 * base.total_flops
    assert top.total_flops < 0.85 * base.total_flops
    assert adapted.argument_bytes < 0.6 * base.argument_bytes
    assert masked.total_flops == base.total_flops
    assert masked.argument_bytes > base.argument_bytes
    assert smaller.total_flops < 0.8 * base.total_flops
    assert smaller.argument_bytes < 0.8 * base.argument_bytes
    assert any("int" in kind for kind in served.flops_by_type)


# ---- The cache ----


def test_a_question_is_answered_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCOST_PLAN_CACHE", str(tmp_path))
    calls = []

    def make():
        calls.append(1)
        return {"answer": 42}

    assert cache.cached("q", make) == cache.cached("q", make) == {"answer": 42}
    assert len(calls) == 1
    cache.cached("other", make)
    assert len(calls) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    assert cache.cached("q", make) == {"answer": 42}


def test_a_cache_that_cannot_be_written_costs_no_answer(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXCOST_PLAN_CACHE", str(tmp_path / "file" / "plans"))
    assert cache.cached("q", lambda: 42) == 42
    assert "set JAXCOST_PLAN_CACHE to a folder" in caplog.text


# ---- Published runs ----


def run_row(**changes):
    shape = {"layers": 2, "width": 256, "heads": 2, "kv_heads": 2, "head_dim": 128, "mlp": 512, "vocab": 1024}
    row = {
        "model": "tiny",
        "shape": shape | {"gated": True},
        "chip": "v5e",
        "chips": 4,
        "topology": "v5e:2x2",
        "sequences_per_device": 1,
        "sequence": 256,
        "mesh": "fsdp",
        "remat": {"offload": [], "save": ["query"], "else": "recompute"},
        "dtype": "bf16 activations, f32 weights and moments",
        "step_seconds": 0.001,
    }
    return row | changes


def write_runs(tmp_path, *rows):
    path = tmp_path / "runs.json"
    path.write_text(json.dumps({"schema": published.SCHEMA, "runs": rows}))
    return path


def test_a_published_run_is_an_experiment(tmp_path):
    (run,) = published.read_runs(write_runs(tmp_path, run_row()))
    found = published.experiment_of(run)
    assert (found.data.batch_size, found.model.num_layers, found.execution.save) == (4, 2, ("query",))
    assert (found.execution.weights, found.optimizer.first_moment) == ("float32", "float32")
    (part,) = published.read_runs(write_runs(tmp_path, run_row(sequences_per_device=0.5)))
    assert repr(published.experiment_of(part).data.batch_size) == "2"


def test_the_runs_held_out_are_experiments_that_were_not_fitted_on():
    fitted = set(json.loads((ROOT / "jaxcost/cost/calibration.json").read_text())["fitted_on"])
    for run in published.read_runs(ROOT / "scripts/benchmarks/held_out_runs.json"):
        assert f"{run.model} {run.topology}" not in fitted
        assert published.experiment_of(run).data.batch_size == run.chips * run.row["sequences_per_device"]


def test_published_experts_and_windows_are_the_models(tmp_path):
    shape = run_row()["shape"]
    experts = shape | {"experts": 8, "experts_per_token": 2, "capacity_factor": 1.25}
    windows = shape | {"sliding_window": 64, "local_to_global": 5}
    rows = [run_row(shape=changed) for changed in (experts, windows, shape | {"sliding_window": 64})]
    first, second, third = (
        published.experiment_of(run).model for run in published.read_runs(write_runs(tmp_path, *rows))
    )
    assert (first.experts, first.experts_per_token, first.capacity_factor) == (8, 2, 1.25)
    assert (second.window, second.pattern) == (64, ("local",) * 5 + ("global",))
    assert third.pattern == ("local",)


def test_a_published_note_is_heeded(tmp_path, monkeypatch):
    note = "first moment in bf16; vocabulary loss in 8 tiles"
    (run,) = published.read_runs(write_runs(tmp_path, run_row(dtype="bf16 weights", note=note)))
    found = published.experiment_of(run)
    assert (found.execution.weights, found.optimizer.first_moment) == ("bfloat16", "bfloat16")
    asked = []

    def compile_nothing(experiment, topology):
        asked.append(experiment.training.loss_chunks)
        raise ValueError("no compiler")

    monkeypatch.setattr(published, "plan", compile_nothing)
    with pytest.raises(published.CannotPlan, match="no compiler"):
        published.plan_run(run)
    assert asked == [8]


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        ("fsdp", config.MeshConfig(fsdp=-1)),
        ("fsdp over 128 devices", config.MeshConfig(fsdp=-1)),
        ("fsdp_transpose (weights sharded on the other axis)", config.MeshConfig(fsdp=-1)),
        ("fsdp 64, tensor 4", config.MeshConfig(fsdp=64, tensor=4)),
        ("fsdp, expert 4", config.MeshConfig(fsdp=-1, expert=4)),
    ],
)
def test_a_published_mesh_is_read(tmp_path, text, mesh):
    (run,) = published.read_runs(write_runs(tmp_path, run_row(mesh=text)))
    assert published.experiment_of(run).mesh == mesh


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": run_row()["shape"] | {"recurrences": 8}}, "recurrences"),
        ({"shape": {"layers": 2}}, "lacks gated, head_dim, heads"),
        ({"mesh": "pipeline 4"}, "mesh"),
        ({"mesh": "fsdp, tensor"}, "how large"),
        ({"dtype": "fp8"}, "fp8"),
        ({"sequences_per_device": 0.1}, "0.4 in all, no whole number"),
        ({"remat": {"offload": [], "save": ["strange"], "else": "recompute"}}, "strange"),
    ],
)
def test_what_cannot_be_planned_says_why(tmp_path, changes, reason):
    (run,) = published.read_runs(write_runs(tmp_path, run_row(**changes)))
    with pytest.raises(published.CannotPlan, match=reason):
        published.experiment_of(run)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "other", "runs": []}', '{"schema": "published-runs-1"}'])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / "runs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="runs.json"):
        published.read_runs(path)


def test_a_run_without_a_field_is_refused(tmp_path):
    row = run_row()
    del row["sequence"]
    with pytest.raises(ValueError, match="run 0 lacks"):
        published.read_runs(write_runs(tmp_path, row))


def test_the_fit_finds_the_constants_that_made_the_seconds():
    truth = estimate.Calibration(matmul=0.8, elementwise=0.5, kernel=2.5, exposed=0.4)
    rng = np.random.default_rng(0)
    parts = [estimate.Parts(*rng.uniform(0.2, 1.0, 4)) for _ in range(20)]
    found = published.fit(parts, [truth.seconds(p) for p in parts])
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(truth), rel=0.1)
    predicted = published.leave_one_out(parts, [truth.seconds(p) for p in parts])
    assert predicted == pytest.approx([truth.seconds(p) for p in parts], rel=0.05)


def test_the_readme_states_the_constants_that_come_with_jaxcost():
    said = " ".join((ROOT / "README.md").read_text().split())
    constants, error = estimate.load_calibration()
    assert f"real over estimated matmul cycles {constants.matmul:.2f}" in said
    assert f"real over estimated elementwise cycles {constants.elementwise:.2f}" in said
    assert f"attention at 1/{constants.kernel:.1f} of the peak, and {constants.exposed:.0%}".replace("%", " %") in said
    assert f"the mean absolute error was {error:.1%}".replace("%", " %") in said


# ---- The scripts, with libtpu ----


def script(name, *arguments, cache_dir):
    environment = os.environ | {"JAXCOST_PLAN_CACHE": str(cache_dir)}
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


@pytest.mark.slow
def test_validate_planner_lists_every_run(tmp_path):
    pytest.importorskip("libtpu")
    odd = run_row(model="odd", mesh="pipeline 4")
    path, out = write_runs(tmp_path, run_row(), odd), tmp_path / "out.json"
    done = script("validate_planner.py", path, "--json", out, cache_dir=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [row["model"] for row in result["rows"]] == ["tiny"]
    assert result["rows"][0]["lower_bound_seconds"] < result["rows"][0]["compiler_seconds"]
    assert [skip["model"] for skip in result["skipped"]] == ["odd"] and "mesh" in result["skipped"][0]["reason"]


@pytest.mark.slow
def test_plan_says_what_does_not_fit_with_status_2(tmp_path):
    pytest.importorskip("libtpu")
    flags = ["--topology", "v5e:2x2", "--model.width", "4096", "--model.mlp-width", "16384", "--model.num-layers", "24"]
    out = tmp_path / "out.json"
    done = script(
        "plan.py",
        ROOT / "configs/quickstart.py",
        *flags,
        "--json",
        out,
        cache_dir=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    (found,) = json.loads(out.read_text())["plans"]
    assert found["fits"] is False and found["needed_bytes"] > found["usable_bytes"]
    assert "does not fit: needs" in done.stdout


@pytest.mark.slow
def test_plan_says_in_words_what_a_mask_costs(tmp_path):
    pytest.importorskip("libtpu")
    flags = ["--topology", "v5e:2x2", "--transforms", "prune(sparsity=0.5)"]
    done = script("plan.py", ROOT / "configs/quickstart.py", *flags, cache_dir=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "A mask saves no FLOPs and adds its own bytes" in " ".join(done.stdout.split())
