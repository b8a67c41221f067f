"""The table of family × transform: every transform applies to every family, or says why it does not. Families are those
that can be read, and models beside them that no checkpoint of transformers holds.

All pairs by their shapes, and one in twenty-four of them (one in six with the long tests) by numbers: a model of
weights of any kinds computes what the model of the dense matrices that they mean computes.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from sweep import sweep

from jaxcost import sharding, weights
from jaxcost.config import load
from jaxcost.evaluation.batch import beside_inputs
from jaxcost.models import families
from jaxcost.models.transformer import Transformer, detections, initialize, logits, output_of
from jaxcost.transforms import (
    bias_only,
    bottleneck,
    calibrated,
    chain,
    factorize,
    freeze,
    ia3,
    lora,
    norm_only,
    prefix_tuning,
    prompt_tuning,
    prune,
    quantize,
    shrink,
    smooth,
)

FIELDS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
IMAGES = FIELDS | {"image_size": 8, "patch_size": 4, "num_labels": 5}
ENCODED = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 4, "relative_attention_num_buckets": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WHISPER = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 6}
WHISPER |= {"decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_source_positions": 16}
AUDIO = {"conv_dim": (16, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 6}
AUDIO |= {"num_conv_pos_embedding_groups": 4}
WHISPER |= {"max_source_positions": 9, "classifier_proj_size": 16, "num_labels": 5, "decoder_start_token_id": 1}
OPTIONS = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 4},
    "roberta": {"architectures": ["RobertaForSequenceClassification"], "type_vocab_size": 1},
    "modernbert": {"local_attention": 4},
    "yolos": {"num_detection_tokens": 3},
    "siglip": {"vision_config": IMAGES},
    "t5": ENCODED,
    "mt5": ENCODED | {"num_decoder_layers": 3},
    "whisper": WHISPER,
    "wav2vec2": AUDIO,
    "hubert": AUDIO | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
SASREC = dataclasses.replace(load("configs/sasrec.py").model, vocab_size=64, width=32, mlp_width=48, max_length=32)
ODD = FIELDS | {"vocab_size": 65, "hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 1}
ODD = {
    "llama": ODD,
    "gemma": ODD | {"head_dim": 10},
    "bert": ODD | {"tie_word_embeddings": False},
    "t5": ODD | ENCODED | {"d_model": 42, "d_kv": 14, "num_heads": 3},
    "whisper": ODD | WHISPER | {"d_model": 42, "encoder_attention_heads": 3, "decoder_attention_heads": 3},
    "vit": ODD | {"image_size": 8, "patch_size": 4, "num_labels": 5},
    "wav2vec2": ODD | AUDIO | {"num_conv_pos_embedding_groups": 3},
}
"""One family of each kind, with heads that are no power of two, one key and value where there may be fewer, embeddings
tied and not, and a vocabulary that no mesh divides."""
BESIDE = {"sasrec": dataclasses.replace(SASREC, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=8)}
"""Models of no checkpoint → their configs."""
ODD_BESIDE = {"sasrec": dataclasses.replace(SASREC, vocab_size=65, width=42, num_heads=3, num_kv_heads=3, head_dim=14)}
FAMILIES = [*families.FAMILIES, *BESIDE]
TRANSFORMS = {
    "prune": prune(sparsity=0.5),
    "prune 2:4": prune(pattern="2:4"),
    "wanda": prune(method="wanda", sparsity=0.5),
    "sparsegpt": prune(method="sparsegpt", sparsity=0.5),
    "shrink": shrink(mlp=0.5, heads=0.5, head_dim=8),
    "factorize": factorize(parameters=0.6),
    "factorize whitened": factorize(parameters=0.6, whitened=True),
    "lora": lora(rank=2),
    "dora": lora(rank=2, dora=True),
    "qlora": chain(quantize(bits=4, group=16), lora(rank=2)),
    "ia3": ia3(),
    "freeze": freeze(top_layers=1),
    "biases": bias_only(),
    "norms": norm_only(),
    "prompt": prompt_tuning(tokens=3),
    "prefix": prefix_tuning(tokens=3),
    "bottleneck": bottleneck(width=4),
    "int8": quantize(),
    "nf4": quantize(bits=4, numbers="nf", group=16),
    "w8a8": quantize(activations="dynamic"),
    "gptq": quantize(bits=4, method="gptq"),
    "awq": quantize(bits=4, method="awq"),
    "smooth": smooth(),
    "training": quantize(mode="training"),
}


def config_of(family):
    fields = (IMAGES if family in ("vit", "deit", "yolos", "siglip_vision_model") else FIELDS) | OPTIONS.get(family, {})
    return BESIDE.get(family) or families.config_of(fields | {"model_type": family})


def odd_config_of(family):
    return ODD_BESIDE.get(family) or families.config_of(ODD[family] | {"model_type": family})


@functools.cache
def model_of(family, config_of=config_of):
    model = Transformer(config_of(family))
    params = jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))
    # Off 0 and 1, where a vector that is lost would not be missed.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [a + 0.05 * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(structure, noisy)


def inputs_of(config, seed=0, rows=2):
    rng = np.random.default_rng(seed)
    images, audio = config.images, config.audio
    if config.encoder.num_layers:
        read = {} if config.source.of_tokens else inputs_of(config.source, seed + 1, rows)
        made = {"inputs": jnp.asarray(rng.integers(0, config.vocab_size, (rows, 12))), "source": read.get("inputs")}
        if config.source.of_tokens:
            made["source"] = jnp.asarray(rng.integers(0, config.vocab_size, (rows, 10)))
            made["source_valid"] = jnp.arange(10) < jnp.asarray(rng.integers(1, 11, (rows, 1)))
        return made
    if audio.channels:
        channels = [audio.channels] if audio.channels > 1 else []
        return {"inputs": jnp.asarray(rng.normal(size=(rows, audio.length(9), *channels)), jnp.float32)}
    if images.patch:
        pictures = rng.normal(size=(rows, images.height, images.width, images.channels))
        return {"inputs": jnp.asarray(pictures, jnp.float32)}
    return {"inputs": jnp.asarray(rng.integers(0, config.vocab_size, (rows, 12)))}


def outputs(model, params, batch):
    if model.config.head.boxes:
        return jnp.concatenate(detections(model, params, batch["inputs"]), axis=-1)
    hidden, _ = model.apply({"params": params}, batch["inputs"], **beside_inputs(batch))
    return logits(model.config, params, hidden)


# A tower that only embeds has nothing to be trained on.
TRAINED = [family for family in FAMILIES if family != "siglip_vision_model"]
UNLIKE = {"bert", "gemma2", "gpt2", "llama", "mixtral", "sasrec", "t5", "vit", "wav2vec2", "whisper", "yolos"}
"""One family of each kind, which are trained more often than the rest."""
UNBIASED = {"llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"}
UNBIASED |= {"t5", "mt5"}
IMAGED = {"vit", "deit", "yolos", "siglip", "siglip_vision_model"}
HEARD = {"wav2vec2", "hubert"}
REFUSED = {
    "biases": (UNBIASED, "matches no weight"),
    "shrink": ({"t5", "mt5"}, "all layers share the relative positions"),
    # A model of images has a position for each patch and none for virtual tokens.
    "prompt": (IMAGED | HEARD, "the model has no embed/table"),
    "prefix": (IMAGED, "virtual tokens and .* tokens are longer than model.max_length"),
}
"""Transform → the families that it does not apply to, and what it says of them."""


FIRST = sorted(FAMILIES, key=("bert", "mixtral", "vit").__contains__, reverse=True)


@sweep("family", FIRST, quick=0, slow=3)
def test_every_transform_applies_to_every_family(family):
    """By shapes alone, which is what planning goes by: nothing is computed."""
    model, params = model_of(family)
    outputs_of = functools.partial(outputs, model)
    inputs = inputs_of(model.config)
    plain = jax.eval_shape(outputs_of, params, inputs)
    if not model.config.head.embed:
        bias = output_of(model.config, params).bias
        numbers = plain.shape[-1] - 4 * model.config.head.boxes
        assert bias is None or bias.shape == (numbers,)
    for name, transform in TRANSFORMS.items():
        families_of, said = REFUSED.get(name, ((), ""))
        if family in families_of:
            with pytest.raises(ValueError, match=said):
                jax.eval_shape(outputs_of, transform.abstract(params), inputs)
            continue
        made = transform.abstract(params)
        assert jax.tree.structure(made) != jax.tree.structure(params) or name in ("shrink", "smooth"), name
        assert any(jax.tree.leaves(weights.trainable_tree(made))) or name in ("int8", "nf4", "w8a8", "gptq", "awq")
        assert jax.eval_shape(outputs_of, made, inputs) == plain, name


def taking(transform):
    """The families that a transform applies to."""
    return [family for family in FAMILIES if family not in REFUSED.get(transform, ((), ""))[0]]


PAIRS = [
    [(f, n) for j, f in enumerate(FAMILIES) if f in taking(n := list(TRANSFORMS)[(j + turn) % len(TRANSFORMS)])]
    for turn in (0, 8, 22, 23)
]
"""Some of all pairs, in parts of which each reaches every family and every transform."""


@sweep(("family", "name"), sum(PAIRS, []), quick=0, slow=7)
def test_what_weights_compute_is_what_the_dense_ones_that_they_mean_compute(family, name):
    model, params = model_of(family)
    batches = [inputs_of(model.config, seed) for seed in (1, 2)]
    forward = jax.jit(functools.partial(outputs, model))
    made = calibrated(TRANSFORMS[name], params, jax.random.key(2), lambda p, x: outputs(model, p, x), lambda: batches)
    got = forward(made, batches[0])
    assert np.all(np.isfinite(got)) and got.shape == forward(params, batches[0]).shape
    # Products in codes err by their rounding.
    if name not in ("training", "w8a8"):
        np.testing.assert_allclose(got, forward(weights.merge(made), batches[0]), atol=2e-4)


@functools.cache
def stepped(family, mesh_config, config_of=config_of):
    """The loss and the gradient's norm of a training step on a mesh."""
    model, params = model_of(family, config_of)
    devices = jax.devices()[: math.prod(dataclasses.asdict(mesh_config).values())]
    mesh = sharding.make_mesh(mesh_config, devices)
    inputs = inputs_of(model.config, seed=3, rows=8)
    *answers, numbers = jax.eval_shape(functools.partial(outputs, model), params, inputs).shape
    rng = np.random.default_rng(4)
    batch = inputs | {"mask": jnp.ones(answers)}
    if model.config.head.boxes:
        numbers = model.config.head.labels
        batch |= {"boxes": rng.uniform(0.1, 0.5, (*answers, 4)), "mask": rng.integers(0, 2, answers).astype(np.float32)}
    batch["targets"] = rng.integers(0, numbers, answers)
    (metrics,), _ = small.trained(model, params, [batch], mesh)
    return [metrics[name] for name in ("loss", "gradient_norm")]


@sweep("family", sorted(TRAINED, key=UNLIKE.__contains__, reverse=True), quick=0, slow=2)
def test_every_family_trains_on_a_mesh_as_on_one_device(family):
    want = stepped(family, sharding.MeshConfig())
    np.testing.assert_allclose(stepped(family, sharding.MeshConfig(fsdp=4, tensor=2)), want, rtol=1e-5)


@sweep("family", [*ODD, *ODD_BESIDE], quick=0)
def test_odd_sizes_train_on_a_mesh_that_does_not_divide_them_as_on_one_device(family):
    want = stepped(family, sharding.MeshConfig(), odd_config_of)
    np.testing.assert_allclose(stepped(family, sharding.MeshConfig(fsdp=2, tensor=2), odd_config_of), want, rtol=1e-5)


def test_the_pairs_reach_every_family_and_every_transform():
    for part in PAIRS:
        assert {family for family, _ in part} == set(FAMILIES)
        assert {name for _, name in part} == set(TRANSFORMS)
