"""Structured pruning: what is left is exactly the model without its dropped parts, smaller, and cheaper in fact."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep import sweep

from jaxcost import sharding, weights
from jaxcost.config import Experiment
from jaxcost.cost import closed_form
from jaxcost.cost.hlo import compiled_cost
from jaxcost.cost.transformed import training_step_flops
from jaxcost.data import DataConfig
from jaxcost.evaluation.score import EvaluationConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.stacks import resized
from jaxcost.models.transformer import Transformer, abstract, axes_of, initialize, start_cache
from jaxcost.planning.ranking import sizes_of
from jaxcost.planning.steps import trace_step
from jaxcost.serving.engine import Engine
from jaxcost.session import Session, load_run
from jaxcost.sharding import MeshConfig
from jaxcost.study.recipes import Recipe, StudyConfig
from jaxcost.study.run import run_study
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import (
    CalibrationError,
    OrderError,
    calibrate,
    chain,
    freeze,
    lora,
    prune,
    quantize,
    rule,
    shrink,
)
from jaxcost.transforms.manifest import manifest

CONFIG = ModelConfig(
    vocab_size=32, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, max_length=16
)
BIASED = dataclasses.replace(
    CONFIG, norm="layer", query_key_norm="head", qkv_bias=True, output_bias=True, mlp_bias=True, gated=False
)
EXPERTS = dataclasses.replace(CONFIG, norm="layer", experts=4, experts_per_token=2, shared_width=8)
CONFIGS = {"llama": CONFIG, "biased": BIASED, "experts": EXPERTS}
TOKENS = np.arange(16).reshape(2, 8)


@functools.cache
def dense(config):
    """Weights of which nothing is zero, so that what goes along with a part shows."""

    def made(key):
        params = initialize(Transformer(config), key)[0]
        keys = iter(jax.random.split(key, 100))
        return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), params)

    return jax.jit(made)(jax.random.key(0))


def hidden(config, params):
    apply = jax.jit(lambda p: Transformer(config).apply({"params": p}, TOKENS)[0])
    return np.asarray(apply(params))


def changed(params, path, f):
    return weights.map_weights(lambda at, w: jnp.asarray(f(np.array(w))) if at == path else w, params)


def norms(kernel):
    """The sum of squares of each row, (..., in)."""
    return np.sum(np.square(np.asarray(kernel, np.float64)), axis=-1)


def best(worth, number):
    return np.sort(np.argsort(-worth, axis=-1, kind="stable")[..., :number], axis=-1)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


# ---- What stays is the model without what went ----


@sweep("name", CONFIGS, quick=0)
def test_fewer_channels_are_the_model_with_their_rows_zeroed(name):
    config, params = CONFIGS[name], dense(CONFIGS[name])
    small = shrink(mlp=0.25)(params)
    width = config.mlp_width // 4
    assert resized(config, small).mlp_width == width and small["layers"]["mlp"]["up"]["kernel"].shape[-1] == width
    zeroed = params
    for path in ("layers/mlp/down/kernel", *(["layers/mlp/shared/down/kernel"] if config.shared_width else [])):

        def without(w):
            kept = best(norms(w), w.shape[-2] // 4)
            stays = np.zeros(w.shape[:-1], bool)
            np.put_along_axis(stays, kept, True, axis=-1)
            return w * stays[..., None]

        zeroed = changed(zeroed, path, without)
    close(hidden(config, small), hidden(config, zeroed))


@sweep("within", [False, True], quick=1)
@sweep("name", ["llama", "biased"], quick=1)
def test_fewer_heads_are_the_model_with_their_rows_zeroed(name, within):
    config, params = CONFIGS[name], dense(CONFIGS[name])
    small = shrink(heads=0.5, head_dim=4, within_groups=within)(params)
    left = resized(config, small)
    assert (left.num_heads, left.num_kv_heads) == ((2, 2) if within else (2, 1))

    def without(w):
        worth = norms(w).reshape(3, 2, 2, 4).sum(axis=-1)
        stays = np.zeros((3, 2, 2), bool)
        if within:
            np.put_along_axis(stays, best(worth, 1), True, axis=-1)
        else:
            np.put_along_axis(stays, best(worth.sum(axis=-1), 1)[..., None], True, axis=1)
        return w * np.repeat(stays.reshape(3, 4), 4, axis=-1)[..., None]

    close(hidden(config, small), hidden(config, changed(params, "layers/attention/output/kernel", without)))


def test_norms_over_all_queries_shrink_along():
    config = dataclasses.replace(CONFIG, query_key_norm="projection")
    small = shrink(heads=2, head_dim=4)(dense(config))["layers"]["attention"]
    assert small["query_norm"]["scale"].shape == (3, 8) and small["key_norm"]["scale"].shape == (3, 4)
    assert np.isfinite(hidden(config, shrink(heads=2, head_dim=4)(dense(config)))).all()


def test_fewer_layers_are_those_that_add_the_most():
    params = changed(
        dense(CONFIG), "layers/attention/output/kernel", lambda w: w * np.array([1, 0.01, 1])[:, None, None]
    )
    params = changed(params, "layers/mlp/down/kernel", lambda w: w * np.array([1, 0.01, 1])[:, None, None])
    small = shrink(layers=2)(params)
    for got, want in zip(jax.tree.leaves(small["layers"]), jax.tree.leaves(params["layers"]), strict=True):
        np.testing.assert_array_equal(got, want[np.array([0, 2])])
    silent = changed(params, "layers/attention/output/kernel", lambda w: w * np.array([1, 0, 1])[:, None, None])
    silent = changed(silent, "layers/mlp/down/kernel", lambda w: w * np.array([1, 0, 1])[:, None, None])
    close(hidden(CONFIG, small), hidden(CONFIG, silent))


@sweep("capacity_factor", [0.0, 4.0], quick=1)
def test_fewer_experts_are_the_model_that_never_chooses_the_others(capacity_factor):
    config = dataclasses.replace(EXPERTS, capacity_factor=capacity_factor)
    params = dense(config)
    # The norm's first output is always 100, so that the router's first row alone can rule an expert out.
    params = changed(params, "layers/mlp_norm/scale", lambda w: np.concatenate([0 * w[:, :1], w[:, 1:]], axis=1))
    params = changed(params, "layers/mlp_norm/bias", lambda w: np.concatenate([0 * w[:, :1] + 100, w[:, 1:]], axis=1))
    params = changed(params, "layers/mlp/router/kernel", lambda w: np.concatenate([0 * w[:, :1], w[:, 1:]], axis=1))
    small = shrink(experts=3)(params)
    assert resized(config, small).experts == 3 and small["layers"]["mlp"]["router"]["kernel"].shape == (3, 16, 3)
    worst = np.argmin(norms(params["layers"]["mlp"]["down"]["kernel"]).sum(axis=-1), axis=-1)

    def ruled_out(w):
        w[np.arange(3), 0, worst] = -10
        return w

    close(hidden(config, small), hidden(config, changed(params, "layers/mlp/router/kernel", ruled_out)))


def test_activations_decide_where_they_are_asked():
    params = dense(CONFIG)
    apply = lambda p, tokens: Transformer(CONFIG).apply({"params": p}, tokens)[0]  # noqa: E731
    one = shrink(mlp=6, heads=2, head_dim=4, layers=2, importance="activations")
    wanted = {path: settings.statistics() for path, settings in one.picked(params).items()}
    assert set(wanted) == {"layers/attention/output/kernel", "layers/mlp/down/kernel"}
    found = calibrate(apply, params, [TOKENS], wanted)
    down, out = (f"layers/{name}/kernel" for name in ("mlp/down", "attention/output"))
    worth = {
        path: norms(params["layers"][path.split("/")[1]][path.split("/")[2]]["kernel"])
        * np.asarray(found[path].squares)
        for path in (down, out)
    }
    layers = best(worth[down].sum(axis=-1) + worth[out].sum(axis=-1), 2)
    kept = best(worth[down][layers], 6)
    small = one(params, None, found)
    want = np.take_along_axis(np.asarray(params["layers"]["mlp"]["down"]["kernel"])[layers], kept[..., None], axis=1)
    np.testing.assert_array_equal(small["layers"]["mlp"]["down"]["kernel"], want)
    with pytest.raises(CalibrationError, match="nothing is known of the inputs of layers/attention/output/kernel"):
        one(params)


# ---- Where it works ----

EVERYTHING = {
    "llama": shrink(heads=2, head_dim=4, mlp=0.5, layers=2),
    "biased": shrink(heads=0.5, head_dim=4, within_groups=True, mlp=8, layers=2),
    "experts": shrink(heads=2, head_dim=4, mlp=0.5, layers=2, experts=2),
}


@sweep("name", CONFIGS, quick=1)
def test_sizes_follow_from_the_options_and_jit_changes_nothing(name):
    params, one = dense(CONFIGS[name]), EVERYTHING[name]
    small = one(params)
    shapes = one.abstract(jax.eval_shape(lambda: params))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), small) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    jitted = jax.jit(one)(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), small, jitted))
    left = resized(CONFIGS[name], small)
    fresh, _ = abstract(Transformer(left))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small)
    assert manifest(small) == {}
    rows = {row.path: row.action for row in one.coverage(params)}
    assert rows["embed/table"] == "-" and rows["layers/mlp/up/kernel"] == one.describe()
    assert shrink(mlp=8).coverage(params)[0].action == "-"


@sweep("name", CONFIGS, quick=0)
def test_a_mesh_changes_nothing_and_no_weight_is_gathered(name):
    config = dataclasses.replace(CONFIGS[name], num_heads=8, num_kv_heads=4)
    one = dataclasses.replace(EVERYTHING[name], heads=4)
    params = dense(config)
    model, mesh = Transformer(config), sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    want, shapes = one(params), one.abstract(params)
    placed = jax.device_put(params, sharding.shardings(params, axes_of(model, params), mesh))
    places = sharding.shardings(shapes, axes_of(model, shapes), mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(one, out_shardings=places).lower(placed).compile()
        small = compiled(placed)
        tokens = np.tile(TOKENS, (2, 1))
        apply = jax.jit(lambda p: model.apply({"params": p}, tokens)[0])
        got = np.asarray(apply(small))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), small, want))
    close(got, np.tile(hidden(config, want), (2, 1, 1)))
    # What parts are worth is compared in one place.
    smallest = min(w.nbytes for part in params["layers"]["attention"].values() for w in part.values() if w.ndim == 3)
    moved = [one for one in compiled_cost(compiled).collectives if one.kind == "all-gather"]
    assert all(one.operand_bytes * one.group_size < smallest for one in moved)


def test_it_comes_before_other_cuts():
    steps = chain(shrink(mlp=8, layers=2), prune(pattern="2:4"), lora(rank=2))
    small = steps(dense(CONFIG))
    assert weights.materialize(small["layers"]["mlp"]["up"]["kernel"]).shape == (2, 16, 8)
    assert np.isfinite(hidden(CONFIG, small)).all()
    with pytest.raises(OrderError):
        chain(lora(), shrink(mlp=8))


@sweep("name", CONFIGS, quick=1)
def test_a_smaller_model_generates_what_its_own_config_would(name):
    config, small = CONFIGS[name], EVERYTHING[name](dense(CONFIGS[name]))
    left = resized(config, small)
    prompts, options = [np.arange(3)], {"max_new_tokens": 4, "tokens_per_dispatch": 2}
    got, want = (Engine(Transformer(c)).generate(small, prompts, **options) for c in (config, left))
    np.testing.assert_array_equal(got, want)
    cache = start_cache(Transformer(config), small, 1, 8)
    assert cache.key.shape == (left.num_layers, 1, 8, left.num_kv_heads, left.head_dim)


# ---- What it saves ----


@sweep("one", [EVERYTHING["llama"], shrink(mlp=0.25), shrink(heads=0.5, head_dim=4, within_groups=True)], quick=1)
def test_the_compiled_step_costs_what_the_closed_form_of_the_smaller_config_says(one):
    model = Transformer(CONFIG, ExecutionConfig(unroll="never"))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    whole = abstract(model)[0]

    def compiled(params):
        state = jax.eval_shape(lambda params: init_state(params, optimizer, 0), params)
        batch = {name: jax.ShapeDtypeStruct((4, 16), jnp.int32) for name in ("inputs", "targets")}
        batch["mask"] = jax.ShapeDtypeStruct((4, 16), jnp.float32)
        step = jax.jit(make_train_step(model, optimizer, one))
        return compiled_cost(step.lower(state, batch).compile()).flops

    params = one.abstract(whole)
    left, flops = resized(CONFIG, params), compiled(params)
    assert 4 * 16 * closed_form.training_flops_per_token(left, 16, "full") == pytest.approx(flops, rel=0.05)
    assert training_step_flops(CONFIG, params, 4, 16, "full") == pytest.approx(flops, rel=0.05)
    assert flops < 0.9 * compiled(whole)
    assert sum(a.size for a in jax.tree.leaves(params)) == closed_form.parameter_counts(left).total


def experiment(data_dir, **changes):
    value = Experiment(
        model=dataclasses.replace(CONFIG, vocab_size=0, max_length=32),
        data=DataConfig(name="python_text/reference", sequence_length=16, batch_size=8, data_dir=str(data_dir)),
        mesh=MeshConfig(data=-1),
        execution=ExecutionConfig(unroll="never"),
        training=TrainingConfig(steps=2),
        evaluation=EvaluationConfig(max_tokens=256),
        checkpoint=CheckpointConfig(every_steps=2),
    )
    return dataclasses.replace(value, **changes)


SMALLER = shrink(heads=2, head_dim=4, mlp=0.5, layers=2, importance="activations")


@pytest.mark.slow
def test_a_smaller_model_trains_restores_and_generates(tmp_path):
    session = Session(experiment(tmp_path, transforms=(SMALLER,)), quiet=True, devices=jax.devices()[:1])
    fitted = session.train(tmp_path / "run")
    left = session.transformed_config
    assert (left.num_layers, left.num_heads, left.num_kv_heads, left.mlp_width) == (2, 2, 1, 12)
    assert session.model_flops_per_token() == closed_form.training_flops_per_token(left, 16)
    assert fitted.cost.flops == pytest.approx(training_step_flops(left, fitted.params, 8, 16, "full"), rel=0.05)
    again, params, step = load_run(tmp_path / "run", jax.devices()[:1])
    assert step == 2
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params, fitted.params))
    made = Engine(again.model).generate(params, [np.arange(4)], max_new_tokens=3, tokens_per_dispatch=3)
    assert len(made[0]) == 3


@pytest.mark.long
def test_a_recipe_goes_through_the_study(tmp_path):
    recipes = (Recipe("small", transforms=(SMALLER,)), Recipe("later", finish=(shrink(mlp=0.5),)))
    study = StudyConfig(recipes=recipes, recovery_steps=1, decode_tokens=4, decode_batch_size=2, topology="v99:1x1")
    value = experiment(tmp_path / "data", study=study)
    result = run_study(value, tmp_path / "study", quiet=True, devices=jax.devices()[:1])
    rows = {row["name"]: row for row in result["rows"]}
    assert json.loads((tmp_path / "study" / "study.json").read_text()) == result
    for name in ("checkpoint_bytes", "weight_bytes", "inference_flops_per_token"):
        assert rows["small"][name] < rows["later"][name] < rows["control"][name]
    assert rows["small"]["step_flops"] < rows["control"]["step_flops"] == rows["later"]["step_flops"]
    assert rows["small"]["trainable_parameters"] < rows["control"]["trainable_parameters"]


def test_the_planner_lays_out_the_smaller_model():
    value = experiment("", transforms=(dataclasses.replace(SMALLER, importance="norm"),), mesh=MeshConfig())
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    traced = trace_step("decode", value, 128, mesh)
    assert traced.bytes_by_category["cache"] == 2 * 4 * 2 * 8 * 16 * 1 * 4 + 4 * 8
    sizes = sizes_of(value, 128)
    assert sizes.model.num_layers == 2 and sizes.parameters == sizes.trainable
    split = dataclasses.replace(value, mesh=MeshConfig(tensor=2))
    with pytest.raises(ValueError, match=r"model.num_kv_heads \(1\) must be a multiple of mesh.tensor \(2\)"):
        trace_step("train", split, 128, sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[:2]))


# ---- What it refuses ----


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: shrink(heads=2), "heads needs the size of one"),
        (lambda: shrink(mlp=0.0), "mlp is 0.0; give a share above 0"),
        (lambda: shrink(layers=1.5), "layers is 1.5; give a share above 0"),
        (lambda: shrink(experts=0), "experts is 0; give a share above 0"),
        (lambda: shrink(importance="luck"), "choose 'norm' or 'activations'"),
        (lambda: shrink(rules=(rule("mlp/"),)), "rules cannot choose"),
        (lambda: shrink(heads=5, head_dim=4)(dense(CONFIG)), "heads is 5, but there are 4; keep at most as many"),
        (lambda: shrink(heads=3, head_dim=4)(dense(CONFIG)), "give a multiple of 2"),
        (lambda: shrink(heads=0.1, head_dim=4)(dense(CONFIG)), "heads is 0.1 of 4, which leaves none"),
        (lambda: shrink(heads=2, head_dim=5)(dense(CONFIG)), "head_dim 5 does not divide the projections"),
        (lambda: shrink(mlp=25)(dense(CONFIG)), "mlp is 25, but there are 24"),
        (lambda: shrink(mlp=0.01)(dense(CONFIG)), "mlp is 0.01 of 24, which leaves none"),
        (lambda: shrink(layers=4)(dense(CONFIG)), "layers is 4, but there are 3"),
        (lambda: shrink(experts=2)(dense(CONFIG)), "has no experts to drop"),
        (lambda: shrink(mlp=8)(prune()(dense(CONFIG))), "is Masked already; put shrink before other transforms"),
        (lambda: shrink(mlp=8)(quantize()(dense(CONFIG))), "is Quantized already"),
        (lambda: shrink(mlp=8)(freeze()(dense(CONFIG))), "put shrink before freeze"),
        (lambda: shrink(mlp=8)({"table": jnp.ones(3)}), "works on a transformer's"),
        (lambda: hidden(EXPERTS, shrink(experts=1)(dense(EXPERTS))), "experts_per_token is 2; it must lie between 1"),
        (
            lambda: Experiment(transforms=(chain(shrink(heads=2, head_dim=8)),)),
            "head_dim is 8, but model.head_dim is 64",
        ),
    ],
)
def test_what_it_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_of_several_kinds_are_not_told_apart():
    config = dataclasses.replace(CONFIG, num_layers=4, pattern=("local", "global"), window=4)
    params = dense(config)
    with pytest.raises(ValueError, match="3 layers of the model's 4, and which of the pattern local global"):
        hidden(config, shrink(layers=3)(params))
    assert np.isfinite(hidden(config, shrink(mlp=8)(params))).all()
