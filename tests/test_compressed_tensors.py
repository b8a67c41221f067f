"""Quantised weights in the compressed-tensors layout: decoded here bit by bit, and read by the library itself.

The part marked `oracles` needs torch, transformers and compressed-tensors.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, MODEL, dense_params
from sweep import sweep

from jaxcost import weights
from jaxcost.models import huggingface
from jaxcost.models.families import UnsupportedModel
from jaxcost.models.huggingface import safetensors
from jaxcost.models.transformer import Transformer, initialize, logits, unembedding
from jaxcost.transforms import calibrated, chain, lora, prune, quantize, rule

EVERYWHERE = (rule("kernel$"),)
MLP_ALONE = (rule("layers/mlp/", group=8, bits=4), rule("attention/(query|key|value)/"))
SCHEMES = {
    "int4 in groups": (quantize(bits=4, group=8, rules=(rule("mlp/down|query"),)), "pack-quantized"),
    "int8 for both": (quantize(activations="dynamic"), "int-quantized"),
    "fp8": (quantize(numbers="fp"), "float-quantized"),
    "int8": (quantize(), "pack-quantized"),
    "int8 in groups, everywhere": (quantize(group=4, rules=EVERYWHERE), "pack-quantized"),
    "int4": (quantize(bits=4), "pack-quantized"),
    "int8 for both, calibrated": (quantize(activations="static"), "int-quantized"),
    "two schemes": (quantize(rules=MLP_ALONE), "pack-quantized"),
    "two layouts": (quantize(rules=(rule("mlp/", numbers="fp"), rule("attention/"))), "mixed-precision"),
    "masked": (chain(prune(sparsity=0.5), quantize(bits=4, group=8)), "pack-quantized"),
}


def quantised(transform):
    """The small model's weights, transformed, calibrated on random tokens."""
    batch = {"inputs": jax.random.randint(jax.random.key(1), (2, 8), 0, CONFIG.vocab_size)}

    def forward(params, batch):
        return weights.contract(MODEL.apply({"params": params}, batch["inputs"])[0], unembedding(params))

    def place(make, *args):
        return make(*args)

    return calibrated(transform, dense_params(), jax.random.key(0), forward, lambda: iter([batch]), place)


def stored(folder):
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: np.array(t.read()) for path in files for name, t in safetensors.read_header(path).items()}
    return json.loads((folder / "config.json").read_text()), tensors


def decoded(tensors, module, group):
    """What a module's tensors mean, (in, out), by the layout's description alone."""
    bits, scale = group["weights"]["num_bits"], tensors[f"{module}.weight_scale"]
    if f"{module}.weight" in tensors:
        codes = tensors[f"{module}.weight"].astype(np.float32)
    else:
        outward, inward = tensors[f"{module}.weight_shape"]
        raw = tensors[f"{module}.weight_packed"].astype("<i4").view(np.uint8)
        bytewise = np.unpackbits(raw, axis=-1, bitorder="little")[:, : inward * bits]
        values = bytewise.reshape(outward, inward, bits) @ (1 << np.arange(bits))
        codes = values.astype(np.float32) - 2 ** (bits - 1)
    return (codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)).T


def scheme_of(config, module):
    """The entry of `config_groups` that a linear module belongs to, None where it is ignored."""
    if module in config["quantization_config"]["ignore"]:
        return None
    groups = config["quantization_config"]["config_groups"].values()
    return next(group for group in groups if "Linear" in group["targets"] or module in group["targets"])


@sweep("name", SCHEMES, quick=1)
def test_codes_mean_what_the_weights_mean(name, tmp_path):
    transform, layout = SCHEMES[name]
    params = quantised(transform)
    huggingface.save(tmp_path / "out", CONFIG, params, layout="compressed-tensors")
    config, tensors = stored(tmp_path / "out")
    assert config["quantization_config"]["format"] == layout
    for path, theirs in (
        ("attention/query", "self_attn.q_proj"),
        ("attention/output", "self_attn.o_proj"),
        ("mlp/down", "mlp.down_proj"),
    ):
        group, inner = path.split("/")
        want = weights.materialize(params["layers"][group][inner]["kernel"])
        for layer in range(CONFIG.num_layers):
            module = f"model.layers.{layer}.{theirs}"
            scheme = scheme_of(config, module)
            if scheme is None:
                np.testing.assert_allclose(tensors[f"{module}.weight"].T, want[layer], atol=1e-6)
            else:
                np.testing.assert_allclose(decoded(tensors, module, scheme), want[layer], atol=1e-6)
                assert tensors[f"{module}.weight_scale"].dtype == np.float32
    assert (scheme_of(config, "lm_head") is None) == ("lm_head.weight_scale" not in tensors)
    coded = [name for name in tensors if name.endswith(("_packed", ".weight"))]
    assert sum(tensors[name].nbytes for name in coded) < sum(a.nbytes for a in jax.tree.leaves(dense_params()))


@pytest.mark.slow
def test_each_expert_is_a_module_and_routers_stay_numbers(tmp_path):
    config = dataclasses.replace(CONFIG, experts=3)
    params = initialize(Transformer(config), jax.random.key(0))[0]
    # Between the norms and the scores of a router there is nothing to save.
    params = quantize(bits=4, group=8, rules=(rule("(up|gate|down|query|key|value|output)/kernel"),))(params)
    huggingface.save(tmp_path / "out", config, params, layout="compressed-tensors")
    written, tensors = stored(tmp_path / "out")
    up = weights.materialize(params["layers"]["mlp"]["up"]["kernel"])
    for layer in range(config.num_layers):
        block = f"model.layers.{layer}.block_sparse_moe"
        assert f"{block}.gate" in written["quantization_config"]["ignore"]
        for expert in range(3):
            module = f"{block}.experts.{expert}.w3"
            got = decoded(tensors, module, scheme_of(written, module))
            np.testing.assert_allclose(got, up[layer, expert], atol=1e-6)


@pytest.mark.slow
def test_activation_scales_are_written(tmp_path):
    params = quantised(quantize(activations="static"))
    huggingface.save(tmp_path / "out", CONFIG, params, layout="compressed-tensors")
    config, tensors = stored(tmp_path / "out")
    [group] = config["quantization_config"]["config_groups"].values()
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }
    want = params["layers"]["mlp"]["up"]["kernel"].activation_scale
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.input_scale"], want[1:2])


@sweep(
    ("transform", "change", "message"),
    [
        (prune(sparsity=0.5), {}, r"No weight is quantised; apply quantize\(\) first"),
        (quantize(bits=4, numbers="nf"), {}, "kernel is nf4, which vLLM does not read"),
        (quantize(numbers="fp", group=8), {}, "is fp8 in groups of 8, which vLLM does not read"),
        (quantize(bits=4, activations="dynamic"), {}, "is int4 with 8-bit activations"),
        (chain(quantize(), lora(rank=2)), {}, "kernel is Lora over quantised weights"),
        (quantize(rules=(rule("mlp/up/"),)), {"rotary_fraction": 0.5}, "are one matrix in .*gate_up_proj.*alike"),
        (
            quantize(),
            {"norm": "layer", "gated": False, "position": "learned", "activation": "gelu", "num_kv_heads": 4}
            | dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), True),
            "c_attn.weight is no linear layer of torch",
        ),
    ],
    quick=1,
)
def test_what_the_layout_does_not_have_is_refused(transform, change, message, tmp_path):
    config = dataclasses.replace(CONFIG, **change)
    make = jax.jit(lambda key: initialize(Transformer(config), key)[0])
    dense = make(jax.random.key(0)) if change else dense_params()
    with pytest.raises(UnsupportedModel, match=message):
        huggingface.save(tmp_path / "out", config, transform(dense), layout="compressed-tensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.oracles
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_reads_the_codes(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    transform, _ = SCHEMES[name]
    params = quantised(transform)
    huggingface.save(tmp_path / "out", CONFIG, params, layout="compressed-tensors")
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12))
    hidden, _ = MODEL.apply({"params": params}, jnp.asarray(tokens))
    want = np.asarray(logits(CONFIG, params, hidden))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        got = again(torch.as_tensor(tokens)).logits.numpy()
    if transform in (SCHEMES[both][0] for both in ("int8 for both", "int8 for both, calibrated")):
        # Activations are rounded in another way: a token's largest value to 127.5 where ours goes to 127, and quotients
        # where we have products with an inverse.
        assert 0 < np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
    else:
        np.testing.assert_allclose(got, want, atol=2e-4)
