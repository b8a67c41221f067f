"""Live parity with torch, transformers and peft: masks, logits, tokens and adapters from both sides.

Run with `pytest -m oracles`, with torch, transformers and peft installed. Torch kernels are (out, in), ours (in, out).
"""

import dataclasses
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost import weights
from jaxcost.models import huggingface
from jaxcost.models.transformer import Transformer, logits
from jaxcost.transforms import lora, prune, rule

pytestmark = pytest.mark.oracles

PROMPT = np.random.default_rng(0).integers(0, 96, (2, 12))
PEFT_NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
PEFT_NAMES |= {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def array(tensor):
    """A copy, so that neither side sees what the other does to it later."""
    return jnp.asarray(tensor.detach().numpy().copy())


# ---- Converters ----


def loaded(hugging):
    """Our config and parameters of what transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        hugging.save_pretrained(folder)
        return huggingface.load(folder)


def scattered(hugging):
    """The model with its norms and biases moved off 1 and 0, where a wrong one would not be seen."""
    import torch

    with torch.no_grad():
        for name, parameter in hugging.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    return hugging.eval()


def llama(tied, seed=0):
    """A random LlamaForCausalLM with grouped queries, our config and its weights as our parameters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=80,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        rms_norm_eps=1e-5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    hugging = scattered(transformers.LlamaForCausalLM(config))
    return hugging, *loaded(hugging)


def our_logits(config, params, tokens):
    hidden, _ = Transformer(config).apply({"params": params}, jnp.asarray(tokens))
    return np.asarray(logits(config, params, hidden))


def their_logits(hugging, tokens):
    import torch

    with torch.no_grad():
        return hugging(torch.as_tensor(tokens)).logits.numpy()


# ---- Models ----


def test_a_wrong_epsilon_or_rope_base_would_be_seen():
    hugging, config, params = llama(tied=False)
    want = their_logits(hugging, PROMPT)
    for change in ({"rope_theta": 10_500.0}, {"activation": "gelu"}, {"norm_epsilon": 1e-2}):
        got = our_logits(dataclasses.replace(config, **change), params, PROMPT)
        assert np.max(np.abs(got - want)) > 2e-3, change


# ---- Pruning ----


@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.5, 0.83])
def test_masks_are_those_of_torch(sparsity):
    torch = pytest.importorskip("torch")
    import torch.nn.utils.prune as torch_prune

    torch.manual_seed(2)
    layers = [torch.nn.Linear(13, 11, bias=False) for _ in range(3)]
    ours = {"layers": {"kernel": jnp.stack([array(layer.weight).T for layer in layers])}}
    got = prune(sparsity=sparsity)(ours)["layers"]["kernel"].mask
    for layer, mask in zip(layers, got, strict=True):
        torch_prune.l1_unstructured(layer, "weight", amount=sparsity)
        np.testing.assert_array_equal(mask, layer.weight_mask.numpy().T > 0)


def test_pruning_again_keeps_torchs_masks_too():
    torch = pytest.importorskip("torch")
    import torch.nn.utils.prune as torch_prune

    torch.manual_seed(3)
    layer = torch.nn.Linear(16, 10, bias=False)
    params = {"layers": {"kernel": array(layer.weight).T[None]}}
    # Torch's second amount is a share of what is left: 0.25 of 0.75 makes 0.4375 of the whole.
    for amount, sparsity in ((0.25, 0.25), (0.25, 0.4375)):
        torch_prune.l1_unstructured(layer, "weight", amount=amount)
        params = prune(sparsity=sparsity)(params)
        np.testing.assert_array_equal(params["layers"]["kernel"].mask[0], layer.weight_mask.numpy().T > 0)


# ---- LoRA ----

TARGETS = {"attention": ("query", "value"), "mlp": ("down",)}
ADAPTERS = lora(rank=4, alpha=12.0, rules=(rule("attention/(query|value)/|mlp/down/"),))


def peft_llama():
    """A peft model with random adapters on a random Llama, our config, and the same as our parameters."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    hugging, config, params = llama(tied=False, seed=4)
    names = [PEFT_NAMES[name] for group in TARGETS.values() for name in group]
    adapted = peft.get_peft_model(hugging, peft.LoraConfig(r=4, lora_alpha=12, target_modules=names)).eval()
    fresh = {name: array(p) for name, p in adapted.named_parameters() if "lora_A" in name}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    state = adapted.state_dict()
    ours = ADAPTERS(params)
    for group, group_names in TARGETS.items():
        for name in group_names:
            module = f"{'self_attn' if group == 'attention' else 'mlp'}.{PEFT_NAMES[name]}"
            a, b = (
                jnp.stack(
                    [
                        array(state[f"base_model.model.model.layers.{i}.{module}.{side}.default.weight"]).T
                        for i in range(3)
                    ]
                )
                for side in ("lora_A", "lora_B")
            )
            w = ours["layers"][group][name]["kernel"]
            ours["layers"][group][name]["kernel"] = w.replace(a=a, b=b)
    return adapted, config, params, ours, fresh


def test_adapters_logits_are_those_of_peft_unmerged_and_merged():
    adapted, config, params, ours, _ = peft_llama()
    want = their_logits(adapted, PROMPT)
    assert np.max(np.abs(want - our_logits(config, params, PROMPT))) > 0.1
    np.testing.assert_allclose(our_logits(config, ours, PROMPT), want, atol=2e-4)
    merged = weights.merge(ours)
    np.testing.assert_allclose(our_logits(config, merged, PROMPT), want, atol=2e-4)
    theirs = adapted.merge_and_unload()
    np.testing.assert_allclose(our_logits(config, merged, PROMPT), their_logits(theirs, PROMPT), atol=2e-4)
    _, expected = loaded(theirs)
    assert jax.tree.structure(expected) == jax.tree.structure(merged)
    for got, leaf in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, leaf, atol=1e-6)
    assert np.any(merged["layers"]["mlp"]["down"]["kernel"] != params["layers"]["mlp"]["down"]["kernel"])


def test_adapters_start_like_pefts():
    adapted, config, params, ours, fresh = peft_llama()
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    start = ADAPTERS(params)
    for group, names in TARGETS.items():
        for name in names:
            w = start["layers"][group][name]["kernel"]
            assert w.scale == layer.scaling["default"] == 3.0
            theirs = [a for path, a in fresh.items() if f".{PEFT_NAMES[name]}." in path]
            bound = w.base.shape[-2] ** -0.5
            # Uniform with the same bound: so are the largest value and the standard deviation, bound / sqrt(3).
            for values in (np.asarray(w.a), np.stack(theirs)):
                assert 0.97 * bound < np.max(np.abs(values)) <= bound
                np.testing.assert_allclose(np.std(values), bound / 3**0.5, rtol=0.1)
            assert not np.any(w.b)
    trainable, _ = weights.partition(start)
    count = sum(leaf.size for leaf in trainable.values())
    assert count == sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
