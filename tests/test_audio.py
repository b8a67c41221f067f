"""Audio models against transformers: small random models that it saves give the same outputs here, and ours there.

Run with `pytest -m oracles`, with torch and transformers installed. Without them, what they promise by themselves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import QUICK

from jaxcost.cost import closed_form
from jaxcost.cost.hlo import compiled_cost
from jaxcost.cost.transformed import training_step_flops
from jaxcost.models import huggingface
from jaxcost.models.config import AudioConfig, HeadConfig, ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.huggingface import fields
from jaxcost.models.transformer import Transformer, abstract, axes_of, initialize, logits
from jaxcost.training.config import OptimizerConfig
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import chain, factorize, lora, rule

oracles = pytest.mark.oracles

WHISPER = {"d_model": 48, "encoder_layers": 3, "encoder_attention_heads": 6, "encoder_ffn_dim": 80, "num_mel_bins": 10}
WHISPER |= {"max_source_positions": 13, "classifier_proj_size": 20, "num_labels": 5, "init_std": 0.3, "vocab_size": 60}
WHISPER |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
MODELS = {
    "whisper": ("WhisperForAudioClassification", WHISPER),
    "whisper, odd": (
        "WhisperForAudioClassification",
        WHISPER
        | {"d_model": 42, "encoder_attention_heads": 3, "num_mel_bins": 1 + 6, "max_source_positions": 7}
        | {"activation_function": "relu", "classifier_proj_size": 42},
    ),
}


@functools.cache
def hugging_model(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(len(name))
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind.partition('For')[0].removesuffix('Model')}Config")(**sizes)
    model = getattr(transformers, kind)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path.lower() or path.endswith("bias") or "position" in path:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    return model


def sounds(config, seed=0, rows=2, frames=None):
    """Random audio of a model, as numpy."""
    frames = frames or config.max_length
    channels = config.audio.channels
    shape = (rows, config.audio.length(frames) + 1, *([channels] if channels > 1 else []))
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def theirs(model, audio, mask=None):
    import torch

    audio = torch.as_tensor(np.moveaxis(audio, -1, 1) if audio.ndim == 3 else audio)
    with torch.no_grad():
        made = model(audio, attention_mask=torch.as_tensor(mask)) if mask is not None else model(audio)
    return (made.logits if hasattr(made, "logits") else made.last_hidden_state).numpy()


def ours(config, params, audio, valid=None):
    hidden, _ = Transformer(config).apply({"params": params}, jnp.asarray(audio), valid_BT=valid)
    return np.asarray(logits(config, params, hidden))


@oracles
@pytest.mark.parametrize("name", MODELS)
def test_audio_gives_what_it_gives_in_transformers(name, tmp_path):
    import torch

    model = hugging_model(name)
    model.save_pretrained(tmp_path / "in")
    config, params = huggingface.load(tmp_path / "in")
    audio = sounds(config)
    want = theirs(model, audio)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(ours(config, params, audio).reshape(want.shape), want, atol=2e-4)

    huggingface.save(tmp_path / "out", config, params, model_type=model.config.model_type)
    again, problems = type(model).from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(problems.values()), problems
    np.testing.assert_allclose(theirs(again.eval(), audio), want, atol=2e-4)
    back, same = huggingface.load(tmp_path / "out")
    assert fields._effective(back) == fields._effective(config)
    jax.tree.map(np.testing.assert_array_equal, same, params)


# ---- Without transformers ----

BASE = ModelConfig(
    vocab_size=0,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_width=48,
    norm="layer",
    causal=False,
    position="none",
    head=HeadConfig(outputs=11, bias=True),
)
MELS = AudioConfig(6, (24, 32), (3, 3), (1, 2), padded=True)
WAVES = AudioConfig(
    1, (12, 16), (10, 3), (5, 2), bias=False, norm="each", projection="normed", position_kernel=6, position_groups=4
)
KINDS = {
    "spectrogram": {"audio": MELS, "position": "learned", "max_length": 13, "key_bias": False, "qkv_bias": True},
    "waveform": {"audio": WAVES},
    "waveform, group": {
        "audio": dataclasses.replace(WAVES, norm="first", bias=True, projection="linear", position_kernel=5),
        "head": HeadConfig(outputs=3, pooling="mean", hidden="linear", hidden_width=20, bias=True),
        "norm_placement": "sum",
        "embedding_norm": True,
    },
}


@functools.cache
def made(kind):
    config = dataclasses.replace(BASE, **KINDS[kind])
    start = jax.jit(lambda key: initialize(Transformer(config), key)[0], compiler_options=QUICK)
    return config, start(jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_closed_form(kind):
    config = dataclasses.replace(BASE, **KINDS[kind])
    params, axes = abstract(Transformer(config))
    assert sum(a.size for a in jax.tree.leaves(params)) == closed_form.parameter_counts(config).total
    assert axes_of(Transformer(config), params) == axes


FRAMES = (rule("audio/(convolution|projection).*kernel"),)
TRANSFORMS = {
    "plain": chain(),
    "lora": lora(),
    "lora of all": lora(rank=2, rules=FRAMES),
    "low rank": factorize(rules=FRAMES),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_training_step_costs_what_the_closed_form_says(name, kind):
    config = dataclasses.replace(BASE, **KINDS[kind])
    model, frames = Transformer(config, ExecutionConfig(unroll="never")), 13
    optimizer = make_optimizer(OptimizerConfig(), 10)
    params = TRANSFORMS[name].abstract(abstract(model)[0])
    state = jax.eval_shape(lambda params: init_state(params, optimizer, 0), params)
    channels = (config.audio.channels,) if config.audio.channels > 1 else ()
    answers = (4, 1 if config.head.pooling != "none" else frames)
    batch = {"inputs": jax.ShapeDtypeStruct((4, config.audio.length(frames), *channels), jnp.float32)}
    batch |= {"targets": jax.ShapeDtypeStruct(answers, jnp.int32), "mask": jax.ShapeDtypeStruct(answers, jnp.float32)}
    step = jax.jit(make_train_step(model, optimizer, TRANSFORMS[name]), compiler_options=QUICK)
    compiled = compiled_cost(step.lower(state, batch).compile()).flops
    assert training_step_flops(config, params, 4, frames, "full") == pytest.approx(compiled, rel=1e-3)
    if name == "plain" and config.head.pooling == "none":
        closed = 4 * frames * closed_form.training_flops_per_token(config, frames, "full")
        assert closed == pytest.approx(compiled, rel=1e-3)
