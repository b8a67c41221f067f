"""Live parity with peft: every adapter that both have, applied to a whole Llama, unmerged and merged.

Run with `pytest -m oracles`, with torch, transformers and peft installed. Torch kernels are (out, in), ours (in, out).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_oracles import PEFT_NAMES, PROMPT, array, llama, loaded, our_logits, their_logits

from jaxcost import weights
from jaxcost.models.transformer import Transformer
from jaxcost.serving.engine import Engine
from jaxcost.transforms import ia3, lora, merge_adapters, prefix_tuning, prompt_tuning, rule
from jaxcost.weights import Dora, Lora, Scaled, materialize

pytestmark = pytest.mark.oracles

TARGETS = {"attention": ("query", "value"), "mlp": ("down",)}
RULES = (rule("attention/(query|value)/|mlp/down/"),)
VARIANTS = {
    "lora": ({}, {}),
    "rslora": ({"use_rslora": True}, {"rank_stabilized": True}),
    "dora": ({"use_dora": True}, {"dora": True}),
    "rsdora": ({"use_rslora": True, "use_dora": True}, {"rank_stabilized": True, "dora": True}),
    "pissa": ({"init_lora_weights": "pissa"}, {"init": "pissa"}),
    "pissa, rslora": ({"init_lora_weights": "pissa", "use_rslora": True}, {"init": "pissa", "rank_stabilized": True}),
}
"""Variant → peft's options and ours."""

EXACT = 1e-6
"""Relative distance of what one layer computes and of merged weights, float32."""
WHOLE_MODEL = 3e-6
"""Of logits: three layers carry on what float32 rounds, as they do without any adapter."""


def distance(got, want):
    """‖got - want‖ / ‖want‖."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def module_name(group, name):
    return f"{'self_attn' if group == 'attention' else 'mlp'}.{PEFT_NAMES[name]}"


def stacked(state, group, name, what):
    layers = [array(state[f"base_model.model.model.layers.{i}.{module_name(group, name)}.{what}"]) for i in range(3)]
    return jnp.stack(layers)


def move(adapted, *names):
    """Random values for peft's adapter parameters whose names hold one of these, as if they had trained."""
    import torch

    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in names):
                parameter.add_(torch.randn_like(parameter) * 0.1)


def both(variant, trained):
    """A peft model on a random Llama, its config, and the same adapters as our parameters."""
    peft = pytest.importorskip("peft")
    theirs, ours = VARIANTS[variant]
    hugging, config, params = llama(tied=False, seed=4)
    modules = [PEFT_NAMES[name] for names in TARGETS.values() for name in names]
    adapted = peft.get_peft_model(hugging, peft.LoraConfig(r=4, lora_alpha=12, target_modules=modules, **theirs)).eval()
    if trained:
        move(adapted, "lora_A", "lora_B", "lora_magnitude_vector")
    state = adapted.state_dict()
    fresh = lora(rank=4, alpha=12.0, rules=RULES, **ours)(params)
    for group, names in TARGETS.items():
        for name in names:
            if trained:
                w = fresh["layers"][group][name]["kernel"]
                a, b, base = (
                    jnp.swapaxes(stacked(state, group, name, f"{what}.weight"), 1, 2)
                    for what in ("lora_A.default", "lora_B.default", "base_layer")
                )
                scale = (w.weight if isinstance(w, Dora) else w).scale
                moved = Lora(base, a, b, scale)
                if isinstance(w, Dora):
                    moved = Dora(moved, stacked(state, group, name, "lora_magnitude_vector.default.weight"))
                fresh["layers"][group][name]["kernel"] = moved
    return adapted, config, params, fresh


def check_layers(adapted, ours, targets):
    """Every adapted layer's output is peft's, to 1e-6."""
    import torch

    for group, names in targets.items():
        for name in names:
            w = ours["layers"][group][name]["kernel"]
            x = np.random.default_rng(6).normal(size=(7, jax.eval_shape(materialize, w).shape[-2])).astype(np.float32)
            for i in range(3):
                layer = adapted.base_model.model.model.layers[i].get_submodule(module_name(group, name))
                with torch.no_grad():
                    want = layer(torch.as_tensor(x)).numpy()
                got = weights.contract(jnp.asarray(x), jax.tree.map(lambda a, i=i: a[i], w))
                assert distance(got, want) < EXACT


def check_merged(adapted, config, ours):
    """Our merged weights are peft's to 1e-6, and so are the model's logits to float32's rounding."""
    merged = merge_adapters()(ours)
    theirs = adapted.merge_and_unload()
    _, expected = loaded(theirs)
    assert jax.tree.structure(expected) == jax.tree.structure(merged)
    for got, leaf in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        assert distance(got, leaf) < EXACT
    assert distance(our_logits(config, merged, PROMPT), their_logits(theirs, PROMPT)) < WHOLE_MODEL
    assert distance(our_logits(config, weights.merge(ours), PROMPT), their_logits(theirs, PROMPT)) < WHOLE_MODEL


def check_logits(adapted, config, params, ours, skip=0):
    want = their_logits(adapted, PROMPT)[:, skip:]
    assert distance(our_logits(config, params, PROMPT), want) > 0.05
    assert distance(our_logits(config, ours, PROMPT), want) < WHOLE_MODEL


def test_the_bare_model_sets_how_near_whole_models_can_be():
    hugging, config, params = llama(tied=False, seed=4)
    assert distance(our_logits(config, params, PROMPT), their_logits(hugging, PROMPT)) < WHOLE_MODEL


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_merge_are_those_of_peft(variant):
    adapted, config, params, ours = both(variant, trained=True)
    check_layers(adapted, ours, TARGETS)
    check_logits(adapted, config, params, ours)
    check_merged(adapted, config, ours)


@pytest.mark.parametrize("variant", ["dora", "pissa", "pissa, rslora"])
def test_starts_are_those_of_peft(variant):
    adapted, config, params, ours = both(variant, trained=False)
    state = adapted.state_dict()
    for group, names in TARGETS.items():
        for name in names:
            w = ours["layers"][group][name]["kernel"]
            if isinstance(w, Dora):
                assert distance(w.magnitude, stacked(state, group, name, "lora_magnitude_vector.default.weight")) < 1e-6
                continue
            base, a, b = (
                np.swapaxes(stacked(state, group, name, f"{what}.weight"), 1, 2)
                for what in ("base_layer", "lora_A.default", "lora_B.default")
            )
            assert distance(w.base, base) < 1e-5 and distance(w.a @ w.b, a @ b) < 1e-5
            # Singular vectors have a sign of their own, the same for both factors.
            signs = np.sign(np.sum(w.a * a, axis=1))
            assert distance(w.a * signs[:, None], a) < 1e-4 and distance(w.b * signs[..., None], b) < 1e-4


def test_ia3_is_that_of_peft():
    peft = pytest.importorskip("peft")
    hugging, config, params = llama(tied=False, seed=4)
    adapted = peft.get_peft_model(
        hugging,
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ).eval()
    move(adapted, "ia3_l")
    state = adapted.state_dict()
    ours = ia3()(params)
    for group, name in (("attention", "key"), ("attention", "value"), ("mlp", "down")):
        w = ours["layers"][group][name]["kernel"]
        assert isinstance(w, Scaled)
        factors = stacked(state, group, name, "ia3_l.default").reshape(w.scale.shape)
        ours["layers"][group][name]["kernel"] = w.replace(scale=factors)
    check_layers(adapted, ours, {"attention": ("key", "value"), "mlp": ("down",)})
    check_logits(adapted, config, params, ours)
    check_merged(adapted, config, ours)


def test_prompts_are_those_of_peft():
    peft = pytest.importorskip("peft")
    hugging, config, params = llama(tied=False, seed=4)
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    adapted = peft.get_peft_model(hugging, peft.PromptTuningConfig(**options)).eval()
    ours = prompt_tuning(tokens=5)(params)
    ours["prompt"]["table"] = array(adapted.prompt_encoder["default"].embedding.weight)
    check_logits(adapted, config, params, ours, skip=5)


def test_prefixes_are_those_of_peft():
    peft = pytest.importorskip("peft")
    hugging, config, params = llama(tied=False, seed=4)
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    adapted = peft.get_peft_model(hugging, peft.PrefixTuningConfig(**options)).eval()
    # (tokens, layers x key and value x heads x head size)
    table = array(adapted.prompt_encoder["default"].embedding.weight).reshape(5, 3, 2, -1)
    ours = prefix_tuning(tokens=5)(params)
    for index, name in enumerate(("key", "value")):
        ours["layers"]["attention"]["prefix"][name] = jnp.moveaxis(table[:, :, index], 0, 1)
    check_logits(adapted, config, params, ours)
    got = Engine(Transformer(config)).generate(ours, list(PROMPT), max_new_tokens=1)
    np.testing.assert_array_equal(np.ravel(got), np.argmax(their_logits(adapted, PROMPT)[:, -1], axis=-1))
