"""Adapters of peft in and out. The part marked `oracles` needs torch, transformers and peft."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from small import CONFIG, GPT2, dense_params, tokens
from sweep import sweep

from jaxcost import weights
from jaxcost.models import huggingface
from jaxcost.models.config import HeadConfig, ModelConfig
from jaxcost.models.families import UnsupportedModel
from jaxcost.models.huggingface import safetensors
from jaxcost.models.transformer import Transformer, initialize, logits
from jaxcost.transforms import chain, lora, prune, rule

PHI3 = dataclasses.replace(CONFIG, rotary_fraction=0.5)


def base_of(config):
    if config == CONFIG:
        return dense_params()
    return jax.jit(lambda key: initialize(Transformer(config), key)[0])(jax.random.key(0))


def trained(params):
    """Adapters whose arrays moved, as if they had trained."""
    keys = iter(jax.random.split(jax.random.key(5), 100))
    found, rest = weights.partition(params)
    moved = {path: a + 0.2 * jax.random.normal(next(keys), a.shape) for path, a in found.items()}
    return weights.combine(params, moved, rest)


def our_logits(config, params):
    hidden, _ = Transformer(config).apply({"params": params}, tokens())
    return np.asarray(logits(config, params, hidden))


CASES = {
    "lora": (CONFIG, "llama", lora(rank=2, alpha=3.0)),
    "part of a fused module": (PHI3, "phi3", lora(rank=2, rules=(rule("attention/(query|value)/"),), dora=True)),
    "rslora": (CONFIG, "llama", lora(rank=4, rank_stabilized=True)),
    "dora": (CONFIG, "llama", lora(rank=2, dora=True)),
    "ranks of their own": (CONFIG, "llama", lora(rules=(rule("mlp/", rank=3, alpha=9.0), rule("query", rank=5)))),
    "fused": (PHI3, "phi3", lora(rank=2)),
    "gpt2": (GPT2, "gpt2", lora(rank=2, rules=(rule("attention/.*kernel", alpha=3.0), rule("mlp/.*kernel", rank=1)))),
    "on a mask": (CONFIG, "llama", chain(prune(sparsity=0.5), lora(rank=2))),
}


@sweep("name", CASES, quick=1)
def test_what_is_written_reads_back_as_the_same_adapter(name, tmp_path):
    config, model_type, transform = CASES[name]
    base = base_of(config)
    base = prune(sparsity=0.5)(base) if name == "on a mask" else base
    params = trained(transform(base_of(config)))
    huggingface.save_adapter(tmp_path / "out", config, params, model_type)
    got = huggingface.load_adapter(tmp_path / "out", config, base, model_type)
    for path, want in weights.partition(params)[0].items():
        if "fused" not in name and name != "gpt2":
            np.testing.assert_allclose(weights.partition(got)[0][path], want, rtol=1e-6)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-5), weights.merge(got), weights.merge(params))
    )


@pytest.fixture
def written(tmp_path):
    huggingface.save_adapter(tmp_path / "out", CONFIG, trained(lora(rank=2, dora=True)(dense_params())), "llama")
    return tmp_path / "out"


def changed(folder, tensors=(), options=()):
    """Writes an adapter again with other tensors (None for none) and options."""
    path = folder / "adapter_model.safetensors"
    found = {name: np.array(t.read()) for name, t in safetensors.read_header(path).items()} | dict(tensors)
    safetensors.write(
        path,
        [
            safetensors.Tensor(name, value.dtype, value.shape, lambda value=value: value)
            for name, value in found.items()
            if value is not None
        ],
    )
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(options)))


UP = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        ({f"{UP}.lora_B.weight": None}, {}, huggingface.BadCheckpoint, f"lacks {UP}.lora_B.weight, which its adapter"),
        ({f"{UP}.lora_magnitude_vector": None}, {}, huggingface.BadCheckpoint, f"lacks {UP}.lora_magnitude_vector"),
        (
            {f"{UP}.lora_A.weight": np.zeros((3, 16), np.float32)},
            {},
            huggingface.BadCheckpoint,
            rf"adapter_model.safetensors: {UP}.lora_A.weight has the shape \(3, 16\), but must have \(2, 16\)",
        ),
        ({"strange": np.zeros(1, np.float32)}, {}, huggingface.BadCheckpoint, "has strange, which fits no module"),
        ({}, {"peft_type": "IA3"}, UnsupportedModel, "the peft_type 'IA3' is not LORA"),
        ({}, {"bias": "all"}, UnsupportedModel, "bias is 'all'"),
        ({}, {"modules_to_save": ["lm_head"]}, UnsupportedModel, "modules_to_save is on"),
        ({}, {"init_lora_weights": "pissa"}, UnsupportedModel, "'pissa', which changed the base"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tensors, options, error, message, written):
    changed(written, tensors, options)
    with pytest.raises(error, match=message):
        huggingface.load_adapter(written, CONFIG, dense_params(), "llama")


def test_files_that_are_cut_off_or_pickled_are_refused(written):
    path = written / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(huggingface.BadCheckpoint, match=r"adapter_model.safetensors is cut off: base_model"):
        huggingface.load_adapter(written, CONFIG, dense_params(), "llama")
    path.rename(written / "adapter_model.bin")
    with pytest.raises(huggingface.BadCheckpoint, match="its pickle file is not read"):
        huggingface.load_adapter(written, CONFIG, dense_params(), "llama")


def test_what_peft_has_no_place_for_is_refused(tmp_path):
    def refused(params, message):
        with pytest.raises(UnsupportedModel, match=message):
            huggingface.save_adapter(tmp_path / "out", CONFIG, params, "llama")

    refused(prune(sparsity=0.5)(dense_params()), r"The weights have no adapter; apply lora\(\) first")
    params = lora(rank=2)(dense_params())
    up = params["layers"]["mlp"]["up"]
    up["kernel"] = weights.Scaled(up["kernel"], np.ones((3, 16), np.float32))
    refused(params, "layers/mlp/up/kernel has an adapter below something else")
    params = lora(rank=2)(dense_params())
    params["final_norm"]["scale"] = params["final_norm"]["scale"].weight
    refused(params, "final_norm/scale trains beside the adapters")
    assert not list(tmp_path.iterdir())


# ---- With peft ----


def their_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.as_tensor(np.array(tokens()))).logits.numpy()


def theirs_of(config, model_type, tmp_path):
    """The same model in transformers, by way of a checkpoint."""
    import torch
    import transformers

    huggingface.save(tmp_path / "base", config, base_of(config), model_type=model_type)
    return transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )


@pytest.mark.oracles
@pytest.mark.parametrize("name", [name for name in CASES if name != "on a mask"])
def test_peft_loads_ours(name, tmp_path):
    peft = pytest.importorskip("peft")
    config, model_type, transform = CASES[name]
    params = trained(transform(base_of(config)))
    huggingface.save_adapter(tmp_path / "out", config, params, model_type, base="a/base")
    model = peft.PeftModel.from_pretrained(theirs_of(config, model_type, tmp_path), tmp_path / "out")
    want = our_logits(config, params)
    assert np.max(np.abs(want - our_logits(config, base_of(config)))) > 0.05
    np.testing.assert_allclose(their_logits(model), want, atol=2e-4)


EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT = {
    "lora": (CONFIG, "llama", {"target_modules": EVERY_LINEAR}),
    "rslora, one layer": (
        CONFIG,
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "layers_to_transform": [1]},
    ),
    "dora": (CONFIG, "llama", {"target_modules": EVERY_LINEAR, "use_dora": True}),
    "dora, one layer": (CONFIG, "llama", {"target_modules": ["up_proj"], "use_dora": True, "layers_to_transform": [2]}),
    "patterns": (
        CONFIG,
        "llama",
        {
            "target_modules": EVERY_LINEAR,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"layers.[02].mlp.up_proj": 5},
        },
    ),
    "phi3": (PHI3, "phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "use_dora": True}),
    "gpt2": (GPT2, "gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.oracles
@pytest.mark.parametrize("name", PEFT)
def test_ours_loads_pefts(name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config, model_type, options = PEFT[name]
    model = peft.get_peft_model(theirs_of(config, model_type, tmp_path), peft.LoraConfig(r=4, lora_alpha=12, **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    want = their_logits(model)
    got = huggingface.load_adapter(tmp_path / "adapter", config, base_of(config), model_type)
    assert np.max(np.abs(want - our_logits(config, base_of(config)))) > 0.05
    np.testing.assert_allclose(our_logits(config, got), want, atol=2e-4)
    np.testing.assert_allclose(our_logits(config, weights.merge(got)), want, atol=2e-4)
    # What trains is the adapter alone, as after `lora`.
    assert all("/kernel/" in path for path in weights.partition(got)[0])


def test_adapters_of_encoders_name_no_task_that_generates(tmp_path):
    encoder = ModelConfig(
        vocab_size=8, width=4, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=2, mlp_width=6, max_length=8,
        causal=False, norm="layer", norm_placement="sum", embedding_norm=True, position="learned", token_types=2,
        gated=False, activation="gelu_exact", qkv_bias=True, output_bias=True, mlp_bias=True,
        head=HeadConfig(outputs=2, bias=True),
    )  # fmt: skip
    start = jax.jit(lambda key: initialize(Transformer(encoder), key)[0])
    adapted = lora(rules=(rule("query/kernel", rank=2),))(start(jax.random.key(0)), jax.random.key(0))
    huggingface.save_adapter(tmp_path / "out", encoder, adapted, "bert")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] is None
