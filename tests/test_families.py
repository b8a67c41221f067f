"""Every family against transformers: a small random model that it saves gives the same logits and tokens here.

Run with `pytest -m oracles`, with torch and transformers installed.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FIELDS, tensors_of, write

from jaxcost.models import families, huggingface
from jaxcost.models.huggingface import fields
from jaxcost.models.huggingface.safetensors import read_header
from jaxcost.models.transformer import Transformer, init_cache, logits
from jaxcost.serving.engine import Engine

oracles = pytest.mark.oracles

PROMPT = np.random.default_rng(0).integers(0, 96, (2, 12))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {"n_positions": 128, "n_embd": 48, "n_layer": 3, "n_head": 6}
MODELS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 40}),
    "llama 2": ("Llama", {"num_key_value_heads": 6}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 10}),
    "llama, tied, with biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama, odd": ("Llama", {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 97}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 5}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2.5": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2.5, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "qwen3-moe, normalised": (
        "Qwen3Moe",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "gemma, odd": ("Gemma", {"head_dim": 10, "num_attention_heads": 5, "num_key_value_heads": 1, "vocab_size": 97}),
    "gemma 2": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 3.0},
    ),
    "gemma 3": (
        "Gemma3Text",
        {
            "head_dim": 8,
            "num_hidden_layers": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 12,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
    "phi-3": ("Phi3", {"sliding_window": 6}),
    "phi-4 mini": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}},
    ),
    "olmo-2": ("Olmo2", {}),
}


@functools.cache
def hugging_model(name):
    """A random model of transformers whose norms and biases are off 1 and 0, where a wrong one would not be seen."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(len(name))
    kind, changes = MODELS[name]
    sizes = {k: SIZES[k] for k in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
    config = getattr(transformers, f"{kind}Config")(**((sizes if kind == "GPT2" else SIZES) | changes))
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind.removesuffix('Text')}ForCausalLM"
    # Scores in one pass and in plain form, so that caps and windows are those of the formulas.
    model = getattr(transformers, head)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path or "ln_" in path or path.endswith("bias"):
                # Beside Gemma's scaled, tied embeddings a layer of plain norms adds nothing that changes a token.
                spread = 4.0 if "post_" in path and kind in ("Gemma2", "Gemma3Text") else 0.4
                parameter.add_(torch.empty_like(parameter).uniform_(-spread, spread))
    return model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    @functools.cache
    def load(name):
        folder = tmp_path_factory.mktemp("checkpoint")
        hugging_model(name).save_pretrained(folder)
        return huggingface.load(folder)

    return load


def their_logits(name, tokens):
    import torch

    with torch.no_grad():
        return hugging_model(name)(torch.as_tensor(tokens)).logits.numpy()


def their_tokens(name, steps):
    """Greedy, by hand, so that no generation default takes part."""
    tokens = PROMPT
    for _ in range(steps):
        tokens = np.concatenate([tokens, np.argmax(their_logits(name, tokens)[:, -1:], axis=-1)], axis=1)
    return tokens[:, PROMPT.shape[1] :]


@oracles
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, loaded):
    config, params = loaded(name)
    want = their_logits(name, PROMPT)
    assert np.std(want) > 0.1
    hidden, _ = Transformer(config).apply({"params": params}, jnp.asarray(PROMPT))
    np.testing.assert_allclose(logits(config, params, hidden), want, atol=2e-4)
    # Both texts in one row, each of which sees itself alone.
    row = np.concatenate([PROMPT[0, :7], PROMPT[1]])[None]
    segments = jnp.asarray(np.repeat([1, 2], [7, PROMPT.shape[1]])[None])
    hidden, _ = Transformer(config).apply({"params": params}, jnp.asarray(row), segments_BT=segments)
    packed = np.concatenate([want[0, :7], want[1]])[None]
    np.testing.assert_allclose(logits(config, params, hidden), packed, atol=2e-4)
    # Rows of different lengths in one cache, with what stands beyond a prompt masked.
    lengths = np.array([12, 7])
    padded = np.where(np.arange(12) < lengths[:, None], PROMPT, 0)
    got, _ = Engine(Transformer(config)).prefill(params, padded, lengths, init_cache(config, 2, 14, jnp.float32))
    np.testing.assert_allclose(got, want[[0, 1], lengths - 1], atol=2e-4)


@oracles
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name, loaded):
    config, params = loaded(name)
    got = Engine(Transformer(config)).generate(params, list(PROMPT), max_new_tokens=64)
    tokens = their_tokens(name, 64)
    np.testing.assert_array_equal(got, tokens)
    assert len(np.unique(tokens)) > 2


@oracles
def test_shards_and_their_index_are_read(tmp_path, loaded):
    hugging_model("mixtral").save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config, params = huggingface.load(tmp_path)
    want_config, want = loaded("mixtral")
    assert config == want_config
    jax.tree.map(np.testing.assert_array_equal, params, want)


@oracles
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_loaded_by_transformers_with_the_same_logits(name, loaded, tmp_path):
    import torch
    import transformers

    config, params = loaded(name)
    want = hugging_model(name)
    model_type = want.config.model_type
    huggingface.save(tmp_path / "out", config, params, model_type=model_type, shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    kind = transformers.AutoModelForCausalLM
    again, problems = kind.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert type(again) is type(want) and not any(problems.values()), problems
    with torch.no_grad():
        got = again.eval()(torch.as_tensor(PROMPT)).logits.numpy()
    np.testing.assert_allclose(got, their_logits(name, PROMPT), atol=2e-4)
    # And the config reads back as the one that it was written from.
    back, same = huggingface.load(tmp_path / "out")
    assert fields._effective(back) == fields._effective(config)
    jax.tree.map(np.testing.assert_array_equal, same, params)


# ---- Without transformers ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_read_into_stacked_parameters(tmp_path, dtype):
    tensors = tensors_of(FIELDS)
    write(tmp_path, FIELDS, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)})
    config, params = huggingface.load(tmp_path, dtype)
    assert (config.num_layers, config.num_kv_heads, config.head_dim, config.tie_embeddings) == (2, 2, 2, False)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    down = tensors["model.layers.1.mlp.down_proj.weight"].astype(dtype)
    np.testing.assert_array_equal(params["layers"]["mlp"]["down"]["kernel"][1], down.T)
    np.testing.assert_array_equal(params["embed"]["table"], tensors["model.embed_tokens.weight"].astype(dtype))


def test_fused_matrices_are_cut_into_ours(tmp_path):
    fields = FIELDS | {"model_type": "phi3", "num_key_value_heads": 1}
    tensors = tensors_of(fields)
    write(tmp_path, fields, tensors)
    _, params = huggingface.load(tmp_path)
    fused = tensors["model.layers.0.self_attn.qkv_proj.weight"]
    assert fused.shape == (4 + 2 + 2, 4)
    attention = params["layers"]["attention"]
    for name, part in (("query", fused[:4]), ("key", fused[4:6]), ("value", fused[6:])):
        np.testing.assert_array_equal(attention[name]["kernel"][0], part.T)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NAME: None}, rf"lacks {NAME}, which a model of this config.json has"),
        ({NAME: np.zeros((4, 6), np.float32)}, rf"model.safetensors: {NAME} has the shape \(4, 6\).*says \(6, 4\)"),
        ({"strange": np.zeros(1, np.float32)}, "model.safetensors has strange, which a model of this config.json"),
    ],
)
def test_tensors_that_are_missing_extra_or_misshaped_are_named(tmp_path, change, message):
    tensors = {name: value for name, value in (tensors_of(FIELDS) | change).items() if value is not None}
    write(tmp_path, FIELDS, tensors)
    with pytest.raises(huggingface.BadCheckpoint, match=message):
        huggingface.load(tmp_path)


def test_files_that_are_cut_off_or_something_else_are_refused(tmp_path):
    tensors = tensors_of(FIELDS)
    write(tmp_path, FIELDS, tensors, cut=4)
    with pytest.raises(huggingface.BadCheckpoint, match=r"model.safetensors is cut off: lm_head|cut off: model\."):
        huggingface.load(tmp_path)
    write(tmp_path, FIELDS, tensors, dtype="F16")
    with pytest.raises(huggingface.BadCheckpoint, match="the bytes of .* are not those of its shape"):
        huggingface.load(tmp_path)
    write(tmp_path, FIELDS, tensors, dtype="F8")
    with pytest.raises(huggingface.BadCheckpoint, match="has the dtype F8"):
        huggingface.load(tmp_path)
    for content, message in ((b"abc", "its header does not end"), (b"\x02" + bytes(7) + b"{]", "is not JSON")):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(huggingface.BadCheckpoint, match=message):
            huggingface.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(huggingface.BadCheckpoint, match="its pickle files are not read"):
        huggingface.load(tmp_path)
    for change in ({"rope_scaling": "linear"}, {"rope_scaling": {"rope_type": "llama3"}}):
        (tmp_path / "config.json").write_text(json.dumps(FIELDS | change))
        with pytest.raises(huggingface.BadCheckpoint, match="lacks a field or holds one of the wrong kind"):
            huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(huggingface.BadCheckpoint, match="is JSON, but not an object"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not one of gpt2, llama"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_act": "tanh"}, "'tanh' is not one of silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not one of default, linear, llama3"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 2}, "type chunked_attention are not among"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "Some layers have experts and others have not"),
    ],
)
def test_models_that_are_not_ours_are_refused(change, message):
    with pytest.raises(families.UnsupportedModel, match=message):
        families.config_of(FIELDS | change)


BERT = FIELDS | {"model_type": "bert", "architectures": ["BertForTokenClassification"]}
PICTURES = BERT | {"model_type": "vit", "architectures": ["ViTForImageClassification"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (BERT | {"hidden_size": "4"}, "hidden_size is '4'; it must be a whole number"),
        (BERT | {"hidden_size": 4.0}, "hidden_size is 4.0"),
        (BERT | {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (BERT | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (BERT | {"layer_norm_eps": None}, "model.norm_epsilon is None; it must be a finite number"),
        (BERT | {"type_vocab_size": True}, "model.token_types is True; it must be a whole number"),
        (BERT | {"tie_word_embeddings": "false"}, "model.tie_embeddings is 'false'; it must be true or false"),
        (BERT | {"hidden_act": ["gelu"]}, r"The activation \['gelu'\] is not one of"),
        (BERT | {"id2label": "abc"}, "id2label is 'abc'; it must be an object"),
        (BERT | {"num_labels": 0}, "num_labels is 0"),
        (BERT | {"architectures": "BertModel"}, "architectures is 'BertModel'; it must list"),
        (BERT | {"architectures": [None]}, "architectures is .None.; it must list"),
        (BERT | {"architectures": ["RobertaForMaskedLM"]}, "The class 'RobertaForMaskedLM' is not one of Bert and"),
        (BERT | {"model_type": ["bert"]}, "is not one of gpt2"),
        (BERT | {"model_type": "roberta", "pad_token_id": None}, "pad_token_id is None"),
        (PICTURES | {"image_size": [8]}, r"image_size is \[8\]"),
        (PICTURES | {"patch_size": 0}, "patch_size is 0"),
        (FIELDS | {"rope_theta": "1e4"}, "model.rope_theta is '1e4'"),
        (FIELDS | {"rope_theta": -1.0}, "model.rope_theta is -1.0; it must be above 0"),
        (FIELDS | {"rms_norm_eps": float("nan")}, "model.norm_epsilon is nan"),
        (FIELDS | {"model_type": "gemma2", "query_pre_attn_scalar": -4}, "query_pre_attn_scalar is -4"),
        (FIELDS | {"model_type": "gemma2", "sliding_window_pattern": -1}, "sliding_window_pattern is -1"),
        (FIELDS | {"model_type": "gemma2", "layer_types": ["full_attention"]}, "one for each of 2 layers"),
        (FIELDS | {"model_type": "gemma2", "layer_types": "full_attention"}, "one for each of 2 layers"),
    ],
)
def test_fields_of_the_wrong_kind_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        families.config_of(fields)


def test_configs_of_releases_before_transformers_5_are_read():
    old = FIELDS | {"rope_theta": 500_000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }}  # fmt: skip
    found = families.config_of(old)
    assert (found.rope_theta, found.rope_scaling.kind, found.rope_scaling.factor) == (500_000.0, "llama3", 8.0)
    gemma = FIELDS | {
        "model_type": "gemma3_text", "num_hidden_layers": 26, "sliding_window": 512, "sliding_window_pattern": 6,
        "rope_theta": 1e6, "rope_local_base_freq": 10_000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "query_pre_attn_scalar": 256, "head_dim": 4,
    }  # fmt: skip
    found = families.config_of(gemma)
    assert found.pattern == ("local",) * 5 + ("global",) and found.window == 512
    assert (found.rope_theta, found.local_rope_theta, found.rope_scaling.factor) == (1e6, 10_000.0, 8.0)
    assert (found.attention_scale, found.attention_soft_cap, found.tie_embeddings) == (1 / 16, 0.0, True)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, r"dtype \['F32'\], which is not one of"),
        ({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, "are not those of its shape"),
    ],
)
def test_odd_entries_of_a_header_are_named(entry, message, tmp_path):
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "x")
