"""Parameters that a model reads where they are present: virtual tokens and bottlenecks, whole and with a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep import sweep

from jaxcost import weights
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.transformer import Transformer, init_cache, initialize, start_cache, unembedding
from jaxcost.serving.engine import Engine
from jaxcost.transforms import bottleneck, chain, freeze, lora, prefix_tuning, prompt_tuning, quantize, rule

CONFIG = ModelConfig(
    vocab_size=32, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, max_length=24
)
CONFIGS = {
    "llama": CONFIG,
    "gpt2": dataclasses.replace(CONFIG, position="learned", norm="layer", gated=False, activation="gelu"),
}

ADDITIONS = {
    "prompt": prompt_tuning(tokens=5),
    "prefix": prefix_tuning(tokens=3),
    "prefix and prompt": chain(prefix_tuning(tokens=3), prompt_tuning(tokens=5, rules=(rule("prefix/"),))),
    "prefix, top layers": chain(freeze(top_layers=1), prefix_tuning(tokens=3)),
    "bottleneck": bottleneck(width=6),
    "bottleneck after the mlp, quantised": chain(quantize(), bottleneck(width=6, after=("mlp",))),
    "lora and a prompt": chain(prompt_tuning(tokens=2), lora(rank=2, train="prompt/")),
}
TRAINS = {
    "prompt": {"prompt/table"},
    "prefix": {"layers/attention/prefix/key", "layers/attention/prefix/value"},
    "prefix, top layers": {f"{s}/attention/prefix/{n}" for s in ("layers", "frozen_layers") for n in ("key", "value")},
    "bottleneck": {f"layers/{p}_adapter/{n}/kernel" for p in ("attention", "mlp") for n in ("down", "up")},
    "bottleneck after the mlp, quantised": {f"layers/mlp_adapter/{n}/kernel" for n in ("down", "up")},
}
TRAINS["prefix and prompt"] = TRAINS["prefix"] | TRAINS["prompt"]


@functools.cache
def dense_params(name):
    model = Transformer(CONFIGS[name])
    return jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))


@functools.cache
def tuned(name, config="llama"):
    """The tree after some training, which moves everything that trains."""
    params = ADDITIONS[name](dense_params(config), jax.random.key(1))
    trainable, frozen = weights.partition(params)
    moved = {
        path: leaf + 0.3 * jax.random.normal(jax.random.key(seed), leaf.shape)
        for seed, (path, leaf) in enumerate(sorted(trainable.items()))
    }
    return weights.combine(params, moved, frozen)


def tokens(length=10):
    return jax.random.randint(jax.random.key(7), (3, length), 0, CONFIG.vocab_size)


def logits(config, params, tokens, **execution):
    model = Transformer(CONFIGS[config], ExecutionConfig(**execution))

    @jax.jit
    def f(params, tokens):
        return weights.contract(model.apply({"params": params}, tokens)[0], unembedding(params))

    return f(params, tokens)


# ---- The transforms ----


@sweep("name", TRAINS, quick=3)
def test_what_is_added_trains_and_all_else_is_frozen(name):
    params = ADDITIONS[name](dense_params("llama"))
    trainable, _ = weights.partition(params)
    assert trainable.keys() == TRAINS[name]
    assert all(leaf.dtype == jnp.float32 for leaf in trainable.values())
    # Coverage names what is added with its shape, and the shapes are known without computing.
    added = {row.path: row.shape for row in ADDITIONS[name].coverage(dense_params("llama")) if "added" in row.action}
    assert added.items() >= {(path, leaf.shape) for path, leaf in trainable.items()}
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), ADDITIONS[name].abstract(dense_params("llama"))) == shapes


def test_bottlenecks_change_nothing_at_first_and_prompts_start_as_embeddings():
    before = logits("llama", dense_params("llama"), tokens())
    np.testing.assert_array_equal(logits("llama", bottleneck()(dense_params("llama")), tokens()), before)
    table = dense_params("llama")["embed"]["table"]
    prompt = prompt_tuning(tokens=40)(dense_params("llama"))["prompt"]["table"]
    assert prompt.shape == (40, 16)
    assert all(np.any(np.all(row == table, axis=1)) for row in prompt)
    other = prompt_tuning(tokens=40)(dense_params("llama"), jax.random.key(9))["prompt"]["table"]
    assert np.any(prompt != other)


# ---- The model ----


@pytest.mark.slow
@sweep("config", CONFIGS, quick=1, slow=0)
@sweep("name", ADDITIONS, quick=2)
def test_prefill_and_decode_equal_the_full_forward_for_rows_of_different_lengths(name, config):
    params, all_tokens = tuned(name, config), tokens()
    want = logits(config, params, all_tokens)
    assert np.max(np.abs(want - logits(config, dense_params(config), all_tokens))) > 0.05
    model = Transformer(CONFIGS[config])
    engine = Engine(model)
    lengths, rows = np.array([6, 3, 1]), np.arange(3)
    prompts = np.where(np.arange(6) < lengths[:, None], all_tokens[:, :6], 5)
    cache = engine.start(params, batch_size=3, slots=10)

    @jax.jit
    def one(params, tokens_B, cache):
        hidden, cache = model.apply({"params": params}, tokens_B[:, None], cache)
        return weights.contract(hidden[:, 0], unembedding(params)), cache

    got, cache = engine.prefill(params, prompts, lengths, cache)
    np.testing.assert_allclose(got, want[rows, lengths - 1], rtol=1e-3, atol=1e-4)
    for step in range(4):
        got, cache = one(params, all_tokens[rows, lengths + step], cache)
        np.testing.assert_allclose(got, want[rows, lengths + step], rtol=1e-3, atol=1e-4)


@sweep("config", CONFIGS, quick=1)
def test_a_prompt_of_real_embeddings_is_those_tokens_and_a_prefix_of_their_keys_too(config):
    params, whole = dense_params(config), tokens()
    # One prompt for all rows, so that all rows begin alike.
    whole = whole.at[:, :4].set(whole[0, :4])
    want = logits(config, params, whole)[:, 4:]
    prompted = params | {"prompt": {"table": params["embed"]["table"][whole[0, :4]]}}
    np.testing.assert_allclose(logits(config, prompted, whole[:, 4:]), want, rtol=1e-3, atol=1e-4)
    model = Transformer(CONFIGS[config])
    _, cache = model.apply({"params": params}, whole[:1, :4], init_cache(CONFIGS[config], 1, 4, jnp.float32))
    prefix = {name: getattr(cache, name)[:, 0].reshape(3, 4, -1) for name in ("key", "value")}
    layers = params["layers"] | {"attention": params["layers"]["attention"] | {"prefix": prefix}}
    got = logits(config, params | {"layers": layers}, whole[:, 4:])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    started = start_cache(model, prompted, 2, 5)
    np.testing.assert_allclose(started.key[:, 1, :4], cache.key[:, 0], rtol=1e-4, atol=1e-5)
    assert started.key.shape == (3, 2, 9, 2, 4) and started.virtual == 4 and started.length.tolist() == [4, 4]


@sweep("name", ["prefix and prompt", "bottleneck"], quick=1)
def test_rematerialising_and_scanning_change_nothing(name):
    params = tuned(name)
    want = logits("llama", params, tokens())
    for execution in ({"unroll": "never"}, {"remat": "full"}, {"remat": "attention", "unroll": "always"}):
        np.testing.assert_allclose(logits("llama", params, tokens(), **execution), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_generation_takes_virtual_tokens_into_account():
    params, engine = tuned("prefix and prompt"), Engine(Transformer(CONFIG))
    prompts = [np.array([3, 1]), np.array([4])]
    got = engine.generate(params, prompts, max_new_tokens=4, tokens_per_dispatch=2)
    for prompt, new in zip(prompts, got, strict=True):
        row = prompt
        for token in new:
            assert token == np.argmax(logits("llama", params, jnp.asarray(row)[None])[0, -1])
            row = np.append(row, token)
    with pytest.raises(ValueError, match="15 new tokens are longer than the 16 that the model's max_length leaves"):
        engine.generate(params, prompts, max_new_tokens=15)


def test_virtual_tokens_are_held_in_integers_too():
    params = tuned("prefix and prompt")
    engine = Engine(Transformer(CONFIG, ExecutionConfig(cache="int8")))
    cache = engine.start(params, batch_size=3, slots=10)
    assert cache.key.codes.dtype == jnp.int8 and cache.key.codes.shape == (3, 3, 18, 2, 4)
    got, _ = engine.prefill(params, tokens(), np.full(3, 10), cache)
    want = logits("llama", params, tokens())[:, -1]
    assert 0 < np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)


# ---- What is refused ----


def apply(params, length=10, cache=None):
    return Transformer(CONFIG).apply({"params": params}, tokens(length), cache)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: apply(prompt_tuning(tokens=15)(p)),
            r"15 virtual tokens and 10 tokens are longer than model.max_length \(24\); use at most 14 virtual tokens",
        ),
        (lambda p: apply(prefix_tuning(tokens=30)(p)), "30 virtual tokens and 10 tokens are longer"),
        (
            lambda p: apply(prefix_tuning(tokens=3)(p), cache=init_cache(CONFIG, 3, 12, jnp.float32)),
            "The weights have 3 virtual tokens, but the cache was started with 0; make it with start_cache",
        ),
        (
            lambda p: apply(p, cache=start_cache(Transformer(CONFIG), prompt_tuning(tokens=2)(p), 3, 12)),
            "The weights have 0 virtual tokens, but the cache was started with 2",
        ),
        (lambda p: prompt_tuning(tokens=0), "prompt_tuning: tokens is 0; it must be at least 1"),
        (lambda p: prefix_tuning(tokens=-1), "prefix_tuning: tokens is -1"),
        (lambda p: bottleneck(width=0), "bottleneck: width is 0"),
        (lambda p: bottleneck(after=()), r"bottleneck: after is \(\); name 'attention', 'mlp' or both"),
        (lambda p: bottleneck(after=("norm",)), "bottleneck: after is"),
        (
            lambda p: chain(bottleneck(), bottleneck())(p),
            "bottleneck: the model has layers/attention_adapter/down/kernel",
        ),
        (lambda p: chain(prompt_tuning(), prompt_tuning())(p), "prompt_tuning: the model has prompt/table already"),
        (lambda p: prompt_tuning()({"layers": p["layers"]}), "prompt_tuning: the model has no embed/table"),
        (lambda p: prompt_tuning(rules=(rule("nowhere"),))(p), "prompt_tuning: the rule 'nowhere' matches no weight"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(dense_params("llama"))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
