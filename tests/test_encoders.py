"""Encoders against transformers: small random models that it saves give the same outputs here, and ours there.

Run with `pytest -m oracles`, with torch and transformers installed. Without them, what an encoder promises by itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from sweep import sweep

from jaxcost import sharding
from jaxcost.config import Experiment
from jaxcost.cost import closed_form
from jaxcost.data import DataConfig
from jaxcost.evaluation.losses import cross_entropy, squared_error
from jaxcost.models import attention, huggingface
from jaxcost.models.attention import Scores
from jaxcost.models.config import HeadConfig, ImageConfig, ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.heads import Output
from jaxcost.models.huggingface import fields
from jaxcost.models.transformer import (
    Transformer,
    abstract,
    axes_of,
    init_cache,
    initialize,
    logits,
    output_of,
    unembedding,
)
from jaxcost.planning.steps import trace_step
from jaxcost.session import Session
from jaxcost.transforms import prompt_tuning

oracles = pytest.mark.oracles

TOKENS = np.random.default_rng(0).integers(2, 96, (3, 12))
LENGTHS = np.array([12, 7, 1])
VALID = np.arange(12) < LENGTHS[:, None]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_labels": 5,
}
ODD = {"hidden_size": 42, "num_attention_heads": 3, "vocab_size": 97}
FAMILIES = {
    "bert": ("Bert", {}),
    "bert, odd": ("Bert", ODD | {"hidden_act": "relu", "type_vocab_size": 3}),
    "roberta": ("Roberta", {"type_vocab_size": 1}),
    "roberta, odd, untied": ("Roberta", ODD | {"type_vocab_size": 1, "tie_word_embeddings": False}),
    "modernbert": ("ModernBert", {"local_attention": 4, "decoder_bias": True}),
    "modernbert, odd, untied": ("ModernBert", ODD | {"local_attention": 4, "tie_word_embeddings": False}),
    "modernbert, biases": (
        "ModernBert",
        {
            "local_attention": 6,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "classifier_pooling": "mean",
        },
    ),
}
IMAGES = {"image_size": 24, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
IMAGES |= {"intermediate_size": 80, "num_labels": 5, "initializer_range": 0.3}
VISION = {
    "vit": ("ViTForImageClassification", {}),
    "vit, odd": (
        "ViTForImageClassification",
        {"image_size": (16, 24), "num_channels": 1, "hidden_size": 42, "num_attention_heads": 3, "qkv_bias": False},
    ),
    "vit, no head": ("ViTModel", {}),
    "deit": ("DeiTForImageClassification", {}),
    "deit, odd": ("DeiTForImageClassification", {"hidden_size": 42, "num_attention_heads": 3, "image_size": 40}),
    "yolos, no head": ("YolosModel", {"image_size": (16, 24), "use_mid_position_embeddings": False}),
    "siglip": ("SiglipForImageClassification", {}),
    "siglip's tower": ("SiglipVisionModel", {}),
    "siglip's tower, odd": ("SiglipVisionModel", {"hidden_size": 42, "num_attention_heads": 3, "image_size": 20}),
}
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
# Only where words are the answer do sizes of vocabularies and tied embeddings matter.
CASES = [(name, head) for name in FAMILIES for head in (HEADS[:1] if "untied" in name else HEADS)]
DECODERS = [("Llama", head) for head in HEADS[1:]] + [("GPT2", head) for head in HEADS[1:]]


@functools.cache
def hugging_model(name, head):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(len(name) + len(head))
    kind, changes = FAMILIES.get(name, (name, {}))
    sizes = SIZES | changes
    if kind == "GPT2":
        sizes = {"n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 96, "num_labels": 5}
        sizes |= {"pad_token_id": 1, "initializer_range": 0.3}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}{head}")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path.lower() or path.endswith("bias"):
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    return model


def theirs(model):
    import torch

    # Padding of its own kind, which RoBERTa's positions and a decoder's last token are counted by.
    tokens = np.where(VALID, TOKENS, 1)
    with torch.no_grad():
        return model(torch.as_tensor(tokens), attention_mask=torch.as_tensor(VALID.astype(int))).logits.numpy()


def ours(config, params):
    model = Transformer(config)
    hidden, _ = model.apply({"params": params}, jnp.asarray(TOKENS), valid_BT=jnp.asarray(VALID))
    return np.asarray(logits(config, params, hidden))


def compare(got, want, tolerance=2e-4):
    if want.ndim == 2:
        np.testing.assert_allclose(got.reshape(want.shape), want, atol=tolerance)
    else:
        np.testing.assert_allclose(got[VALID], want[VALID], atol=tolerance)


@oracles
@pytest.mark.parametrize(("name", "head"), CASES + DECODERS)
def test_outputs_are_those_of_transformers_and_ours_are_theirs(name, head, tmp_path):
    import torch
    import transformers

    model = hugging_model(name, head)
    model.save_pretrained(tmp_path / "in")
    config, params = huggingface.load(tmp_path / "in")
    want = theirs(model)
    assert np.std(want) > 0.1
    compare(ours(config, params), want)

    huggingface.save(tmp_path / "out", config, params, model_type=model.config.model_type, extra={"pad_token_id": 1})
    kind = getattr(transformers, f"AutoModel{head}")
    again, problems = kind.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert type(again) is type(model) and not any(problems.values()), problems
    compare(theirs(again.eval()), want)
    back, same = huggingface.load(tmp_path / "out")
    assert fields._effective(back) == fields._effective(config)
    jax.tree.map(np.testing.assert_array_equal, same, params)


@oracles
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "ModernBert"])
def test_the_loss_of_a_regression_is_that_of_transformers(kind, tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    given = getattr(transformers, f"{kind}Config")(**SIZES | {"num_labels": 1}, problem_type="regression")
    whole = getattr(transformers, f"{kind}ForSequenceClassification")
    model = whole._from_config(given, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "in")
    config, params = huggingface.load(tmp_path / "in")
    assert config.head.outputs == 1 and config.head.pooling == "first"
    numbers = np.array([[-1.5], [0.25], [3.0]], np.float32)

    def their(model):
        tokens = {"input_ids": torch.as_tensor(np.where(VALID, TOKENS, 1)), "attention_mask": torch.as_tensor(VALID)}
        return model(**{name: a.long() for name, a in tokens.items()}, labels=torch.as_tensor(numbers[:, 0])).loss

    def our(params):
        model = Transformer(config)
        hidden, _ = model.apply({"params": params}, jnp.asarray(TOKENS), valid_BT=jnp.asarray(VALID))
        total, count = squared_error(hidden, output_of(config, params), numbers, jnp.ones((3, 1)))
        return total / count

    want = their(model)
    want.backward()
    got, gradient = jax.jit(jax.value_and_grad(our))(params)
    np.testing.assert_allclose(got, float(want.detach()), rtol=1e-4)
    last = [parameter for path, parameter in model.named_parameters() if path.endswith("weight")][-1]
    np.testing.assert_allclose(gradient["head"]["output"]["kernel"], last.grad.numpy().T, atol=2e-4)

    huggingface.save(tmp_path / "out", config, params, extra={"pad_token_id": 1, "problem_type": "regression"})
    again = whole.from_pretrained(tmp_path / "out", attn_implementation="eager", dtype=torch.float32).eval()
    assert again.config.num_labels == 1 and again.config.problem_type == "regression"
    np.testing.assert_allclose(float(their(again).detach()), float(want.detach()), rtol=1e-5)


@functools.cache
def hugging_vision(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(len(name))
    kind, changes = VISION[name]
    family = kind.partition("For")[0].removesuffix("Model")
    sizes = IMAGES | changes
    if kind == "SiglipForImageClassification":
        text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        config = transformers.SiglipConfig(vision_config=sizes, text_config=text, num_labels=5)
    else:
        config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, kind)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path.lower() or path.endswith("bias") or "token" in path or "position" in path:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    return model


@oracles
@pytest.mark.parametrize("name", VISION)
def test_images_give_what_they_give_in_transformers(name, tmp_path):
    import torch

    model = hugging_vision(name)
    model.save_pretrained(tmp_path / "in")
    config, params = huggingface.load(tmp_path / "in")
    sizes = config.images
    images = np.random.default_rng(0).normal(size=(2, sizes.height, sizes.width, sizes.channels)).astype(np.float32)

    def their(model):
        with torch.no_grad():
            made = model(torch.as_tensor(np.moveaxis(images, -1, 1)))
        return (made.logits if hasattr(made, "logits") else made.last_hidden_state).numpy()

    want = their(model)
    assert np.std(want) > 0.1
    hidden, _ = Transformer(config).apply({"params": params}, jnp.asarray(images))
    np.testing.assert_allclose(np.asarray(logits(config, params, hidden)).reshape(want.shape), want, atol=2e-4)

    huggingface.save(tmp_path / "out", config, params, model_type=model.config.model_type)
    again, problems = type(model).from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    missing = {name for name in problems.pop("missing_keys") if "pooler" not in name}
    assert not missing and not any(problems.values()), (missing, problems)
    np.testing.assert_allclose(their(again.eval()), want, atol=2e-4)
    back, same = huggingface.load(tmp_path / "out")
    assert fields._effective(back) == fields._effective(config)
    jax.tree.map(np.testing.assert_array_equal, same, params)


# ---- Without transformers ----

BASE = ModelConfig(
    vocab_size=96, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, causal=False
)
POST = {"norm": "layer", "norm_placement": "sum", "embedding_norm": True, "position": "learned", "token_types": 2}
KINDS = {
    "plain": {},
    "windows": {"pattern": ("global", "local"), "window": 3},
    "post": POST,
    "pooled": {"head": HeadConfig(outputs=5, pooling="mean", hidden="tanh", hidden_norm=True, bias=True)},
    "last": {"head": HeadConfig(outputs=1, pooling="last"), "causal": True},
    "first": {"embedding_norm": True, "first_norm": False, "head": HeadConfig(outputs=2, pooling="first")},
}


@functools.cache
def made(kind):
    config = dataclasses.replace(BASE, **KINDS[kind])
    start = jax.jit(lambda key: initialize(Transformer(config), key)[0])
    return config, start(jax.random.key(0))


@sweep("kind", ["post", *(kind for kind in KINDS if kind != "post")], quick=0, slow=2)
def test_padding_changes_nothing(kind):
    config, params = made(kind)
    batch = ours(config, params)
    for row, length in enumerate(LENGTHS):
        hidden, _ = Transformer(config).apply({"params": params}, jnp.asarray(TOKENS[row : row + 1, :length]))
        alone = logits(config, params, hidden)[0]
        np.testing.assert_allclose(batch[row, : len(alone)], alone, atol=1e-5)


def test_an_encoder_sees_what_comes_after():
    config, params = made("plain")
    changed = np.array(TOKENS)
    changed[0, -1] += 1

    def first(config, tokens):
        return Transformer(config).apply({"params": params}, jnp.asarray(tokens))[0][0, 0]

    assert np.abs(first(config, TOKENS) - first(config, changed)).max() > 1e-4
    causal = dataclasses.replace(config, causal=True)
    np.testing.assert_array_equal(first(causal, TOKENS), first(causal, changed))


def test_types_of_tokens_are_told_apart():
    config, params = made("post")
    apply = functools.partial(Transformer(config).apply, {"params": params}, jnp.asarray(TOKENS))
    plain, zeros = apply()[0], apply(types_BT=jnp.zeros(TOKENS.shape, jnp.int32))[0]
    np.testing.assert_array_equal(plain, zeros)
    assert np.abs(plain - apply(types_BT=jnp.ones(TOKENS.shape, jnp.int32))[0]).max() > 1e-4


@sweep("window", [5, 2, 1, 7], quick=1)
@pytest.mark.parametrize("padded", [False, True])
def test_windows_on_both_sides_in_blocks_are_those_of_a_mask(window, padded):
    rng = np.random.default_rng(0)
    length = 23
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    valid = jnp.arange(length) < np.array([length, 9])[:, None] if padded else None
    got = attention.self_attention(q, k, v, "reference", Scores(window, causal=False), segments_BT=valid)
    near = np.abs(np.arange(length)[:, None] - np.arange(length)) < window
    seen = near[None] if valid is None else near & np.asarray(valid)[:, None]
    want = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])
    rows = np.ones((2, length), bool) if valid is None else np.asarray(valid)
    np.testing.assert_allclose(np.asarray(got)[rows], np.asarray(want)[rows], atol=1e-5)


@sweep(
    ("window", "causal", "padded"),
    [(0, False, True), (40, False, True), (0, True, True), (0, False, False), (40, False, False)],
    quick=0,
)
def test_splash_attention_of_encoders_equals_the_reference(window, causal, padded, monkeypatch):
    interpreted = functools.partial(attention._splash_kernel, interpret=True)
    monkeypatch.setattr(attention, "_splash_kernel", interpreted)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 256, heads, 128)), jnp.float32) for heads in (2, 1, 1))
    valid = jnp.arange(256) < np.array([256, 100])[:, None] if padded else None
    scores = Scores(window, causal=causal)

    def total(implementation, *inputs):
        out = attention.self_attention(*inputs, implementation, scores, segments_BT=valid)
        return jnp.sum(jnp.sin(out if valid is None else out * valid[:, :, None, None]))

    for implementation in ("splash",):
        got = jax.grad(functools.partial(total, implementation), argnums=(0, 1, 2))(q, k, v)
        want = jax.grad(functools.partial(total, "reference"), argnums=(0, 1, 2))(q, k, v)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)


PICTURES = ImageConfig(patch=4, height=8, width=12, channels=2, class_tokens=1)
KINDS |= {
    "pictures": POST
    | {"images": PICTURES, "vocab_size": 0, "norm_placement": "pre", "token_types": 0, "max_length": 7}
    | {"head": HeadConfig(outputs=5, pooling="first", bias=True)},
    "embeddings": {"head": HeadConfig(embed=True, pooling="mean")},
    "tied": POST | {"tie_embeddings": True, "head": HeadConfig(hidden="gelu_exact", hidden_norm=True, bias=True)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_closed_form(kind):
    config = dataclasses.replace(BASE, **KINDS[kind])
    params, axes = abstract(Transformer(config))
    assert sum(a.size for a in jax.tree.leaves(params)) == closed_form.parameter_counts(config).total
    assert axes_of(Transformer(config), params) == axes


def batch_of(config):
    rng = np.random.default_rng(0)
    pictures = (8, config.images.height, config.images.width, config.images.channels)
    inputs = rng.normal(size=pictures) if config.images.patch else rng.integers(0, 96, (8, 12))
    answers = (8, 1) if config.head.pooling != "none" else (8, 12)
    labels = config.head.outputs or 96
    batch = {"inputs": inputs, "targets": rng.integers(0, labels, answers), "mask": rng.random(answers) < 0.8}
    batch = {name: x.astype(np.float32 if name != "targets" else np.int32) for name, x in batch.items()}
    if not config.images.patch:
        batch |= {"inputs": inputs.astype(np.int32), "valid": np.arange(12) < rng.integers(1, 13, (8, 1))}
    return batch


def losses(kind, mesh, accumulation=1):
    config, params = made(kind)
    model = Transformer(config, ExecutionConfig(unroll="never"))
    how = {"learning_rate": 2e-3, "accumulation": accumulation}
    metrics, _ = small.trained(model, params, [batch_of(config)] * 3, mesh, **how)
    return [one["loss"] for one in metrics]


@sweep("kind", ["pictures", "pooled", "tied", "windows", "post", "first"], quick=0, slow=0)
def test_training_on_a_mesh_is_that_on_one_device(kind):
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    want = losses(kind, one)
    assert want[-1] < want[0] - 1e-3
    np.testing.assert_allclose(losses(kind, sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))), want, rtol=1e-5)
    np.testing.assert_allclose(losses(kind, one, accumulation=2), want, rtol=1e-5)


def test_embeddings_have_unit_length():
    config, params = made("embeddings")
    np.testing.assert_allclose(np.linalg.norm(ours(config, params), axis=-1), 1, rtol=1e-5)


def test_a_sequence_without_a_token_has_an_embedding_of_zeros():
    config, params = made("embeddings")
    hidden, _ = Transformer(config).apply({"params": params}, jnp.asarray(TOKENS), valid_BT=jnp.asarray(VALID[:1] < 0))

    def total(hidden):
        return jnp.sum(logits(config, params, hidden))

    assert not np.any(logits(config, params, hidden)) and np.all(np.isfinite(jax.grad(total)(hidden)))


@pytest.mark.long
def test_types_are_those_of_the_text_behind_a_prompt():
    config, params = made("post")
    tuned = prompt_tuning(tokens=3)(params)
    apply = functools.partial(Transformer(config).apply, {"params": tuned}, jnp.asarray(TOKENS))
    kinds = jnp.asarray(TOKENS % 2)
    want = Transformer(config).apply(
        {"params": params},
        jnp.concatenate([jnp.broadcast_to(tuned["prompt"]["table"], (3, 3, 32)), params["embed"]["table"][TOKENS]], 1),
        types_BT=jnp.pad(kinds, ((0, 0), (3, 0))),
    )[0][:, 3:]
    np.testing.assert_allclose(apply(types_BT=kinds)[0], want, atol=1e-5)
    np.testing.assert_array_equal(apply(types_BT=0 * kinds)[0], apply()[0])


def test_there_are_as_many_targets_as_answers():
    config, params = made("pooled")
    hidden = jnp.zeros((8, 1, 32))
    with pytest.raises(ValueError, match=r"answers \(8, 1\) times and the batch has \(8, 12\) targets"):
        cross_entropy(hidden, Output(unembedding(params)), jnp.zeros((8, 12), jnp.int32), jnp.ones((8, 12)))


def test_a_step_of_a_classifier_is_planned():
    experiment = Experiment(
        model=dataclasses.replace(made("pooled")[0], max_length=16), data=DataConfig(sequence_length=16)
    )
    traced = trace_step("train", experiment, 96, sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
    assert traced.arguments[1]["targets"].shape == (experiment.data.batch_size, 1)
    traced.jitted.trace(*traced.arguments)


def test_images_of_another_size_are_refused():
    config, params = made("pictures")
    with pytest.raises(ValueError, match=r"shape \(8, 8, 2\), but model.images says \(8, 12, 2\)"):
        Transformer(config).apply({"params": params}, jnp.zeros((1, 8, 8, 2)))


def test_tokens_behind_the_last_learned_position_reach_nothing_before_it():
    config = dataclasses.replace(BASE, num_layers=2, causal=True, position="learned", max_length=6)
    model = Transformer(config)
    params = jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))
    apply = functools.partial(model.apply, {"params": params})
    got, _ = apply(jnp.asarray(TOKENS), init_cache(config, 3, 12, jnp.float32))
    np.testing.assert_allclose(got[:, :6], apply(jnp.asarray(TOKENS[:, :6]))[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"12 tokens is longer than model.max_length \(6\)"):
        apply(jnp.asarray(TOKENS))


def test_an_encoder_has_no_cache():
    config, params = made("plain")
    with pytest.raises(ValueError, match=r"model.causal is off, and a cache holds"):
        Transformer(config).apply({"params": params}, jnp.asarray(TOKENS), init_cache(config, 3, 12, jnp.float32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first_norm": False}, "needs model.embedding_norm"),
        ({"position_offset": 2}, "for learned positions"),
        ({"token_types": -1}, "cannot be negative"),
        ({"tie_embeddings": True, "head": HeadConfig(outputs=2)}, "turn it off"),
        ({"images": ImageConfig(patch=4, height=8, width=8)}, "set model.vocab_size to 0"),
        (
            {"images": ImageConfig(patch=4), "vocab_size": 0, "head": HeadConfig(embed=True), "max_length": 9},
            "makes 3136 tokens, more than model.max_length",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(BASE, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"outputs": -1}, "cannot be negative"),
        ({"hidden_norm": True}, "without a further layer"),
        ({"pooling": "mean"}, "set model.head.outputs"),
        ({"embed": True, "outputs": 2}, "model.head.embed is on"),
    ],
)
def test_heads_that_make_no_sense_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        HeadConfig(**change)


def test_images_are_whole_patches():
    with pytest.raises(ValueError, match="8 x 9 pixels, which patches of 4 do not fill"):
        ImageConfig(patch=4, height=8, width=9)


def test_encoders_are_not_trained_on_the_next_token(tmp_path):
    session = Session(Experiment(model=dataclasses.replace(BASE, vocab_size=512)))
    with pytest.raises(ValueError, match="set model.causal"):
        session.train(tmp_path)
    assert not any(tmp_path.iterdir())
