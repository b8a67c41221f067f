"""Allocation of one budget over weights: sensitivities, the best choice of all, and what uniform levels cost."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost import weights
from jaxcost.config import Experiment
from jaxcost.cost.hardware import load_chip
from jaxcost.data import DataConfig
from jaxcost.evaluation.score import EvaluationConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.session import Session
from jaxcost.study.allocate import (
    Choice,
    allocate,
    compare_with_uniform,
    contraction_seconds,
    layer_error,
    loss_increase,
    sensitivities,
    stored_bytes,
    uniform_cost,
    with_levels,
)
from jaxcost.training.config import OptimizerConfig, TrainingConfig
from jaxcost.transforms import factorize, prune, quantize, rule
from jaxcost.weights import Inputs, Masked


def random_table(seed, weights=5, levels=4):
    drawn = np.random.default_rng(seed).uniform(1, 100, (weights, levels, 2))
    return {f"w{i}": tuple(Choice(j, *map(float, pair)) for j, pair in enumerate(row)) for i, row in enumerate(drawn)}


def best_by_hand(table, budget):
    every = itertools.product(*table.values())
    return min(sum(c.loss for c in chosen) for chosen in every if sum(c.cost for c in chosen) <= budget)


@pytest.mark.parametrize("states", [20_000, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_allocation_is_the_best_of_all_or_says_by_how_much_it_may_not_be(seed, states, monkeypatch):
    monkeypatch.setattr("jaxcost.study.allocate._STATES", states)
    table = random_table(seed)
    least = sum(min(c.cost for c in choices) for choices in table.values())
    most = sum(max(c.cost for c in choices) for choices in table.values())
    for share in (0.0, 0.2, 0.5, 1.0):
        budget = least + share * (most - least)
        found, best = allocate(table, budget), best_by_hand(table, budget)
        assert found.cost <= budget * (1 + 1e-9)
        assert found.loss >= best - 1e-9 and found.loss - found.gap <= best + 1e-9
        assert found.loss == pytest.approx(best) if states > 8 else found.loss <= best + found.gap + 1e-9
        assert states == 8 or found.gap == 0
        chosen = [table[path][level] for path, level in found.levels]
        assert sum(c.loss for c in chosen) == pytest.approx(found.loss)


def test_budgets_that_cannot_be_are_refused():
    table = {"a": (Choice(0, 10.0, 0.0), Choice(1, 2.0, 1.0)), "b": (Choice(0, 5.0, 0.0),)}
    assert allocate(table, 15.0).levels == (("a", 0), ("b", 0)) and allocate(table, 7.0).levels == (("a", 1), ("b", 0))
    with pytest.raises(ValueError, match="A budget of 6.9 is below the least .* choose one from 7 to 15"):
        allocate(table, 6.9)
    with pytest.raises(ValueError, match="A budget of 15.1 is above the most"):
        allocate(table, 15.1)
    with pytest.raises(ValueError, match="no weight to allocate to"):
        allocate({}, 0.0)
    with pytest.raises(ValueError, match="7 is none of the levels 0, 1"):
        uniform_cost(table, 7)


PARAMS = {
    "layers": {
        "up": {"kernel": jax.random.normal(jax.random.key(0), (2, 16, 8))},
        "down": {"kernel": 0.01 * jax.random.normal(jax.random.key(1), (2, 8, 16))},
    },
    "norm": {"scale": jnp.ones(16)},
}
UP, DOWN = "layers/up/kernel", "layers/down/kernel"


def energy(params):
    return -float(sum(jnp.sum(jnp.square(weights.materialize(w["kernel"]))) for w in params["layers"].values()))


def test_each_weight_is_measured_alone_and_gets_a_rule_of_its_own():
    levels = (0.0, 0.2, 0.5, 0.9)
    table = sensitivities(prune(), "sparsity", levels, PARAMS, loss_increase(energy, PARAMS))
    assert set(table) == {UP, DOWN} and [c.level for c in table[UP]] == list(levels)
    for path, choices in table.items():
        assert [c.loss for c in choices] == sorted(c.loss for c in choices) and choices[0].loss == 0
        changed = prune(rules=(rule(f"^{path}$"),), sparsity=0.5)(PARAMS)
        assert choices[2].loss == pytest.approx(energy(changed) - energy(PARAMS), rel=1e-4)
    assert table[UP][2].cost == 0.5 * 256 * 4 + 256 / 8
    found = allocate(table, uniform_cost(table, 0.5))
    # What carries nothing is pruned in favour of what does.
    assert dict(found.levels) == {UP: 0.2, DOWN: 0.9} and found.cost <= uniform_cost(table, 0.5)
    pruned = found.transform(prune(), "sparsity")(PARAMS)
    assert float(jnp.mean(pruned["layers"]["up"]["kernel"].mask)) > 0.75
    assert energy(pruned) < energy(prune(sparsity=0.5)(PARAMS))


def test_rules_keep_their_other_options_and_none_leaves_a_weight_alone():
    base = prune(rules=(rule("up", pattern="unstructured"), rule("kernel")))
    found = with_levels(base, "sparsity", {UP: 0.3, DOWN: None})
    assert found.rules[0].options == (("pattern", "unstructured"), ("sparsity", 0.3)) and found.rules[1].skip
    params = found(PARAMS)
    assert isinstance(params["layers"]["up"]["kernel"], Masked)
    assert params["layers"]["down"]["kernel"] is PARAMS["layers"]["down"]["kernel"]
    thin = sensitivities(factorize(), "rank", (1, 4, None), PARAMS, loss_increase(energy, PARAMS))
    assert [c.cost for c in thin[UP]] == [2 * 4 * 24, 2 * 4 * 4 * 24, 4 * 256]
    assert thin[UP][2].loss == 0


def test_layer_errors_are_those_of_the_outputs():
    x = jax.random.normal(jax.random.key(3), (100, 16)) * jnp.arange(1, 17)
    squares = jnp.broadcast_to(jnp.sum(jnp.square(x), axis=0), (2, 16))
    calibration = {UP: Inputs(jnp.full(2, 100.0), squares, squares)}
    changed = prune(rules=(rule("up"),), sparsity=0.5)(PARAMS)
    w, cut = (np.asarray(weights.materialize(p["layers"]["up"]["kernel"])) for p in (PARAMS, changed))
    exact = np.sum(np.asarray(squares)[..., None] * (w - cut) ** 2) / np.sum(np.asarray(squares)[..., None] * w**2)
    assert layer_error(calibration, PARAMS)(UP, changed) == pytest.approx(exact, rel=1e-5)


def test_bytes_are_those_that_are_stored():
    w = PARAMS["layers"]["up"]["kernel"]
    assert stored_bytes(w) == 1024
    assert stored_bytes(quantize(rules=(rule("up"),))(PARAMS)["layers"]["up"]["kernel"]) == 256 + 2 * 8 * 4


def test_bits_are_allocated_between_the_grids():
    levels = (4, 8, None)
    table = sensitivities(quantize(rules=(rule("kernel"),)), "bits", levels, PARAMS, loss_increase(energy, PARAMS))
    scales = 2 * 8 * 4
    assert [c.cost for c in table[UP]] == [128 + scales, 256 + scales, 1024]
    budget = uniform_cost(table, 8)
    found = allocate(table, budget)
    assert found.cost <= budget and found.loss <= sum(c[1].loss for c in table.values())
    stored = found.transform(quantize(rules=(rule("kernel"),)), "bits")(PARAMS)
    assert sum(stored_bytes(w["kernel"]) for w in stored["layers"].values()) == found.cost


def test_seconds_are_those_of_the_compiled_products():
    seconds = contraction_seconds(load_chip("v5e"), rows=4096)
    w = jax.ShapeDtypeStruct((3, 2048, 2048), jnp.bfloat16)
    flops = 3 * 2 * 4096 * 2048 * 2048
    assert seconds(w) == pytest.approx(flops / 197e12, rel=0.01)
    params = {"layers": {"kernel": w}}
    thin = factorize(rules=(rule("kernel"),), rank=512).abstract(params)["layers"]["kernel"]
    assert seconds(thin) == pytest.approx(seconds(w) / 2, rel=0.1)
    assert seconds(prune(rules=(rule("kernel"),)).abstract(params)["layers"]["kernel"]) >= seconds(w)


def test_nothing_to_choose_from_is_refused():
    score = loss_increase(energy, PARAMS)
    with pytest.raises(ValueError, match="needs levels"):
        sensitivities(prune(), "sparsity", (), PARAMS, score)
    with pytest.raises(ValueError, match="picks no weight"):
        sensitivities(prune(rules=(rule("nothing"),)), "sparsity", (0.5,), PARAMS, score)
    with pytest.raises(ValueError, match="sets colour, but the options are"):
        sensitivities(prune(), "colour", (0.5,), PARAMS, score)


@pytest.mark.slow
def test_the_allocation_beats_the_uniform_level_on_a_trained_model(tmp_path):
    """The small version of `scripts/allocate.py` on the quickstart's model."""
    value = Experiment(
        model=ModelConfig(0, width=48, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=24, mlp_width=96),
        data=DataConfig(name="python_text/reference", sequence_length=64, batch_size=8, data_dir=str(tmp_path)),
        execution=ExecutionConfig(unroll="never"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        training=TrainingConfig(steps=80),
        evaluation=EvaluationConfig(max_tokens=8192),
    )
    session = Session(dataclasses.replace(value), quiet=True, devices=jax.devices()[:1])
    params = session.train(tmp_path / "run").params
    levels = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)
    found = compare_with_uniform(session, params, prune(), "sparsity", levels, 0.8, batches=4)
    assert found["allocated"]["cost"] <= found["uniform"]["cost"] * (1 + 1e-9)
    assert found["beats_uniform"] and found["gap"] < 1e-3
    assert found["allocated"]["bits_per_byte"] < found["uniform"]["bits_per_byte"] - 0.02
    bits = compare_with_uniform(session, params, quantize(), "bits", (4, 8, None), 8, batches=4)
    assert bits["allocated"]["cost"] <= bits["uniform"]["cost"] * (1 + 1e-9)
    # Eight bits lose next to nothing, so there is next to nothing to win.
    assert abs(bits["allocated"]["bits_per_byte"] - bits["uniform"]["bits_per_byte"]) < 0.01
