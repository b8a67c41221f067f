"""What a config may ask of a layer: windows, soft caps, norms, biases, scaled and partial rotary positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import assert_close
from sweep import sweep

from jaxcost import weights
from jaxcost.cost import trace
from jaxcost.evaluation.losses import cross_entropy
from jaxcost.models import attention
from jaxcost.models.attention import Scores
from jaxcost.models.config import ModelConfig, RopeScaling
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.heads import Output
from jaxcost.models.positions import frequencies, rotate
from jaxcost.models.transformer import Transformer, abstract, init_cache, initialize, logits, unembedding
from jaxcost.serving.engine import Engine
from jaxcost.transforms import freeze

PLAIN = ModelConfig(
    vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, max_length=32
)
WINDOWS = dataclasses.replace(PLAIN, num_layers=5, pattern=("local", "local", "global"), window=3)
CONFIGS = {
    "all local": dataclasses.replace(PLAIN, pattern=("local",), window=4),
    "alternating": WINDOWS,
    "gemma": dataclasses.replace(
        WINDOWS,
        activation="gelu",
        norm_placement="both",
        norm_unit_offset=True,
        scale_embeddings=True,
        tie_embeddings=True,
        query_key_norm="head",
        local_rope_theta=100.0,
        rope_scaling=RopeScaling("linear", 8.0),
        attention_scale=0.3,
        attention_soft_cap=5.0,
        logit_soft_cap=0.3,
    ),
    "olmo": dataclasses.replace(PLAIN, norm_placement="post", query_key_norm="projection"),
    "biases": dataclasses.replace(PLAIN, qkv_bias=True, output_bias=True, mlp_bias=True, gated=False, norm="layer"),
    "partial rotary": dataclasses.replace(PLAIN, head_dim=8, rotary_fraction=0.5),
}


@functools.cache
def params_of(name):
    params = jax.jit(lambda key: initialize(Transformer(CONFIGS[name]), key)[0])(jax.random.key(0))
    # Biases and scales at 0 or 1 would hide a wrong one.
    moved = lambda path, a: a + 0.3 * jax.random.normal(jax.random.key(len(path)), a.shape)  # noqa: E731
    return weights.map_weights(lambda path, a: moved(path, a) if path.endswith(("bias", "scale")) else a, params)


def tokens_of(shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, 64)


@functools.cache
def full_logits(name):
    model, tokens = Transformer(CONFIGS[name]), tokens_of((3, 12))

    @jax.jit
    def f(params):
        return logits(CONFIGS[name], params, model.apply({"params": params}, tokens)[0])

    return f(params_of(name)), tokens


# ---- Every option, whole models ----


def test_options_make_the_parameters_that_they_need():
    def added(name):
        shapes, axes = abstract(Transformer(CONFIGS[name]))
        is_spec = lambda node: isinstance(node, jax.sharding.PartitionSpec)  # noqa: E731
        specs = jax.tree.leaves(axes, is_leaf=is_spec)
        for spec, array in zip(specs, jax.tree.leaves(shapes), strict=True):
            assert len(spec) == array.ndim
        plain, _ = abstract(Transformer(PLAIN))
        plain = {weights.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain)}
        found = {weights.path_name(path): a.shape for path, a in jax.tree_util.tree_leaves_with_path(shapes)}
        return {path: shape for path, shape in found.items() if path not in plain}

    assert added("gemma") == {
        "layers/attention/query_norm/scale": (5, 4),
        "layers/attention/key_norm/scale": (5, 4),
        "layers/attention_post_norm/scale": (5, 16),
        "layers/mlp_post_norm/scale": (5, 16),
    }
    assert added("olmo") == {
        "layers/attention/query_norm/scale": (2, 16),
        "layers/attention/key_norm/scale": (2, 8),
        "layers/attention_post_norm/scale": (2, 16),
        "layers/mlp_post_norm/scale": (2, 16),
    }
    biases = {name: (2, 16) for name in ("attention/query", "attention/output", "mlp/down")}
    biases |= {"attention/key": (2, 8), "attention/value": (2, 8), "mlp/up": (2, 24)}
    norms = {f"layers/{name}_norm/bias": (2, 16) for name in ("attention", "mlp")} | {"final_norm/bias": (16,)}
    assert added("biases") == {f"layers/{name}/bias": shape for name, shape in biases.items()} | norms
    assert not added("partial rotary") and not added("alternating")


@sweep("name", CONFIGS, quick=1)
def test_prefill_and_decode_equal_the_full_forward_for_rows_of_different_lengths(name):
    want, tokens = full_logits(name)
    model, params = Transformer(CONFIGS[name]), params_of(name)
    lengths, rows = np.array([6, 3, 1]), np.arange(3)
    prompts = np.where(np.arange(6) < lengths[:, None], tokens[:, :6], 5)

    @jax.jit
    def one(params, tokens_B, cache):
        hidden, cache = model.apply({"params": params}, tokens_B[:, None], cache)
        return logits(CONFIGS[name], params, hidden[:, 0]), cache

    got, cache = Engine(model).prefill(params, prompts, lengths, init_cache(CONFIGS[name], 3, 12, jnp.float32))
    np.testing.assert_allclose(got, want[rows, lengths - 1], rtol=2e-4, atol=2e-5)
    for step in range(6):
        got, cache = one(params, tokens[rows, lengths + step], cache)
        np.testing.assert_allclose(got, want[rows, lengths + step], rtol=2e-4, atol=2e-5)


def test_a_token_reaches_as_far_as_the_windows_of_all_layers():
    """A local layer hands a token on by window - 1, and a global one to all that follow."""

    def reached(name):
        want, tokens = full_logits(name)
        changed = tokens.at[:, 2].set((tokens[:, 2] + 1) % 64)
        hidden, _ = Transformer(CONFIGS[name]).apply({"params": params_of(name)}, changed)
        got = logits(CONFIGS[name], params_of(name), hidden)
        return np.flatnonzero(np.max(np.abs(got - want), axis=(0, 2)) > 1e-5).tolist()

    assert reached("all local") == list(range(2, 2 + 1 + 2 * 3))
    assert reached("alternating") == list(range(2, 12))


@sweep(
    ("option", "value"),
    [
        ("window", 4),
        ("local_rope_theta", 0.0),
        ("rope_scaling", RopeScaling("linear", 4.0)),
        ("attention_scale", 0.0),
        ("attention_soft_cap", 0.0),
        ("logit_soft_cap", 0.0),
        ("norm_unit_offset", False),
        ("scale_embeddings", False),
    ],
    quick=3,
    slow=5,
)
def test_every_option_changes_what_is_computed(option, value):
    want, tokens = full_logits("gemma")
    changed = dataclasses.replace(CONFIGS["gemma"], **{option: value})
    hidden, _ = Transformer(changed).apply({"params": params_of("gemma")}, tokens)
    assert np.max(np.abs(logits(changed, params_of("gemma"), hidden) - want)) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 4}, "local layers need a window, and a window needs local layers"),
        ({"pattern": ("local",)}, "local layers need a window"),
        ({"pattern": ()}, "model.pattern is empty"),
        ({"window": -1, "pattern": ("local",)}, "model.window is -1; it cannot be negative"),
        ({"rotary_fraction": 0.0}, "model.rotary_fraction is 0.0"),
        ({"rotary_fraction": 0.75}, "its rotated part of 3"),
        ({"logit_soft_cap": -1.0}, "model.logit_soft_cap is -1.0"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change)


def test_scalings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="factor is 0.5"):
        RopeScaling("linear", 0.5)
    with pytest.raises(ValueError, match="must be above low_frequency_factor"):
        RopeScaling("llama3", 8.0, 4.0, 4.0)


# ---- Attention ----


def qkv(length, heads=4, kv_heads=2, head_dim=8, batch=2):
    shapes = (batch, length, heads, head_dim), *((batch, length, kv_heads, head_dim),) * 2
    return tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))


def by_hand(q, k, v, window, scale, soft_cap):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, head in np.ndindex(q.shape[:3]):
        first = max(0, t - window + 1) if window else 0
        scores = k[b, first : t + 1, head // groups] @ q[b, t, head] * (scale or q.shape[-1] ** -0.5)
        scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
        share = np.exp(scores - scores.max())
        out[b, t, head] = share @ v[b, first : t + 1, head // groups] / share.sum()
    return out


@pytest.mark.slow
@sweep("length", [13, 7, 12], quick=1, slow=0)
@pytest.mark.parametrize("scores", [Scores(), Scores(3), Scores(4, 0.7), Scores(5, 0.0, 1.5), Scores(0, 0.0, 2.0)])
def test_windows_scales_and_caps_are_those_of_a_sum_by_hand(scores, length):
    q, k, v = qkv(length)
    want = by_hand(q, k, v, scores.window, scores.scale, scores.soft_cap)
    got = attention.self_attention(q, k, v, "reference", scores)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for start, span in ((0, length), (length - 1, 1), (length - 3, 2)):
        positions = jnp.full((2, 1), start) + jnp.arange(span)
        cached = attention.cached_attention(q[:, start : start + span], k, v, positions, scores)
        np.testing.assert_allclose(cached, want[:, start : start + span], rtol=1e-4, atol=1e-5)


def test_local_layers_cost_their_window_and_not_the_sequence():
    def flops(length, window):
        q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv(length))
        return trace.flops_of(lambda q, k, v: attention.self_attention(q, k, v, scores=Scores(window)), q, k, v).flops

    a_score = 4 * 2 * 4 * 8
    assert flops(64, 0) == a_score * 64 * 64
    assert flops(64, 8) == a_score * 64 * 16
    assert flops(128, 8) == 2 * flops(64, 8)
    assert flops(64, 64) == flops(64, 100) == flops(64, 0)

    def decode(slots, window):
        q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv(slots))
        one = jax.ShapeDtypeStruct((2, 1, 4, 8), jnp.float32)
        position = jnp.full((2, 1), slots - 1)
        return trace.flops_of(lambda q, k, v: attention.cached_attention(q, k, v, position, Scores(window)), one, k, v)

    assert decode(64, 8).flops == a_score * 8
    assert decode(64, 0).flops == a_score * 64


@sweep("scores", [Scores(128), Scores(200, 0.05), Scores(100, 0.0, 3.0), Scores(0, 0.0, 3.0)], quick=0)
def test_splash_attention_equals_the_reference(scores, monkeypatch):
    interpreted = functools.partial(attention._splash_kernel, interpret=True)
    monkeypatch.setattr(attention, "_splash_kernel", interpreted)
    q, k, v = qkv(384, heads=2, kv_heads=1, head_dim=128, batch=1)

    def loss(implementation, *inputs):
        return jnp.sum(jnp.sin(attention.self_attention(*inputs, implementation, scores)))

    want = jax.value_and_grad(loss, argnums=(1, 2, 3))("reference", q, k, v)
    got = jax.value_and_grad(loss, argnums=(1, 2, 3))("splash", q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), got, want)


def test_cudnn_is_not_taken_where_scores_are_capped():
    assert attention.resolve("auto", "gpu", 64, 64, 16) == "cudnn"
    assert attention.resolve("auto", "gpu", 64, 64, 16, soft_cap=5.0) == "reference"
    with pytest.raises(ValueError, match="has no soft cap"):
        attention.self_attention(*qkv(8), "cudnn", Scores(soft_cap=5.0))


# ---- Layers of several kinds in one scan ----


@pytest.mark.parametrize(
    ("start", "depth", "groups"),
    [
        (0, 6, [(2, "llg")]),
        (0, 5, [(1, "llg"), (1, "ll")]),
        (0, 2, [(1, "ll")]),
        (4, 1, [(1, "l")]),
        (4, 5, [(1, "lgl"), (1, "lg")]),
    ],
)
def test_scans_hold_whole_patterns_from_any_layer_on(start, depth, groups):
    found = WINDOWS.groups(start, depth)
    assert [(n, "".join(kind[0] for kind in kinds)) for n, kinds in found] == groups
    assert WINDOWS.layer_kinds == ("local", "local", "global", "local", "local")
    assert PLAIN.groups(start, depth) == [(depth, ("global",))]
    assert CONFIGS["all local"].groups(start, depth) == [(depth, ("local",))]


DEEP = dataclasses.replace(WINDOWS, num_layers=7)
EXECUTIONS = {
    "scanned": ExecutionConfig(unroll="never"),
    "unrolled": ExecutionConfig(unroll="always"),
    "full": ExecutionConfig(remat="full", unroll="never"),
    "offload": ExecutionConfig(remat="attention", offload=("layer_input",), unroll="never"),
}


@functools.cache
def deep_params():
    return jax.jit(lambda key: initialize(Transformer(DEEP), key)[0])(jax.random.key(2))


def deep_loss(execution):
    tokens = tokens_of((2, 16))

    def loss(params):
        return jnp.sum(jnp.sin(Transformer(DEEP, execution).apply({"params": params}, tokens)[0]))

    return loss


@functools.cache
def deep_gradients(name, top_layers=None):
    params = deep_params() if top_layers is None else freeze(top_layers=top_layers)(deep_params())
    trainable, frozen = weights.partition(params)
    loss = lambda p: deep_loss(EXECUTIONS[name])(weights.combine(params, p, frozen))  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(trainable)


@sweep("name", [name for name in EXECUTIONS if name != "scanned"], quick=0)
def test_no_execution_changes_the_loss_or_the_gradients(name):
    (loss, gradients), (want_loss, want) = deep_gradients(name), deep_gradients("scanned")
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    jax.tree.map(assert_close, gradients, want)


@sweep("top_layers", [1, 3, 6], quick=1)
def test_a_stack_cut_anywhere_keeps_each_layers_kind(top_layers):
    loss, gradients = deep_gradients("scanned", top_layers)
    want_loss, want = deep_gradients("scanned")
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    for path, gradient in gradients.items():
        full = want[path]
        cut = full[-top_layers:] if path.startswith("layers/") else full
        assert_close(gradient, cut)


def residuals(config, execution):
    params, _ = abstract(Transformer(config))
    tokens = jnp.zeros((1, 16), jnp.int32)
    model = Transformer(config, execution)
    backward = lambda params: jax.vjp(lambda p: model.apply({"params": p}, tokens)[0], params)[1]  # noqa: E731
    return [a.shape for a in jax.tree.leaves(jax.eval_shape(backward, params))]


def test_groups_keep_each_layers_input_and_no_second_copy_of_the_weights():
    config = dataclasses.replace(DEEP, num_layers=6, mlp_width=40)
    up = 6 * 16 * 40
    for execution in (EXECUTIONS["scanned"], EXECUTIONS["full"]):
        shapes = residuals(config, execution)
        kept = [
            shape for shape in shapes if np.prod(shape) in (up, up // 3) and set(shape) >= {16, 40} and 1 not in shape
        ]
        # Two matrices in and one out; each is there once, in whatever groups.
        assert sum(np.prod(shape) for shape in kept) == 3 * up
    inputs = [shape for shape in residuals(config, EXECUTIONS["full"]) if shape[-2:] == (16, 16) and 1 in shape]
    assert sum(np.prod(shape) for shape in inputs) >= 6 * 16 * 16


def test_layers_of_several_kinds_train_as_many_flops_as_they_have():
    def flops(config):
        params, _ = abstract(Transformer(config))
        return trace.flops_of(
            lambda p: Transformer(config, EXECUTIONS["scanned"]).apply({"params": p}, jnp.zeros((1, 24), jnp.int32))[0],
            params,
        ).flops

    every = {kind: flops(dataclasses.replace(DEEP, pattern=(kind,), window=3 * (kind == "local"))) for kind in
             ("global", "local")}  # fmt: skip
    local = DEEP.layer_kinds.count("local")
    assert flops(DEEP) == (local * every["local"] + (7 - local) * every["global"]) / 7


# ---- Positions and logits ----


def test_llama3_scaling_leaves_fast_waves_and_stretches_slow_ones():
    plain = dataclasses.replace(PLAIN, head_dim=128, rope_theta=500_000.0)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    before, after = frequencies(plain), frequencies(scaled)
    wavelength = 2 * np.pi / before
    fast, slow = wavelength < 8192 / 4, wavelength > 8192 / 1
    assert fast.any() and slow.any() and not (fast | slow).all()
    np.testing.assert_array_equal(after[fast], before[fast])
    np.testing.assert_allclose(after[slow], before[slow] / 8, rtol=1e-6)
    between = before[~(fast | slow)] / after[~(fast | slow)]
    assert np.all((between > 1) & (between < 8)) and np.all(np.diff(between) > 0)


def test_local_layers_have_their_own_unscaled_frequencies():
    c = CONFIGS["gemma"]
    np.testing.assert_allclose(frequencies(c, "local"), [1.0, 100.0**-0.5], rtol=1e-6)
    np.testing.assert_allclose(frequencies(c), [1 / 8, 10_000.0**-0.5 / 8], rtol=1e-6)
    shared = dataclasses.replace(c, local_rope_theta=0.0)
    np.testing.assert_array_equal(frequencies(shared, "local"), frequencies(shared))


def test_a_partial_rotation_leaves_the_rest_of_the_head():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    turns = frequencies(CONFIGS["partial rotary"])
    assert turns.shape == (2,)
    got = rotate(x, jnp.arange(5)[None], turns)
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(got[..., :4], rotate(x[..., :4], jnp.arange(5)[None], turns))
    assert np.max(np.abs(got[:, 1:, :, :4] - x[:, 1:, :, :4])) > 0.1


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_loss_sees_capped_logits(chunks):
    model, params = Transformer(CONFIGS["gemma"]), params_of("gemma")
    want, tokens = full_logits("gemma")
    assert 0.2 < np.max(np.abs(want)) < 0.3
    hidden, _ = model.apply({"params": params}, tokens)
    mask = jnp.ones(tokens.shape)
    total, _ = cross_entropy(hidden, Output(unembedding(params), soft_cap=0.3), tokens, mask, chunks=chunks)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(want), tokens[..., None], axis=-1)
    np.testing.assert_allclose(total, -jnp.sum(chosen), rtol=1e-5)
