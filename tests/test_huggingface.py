"""Checkpoints in and out without transformers: sharded, streamed, of weights of any kind, whole or not at all."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FIELDS, tensors_of, write
from small import CONFIG, GPT2, dense_params
from sweep import sweep

from jaxcost import sharding, weights
from jaxcost.models import families, huggingface
from jaxcost.models.config import RopeScaling
from jaxcost.models.huggingface import fields, safetensors
from jaxcost.models.transformer import Transformer, abstract, initialize
from jaxcost.transforms import chain, factorize, freeze, lora, prompt_tuning, prune, quantize, shrink

# ---- In ----


@sweep("model_type", ["mixtral", "phi3", "llama"], quick=1)
def test_each_device_gets_its_part(tmp_path, model_type):
    changes = {"model_type": model_type, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4}
    made = FIELDS | changes | {"num_local_experts": 4, "num_experts_per_tok": 2}
    write(tmp_path, made, tensors_of(made))
    _, want = huggingface.load(tmp_path)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2, expert=2))
    config, got = huggingface.load(tmp_path, mesh=mesh)
    homes = sharding.shardings(got, abstract(Transformer(config))[1], mesh)
    assert jax.tree.all(jax.tree.map(lambda a, home: a.sharding.is_equivalent_to(home, a.ndim), got, homes))
    assert got["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data.size * 8 <= want["layers"]["mlp"]["up"][
        "kernel"
    ].size * (1 if model_type == "mixtral" else 2)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_checkpoint_of_a_model_without_its_head_is_read(tmp_path):
    made = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 4, "n_layer": 2, "n_head": 2, "n_positions": 8}
    tensors = tensors_of(made)
    write(tmp_path, made, tensors)
    _, want = huggingface.load(tmp_path)
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    write(tmp_path, made, bare | {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)})
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path)[1], want)


def test_quantised_checkpoints_and_integers_are_refused(tmp_path):
    tensors = tensors_of(FIELDS)
    write(tmp_path, FIELDS | {"quantization_config": {"quant_method": "gptq"}}, tensors)
    with pytest.raises(families.UnsupportedModel, match=r"config.json says that the weights are quantised \(gptq\)"):
        huggingface.load(tmp_path)
    write(tmp_path, FIELDS, {name: value.astype(np.int32) for name, value in tensors.items()}, dtype="I32")
    with pytest.raises(huggingface.BadCheckpoint, match=r"model.safetensors: \S+ holds int32 numbers"):
        huggingface.load(tmp_path)


# ---- Out ----

CONFIGS = {
    "llama": CONFIG,
    "llama, scaled": dataclasses.replace(CONFIG, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16)),
    "mistral": dataclasses.replace(CONFIG, pattern=("local",), window=4),
    "mixtral": dataclasses.replace(CONFIG, experts=4, capacity_factor=1.5),
    "qwen2": dataclasses.replace(CONFIG, qkv_bias=True),
    "qwen2, layers": dataclasses.replace(CONFIG, qkv_bias=True, pattern=("global", "local", "local"), window=4),
    "qwen3": dataclasses.replace(CONFIG, query_key_norm="head"),
    "qwen3_moe": dataclasses.replace(CONFIG, query_key_norm="head", experts=4, normalize_experts=False),
    "gemma": dataclasses.replace(CONFIG, norm_unit_offset=True, scale_embeddings=True, activation="gelu"),
    "gemma2": dataclasses.replace(
        CONFIG,
        norm_unit_offset=True,
        scale_embeddings=True,
        activation="gelu",
        norm_placement="both",
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        pattern=("local", "global"),
        window=4,
    ),
    "gemma3_text": dataclasses.replace(
        CONFIG,
        norm_unit_offset=True,
        scale_embeddings=True,
        activation="gelu",
        norm_placement="both",
        query_key_norm="head",
        local_rope_theta=1000.0,
        pattern=("local", "local", "global"),
        window=4,
        attention_scale=0.3,
    ),
    "phi3": dataclasses.replace(CONFIG, rotary_fraction=0.5),
    "olmo2": dataclasses.replace(CONFIG, norm_placement="post", query_key_norm="projection"),
    "gpt2": GPT2,
}


@sweep("name", CONFIGS, quick=2)
def test_a_model_of_ours_finds_its_family_and_comes_back(name, tmp_path):
    config = CONFIGS[name]
    params = jax.jit(lambda key: initialize(Transformer(config), key)[0])(jax.random.key(0))
    huggingface.save(tmp_path / "out", config, params, extra={"eos_token_id": 3})
    read = json.loads((tmp_path / "out" / "config.json").read_text())
    assert read["model_type"] == name.partition(",")[0]
    assert (read["eos_token_id"], read["bos_token_id"], read["dtype"]) == (3, None, "float32")
    back, got = huggingface.load(tmp_path / "out")
    assert fields._effective(back) == fields._effective(config)
    jax.tree.map(np.testing.assert_array_equal, got, params)


@pytest.mark.parametrize(
    ("change", "model_type", "message"),
    [
        ({"shared_width": 8, "experts": 2}, None, "mixtral comes near, but does not have model.shared_width = 8"),
        ({"norm": "layer"}, None, "does not have model.norm = layer"),
        ({"rope_scaling": RopeScaling("linear", 2.0), "rotary_fraction": 0.5, "qkv_bias": True}, None, "rotary_frac"),
        ({"qkv_bias": True}, "llama", "llama does not have model.qkv_bias = True"),
        ({}, "mixtral", "mixtral does not have"),
        ({}, "mamba", "'mamba' is not one of gpt2, llama"),
    ],
)
def test_options_that_no_family_has_are_named(change, model_type, message):
    with pytest.raises(families.UnsupportedModel, match=message):
        fields.fields_of(dataclasses.replace(CONFIG, **change), model_type)


KINDS = {
    "frozen below": freeze(top_layers=1),
    "masked": prune(sparsity=0.5),
    "low rank": factorize(rank=4),
    "adapter on a mask": chain(prune(sparsity=0.5), lora(rank=2, dora=True)),
    "codes": quantize(bits=4, group=8),
    "smaller": shrink(mlp=12, layers=2),
}


@sweep("name", KINDS, quick=2)
def test_weights_of_any_kind_are_written_as_what_they_mean(name, tmp_path):
    params = KINDS[name](dense_params())
    huggingface.save(tmp_path / "out", CONFIG, params)
    _, got = huggingface.load(tmp_path / "out")
    want = dict(weights.merge(params))
    if "frozen_layers" in want:
        stacks = want.pop("frozen_layers"), want["layers"]
        want["layers"] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_a_parameter_that_has_no_place_is_named(tmp_path):
    with pytest.raises(families.UnsupportedModel, match="prompt/table has no place in a llama checkpoint"):
        huggingface.save(tmp_path / "out", CONFIG, prompt_tuning(tokens=2)(dense_params()))
    assert not list(tmp_path.iterdir())


@sweep("dtype", ["bfloat16", "float16"], quick=1)
def test_files_are_cut_into_shards_and_copied_beside(dtype, tmp_path):
    beside = tmp_path / "tokenizer.json"
    beside.write_text("{}")
    huggingface.save(tmp_path / "out", CONFIG, dense_params(), dtype=dtype, shard_bytes=4000, files=[beside])
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and all(path.name.endswith(f"-of-{len(shards):05d}.safetensors") for path in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: path.name for path in shards for name in safetensors.read_header(path)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(a.size for a in jax.tree.leaves(dense_params())) * 2
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    _, got = huggingface.load(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype)), got, dense_params())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def full(path, tensors, done):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(b"half")

    monkeypatch.setattr("jaxcost.models.huggingface.writing.write", full)
    with pytest.raises(OSError, match="No space left"):
        huggingface.save(tmp_path / "out", CONFIG, dense_params(), shard_bytes=4000)
    assert len(written) == 2 and not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("text")
    with pytest.raises(ValueError, match="out exists already; name a folder that does not"):
        huggingface.save(tmp_path / "out", CONFIG, dense_params())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_kill_leaves_no_folder_that_looks_whole(tmp_path):
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from small import CONFIG, dense_params
        from jaxcost.models import huggingface
        from jaxcost.models.huggingface import writing
        plain = writing.write
        def killed(path, tensors, done):
            plain(path, tensors, done)
            os.kill(os.getpid(), signal.SIGKILL)
        writing.write = killed
        huggingface.save({str(tmp_path / "out")!r}, CONFIG, dense_params())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("config.json"))


# ---- Memory ----

LARGE = {"model_type": "llama", "vocab_size": 32_000, "hidden_size": 2048, "num_hidden_layers": 14}
LARGE |= {"num_attention_heads": 16, "intermediate_size": 8192}
PROGRAMS = 64 * 2**20
"""Allowed for compiled programs, bytes."""


@sweep("devices", [4, 1], quick=0)
def test_a_large_checkpoint_is_read_within_its_bound(devices, tmp_path):
    dtype = np.dtype(jnp.bfloat16)
    block = np.random.default_rng(0).normal(0, 0.02, 4_000_003).astype(dtype)
    places = [(name, value.shape) for name, value in tensors_of(LARGE, make=np.broadcast_to).items()]
    tensors = [safetensors.Tensor(name, dtype, shape, lambda s=shape: np.resize(block, s)) for name, shape in places]
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    safetensors.write(tmp_path / "model.safetensors", tensors)
    total, largest = sum(t.bytes for t in tensors), max(t.bytes for t in tensors)
    assert total / 2 > 1e9
    code = f"""
        import jax
        from jaxcost import sharding
        from jaxcost.models import huggingface
        def memory(what):
            [line] = [line for line in open("/proc/self/status") if line.startswith(what)]
            return int(line.split()[1]) * 1024
        mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=-1), jax.devices())
        jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(3)))
        before = memory("VmRSS")
        _, params = huggingface.load({str(tmp_path)!r}, "bfloat16", mesh, quiet=False)
        print(sum(a.nbytes for a in jax.tree.leaves(params)), memory("VmHWM") - before)
    """
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    held, peak = map(int, done.stdout.split())
    # All shards are of this one host.
    assert held == total and peak < total + 2 * largest + PROGRAMS
