"""A mixture of experts: routing, capacity, dropless, its losses, every kind of weight, and training on meshes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads
from sweep import sweep

from jaxcost import sharding, weights
from jaxcost.config import Experiment
from jaxcost.data.config import DataConfig
from jaxcost.models import experts
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.transformer import Transformer, abstract, init_cache, initialize, logits
from jaxcost.serving.engine import Engine
from jaxcost.sharding import MeshConfig
from jaxcost.training.config import OptimizerConfig
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import Gradual, chain, factorize, freeze, lora, prune, quantize, shrink

DROPLESS = ModelConfig(
    vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, max_length=32,
    experts=4, experts_per_token=2,
)  # fmt: skip
CAPACITY = dataclasses.replace(DROPLESS, capacity_factor=1.0)
ROOMY = dataclasses.replace(DROPLESS, capacity_factor=4.0)
SHARED = dataclasses.replace(DROPLESS, shared_width=12, normalize_experts=False, experts_per_token=1)
LOSSES = {"load_balancing": 0.1, "router_z": 0.01}


@functools.cache
def params_of(config):
    return jax.jit(lambda key: initialize(Transformer(config), key)[0])(jax.random.key(0))


def tokens_of(shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, 64)


def layer_of(params, index=0):
    return jax.tree.map(lambda a: a[index], params["layers"]["mlp"])


def block(config, mlp, x, drops=True):
    """One layer's output and losses."""
    return experts.Experts(config, drops=drops).apply({"params": mlp}, x, None)


def by_hand(config, mlp, x, rows=None):
    """Every sequence, choice and token in its turn, in float64; at most `rows` tokens an expert and sequence."""
    mlp = jax.tree.map(lambda a: np.asarray(a, np.float64), mlp)
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    out = np.zeros(x.shape)
    for b, sequence in enumerate(np.asarray(x, np.float64)):
        scores = sequence @ mlp["router"]["kernel"]
        shares = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        order = np.argsort(-shares, axis=-1)[:, : config.experts_per_token]
        taken = dict.fromkeys(range(config.experts), 0)
        for choice in range(config.experts_per_token):
            for t, token in enumerate(sequence):
                e = order[t, choice]
                taken[e] += 1
                if rows is not None and taken[e] > rows:
                    continue
                share = shares[t, e] / (shares[t, order[t]].sum() if config.normalize_experts else 1)
                hidden = silu(token @ mlp["gate"]["kernel"][e]) * (token @ mlp["up"]["kernel"][e])
                out[b, t] += share * (hidden @ mlp["down"]["kernel"][e])
        if config.shared_width:
            w = mlp["shared"]
            hidden = silu(sequence @ w["gate"]["kernel"]) * (sequence @ w["up"]["kernel"])
            out[b] += hidden @ w["down"]["kernel"]
    return out


X = jax.random.normal(jax.random.key(3), (3, 10, 16))


# ---- One layer ----


@sweep("config", [DROPLESS, ROOMY, SHARED], quick=1)
def test_tokens_take_the_weighted_sum_of_their_experts(config):
    mlp = layer_of(params_of(config))
    np.testing.assert_allclose(block(config, mlp, X)[0], by_hand(config, mlp, X), rtol=1e-4, atol=1e-5)


@sweep("factor", [0.4, 0.8, 1.0], quick=1)
def test_experts_take_first_choices_first_and_drop_what_is_beyond_their_capacity(factor):
    config = dataclasses.replace(DROPLESS, capacity_factor=factor)
    mlp, rows = layer_of(params_of(config)), experts.capacity(config, 10)
    assert rows == {0.4: 2, 0.8: 4, 1.0: 5}[factor]
    got = block(config, mlp, X)[0]
    np.testing.assert_allclose(got, by_hand(config, mlp, X, rows), rtol=1e-4, atol=1e-5)
    without = block(config, mlp, X, drops=False)[0]
    np.testing.assert_allclose(without, by_hand(config, mlp, X), rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(got - without)) > 1e-3


def test_capacities_are_at_least_one_row_and_at_most_the_sequence():
    assert experts.capacity(CAPACITY, 1) == 1
    assert experts.capacity(dataclasses.replace(CAPACITY, capacity_factor=100.0), 10) == 10
    mixtral = dataclasses.replace(DROPLESS, experts=8, capacity_factor=1.25)
    assert experts.capacity(mixtral, 4096) == 1280


@pytest.mark.slow
def test_both_paths_have_the_same_gradients_where_nothing_is_dropped():
    mlp = layer_of(params_of(DROPLESS))

    def gradients(config):
        return jax.grad(lambda mlp, x: jnp.sum(jnp.sin(block(config, mlp, x)[0])), (0, 1))(mlp, X)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients(DROPLESS), gradients(ROOMY)
    )


@sweep("config", [CAPACITY, DROPLESS], quick=0)
def test_gradients_are_those_of_finite_differences(config):
    mlp = layer_of(params_of(config))
    check_grads(
        lambda mlp, x: block(config, mlp, x)[0], (mlp, X[:1]), order=1, modes=["rev"], eps=1e-3, atol=0.02, rtol=0.02
    )


@pytest.mark.slow
def test_router_losses_are_one_where_loads_are_even_and_the_number_of_experts_where_one_takes_all():
    even = 8 * jnp.eye(4)[jnp.arange(12) % 4][None]
    one = jnp.zeros((1, 12, 4)).at[..., 2].set(50.0)
    for router, want in ((even, 1.0), (one, 4.0), (jnp.zeros((1, 12, 4)), 1.0)):
        _, _, losses = experts.route(router, 1, True)
        np.testing.assert_allclose(losses["load_balancing"], want, rtol=1e-4)
        z = np.log(np.exp(np.asarray(router, np.float64)).sum(-1))
        np.testing.assert_allclose(losses["router_z"], np.mean(z**2), rtol=1e-5)
    gradient = jax.grad(lambda r: experts.route(r, 1, True)[2]["load_balancing"])(one.at[..., 2].set(1.0))
    assert np.all(gradient[..., 2] > 0) and np.all(gradient[..., 0] < 0)


# ---- Kinds of weight ----


@pytest.mark.slow
@sweep("config", [ROOMY, DROPLESS], quick=1)
@pytest.mark.parametrize("name", ["prune", "2:4", "lora", "factorize", "qlora", "quantised training"])
def test_every_kind_of_weight_means_the_same_as_its_dense_matrix(name, config):
    params = TRANSFORMS[name](params_of(config))
    # A fresh adapter is zero; another one is seen.
    params = jax.tree_util.tree_map_with_path(
        lambda path, a: a + 0.1 if weights.path_name(path).endswith("/b") else a, params
    )
    mlp = layer_of(params)
    want = block(config, weights.merge(mlp), X)[0]
    got = block(config, mlp, X)[0]
    # Quantised training rounds the activations too, where experts are contracted and not materialised.
    exact = name != "quantised training"
    np.testing.assert_allclose(got, want, atol=2e-4 if exact else 0.15)
    assert np.std(want) > 0.05


# ---- Whole models ----


def test_parameters_have_the_shapes_and_axes_that_the_config_says():
    shapes, axes = abstract(Transformer(SHARED))
    mlp = {weights.path_name(path): a.shape for path, a in jax.tree_util.tree_leaves_with_path(shapes["layers"]["mlp"])}
    matrices = {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
    want = {f"{name}/kernel": (2, 4, *shape) for name, shape in matrices.items()}
    want |= {f"shared/{name}/kernel": (2, *(12 if n == 24 else n for n in shape)) for name, shape in matrices.items()}
    assert mlp == want | {"router/kernel": (2, 16, 4)}
    assert tuple(axes["layers"]["mlp"]["up"]["kernel"]) == ("layers", "expert", "embed", "mlp")
    assert tuple(axes["layers"]["mlp"]["down"]["kernel"]) == ("layers", "expert", "mlp", "embed")
    up = params_of(SHARED)["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(np.std(up, axis=(2, 3)), 16**-0.5, rtol=0.2)


@sweep("config", [CAPACITY, SHARED], quick=1)
def test_serving_drops_nothing(config):
    dropless = dataclasses.replace(config, capacity_factor=0.0)
    params, tokens = params_of(config), tokens_of((3, 10))
    want = logits(dropless, params, Transformer(dropless).apply({"params": params}, tokens)[0])
    engine, rows = Engine(Transformer(config)), np.arange(3)
    got, cache = engine.prefill(params, tokens[:, :6], np.array([6, 3, 1]), init_cache(config, 3, 10, jnp.float32))
    np.testing.assert_allclose(got, want[rows, [5, 2, 0]], rtol=2e-4, atol=2e-5)
    for step in range(3):
        lengths = np.array([6, 3, 1]) + step
        hidden, cache = Transformer(config).apply({"params": params}, tokens[rows, lengths][:, None], cache)
        np.testing.assert_allclose(logits(config, params, hidden[:, 0]), want[rows, lengths], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 5}, "model.experts_per_token is 5; it must lie between 1 and model.experts"),
        ({"experts": 0, "shared_width": 8}, "need experts; set model.experts"),
        ({"experts": 0, "capacity_factor": 1.0}, "need experts; set model.experts"),
        ({"experts": -1}, "model.experts is -1"),
        ({"mlp_bias": True}, "experts have no biases"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DROPLESS, **change)


def test_meshes_that_do_not_divide_the_experts_are_refused():
    experiment = Experiment(
        model=DROPLESS, data=DataConfig(batch_size=8, sequence_length=16), mesh=MeshConfig(expert=8)
    )
    with pytest.raises(ValueError, match=r"model.experts \(4\) must be a multiple of mesh.expert \(8\)"):
        experiment.check_devices(8)
    with pytest.raises(ValueError, match=r"mesh.data x mesh.fsdp x mesh.expert = 3 parts"):
        dataclasses.replace(experiment, mesh=MeshConfig(expert=3)).check_devices(3)


# ---- Training ----

TRANSFORMS = {
    "plain": chain(),
    "prune": prune(sparsity=0.6),
    "2:4": prune(pattern="2:4"),
    "shrink": shrink(mlp=0.5, experts=2),
    "gradual": prune(sparsity=0.7, gradual=Gradual(begin_step=1, end_step=2, every_steps=1)),
    "lora": lora(rank=2),
    "factorize": factorize(parameters=0.6),
    "qlora": chain(quantize(), lora(rank=2)),
    "quantised training": quantize(mode="training"),
    "freeze": freeze(top_layers=1),
}
MESHES = {
    "fsdp 2 x tensor 2 x expert 2": MeshConfig(fsdp=2, tensor=2, expert=2),
    "fsdp 4 x tensor 2": MeshConfig(fsdp=4, tensor=2),
    "data 2 x expert 4": MeshConfig(data=2, expert=4),
}


@functools.cache
def trained(config, name, mesh_name, accumulation=1):
    """Three steps' metrics, and the parameters after them."""
    transform = TRANSFORMS[name]
    mesh = sharding.make_mesh(MESHES[mesh_name]) if mesh_name else sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model = Transformer(config, ExecutionConfig(unroll="never"))
    mask = (np.random.default_rng(1).random((8, 16)) < 0.8).astype(np.float32)
    batches = [
        {"inputs": batch[:, :-1], "targets": batch[:, 1:], "mask": mask}
        for batch in np.asarray(tokens_of((3, 8, 17), seed=4))
    ]
    how = {"transform": transform, "accumulation": accumulation, "router_losses": LOSSES}
    return small.trained(model, transform(params_of(config)), batches, mesh, **how)


@sweep(
    ("config", "mesh_name"),
    [
        (CAPACITY, "fsdp 2 x tensor 2 x expert 2"),
        (CAPACITY, "data 2 x expert 4"),
        (DROPLESS, "fsdp 2 x tensor 2 x expert 2"),
        (DROPLESS, "data 2 x expert 4"),
        (SHARED, "fsdp 4 x tensor 2"),
    ],
    quick=0,
)
def test_training_on_a_mesh_equals_training_on_one_device(config, mesh_name):
    want, got = trained(config, "plain", None)[0], trained(config, "plain", mesh_name)[0]
    assert set(want[0]) == {"loss", "gradient_norm", "skipped", *experts.LOSSES}
    for a, b in zip(got, want, strict=True):
        for name, value in b.items():
            np.testing.assert_allclose(a[name], value, rtol=1e-3, err_msg=name)
    assert want[0]["loss"] != want[-1]["loss"]


def test_rows_go_to_their_experts_without_being_gathered():
    """Left to the partitioner, every device held the rows of all experts of all sequences."""
    mesh, rows, config = sharding.make_mesh(MeshConfig(fsdp=4, expert=2)), 40, CAPACITY
    mlp = layer_of(params_of(config))

    def of_all(x_BTD):
        return block(config, mlp, x_BTD)[0].sum()

    with jax.set_mesh(mesh):
        apart = NamedSharding(mesh, sharding.mesh_spec(PartitionSpec("batch"), mesh.shape))
        x = jax.ShapeDtypeStruct((rows, 16, config.width), jnp.float32, sharding=apart)
        text = jax.jit(jax.grad(of_all)).lower(x).compile().as_text()
    assert "all-to-all" in text
    assert not re.search(rf"\[({config.experts},{rows}|{rows},{config.experts}),", text)


@sweep("name", [name for name in TRANSFORMS if name != "plain"], quick=1)
def test_every_transform_trains_experts(name):
    metrics, params = trained(CAPACITY, name, None)
    assert np.ptp([m["loss"] for m in metrics]) > 1e-3
    before = weights.partition(TRANSFORMS[name](params_of(CAPACITY)))[0]
    for path, leaf in weights.partition(params)[0].items():
        assert np.any(leaf != before[path]), path


@sweep("name", ["gradual", "factorize", "qlora", "quantised training"], quick=0)
def test_transformed_experts_train_on_a_mesh_as_on_one_device(name):
    want, _ = trained(CAPACITY, name, None)
    got, _ = trained(CAPACITY, name, "fsdp 2 x tensor 2 x expert 2")
    np.testing.assert_allclose(got[0]["loss"], want[0]["loss"], rtol=1e-5)
    np.testing.assert_allclose([m["loss"] for m in got], [m["loss"] for m in want], rtol=3e-3)


@pytest.mark.slow
def test_router_losses_even_out_the_loads():
    def last(router_losses):
        model, optimizer = Transformer(CAPACITY), make_optimizer(OptimizerConfig(learning_rate=1e-2), 12)
        params = jax.tree.map(lambda a: a, params_of(CAPACITY))
        # A router that favours one expert.
        params["layers"]["mlp"]["router"]["kernel"] = params["layers"]["mlp"]["router"]["kernel"].at[..., 1].mul(4.0)
        state = init_state(params, optimizer, 0)
        step = make_train_step(model, optimizer, chain(), router_losses=router_losses)
        jitted = jax.jit(step)
        tokens = tokens_of((4, 17), seed=9)
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": jnp.ones((4, 16))}
        for _ in range(12):
            state, metrics = jitted(state, batch)
        return metrics

    with_them, without = last({"load_balancing": 1.0, "router_z": 0.1}), last({})
    assert with_them["load_balancing"] < without["load_balancing"]
    assert with_them["router_z"] < without["router_z"]


@pytest.mark.slow
def test_accumulation_weighs_router_losses_by_targets_and_changes_no_other():
    whole, parts = trained(SHARED, "plain", None)[0], trained(SHARED, "plain", None, 2)[0]
    np.testing.assert_allclose(parts[0]["loss"], whole[0]["loss"], rtol=1e-5)
    # Loads are evened out within a microbatch, whose shares differ a little from the whole batch's.
    np.testing.assert_allclose(parts[0]["router_z"], whole[0]["router_z"], rtol=0.1)
    assert set(parts[0]) == set(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("config", [CAPACITY, DROPLESS])
def test_rematerialisation_changes_no_gradient(config):
    tokens = tokens_of((2, 16))

    def gradient(execution):
        model = Transformer(config, execution)
        loss = lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, tokens)[0]))  # noqa: E731
        return jax.jit(jax.grad(loss))(params_of(config))

    want = gradient(ExecutionConfig(unroll="never"))
    for execution in (ExecutionConfig(remat="full"), ExecutionConfig(remat="full", save=("mlp_up",))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(execution), want)
