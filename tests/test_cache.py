"""The cache in 8-bit integers: its error, its bytes, what is generated with it, and where it lives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost import weights
from jaxcost.config import Experiment
from jaxcost.cost import closed_form
from jaxcost.data.config import DataConfig
from jaxcost.models import cache as caches
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.stacks import apart, resized
from jaxcost.models.transformer import Transformer, init_cache, initialize, unembedding
from jaxcost.planning.steps import trace_step
from jaxcost.serving.engine import Engine
from jaxcost.sharding import MeshConfig, make_mesh
from jaxcost.training.config import OptimizerConfig
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import chain, freeze, quantize

CONFIG = ModelConfig(
    vocab_size=32, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, max_length=32
)
INT8 = ExecutionConfig(cache="int8")


def sequences(rows, length, seed):
    """Each row counts on from a random number by a random step, so there is something to learn."""
    start, step = jax.random.randint(jax.random.key(seed), (2, rows, 1), 1, 5)
    return (start + step * jnp.arange(length)) % CONFIG.vocab_size


@functools.cache
def trained():
    model = Transformer(CONFIG)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=5e-3, warmup_steps=10), 100)
    state = init_state(initialize(model, jax.random.key(0))[0], optimizer, seed=0)
    step = jax.jit(make_train_step(model, optimizer, chain()))
    for index in range(100):
        rows = sequences(16, 25, index)
        batch = {"inputs": rows[:, :-1], "targets": rows[:, 1:], "mask": jnp.ones((16, 24))}
        state, metrics = step(state, batch)
    assert metrics["loss"] < 0.5
    return state.params


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_read_is_what_was_written_to_half_a_step(dtype):
    new = jax.random.normal(jax.random.key(0), (2, 3, 2, 8)).at[0, 1, 1].set(0.0).astype(dtype)
    starts = jnp.asarray([[0, 1, 2], [4, 5, 6]])
    held = caches.write(caches.empty((2, 9, 2, 8), jnp.int8), new, starts)
    assert held.codes.dtype == jnp.int8 and held.scale.shape == (2, 9, 2, 1)
    read = np.asarray(caches.read(held, jnp.float32))
    exact = np.asarray(new, np.float32)
    for row, start in ((0, 0), (1, 4)):
        step = np.max(np.abs(exact[row]), axis=-1, keepdims=True) / 127
        assert np.all(np.abs(read[row, start : start + 3] - exact[row]) <= step * 0.5001)
        assert not np.any(np.delete(read[row], range(start, start + 3), axis=0))
    assert caches.read(held, dtype).dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_token_a_row_goes_to_its_slot_and_nowhere_else(dtype):
    old = jax.random.normal(jax.random.key(1), (3, 9, 2, 8)).astype(dtype)
    new = jax.random.normal(jax.random.key(2), (3, 1, 2, 8)).astype(dtype)
    # Behind the end, as a row that nobody reads may be, is the last slot.
    got = np.asarray(caches.write(old, new, jnp.asarray([[0], [5], [20]])), np.float32)
    want = np.array(old, np.float32)
    for row, slot in enumerate((0, 5, 8)):
        want[row, slot] = np.asarray(new[row, 0], np.float32)
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_attention_over_codes_errs_by_what_its_keys_and_values_do():
    def one(cache):
        hidden, cache = Transformer(CONFIG).apply({"params": trained()}, sequences(3, 10, 1000), cache)
        return weights.contract(hidden, unembedding(trained())), cache

    want, _ = one(init_cache(CONFIG, 3, 16, jnp.float32))
    got, cache = one(init_cache(CONFIG, 3, 16, jnp.int8))
    assert isinstance(cache.key, caches.Codes) and cache.key.codes.shape == (2, 3, 16, 2, 8)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-5 < error < 0.02


@pytest.mark.slow
def test_greedy_tokens_are_nearly_all_those_of_the_exact_cache():
    prompts = list(np.asarray(sequences(24, 6, 2000)))
    exact = Engine(Transformer(CONFIG)).generate(trained(), prompts, max_new_tokens=16)
    coded = Engine(Transformer(CONFIG, INT8)).generate(trained(), prompts, max_new_tokens=16)
    truth = np.asarray(sequences(24, 22, 2000))[:, 6:]
    assert np.mean(np.asarray(exact) == truth) > 0.8
    assert np.mean(np.asarray(exact) == np.asarray(coded)) > 0.97


@pytest.mark.slow
def test_a_frozen_stack_has_its_share_of_the_codes():
    params = freeze(top_layers=1)(trained())
    prompts = list(np.asarray(sequences(4, 6, 3000)))
    cut = Engine(Transformer(CONFIG, INT8)).generate(params, prompts, max_new_tokens=8)
    whole = Engine(Transformer(CONFIG, INT8)).generate(trained(), prompts, max_new_tokens=8)
    np.testing.assert_array_equal(cut, whole)


@pytest.mark.parametrize(("cache", "compute"), [("int8", "float32"), ("compute", "bfloat16"), ("compute", "float32")])
def test_the_closed_form_knows_its_bytes(cache, compute):
    execution = ExecutionConfig(cache=cache, compute=compute)
    held = init_cache(CONFIG, 3, 20, execution.cache_dtype)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((held.key, held.value)))
    item = execution.cache_dtype.itemsize
    assert closed_form.kv_cache_bytes(CONFIG, 3, 20, item, execution.cache_scale_bytes) == num_bytes


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_the_planner_shards_it_like_any_cache_and_counts_its_bytes(step):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    data = DataConfig(batch_size=8, sequence_length=16)
    experiment = Experiment(CONFIG, data, MeshConfig(fsdp=4, tensor=2), INT8)
    traced = trace_step(step, experiment, 32, mesh)
    whole = closed_form.kv_cache_bytes(CONFIG, 8, 16, 1, 4)
    assert traced.bytes_by_category["cache"] == whole // 8 + 8 // 4 * 4
    cache = traced.arguments[3 if step == "prefill" else 2]
    assert cache.key.codes.sharding.spec == cache.key.scale.sharding.spec
    with jax.set_mesh(mesh):
        traced.jitted.lower(*traced.arguments, **traced.static).compile()


def test_the_cache_is_no_part_of_what_was_trained():
    plain = Experiment()
    coded = dataclasses.replace(plain, execution=dataclasses.replace(plain.execution, cache="int8"))
    assert coded.trained_part() == plain.trained_part()


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_layers_apart_give_what_their_stack_gives_and_stay_apart(cache):
    model = Transformer(dataclasses.replace(CONFIG, num_layers=3), ExecutionConfig(cache=cache))
    params = chain(freeze(top_layers=1), quantize(group=16))(initialize(model, jax.random.key(0))[0])
    tokens = sequences(2, 6, 0)

    @jax.jit
    def run(params, held):
        for piece in (tokens[:, :5], tokens[:, 5:]):
            hidden, held = model.apply({"params": params}, piece, held)
        return hidden, held

    held = init_cache(model.config, 2, 8, model.execution.cache_dtype)
    expected, whole = run(params, held)
    parted = params | {name: apart(params[name]) for name in ("frozen_layers", "layers")}
    hidden, found = run(parted, held.replace(key=apart(held.key), value=apart(held.value)))
    np.testing.assert_array_equal(hidden, expected)
    assert len(found.key) == len(found.value) == 3 and resized(model.config, parted) == model.config
    for one, other in zip((whole.key, whole.value), (found.key, found.value), strict=True):
        jax.tree.map(np.testing.assert_array_equal, apart(one), other)


def test_layers_apart_lie_where_their_stack_lies():
    stack = {"kernel": jnp.ones((3, 16, 16)), "bias": jnp.arange(3.0)[:, None]}
    layers = apart(stack)
    assert [float(layer["bias"][0, 0]) for layer in layers] == [0, 1, 2]
    start, step = stack["kernel"].unsafe_buffer_pointer(), stack["kernel"].nbytes // 3
    assert [layer["kernel"].unsafe_buffer_pointer() - start for layer in layers] == [0, step, 2 * step]
    assert {layer["kernel"].shape for layer in layers} == {(1, 16, 16)}
    elsewhere = jax.device_put(stack, jax.devices()[1])
    assert [layer["kernel"].devices() for layer in apart(elsewhere)] == [{jax.devices()[1]}] * 3
