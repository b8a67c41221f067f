"""Audio models against transformers: small random models that it saves give the same outputs here, and ours there.

Run with `pytest -m oracles`, with torch and transformers installed. Without them, what they promise by themselves.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from checkpoints import tensors_of, write
from sweep import sweep

from jaxcost import sharding, weights
from jaxcost.cost import closed_form
from jaxcost.cost.hlo import compiled_cost
from jaxcost.cost.transformed import training_step_flops
from jaxcost.evaluation.losses import ctc_loss
from jaxcost.models import families, huggingface
from jaxcost.models.audio import valid_frames
from jaxcost.models.config import AudioConfig, EncoderConfig, HeadConfig, ImageConfig, ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.heads import Output
from jaxcost.models.huggingface import fields
from jaxcost.models.transformer import Transformer, abstract, axes_of, initialize, logits, start_cache
from jaxcost.serving.ctc import greedy_decode
from jaxcost.training.config import OptimizerConfig
from jaxcost.training.optimizer import make_optimizer
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import calibrated, chain, factorize, lora, prune, quantize, rule

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
WAV2VEC2 = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 80}
WAV2VEC2 |= {"conv_dim": (16, 16, 20), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2), "num_labels": 5}
WAV2VEC2 |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "vocab_size": 11}
WAV2VEC2 |= {"classifier_proj_size": 20, "initializer_range": 0.2}
STABLE = WAV2VEC2 | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
ODD = {"num_conv_pos_embeddings": 7, "conv_dim": (6, 9), "conv_kernel": (7, 4), "conv_stride": (3, 2)}
ODD |= {"hidden_size": 42, "num_attention_heads": 3, "num_conv_pos_embedding_groups": 3, "hidden_act": "relu"}
MODELS |= {
    "wav2vec2": ("Wav2Vec2ForCTC", WAV2VEC2),
    "wav2vec2, stable": ("Wav2Vec2ForCTC", STABLE),
    "wav2vec2, labels": ("Wav2Vec2ForSequenceClassification", STABLE | {"do_stable_layer_norm": False}),
    "wav2vec2, no head": ("Wav2Vec2Model", WAV2VEC2 | ODD),
    "wav2vec2, odd": ("Wav2Vec2ForSequenceClassification", STABLE | ODD),
    "hubert": ("HubertForCTC", WAV2VEC2 | {"feat_proj_layer_norm": False}),
    "hubert, stable": ("HubertForSequenceClassification", STABLE),
    "hubert, no head": ("HubertModel", STABLE | ODD | {"feat_proj_layer_norm": True}),
}
PADDED = [name for name, (_, sizes) in MODELS.items() if "conv_dim" in sizes]


@functools.cache
def hugging_model(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(len(name))
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind.partition('For')[0].removesuffix('Model')}Config")(**sizes)
    model = getattr(transformers, kind)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path.lower() or path.endswith(("bias", "original0")) or "position" in path:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    return model


def sounds(config, seed=0, rows=2, frames=None):
    """Random audio of a model, as numpy."""
    frames = frames or min(config.max_length, 13)
    channels = config.audio.channels
    shape = (rows, config.audio.length(frames) + 1, *([channels] if channels > 1 else []))
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def theirs(model, audio, mask=None):
    import torch

    audio = torch.as_tensor(np.moveaxis(audio, -1, 1) if audio.ndim == 3 else audio)
    with torch.no_grad():
        made = model(audio, attention_mask=torch.as_tensor(mask)) if mask is not None else model(audio)
    return (made.logits if hasattr(made, "logits") else made.last_hidden_state).numpy()


@functools.cache
def forward(config):
    def outputs(params, audio, valid):
        hidden, _ = Transformer(config).apply({"params": params}, audio, valid_BT=valid)
        return logits(config, params, hidden)

    return jax.jit(outputs)


def ours(config, params, audio, valid=None):
    return np.asarray(forward(config)(params, jnp.asarray(audio), valid))


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


@oracles
@pytest.mark.parametrize("name", PADDED)
def test_padded_audio_gives_what_it_gives_in_transformers(name, tmp_path):
    model = hugging_model(name)
    model.save_pretrained(tmp_path / "in")
    config, params = huggingface.load(tmp_path / "in")
    audio = sounds(config, rows=4, frames=17)
    longest = audio.shape[1]
    lengths = np.array([longest, longest - 1, longest // 2, config.audio.length(1)])
    heard = np.arange(longest) < lengths[:, None]
    valid = valid_frames(config.audio, lengths, longest)
    np.testing.assert_array_equal(valid.sum(1), model._get_feat_extract_output_lengths(lengths_tensor(lengths)))
    want, got = (
        theirs(model, audio * heard, heard.astype(np.int64)),
        ours(config, params, audio * heard, valid),
    )
    if config.head.pooling == "none":
        want, got = want[np.asarray(valid)], got[np.asarray(valid)]
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=2e-4)


def lengths_tensor(lengths):
    import torch

    return torch.as_tensor(lengths)


@oracles
@pytest.mark.parametrize("blank", [0, 3])
def test_the_loss_of_ctc_is_that_of_torch(blank):
    import torch

    logits_BTV, labels, mask, valid, output = alignment(blank)

    def total(logits_BTV):
        return ctc_loss(logits_BTV, output, labels, mask, valid, blank=blank)[0]

    value, gradient = jax.value_and_grad(total)(jnp.asarray(logits_BTV))
    theirs = torch.tensor(logits_BTV, requires_grad=True)
    loss = torch.nn.functional.ctc_loss(
        torch.log_softmax(theirs, -1).transpose(0, 1),
        torch.as_tensor(labels),
        torch.as_tensor(valid.sum(1)),
        torch.as_tensor(mask.sum(1).astype(int)),
        blank=blank,
        reduction="sum",
        zero_infinity=True,
    )
    loss.backward()
    np.testing.assert_allclose(value, loss.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-4)


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
    start = jax.jit(lambda key: initialize(Transformer(config), key)[0])
    return config, start(jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_closed_form(kind):
    config = dataclasses.replace(BASE, **KINDS[kind])
    params, axes = abstract(Transformer(config))
    assert sum(a.size for a in jax.tree.leaves(params)) == closed_form.parameter_counts(config).total
    assert axes_of(Transformer(config), params) == axes


def test_sizes_are_the_published_ones():
    base = {"model_type": "wav2vec2", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    large = base | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    large |= {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
    # Less the vector that stands for masked frames in training, of 94,396,320 and 315,471,520.
    for sizes, published in ((base | {"intermediate_size": 3072}, 94_395_552), (large, 315_470_496)):
        config = families.config_of(sizes | {"vocab_size": 32})
        assert closed_form.parameter_counts(config).total == published
        assert config.audio.frames(30 * 16_000) == 1499 and config.audio.length(1) == 400
    # A third of what wav2vec 2.0 computes of half a minute is its convolutions.
    config = families.config_of(base | {"intermediate_size": 3072, "vocab_size": 32})
    blocks = 1499 * 2 * (closed_form.parameter_counts(config).matmul + 2 * 12 * 1499 * 768)
    share = 1 - blocks / (1499 * closed_form.forward_flops_per_token(config, 1499, "full"))
    assert share == pytest.approx(0.325, abs=1e-3)


FRAMES = (rule("audio/(convolution|projection).*kernel"),)
TRANSFORMS = {
    "plain": chain(),
    "lora": lora(),
    "lora of all": lora(rank=2, rules=FRAMES),
    "low rank": factorize(rules=FRAMES),
}


@sweep(
    ("name", "kind"),
    [("plain", kind) for kind in KINDS] + [(name, kind) for name in TRANSFORMS for kind in KINDS if name != "plain"],
    quick=1,
)
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
    step = jax.jit(make_train_step(model, optimizer, TRANSFORMS[name]))
    compiled = compiled_cost(step.lower(state, batch).compile()).flops
    assert training_step_flops(config, params, 4, frames, "full") == pytest.approx(compiled, rel=1e-3)
    if name == "plain" and config.head.pooling == "none":
        closed = 4 * frames * closed_form.training_flops_per_token(config, frames, "full")
        assert closed == pytest.approx(compiled, rel=1e-3)


def test_padding_changes_nothing():
    config, params = made("waveform")
    audio = sounds(config, frames=9)
    lengths = np.array([audio.shape[1], config.audio.length(4)])
    valid = valid_frames(config.audio, lengths, audio.shape[1])
    batch = ours(config, params, audio, valid)
    assert valid.sum(1).tolist() == [config.audio.frames(audio.shape[1]), 4]
    for row, length in enumerate(lengths):
        alone = ours(config, params, audio[row : row + 1, :length])[0]
        np.testing.assert_allclose(batch[row, : len(alone)], alone, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_hears_for_a_decoder():
    speech = {"vocab_size": 20, "causal": True, "head": HeadConfig(), "encoder": EncoderConfig(3, max_length=13)}
    config = dataclasses.replace(BASE, **KINDS["spectrogram"] | speech | {"max_length": 8})
    model = Transformer(config)
    params = jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))
    assert "embed" in params and "audio" in params["encoder"] and "audio" not in params
    audio, tokens = jnp.asarray(sounds(config, frames=13)), jnp.arange(16).reshape(2, 8)
    apply = jax.jit(functools.partial(model.apply, {"params": params}))
    want, _ = apply(tokens, source_BS=audio)
    assert np.abs(want - apply(tokens, source_BS=audio[::-1])[0]).max() > 1e-3
    cache = start_cache(model, params, 2, 8, audio)
    for piece in (tokens[:, :5], tokens[:, 5:]):
        got, cache = apply(piece, cache)
    np.testing.assert_allclose(got, want[:, 5:], atol=1e-5)


FRONTEND = (rule("audio/.*kernel"),)
KERNELS = {
    "masked": prune(sparsity=0.5, rules=FRONTEND),
    "low rank": factorize(parameters=0.6, rules=FRONTEND),
    "lora": lora(rank=2, rules=FRONTEND),
    "dora": lora(rank=2, dora=True, rules=FRONTEND),
    "int8": quantize(rules=FRONTEND),
    "int8 and lora": chain(quantize(rules=FRONTEND), lora(rank=2, rules=FRONTEND)),
    "wanda": prune(sparsity=0.5, method="wanda", rules=FRAMES),
    "gptq": quantize(bits=4, method="gptq", rules=FRAMES),
}


@sweep("name", KERNELS, quick=1)
def test_kernels_of_any_kind_compute_what_they_mean(name):
    config, params = made("waveform")
    audio = sounds(config)
    start = calibrated(
        KERNELS[name],
        params,
        jax.random.key(0),
        lambda p, x: Transformer(config).apply({"params": p}, x)[0],
        lambda: [audio],
    )
    # Adapters start at zero.
    trained, rest = weights.partition(start)
    changed = weights.combine(start, {path: a + 0.1 for path, a in trained.items()}, rest)
    assert type(changed["audio"]["convolution_0"]["kernel"]) is not type(params["audio"]["convolution_0"]["kernel"])
    got = ours(config, changed, audio)
    np.testing.assert_allclose(got, ours(config, weights.merge(changed), audio), atol=2e-4)
    assert np.abs(got - ours(config, params, audio)).max() > 1e-3


@pytest.mark.long
def test_a_model_of_ctc_trains_on_a_mesh_as_on_one_device():
    config, params = made("waveform")
    config = dataclasses.replace(config, head=HeadConfig(outputs=12, bias=True))
    params = jax.jit(lambda key: initialize(Transformer(config), key)[0])(jax.random.key(1))
    audio, rng = sounds(config, rows=8), np.random.default_rng(0)
    lengths = rng.integers(config.audio.length(8), audio.shape[1] + 1, 8)
    batch = {
        "inputs": audio,
        "targets": rng.integers(1, 12, (8, 4)).astype(np.int32),
        "mask": (np.arange(4) < rng.integers(1, 5, (8, 1))).astype(np.float32),
        "valid": np.asarray(valid_frames(config.audio, lengths, audio.shape[1])),
    }

    def losses(mesh_config, devices, **options):
        mesh = sharding.make_mesh(mesh_config, devices)
        model = Transformer(config, ExecutionConfig(unroll="never"))
        options |= {"learning_rate": 2e-3, "ctc_blank": 0}
        return [one["loss"] for one in small.trained(model, params, [batch] * 3, mesh, **options)[0]]

    want = losses(sharding.MeshConfig(), jax.devices()[:1])
    assert want[-1] < want[0] - 1e-3
    np.testing.assert_allclose(losses(sharding.MeshConfig(fsdp=4, tensor=2), jax.devices()), want, rtol=1e-5)
    np.testing.assert_allclose(losses(sharding.MeshConfig(), jax.devices()[:1], accumulation=2), want, rtol=1e-5)


# ---- CTC ----


def alignment(blank, frames=9, rows=6, outputs=5):
    """Logits, labels with some that repeat, their mask, frames that are valid, and an output that changes nothing. The
    last row has more labels than frames."""
    rng = np.random.default_rng(0)
    logits_BTV = rng.normal(size=(rows, frames, outputs)).astype(np.float32) * 3
    labels = (blank + rng.integers(1, outputs, (rows, 4))).astype(np.int32) % outputs
    labels[0] = labels[0, 0]
    mask = (np.arange(4) < np.array([4, 3, 1, 0, 2, 4])[:, None]).astype(np.float32)
    valid = np.arange(frames) < np.array([frames, 5, 1, 4, 7, 3])[:, None]
    return logits_BTV, labels, mask, valid, Output(jnp.eye(outputs))


def collapsed(path, blank):
    return [label for label, _ in itertools.groupby(path) if label != blank]


@sweep("blank", [0, 2], quick=1)
def test_the_loss_of_ctc_sums_over_all_paths(blank):
    logits_BTV, labels, mask, valid, output = alignment(blank, frames=6, outputs=3)
    total, count = ctc_loss(jnp.asarray(logits_BTV), output, labels, mask, valid, blank=blank)
    assert count == mask.sum() == 14
    want = 0.0
    for row, logits_TV in enumerate(np.asarray(jax.nn.log_softmax(logits_BTV), np.float64)):
        frames, target = valid[row].sum(), labels[row][mask[row] > 0].tolist()
        paths = [path for path in itertools.product(range(3), repeat=frames) if collapsed(path, blank) == target]
        chances = [sum(logits_TV[t, label] for t, label in enumerate(path)) for path in paths]
        # Labels that do not fit cost nothing.
        want += -np.logaddexp.reduce(chances) if paths else 0.0
    np.testing.assert_allclose(total, want, rtol=1e-5)
    gradient = jax.grad(lambda x: ctc_loss(x, output, labels, mask, valid, blank=blank)[0])(jnp.asarray(logits_BTV))
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[~valid]) and not np.any(gradient[-1])


@pytest.mark.parametrize("blank", [0, 3])
def test_greedy_decoding_collapses_repeats_and_drops_blanks(blank):
    paths = np.random.default_rng(1).integers(0, 4, (40, 12))
    valid = np.arange(12) < np.random.default_rng(2).integers(0, 13, (40, 1))
    labels, lengths = greedy_decode(jax.nn.one_hot(paths, 4), jnp.asarray(valid), blank=blank)
    for row, path in enumerate(paths):
        want = collapsed(path[valid[row]], blank)
        assert lengths[row] == len(want) and labels[row].tolist() == want + [blank] * (12 - len(want))
    whole, _ = greedy_decode(jax.nn.one_hot(paths, 4), blank=blank)
    assert whole[0].tolist()[: len(collapsed(paths[0], blank))] == collapsed(paths[0], blank)


def test_what_ctc_cannot_be_is_refused():
    logits_BTV, labels, mask, _, output = alignment(0)
    with pytest.raises(ValueError, match="The blank is 5, which is none of the model's 5 outputs"):
        ctc_loss(jnp.asarray(logits_BTV), output, labels, mask, blank=5)
    with pytest.raises(ValueError, match="5 rows of labels for 6 rows of frames"):
        ctc_loss(jnp.asarray(logits_BTV), output, labels[:5], mask[:5])
    with pytest.raises(ValueError, match="an answer for each frame"):
        make_train_step(Transformer(made("waveform, group")[0]), None, chain(), ctc_blank=0)


# ---- What is not ours ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"widths": (24, 30)}, "widths ends with 30, which is not model.width"),
        ({"widths": (24, 32, 32)}, "3 widths, 2 kernels and 2 strides"),
        ({"kernels": (3, 4)}, "padded is on, which needs odd kernels"),
        ({"strides": (1, 0)}, "whole numbers of at least 1"),
        ({"channels": 0}, "channels is 0 and there are 2 convolutions"),
        ({"position_kernel": 3, "position_groups": 5}, "does not divide model.width"),
        ({"position_groups": 0}, "no position_groups"),
    ],
)
def test_convolutions_that_make_no_sense_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(BASE, audio=dataclasses.replace(MELS, **change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 9}, "model.audio is on, which leaves no vocabulary"),
        ({"head": HeadConfig()}, "model.audio is on, which leaves no vocabulary"),
        ({"images": ImageConfig(patch=4, height=8, width=8)}, "both on"),
    ],
)
def test_models_that_contradict_their_audio_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(BASE, audio=MELS, **change)


def test_audio_of_another_shape_is_refused():
    config, params = made("spectrogram")
    for shape, said in [((1, 9, 5), r"takes \(batch, frames, 6\)"), ((1, 60, 6), "30 tokens is longer than")]:
        with pytest.raises(ValueError, match=said):
            ours(config, params, np.zeros(shape, np.float32))
    config, params = made("waveform")
    with pytest.raises(ValueError, match="length 19 is too short for a frame, which takes 20"):
        ours(config, params, np.zeros((1, 19), np.float32))
    with pytest.raises(ValueError, match=r"takes \(batch, samples\)"):
        ours(config, params, np.zeros((1, 40, 2), np.float32))


SMALL = {"model_type": "wav2vec2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "vocab_size": 7}
SMALL |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "architectures": ["Wav2Vec2ForCTC"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"add_adapter": True, "num_adapter_layers": 3}, "add_adapter is on"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim is set"),
        ({"model_type": "hubert", "conv_pos_batch_norm": True, "architectures": None}, "conv_pos_batch_norm is on"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm is 'batch'"),
        ({"feat_extract_activation": "tanh"}, "activation 'tanh' is not one of"),
        ({"conv_dim": 8}, "conv_dim is 8; it must list"),
        ({"conv_kernel": [10, 0]}, "conv_kernel is 0; it must be a whole number"),
        ({"conv_stride": [5]}, "2 widths, 2 kernels and 1 strides"),
        ({"conv_bias": "yes"}, "model.audio.bias is 'yes'; it must be true or false"),
        ({"num_conv_pos_embedding_groups": 3}, "does not divide model.width"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"architectures": ["Wav2Vec2ForXVector"]}, "'Wav2Vec2ForXVector' is not one of"),
        (
            {"architectures": ["Wav2Vec2ForSequenceClassification"], "use_weighted_layer_sum": True},
            "use_weighted_layer_sum is on",
        ),
        ({"model_type": "whisper", "architectures": None}, "lacks d_model"),
    ],
)
def test_options_that_are_not_ours_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        families.config_of(SMALL | change)


def test_older_names_and_what_the_first_training_left_are_read(tmp_path):
    tensors = tensors_of(SMALL)
    weight = "wav2vec2.encoder.pos_conv_embed.conv"
    older = dict(tensors)
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        older[f"{weight}.{old}"] = older.pop(f"{weight}.parametrizations.weight.{new}")
    older["wav2vec2.masked_spec_embed"] = np.zeros(16, np.float32)
    for name, held in (("new", tensors), ("old", older)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, SMALL, held)
    jax.tree.map(np.testing.assert_array_equal, *(huggingface.load(tmp_path / name)[1] for name in ("old", "new")))
    first = SMALL | {"architectures": ["Wav2Vec2ForPreTraining"]}
    (tmp_path / "first").mkdir()
    write(tmp_path / "first", first, tensors_of(first) | {"quantizer.codevectors": np.zeros((1, 4, 4), np.float32)})
    config, _ = huggingface.load(tmp_path / "first")
    assert config.head.embed
    assert fields.fields_of(config, "wav2vec2")["architectures"] == ["Wav2Vec2Model"]


def test_codes_and_adapters_of_convolutions_have_no_place_elsewhere(tmp_path):
    config = families.config_of(SMALL)
    params = jax.jit(lambda key: initialize(Transformer(config), key)[0])(jax.random.key(0))
    with pytest.raises(families.UnsupportedModel, match=r"conv.* is no linear layer of torch"):
        huggingface.save(tmp_path / "out", config, quantize(rules=FRONTEND)(params), layout="compressed-tensors")
    adapted = lora(rank=2, rules=FRONTEND)(params, jax.random.key(0))
    with pytest.raises(families.UnsupportedModel, match="no module for the adapter of audio/"):
        huggingface.save_adapter(tmp_path / "out", config, adapted, "wav2vec2")
