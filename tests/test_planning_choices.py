"""Choosing before compiling: layouts by the closed form, sizes by scaling laws, and what the scripts refuse."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from small import tpus
from sweep import sweep

from jaxcost.config import Experiment, MeshConfig
from jaxcost.cost import hardware, links
from jaxcost.data.config import DataConfig
from jaxcost.models.config import ModelConfig
from jaxcost.planning import limits, picture, ranking, scaling, search, topology
from jaxcost.transforms import lora

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENT = Experiment(
    model=ModelConfig(vocab_size=512, width=256, num_layers=4, num_heads=8, num_kv_heads=8, max_length=256),
    data=DataConfig(batch_size=64, sequence_length=256),
)


def found(experiment=EXPERIMENT, **asked):
    chip = hardware.load_chip("v5e")
    return list(search.candidates(experiment, chip, tpus(2, 4), 512, ranking.sizes_of(experiment, 512), **asked))


# ---- Search ----


def test_candidates_are_many_and_all_divide():
    candidates = found()
    assert len(candidates) >= 500
    for candidate in candidates:
        candidate.experiment.check_devices(8)
    assert len({candidate.flags() for candidate in candidates}) == len(candidates)


@pytest.mark.slow
def test_the_closed_form_ranks_as_it_should():
    def pick(**wanted):
        for candidate in found():
            e = candidate.experiment
            values = {"remat": e.execution.remat, "accumulation": e.training.accumulation, "mesh": e.mesh}
            values["chunks"] = e.training.loss_chunks
            if all(values[name] == value for name, value in wanted.items()):
                return candidate
        raise AssertionError(wanted)

    sharded = {"mesh": MeshConfig(fsdp=8), "chunks": 1, "accumulation": 1}
    none, full = pick(remat="none", **sharded), pick(remat="full", **sharded)
    assert none.bytes_per_device > full.bytes_per_device and none.seconds < full.seconds
    split = pick(**sharded | {"accumulation": 4}, remat="none")
    assert split.bytes_per_device < none.bytes_per_device and split.seconds > none.seconds
    copied = pick(**sharded | {"mesh": MeshConfig(data=8)}, remat="none")
    assert copied.bytes_per_device > none.bytes_per_device


def test_what_is_kept_is_what_the_traced_step_keeps():
    kept = ranking.sizes_of(EXPERIMENT, 512).kept_bytes
    layers, width = EXPERIMENT.model.num_layers, EXPERIMENT.model.width
    assert layers * width * 4 <= kept["full"] <= 2 * layers * width * 4
    assert kept["full"] < kept["attention"] < kept["projections"] < kept["none"]


@pytest.mark.slow
def test_other_batches_train_on_the_same_tokens():
    candidates = found(batches=(32, 128))
    tokens = {c.experiment.data.batch_size: c.experiment.training.steps * c.tokens for c in candidates}
    assert set(tokens) == {32, 64, 128} and len(set(tokens.values())) == 1


@pytest.mark.slow
def test_long_sequences_may_be_split():
    model = dataclasses.replace(EXPERIMENT.model, max_length=8192)
    long = dataclasses.replace(EXPERIMENT, model=model, data=DataConfig(batch_size=1, sequence_length=8192))
    assert {c.experiment.mesh.context for c in found()} == {1}
    assert {c.experiment.mesh.context for c in found(long)} == {1, 2, 4, 8}
    ring = dataclasses.replace(long.execution, context="ring")
    pushed = {c.flags(): c.seconds for c in found(dataclasses.replace(long, execution=ring))}
    assert any(pushed[c.flags()] != c.seconds for c in found(long) if c.experiment.mesh.context > 1)


def mixture(**options):
    model = dataclasses.replace(EXPERIMENT.model, experts=4, **options)
    return dataclasses.replace(EXPERIMENT, model=model)


@pytest.mark.long
def test_experts_may_be_split():
    assert {c.experiment.mesh.expert for c in found()} == {1}
    assert {c.experiment.mesh.expert for c in found(mixture())} == {1, 2, 4}
    assert {c.experiment.mesh.expert for c in found(mixture(), step="decode")} == {1, 2, 4}

    def seconds(experiment, mesh):
        return next(c.seconds for c in found(experiment) if c.experiment.mesh == mesh)

    # Wide experts and few tokens: their weights cost more links than the tokens that are sent to them.
    few = dataclasses.replace(EXPERIMENT.data, batch_size=8, sequence_length=64)
    wide = dataclasses.replace(mixture(mlp_width=4096, capacity_factor=1.25), data=few)
    assert seconds(wide, MeshConfig(fsdp=2, expert=4)) < seconds(wide, MeshConfig(fsdp=8))
    narrow = mixture(mlp_width=16, capacity_factor=1.25)
    assert seconds(narrow, MeshConfig(fsdp=2, expert=4)) > seconds(narrow, MeshConfig(fsdp=8))


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_serving_chooses_meshes_and_batches_alone(step):
    candidates = found(step=step, batches=(8,))
    assert len(candidates) == len({(c.experiment.mesh, c.experiment.data.batch_size) for c in candidates}) > 8
    assert all(c.seconds > 0 and c.bytes_per_device > 0 for c in candidates)


def test_what_was_compiled_corrects_the_closed_form():
    candidates = found()
    first = next(search._frontier(search._corrected(candidates, [], math.inf)))

    def compiled(needed, seconds):
        estimate = types.SimpleNamespace(seconds=seconds)
        return types.SimpleNamespace(compiled=types.SimpleNamespace(needed_bytes=needed, estimate=estimate))

    slow = search._corrected(candidates, [(first, compiled(first.bytes_per_device, 10 * first.seconds))], math.inf)
    others = [c for c in slow if search._kind(c) != search._kind(first)]
    assert len(slow) == len(candidates) and others
    large = [(first, compiled(3 * first.bytes_per_device, math.inf))]
    fitting = search._corrected(candidates, large, 2 * first.bytes_per_device)
    assert first in search._corrected(candidates, [], 2 * first.bytes_per_device) and first not in fitting


@pytest.mark.long
def test_adapters_need_less():
    adapted = dataclasses.replace(EXPERIMENT, transforms=(lora(rank=4),))
    assert found(adapted)[0].bytes_per_device < found()[0].bytes_per_device
    assert found(adapted)[0].seconds < found()[0].seconds


@pytest.mark.slow
def test_a_search_compiles_its_best(tmp_path, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("JAXCOST_PLAN_CACHE", str(tmp_path))
    result = search.search(EXPERIMENT, "v5e:2x4", 512, count=2)
    assert result.considered >= 500 and len(result.compiled) == 2
    first, second = (made.compiled.estimate.seconds for _, made in result.compiled)
    assert first <= second
    served = search.search(EXPERIMENT, "v5e:2x4", 512, "decode", count=2, processes=2)
    assert [made.step for _, made in served.compiled] == ["decode", "decode"]


# ---- Limits ----


def priced(seconds, usd, fits=True):
    return types.SimpleNamespace(
        cost=types.SimpleNamespace(seconds=seconds, usd=usd), compiled=types.SimpleNamespace(fits=fits)
    )


def test_plans_are_ranked_within_their_limits():
    slow, fast, unpriced, misfit = priced(7200, 1.0), priced(3600, 2.0), priced(1800, None), priced(1, 0.1, fits=False)
    plans = [misfit, unpriced, fast, slow]
    assert sorted(plans, key=limits.Limits().rank) == [slow, fast, unpriced, misfit]
    assert sorted(plans, key=limits.Limits(deadline_hours=1.5).rank) == [fast, unpriced, slow, misfit]
    assert sorted(plans, key=limits.Limits(budget_usd=5).rank) == [fast, slow, unpriced, misfit]
    tight = limits.Limits(budget_usd=1.5, deadline_hours=1.5)
    assert tight.over(slow) == ["takes 2 hours, over the deadline of 1.5."]
    assert tight.over(fast) == ["costs 2 dollars, over the budget of 1.5."]
    assert "its price is unknown" in tight.over(unpriced)[0]


def test_limits_and_figures_of_chips_are_checked():
    with pytest.raises(ValueError, match="--deadline-hours is 0; it must be positive"):
        limits.Limits(deadline_hours=0)
    assert limits.figures_by_chip("--price", ("a=2", "b=0.5"), {"a", "b", "c"}) == {"a": 2.0, "b": 0.5}
    with pytest.raises(ValueError, match="--price names 'd', and the topologies are of a, b"):
        limits.figures_by_chip("--price", ("d=2",), {"a", "b"})
    with pytest.raises(ValueError, match="--price is 'a'; write a chip and a number, such as a=5"):
        limits.figures_by_chip("--price", ("a",), {"a"})


# ---- Scaling laws ----


@pytest.mark.parametrize("law", scaling.LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("flops", [1e18, 1e21, 1e24])
def test_the_optimum_without_serving_is_the_papers_closed_form(law, flops):
    """G (C/6)**a with G = (αA / βB)**(1 / (α + β)) and a = β / (α + β): Hoffmann et al. 2022, equation 4."""
    g = (law.alpha * law.a / (law.beta * law.b)) ** (1 / (law.alpha + law.beta))
    expected = g * (flops / 6) ** (law.beta / (law.alpha + law.beta))
    parameters, tokens = scaling.optimal(law, flops)
    assert parameters == pytest.approx(expected, rel=1e-3)
    assert 6 * parameters * tokens == pytest.approx(flops, rel=1e-9)


def test_serving_makes_the_best_model_smaller():
    law = scaling.LAWS[0]
    alone, served = scaling.optimal(law, 1e21), scaling.optimal(law, 1e21, tokens_served=1e12)
    assert served[0] < alone[0]
    assert 6 * served[0] * served[1] + 2 * served[0] * 1e12 == pytest.approx(1e21)


def test_intervals_hold_the_optimum():
    row = scaling.choices(1e21)[1]
    assert row.parameters_interval[0] < row.parameters < row.parameters_interval[1]
    assert row.tokens_interval[0] < row.tokens < row.tokens_interval[1]
    assert scaling.choices(1e21)[0].parameters_interval is None


@pytest.mark.parametrize("flops", [0.0, -1.0, math.nan])
def test_no_money_buys_no_model(flops):
    with pytest.raises(ValueError, match="give more money"):
        scaling.optimal(scaling.LAWS[0], flops)


# ---- Slices ----


@pytest.mark.parametrize(
    ("chip", "sizes", "wraps"),
    [
        ("v5e", [16, 16], (True, True)),
        ("v6e", [8, 16], (False, True)),
        ("v5p", [4, 4, 2], (True, True, False)),
        ("v3", [4, 4], (False, False)),
    ],
)
def test_links_wrap_where_the_hardware_has_them(chip, sizes, wraps):
    assert links.wraps_of(hardware.load_chip(chip), sizes) == wraps


@pytest.mark.parametrize("name", ["v5e:0x4", "h100:0x8"])
def test_a_slice_has_chips(name):
    with pytest.raises(ValueError, match="at least 1"):
        topology.topology_devices(name)


# ---- Pictures and scripts ----


def test_a_picture_is_drawn(tmp_path):
    row = dict.fromkeys(
        ("compiler_seconds", "compiler_exposed_seconds", "calibrated_seconds", "usable_bytes", "memory_split_bytes")
    )
    row |= {"step": "train", "topology": "v5e:2x2", "lower_bound_seconds": 1.0}
    full = row | {"usable_bytes": 2**34, "memory_split_bytes": {"weights": 2**30, "temporaries": 2**31}}
    for name in ("plan.png", "plan.svg"):
        picture.draw([("a", row), ("b", full)], tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def script(name, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ)


@sweep(
    ("command", "said"),
    [
        (("budget.py", "0"), "give a positive"),
        (("budget.py", "100", "--chip", "b200"), "price of b200 is unknown"),
        (("budget.py", "100", "--utilization", "2"), "at most 1"),
        (("plan.py", "configs/llama2_7b.py", "--topology", "v5e"), "write a chip and a shape"),
        (("plan.py", "configs/llama2_7b.py", "--topology", "h100:8"), "hosts x GPUs a host"),
        (("plan.py", "configs/llama2_7b.py", "--topology", "cpu:2x2"), "of no TPU or GPU"),
        (("validate_planner.py", "no.json"), "cannot be read"),
        (("allocate.py", "nowhere", "--uniform", "0.83"), "none of the levels of sparsity"),
    ],
    quick=1,
)
def test_scripts_refuse_in_one_sentence(command, said):
    done = script(command[0], *(str(ROOT / a) if a.startswith("configs") else a for a in command[1:]))
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert "Traceback" not in done.stderr


def test_budget_says_what_it_rests_on(tmp_path):
    done = script("budget.py", "10000", "--chip", "v5p", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["flops"] == pytest.approx(10000 / 4.2 * 3600 * 459e12 * 0.4)
    assert {row["law"] for row in result["choices"]} == {"Hoffmann", "Epoch"}
    assert np.isfinite(result["choices"][0]["loss"])
