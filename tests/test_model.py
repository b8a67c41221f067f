"""The transformer: its cache, its options, rematerialisation, the loss, and training on a mesh with every transform."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import assert_close
from sweep import sweep

from jaxcost import sharding, weights
from jaxcost.cost.hlo import compiled_cost
from jaxcost.evaluation.losses import cross_entropy
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import PRESETS, ExecutionConfig
from jaxcost.models.heads import Output
from jaxcost.models.positions import frequencies, rotate
from jaxcost.models.transformer import (
    Transformer,
    abstract,
    axes_of,
    init_cache,
    initialize,
    unembedding,
)
from jaxcost.serving.engine import Engine
from jaxcost.serving.stopping import Stop
from jaxcost.sharding import MeshConfig
from jaxcost.training.config import OptimizerConfig
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import (
    Gradual,
    bottleneck,
    chain,
    factorize,
    freeze,
    ia3,
    lora,
    prefix_tuning,
    prompt_tuning,
    prune,
    quantize,
    rule,
)

SMALL = ModelConfig(
    vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, max_length=32
)

CONFIGS = {
    "llama": SMALL,
    "gpt2": dataclasses.replace(
        SMALL, norm="layer", position="learned", gated=False, activation="gelu", tie_embeddings=True, num_kv_heads=4
    ),
    "one kv head": dataclasses.replace(SMALL, num_kv_heads=1, gated=False, activation="relu", tie_embeddings=True),
    "odd": ModelConfig(37, 15, 3, 3, 1, 6, 17, norm="layer", max_length=32),
    "learned and gated": dataclasses.replace(SMALL, position="learned", num_layers=1, num_heads=2),
}


@functools.cache
def params_of(name):
    return jax.jit(lambda key: initialize(Transformer(CONFIGS[name]), key)[0])(jax.random.key(0))


def random_tokens(shape, vocab, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab)


# ---- Parameters ----


@sweep("name", CONFIGS, quick=2)
def test_parameters_have_the_shapes_and_axes_that_the_config_says(name):
    c = CONFIGS[name]
    shapes, axes = abstract(Transformer(c))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params_of(name)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    paths = {weights.path_name(path): a.shape for path, a in jax.tree_util.tree_leaves_with_path(shapes)}
    depth, d, f = c.num_layers, c.width, c.mlp_width
    q, k = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    expected = {"embed/table": (c.vocab_size, d), "layers/mlp/up/kernel": (depth, d, f)}
    expected |= {"layers/mlp/down/kernel": (depth, f, d), "layers/attention/query/kernel": (depth, d, q)}
    expected |= {f"layers/attention/{name}/kernel": (depth, d, k) for name in ("key", "value")}
    expected |= {"layers/attention/output/kernel": (depth, q, d)}
    for norm in ("final_norm", "layers/attention_norm", "layers/mlp_norm"):
        for vector in ("scale", "bias") if c.norm == "layer" else ("scale",):
            expected[f"{norm}/{vector}"] = (depth, d) if norm.startswith("layers") else (d,)
    if c.gated:
        expected["layers/mlp/gate/kernel"] = (depth, d, f)
    if c.position == "learned":
        expected["positions/table"] = (c.max_length, d)
    if not c.tie_embeddings:
        expected["unembed/kernel"] = (d, c.vocab_size)
    assert paths == expected
    sizes = {"layers": depth, "embed": d, "mlp": f, "heads": q, "kv_heads": k, "vocab": c.vocab_size}
    sizes["position"] = c.max_length
    is_spec = lambda node: isinstance(node, jax.sharding.PartitionSpec)  # noqa: E731
    for spec, array in zip(jax.tree.leaves(axes, is_leaf=is_spec), jax.tree.leaves(shapes), strict=True):
        assert len(spec) == array.ndim
        assert all(sizes[axis] == size for axis, size in zip(spec, array.shape, strict=True) if axis is not None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, r"model.num_heads \(4\) must be a multiple of model.num_kv_heads \(3\)"),
        ({"head_dim": 3}, r"model.head_dim \(3\) must be even"),
        ({"width": 0}, "model.width is 0"),
        ({"vocab_size": -1}, "model.vocab_size is -1"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


# ---- The forward pass and the cache ----


@functools.cache
def full_logits(name):
    """Logits (B, T, V) of the whole sequence at once, and its tokens."""
    model, tokens = Transformer(CONFIGS[name]), random_tokens((3, 10), CONFIGS[name].vocab_size)

    @jax.jit
    def f(params):
        return weights.contract(model.apply({"params": params}, tokens)[0], unembedding(params))

    return f(params_of(name)), tokens


@sweep("name", CONFIGS, quick=2)
def test_prefill_and_decode_equal_the_full_forward_for_rows_of_different_lengths(name):
    want, tokens = full_logits(name)
    model, params = Transformer(CONFIGS[name]), params_of(name)
    lengths = np.array([6, 3, 1])
    rows = np.arange(3)
    # What stands beyond a prompt is no part of it.
    prompts = np.where(np.arange(6) < lengths[:, None], tokens[:, :6], 5)

    @jax.jit
    def one(params, tokens_B, cache):
        hidden, cache = model.apply({"params": params}, tokens_B[:, None], cache)
        return weights.contract(hidden[:, 0], unembedding(params)), cache

    logits, cache = Engine(model).prefill(params, prompts, lengths, init_cache(CONFIGS[name], 3, 10, jnp.float32))
    np.testing.assert_allclose(logits, want[rows, lengths - 1], rtol=2e-4, atol=2e-5)
    for step in range(4):
        logits, cache = one(params, tokens[rows, lengths + step], cache)
        np.testing.assert_allclose(logits, want[rows, lengths + step], rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(cache.length, lengths + 4)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_sees_a_later_one_and_every_token_sees_the_earlier_ones(name):
    want, tokens = full_logits(name)
    model = Transformer(CONFIGS[name])
    changed = tokens.at[:, 4].set((tokens[:, 4] + 1) % CONFIGS[name].vocab_size)
    hidden, _ = model.apply({"params": params_of(name)}, changed)
    got = weights.contract(hidden, unembedding(params_of(name)))
    np.testing.assert_allclose(got[:, :4], want[:, :4], rtol=1e-4, atol=1e-5)
    assert np.all(np.max(np.abs(got[:, 4:] - want[:, 4:]), axis=-1) > 1e-4)


def test_greedy_generation_equals_the_full_forward_token_by_token():
    model, params = Transformer(SMALL), params_of("llama")
    prompts = [np.array([3, 9, 4, 1, 7]), np.array([8]), np.array([2, 2, 6])]
    # With random weights the logits are close to each other; larger ones make the likeliest token a clear one.
    params = {**params, "unembed": {"kernel": 8 * params["unembed"]["kernel"]}}

    @jax.jit
    def full(tokens):
        return weights.contract(model.apply({"params": params}, tokens)[0], unembedding(params))

    rows = np.zeros((3, 16), np.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    for step in range(11):
        ends = np.array([len(prompt) + step for prompt in prompts])
        rows[np.arange(3), ends] = np.argmax(full(rows)[np.arange(3), ends - 1], axis=-1)
    want = [row[len(prompt) : len(prompt) + 11] for row, prompt in zip(rows, prompts, strict=True)]
    pieces = []
    engine = Engine(model)
    got = engine.generate(params, prompts, max_new_tokens=11, tokens_per_dispatch=4, on_tokens=pieces.append)
    np.testing.assert_array_equal(got, want)
    assert [piece.shape for piece in pieces] == [(3, 4), (3, 4), (3, 3)]
    stopped = engine.generate(params, prompts, max_new_tokens=11, tokens_per_dispatch=4, stop=Stop([int(want[0][2])]))
    for row, full_row in zip(stopped, want, strict=True):
        ends = np.flatnonzero(full_row == want[0][2])
        np.testing.assert_array_equal(row, full_row[: ends[0]] if len(ends) else full_row[: len(row)])


def test_rotations_depend_on_the_distance_of_two_tokens_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    turns = frequencies(dataclasses.replace(SMALL, head_dim=8))
    at = lambda x, position: rotate(x, jnp.full((1, 1), position), turns)[0, 0, 0]  # noqa: E731
    score = lambda i, j: at(q, i) @ at(k, j)  # noqa: E731
    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    np.testing.assert_array_equal(at(q, 0), q[0, 0, 0])


def test_bfloat16_is_close_to_float32():
    want, tokens = full_logits("llama")
    hidden, _ = Transformer(SMALL, ExecutionConfig(compute="bfloat16")).apply({"params": params_of("llama")}, tokens)
    got = weights.contract(hidden, unembedding(params_of("llama")))
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float32) - want)
    assert 0 < np.max(error) < 0.05 * np.max(np.abs(want))


# ---- Rematerialisation and unrolling ----

DEEP = dataclasses.replace(SMALL, num_layers=4)
EXECUTIONS = {
    "none": ExecutionConfig(unroll="never"),
    "full": ExecutionConfig(remat="full", unroll="never"),
    "attention": ExecutionConfig(remat="attention", unroll="never"),
    "projections": ExecutionConfig(remat="projections", unroll="never"),
    "save": ExecutionConfig(save=("attention_output", "mlp_up"), unroll="never"),
    "offload": ExecutionConfig(offload=("layer_input", "attention_output"), unroll="never"),
    "unrolled": ExecutionConfig(unroll="always"),
    "full, unrolled": ExecutionConfig(remat="full", unroll="always"),
}


@functools.cache
def deep_params():
    return jax.jit(lambda key: initialize(Transformer(DEEP), key)[0])(jax.random.key(2))


def deep_loss(execution):
    model, tokens = Transformer(DEEP, execution), random_tokens((4, 24), 64)

    def loss(params):
        hidden, _ = model.apply({"params": params}, tokens)
        return cross_entropy(hidden, Output(unembedding(params)), tokens, jnp.ones(tokens.shape))[0]

    return jax.value_and_grad(loss)


def trace(execution):
    return jax.jit(deep_loss(execution)).trace(deep_params())


@functools.cache
def executed(name):
    """Dots in the traced gradient, the compiled program, and what it computes."""
    traced = trace(EXECUTIONS[name])
    compiled = traced.lower().compile()
    return str(traced.jaxpr), compiled, compiled(deep_params())


def flops(name):
    return compiled_cost(executed(name)[1]).flops


def temporaries(name):
    return executed(name)[1].memory_analysis().temp_size_in_bytes


@sweep("name", [name for name in EXECUTIONS if name != "none"], quick=1)
def test_no_execution_changes_the_loss_or_the_gradients(name):
    loss, gradients = executed(name)[2]
    want_loss, want = executed("none")[2]
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want), strict=True):
        assert_close(got, expected)


def test_presets_compute_again_what_they_do_not_keep():
    dots = {name: executed(name)[0].count("dot_general") for name in ("none", "projections", "attention", "full")}
    # A block has seven products with weights, one of queries with keys and one of weights with values.
    assert dots["projections"] == dots["none"] + 1
    assert dots["attention"] == dots["projections"] + 6
    assert dots["full"] == dots["attention"] + 1
    # And the compiled program does it: a layer's own products, as often as there are layers.
    assert flops("none") < flops("projections") < flops("attention") < flops("full")
    tokens, per_layer = 4 * 24, 16 * (16 + 8 + 8) + 3 * 16 * 24
    # Of a layer's last product only the input is needed again, and attention scores (24 of them) come on top.
    again = 2 * tokens * 4 * (per_layer + 2 * 24 * 16)
    assert 0.6 * again < flops("full") - flops("none") <= 1.35 * again


def test_presets_keep_less_the_more_they_compute_again():
    kept = [temporaries(name) for name in ("full", "attention", "projections", "none")]
    assert kept == sorted(kept)
    assert temporaries("full") < 0.5 * temporaries("none")


def test_named_activations_are_kept():
    assert flops("none") < flops("save") < flops("full")
    assert executed("save")[0].count("dot_general") == executed("full")[0].count("dot_general") - 2
    assert set(PRESETS) == {"full", "attention", "projections"}


def test_offloaded_activations_go_to_the_host_and_come_back():
    jaxpr = executed("offload")[0]
    assert jaxpr.count("pinned_host") >= 2 or jaxpr.count("<host>") >= 2
    assert "host" not in executed("attention")[0]
    assert flops("none") < flops("offload") < flops("full")


@pytest.mark.slow
def test_unrolling_is_what_was_asked_for():
    # Scattered gradients of embeddings may be a loop of their own.
    loops = {name: executed(name)[1].as_text().count("while(") for name in ("unrolled", "none")}
    assert loops["unrolled"] < loops["none"]
    # On CPU, auto unrolls, except what is rematerialised: without a loop, the compiler undoes it.
    assert trace(ExecutionConfig()).lower().as_text() == trace(EXECUTIONS["unrolled"]).lower().as_text()
    assert trace(ExecutionConfig(remat="full")).lower().as_text() == trace(EXECUTIONS["full"]).lower().as_text()
    assert executed("full, unrolled")[0].count("prevent_cse=True") == 1
    assert executed("full")[0].count("prevent_cse=False") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save": ("nothing",)}, "there is no activation 'nothing'; choose from layer_input, query"),
        ({"offload": ("nothing",)}, "there is no activation 'nothing'"),
        ({"save": ("query",), "offload": ("query", "key")}, "query cannot be both saved and offloaded; choose one"),
    ],
)
def test_activations_that_cannot_be_kept_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExecutionConfig(**options)


# ---- The loss in chunks ----


@pytest.mark.parametrize("chunks", [2, 5, 100])
def test_the_loss_in_chunks_equals_the_loss_at_once(chunks):
    hidden = jax.random.normal(jax.random.key(0), (2, 12, 8))
    kernel = weights.Lora(*(jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 33), (8, 2), (2, 33)])))
    targets = random_tokens((2, 12), 33)
    mask = jnp.asarray(np.random.default_rng(0).random((2, 12)) < 0.6, jnp.float32).at[0, 4:8].set(0.0)

    def loss(chunks):
        f = lambda hidden, kernel: cross_entropy(hidden, Output(kernel), targets, mask, chunks=chunks)  # noqa: E731
        return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, kernel)

    (total, count), gradients = loss(chunks)
    (want, want_count), want_gradients = loss(1)
    np.testing.assert_allclose(total, want, rtol=1e-6)
    assert count == want_count == np.sum(mask)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert not np.any(gradients[0][mask == 0]) and np.all(np.any(gradients[0][mask == 1] != 0, axis=-1))
    logits = np.asarray(hidden @ weights.materialize(kernel), np.float64)
    chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
    by_hand = np.sum((np.log(np.sum(np.exp(logits), axis=-1)) - chosen) * mask)
    np.testing.assert_allclose(total, by_hand, rtol=1e-5)


def test_the_loss_in_chunks_takes_less_memory():
    def temporaries(chunks):
        shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((2, 64, 16), jnp.float32), ((16, 8192), jnp.float32))]
        rest = jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2, 64), jnp.float32)
        f = lambda hidden, kernel, *rest: cross_entropy(hidden, Output(kernel), *rest, chunks=chunks)[0]  # noqa: E731
        compiled = jax.jit(jax.grad(f, (0, 1))).lower(*shapes, *rest).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits_bytes = 2 * 64 * 8192 * 4
    assert temporaries(1) >= logits_bytes > 2 * temporaries(8)


# ---- Training on a mesh ----

TRANSFORMS = {
    "plain": chain(),
    "prune": prune(sparsity=0.6),
    "2:4": prune(pattern="2:4"),
    "gradual": prune(sparsity=0.7, gradual=Gradual(begin_step=1, end_step=4, every_steps=2)),
    "lora": lora(rank=2),
    "factorize": factorize(parameters=0.6),
    "qlora": chain(quantize(), lora(rank=2)),
    "quantised training": quantize(mode="training"),
    "freeze": freeze(top_layers=1),
    "dora": lora(rank=2, dora=True),
    "ia3": ia3(),
    "virtual tokens": chain(prefix_tuning(tokens=3), prompt_tuning(tokens=5, rules=(rule("prefix/"),))),
    "bottleneck": bottleneck(width=4),
}
MESHES = {"fsdp 4 x tensor 2": MeshConfig(fsdp=4, tensor=2), "2 x 2 x 2": MeshConfig(data=2, fsdp=2, tensor=2)}
STEPS = {}


@functools.cache
def losses(name, mesh_name):
    """Five steps' losses, and the state after them."""
    transform = TRANSFORMS[name]
    mesh = sharding.make_mesh(MESHES[mesh_name]) if mesh_name else sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model = Transformer(SMALL, ExecutionConfig(unroll="never"))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=2), 5)
    state = init_state(transform(params_of("llama")), optimizer, seed=0)
    places = sharding.shardings(state.params, axes_of(model, state.params), mesh)
    by_path = {weights.path_name(path): place for path, place in jax.tree_util.tree_leaves_with_path(places)}
    one = sharding.replicated(mesh)
    moments = jax.tree_util.tree_map_with_path(
        lambda path, _: by_path.get(getattr(path[-1], "key", None), one), state.optimizer
    )
    places = state.replace(step=one, params=places, optimizer=moments, key=one)
    tokens = np.asarray(random_tokens((5, 8, 17), 64, seed=4))
    mask = (np.random.default_rng(1).random((8, 16)) < 0.8).astype(np.float32)
    found = []
    with jax.set_mesh(mesh):
        state = jax.device_put(state, places)
        # What two transforms leave in the same shapes, such as two kinds of masks, one compiled program trains.
        moving = transform if transform.last_step() >= 0 else chain()
        shapes = tuple((weights.path_name(path), a.shape) for path, a in jax.tree_util.tree_leaves_with_path(state))
        compile_key = (mesh_name, moving, shapes, jax.tree.structure(state))
        if compile_key not in STEPS:
            step = make_train_step(model, optimizer, moving)
            STEPS[compile_key] = jax.jit(step, out_shardings=(places, one))
        step = STEPS[compile_key]
        for batch in tokens:
            batch = {"inputs": batch[:, :-1], "targets": batch[:, 1:], "mask": mask}
            state, metrics = step(state, sharding.place_batch(batch, mesh))
            found.append(float(metrics["loss"]))
    return np.array(found), jax.device_get(state)


@pytest.mark.slow
@sweep("mesh_name", MESHES, quick=1)
@sweep("name", TRANSFORMS, quick=1)
def test_training_on_a_mesh_equals_training_on_one_device(name, mesh_name):
    want, want_state = losses(name, None)
    got, got_state = losses(name, mesh_name)
    assert np.ptp(want) > 1e-3
    # Once training is quantised, a difference in the last bit moves a value that lies between two codes by a whole one.
    exact = 1 if name == "quantised training" else 5
    np.testing.assert_allclose(got[:exact], want[:exact], rtol=1e-5)
    np.testing.assert_allclose(got, want, rtol=3e-3)
    assert jax.tree.structure(got_state) == jax.tree.structure(want_state)


@pytest.mark.parametrize("mesh_name", MESHES)
def test_one_row_a_device_is_scored_as_on_one_device(mesh_name):
    params, mesh = params_of("llama"), sharding.make_mesh(MESHES[mesh_name])
    model, tokens = Transformer(SMALL), random_tokens((4, 8), SMALL.vocab_size)

    def hidden(params, tokens):
        return model.apply({"params": params}, tokens)[0]

    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(params, axes_of(model, params), mesh))
        found = jax.jit(hidden)(placed, jax.device_put(tokens, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(found, jax.jit(hidden)(params, tokens), rtol=1e-4, atol=1e-5)


@sweep("name", TRANSFORMS, quick=4)
def test_training_moves_what_trains_and_nothing_else(name):
    before = TRANSFORMS[name](params_of("llama"))
    after = losses(name, None)[1].params
    trainable, frozen = weights.partition(before)
    for path, leaf in weights.partition(after)[0].items():
        assert np.any(leaf != trainable[path]), path
    for path, leaf in weights.partition(after)[1].items():
        assert np.array_equal(leaf, frozen[path]) != (name == "gradual" and path.endswith("mask")), path


def test_gradual_pruning_is_finished_after_training():
    masks = [leaf for path, leaf in weights.partition(losses("gradual", None)[1].params)[1].items() if "mask" in path]
    assert masks
    for mask in masks:
        size = mask.shape[1] * mask.shape[2]
        assert np.sum(~mask, axis=(1, 2)).tolist() == [round(0.7 * size)] * 2


@pytest.mark.slow
def test_stochastic_rounding_takes_a_key_for_every_layer_and_step_and_none_without_gradients():
    blocks = (rule("layers/.*kernel$"),)
    params = quantize(mode="training", stochastic_rounding=True, rules=blocks)(params_of("llama"))
    model, tokens = Transformer(SMALL), random_tokens((2, 8), 64)
    trainable, frozen = weights.partition(params)

    @jax.jit
    def gradients(trainable, key):
        def f(trainable):
            hidden, _ = model.apply({"params": weights.combine(params, trainable, frozen)}, tokens, key=key)
            return jnp.sum(jnp.sin(hidden))

        return jax.value_and_grad(f)(trainable)

    (value, first), (again, same), (other_value, other) = (
        gradients(trainable, jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert value == again == other_value
    name = "layers/mlp/up/kernel/weight"
    np.testing.assert_array_equal(first[name], same[name])
    assert np.any(first[name] != other[name])
    # Scoring and serving take no gradient, and so need no key.
    hidden, _ = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(jnp.sum(jnp.sin(hidden)), value, rtol=1e-4)
    with pytest.raises(ValueError, match="needs a random key"):
        jax.grad(lambda p: jnp.sum(model.apply({"params": weights.combine(params, p, frozen)}, tokens)[0]))(trainable)


# ---- What a cut costs ----

QUICKSTART = ModelConfig(
    vocab_size=1024, width=192, num_layers=4, num_heads=3, num_kv_heads=3, head_dim=64, mlp_width=512
)


@functools.cache
def step_flops(transform, unroll):
    model = Transformer(QUICKSTART, ExecutionConfig(compute="bfloat16", unroll=unroll))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    params, _ = abstract(model)
    state = jax.eval_shape(lambda params: init_state(transform(params), optimizer, 0), params)
    batch = {name: jax.ShapeDtypeStruct((8, 256), jnp.int32) for name in ("inputs", "targets")}
    batch["mask"] = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    step = jax.jit(make_train_step(model, optimizer, transform))
    return compiled_cost(step.lower(state, batch).compile()).flops


@pytest.mark.slow
@pytest.mark.parametrize("unroll", ["always", "never"])
def test_lora_spares_the_weight_gradients_of_what_is_frozen(unroll):
    full, adapted = step_flops(chain(), unroll), step_flops(lora(rank=4, alpha=8), unroll)
    assert 0.6 * full < adapted <= 0.75 * full


def test_freezing_spares_the_backward_pass_through_what_is_frozen():
    full, frozen = step_flops(chain(), "never"), step_flops(freeze(top_layers=1), "never")
    assert frozen <= 0.55 * full


def test_the_optimizer_keeps_moments_for_adapters_alone():
    optimizer = make_optimizer(OptimizerConfig(), 10)
    params, _ = abstract(Transformer(QUICKSTART))
    state = jax.eval_shape(lambda p: init_state(lora(rank=4)(p), optimizer, 0), params)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    adapters = [leaf for path, leaf in weights.partition(state.params)[0].items()]
    assert len(adapters) == 2 * 7 and all("/a" in path or "/b" in path for path in weights.partition(state.params)[0])
    assert sorted(leaf.shape for leaf in moments) == sorted(leaf.shape for leaf in adapters * 2)
    with pytest.raises(ValueError, match="Nothing in the weights trains"):
        init_state(jax.tree.map(weights.Frozen, params), optimizer, 0)
