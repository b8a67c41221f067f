"""Encoder-decoders against transformers: small random models that it saves give the same logits, tokens and beams here.

Run with `pytest -m oracles`, with torch and transformers installed. Without them, what an encoder-decoder promises by
itself.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import tensors_of, write
from sweep import sweep

from jaxcost.models import families, huggingface
from jaxcost.models.config import AudioConfig, EncoderConfig, ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.huggingface import fields, safetensors
from jaxcost.models.positions import relative_buckets
from jaxcost.models.stacks import resized
from jaxcost.models.transformer import Transformer, init_cache, initialize, logits, start_cache
from jaxcost.serving.beam import BeamEngine
from jaxcost.serving.engine import Engine
from jaxcost.training.distill import DistillConfig, check_pair
from jaxcost.transforms import freeze, prefix_tuning, prompt_tuning, shrink

oracles = pytest.mark.oracles

rng = np.random.default_rng(0)
SOURCES, TARGETS = rng.integers(2, 96, (3, 40)), rng.integers(2, 96, (3, 30))
LENGTHS = np.array([40, 17, 1])
VALID = np.arange(40) < LENGTHS[:, None]
SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
CASES = {
    "t5": ("T5", {}),
    "t5, odd": ("T5", {"d_model": 42, "d_kv": 7, "num_heads": 3, "vocab_size": 97, "num_decoder_layers": 2}),
    "t5, gated": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5, untied": ("T5", {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False, "untied": True}),
    "mt5, odd": ("MT5", {"untied": True, "num_decoder_layers": 1, "vocab_size": 97, "num_heads": 3}),
}


@functools.cache
def hugging_model(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(len(name))
    kind, changes = CASES[name]
    options = SIZES | changes
    untied = options.pop("untied", False)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        if untied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model) * 0.1)
        model.shared.weight.mul_(0.3 if kind == "MT5" else 1.0)
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
            if "relative" in path:
                parameter.normal_()
    return model.eval()


def theirs(model):
    import torch

    with torch.no_grad():
        tokens, valid, targets = map(torch.as_tensor, (SOURCES, VALID.astype(int), TARGETS))
        return model(input_ids=tokens, attention_mask=valid, decoder_input_ids=targets).logits.numpy()


def ours(config, params, **options):
    hidden, _ = Transformer(config, **options).apply(
        {"params": params}, jnp.asarray(TARGETS), source_BS=jnp.asarray(SOURCES), source_valid_BS=jnp.asarray(VALID)
    )
    return logits(config, params, hidden)


@oracles
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_and_ours_are_theirs(name, tmp_path):
    import torch
    import transformers

    model = hugging_model(name)
    model.save_pretrained(tmp_path / "in")
    config, params = huggingface.load(tmp_path / "in")
    want = theirs(model)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(ours(config, params), want, atol=2e-4)

    cache = start_cache(Transformer(config), params, 3, 30, jnp.asarray(SOURCES), jnp.asarray(VALID))
    first, cache = Transformer(config).apply({"params": params}, jnp.asarray(TARGETS[:, :7]), cache)
    rest, _ = Transformer(config).apply({"params": params}, jnp.asarray(TARGETS[:, 7:]), cache)
    np.testing.assert_allclose(logits(config, params, jnp.concatenate([first, rest], 1)), want, atol=2e-4)

    huggingface.save(tmp_path / "out", config, params, model_type=model.config.model_type)
    again, problems = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert type(again) is type(model) and not any(problems.values()), problems
    np.testing.assert_allclose(theirs(again.eval()), want, atol=1e-5)
    back, same = huggingface.load(tmp_path / "out")
    assert fields._effective(back) == fields._effective(config)
    jax.tree.map(np.testing.assert_array_equal, same, params)


@oracles
def test_hidden_states_are_those_of_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.T5Model._from_config(transformers.T5Config(**SIZES), attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "in")
    config, params = huggingface.load(tmp_path / "in")

    def theirs(model):
        tokens, valid, targets = map(torch.as_tensor, (SOURCES, VALID.astype(int), TARGETS))
        with torch.no_grad():
            found = model(input_ids=tokens, attention_mask=valid, decoder_input_ids=targets)
        return found.last_hidden_state.numpy()

    np.testing.assert_allclose(ours(config, params), theirs(model), atol=2e-4)
    huggingface.save(tmp_path / "out", config, params, model_type="t5")
    again = transformers.T5Model.from_pretrained(tmp_path / "out", attn_implementation="eager", dtype=torch.float32)
    np.testing.assert_allclose(theirs(again.eval()), theirs(model), atol=1e-5)


@oracles
@pytest.mark.parametrize("kind", ["EncoderModel", "ForTokenClassification", "ForSequenceClassification"])
@pytest.mark.parametrize("family", ["T5", "MT5"])
def test_what_else_t5_gives_is_what_it_gives_in_transformers(family, kind, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = SIZES | {"num_labels": 5, "num_decoder_layers": 2, "eos_token_id": 1, "pad_token_id": 0}
    given, whole = getattr(transformers, f"{family}Config")(**sizes), getattr(transformers, f"{family}{kind}")
    model = whole._from_config(given, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    model.save_pretrained(tmp_path / "in")
    config, params = huggingface.load(tmp_path / "in")
    # Every text ends with the token that says so, and is followed by padding.
    texts = np.where(VALID, np.where(np.arange(40) == LENGTHS[:, None] - 1, 1, SOURCES), 0)

    def theirs(model):
        with torch.no_grad():
            found = model(torch.as_tensor(texts), attention_mask=torch.as_tensor(VALID.astype(int)))
        return (found.last_hidden_state if kind == "EncoderModel" else found.logits).numpy()

    def our():
        inputs, beside = texts, {}
        if config.encoder.num_layers:
            inputs = np.pad(texts, ((0, 0), (1, 0)))[:, :-1]
            beside = {"source_BS": jnp.asarray(texts), "source_valid_BS": jnp.asarray(VALID)}
        apply = jax.jit(functools.partial(Transformer(config).apply, {"params": params}))
        hidden, _ = apply(jnp.asarray(inputs), valid_BT=jnp.asarray(VALID), **beside)
        return np.asarray(logits(config, params, hidden))

    want, shown = theirs(model), VALID if kind != "ForSequenceClassification" else np.ones(3, bool)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(our().reshape(want.shape)[shown], want[shown], atol=2e-4)

    huggingface.save(tmp_path / "out", config, params, model_type=given.model_type, extra={"eos_token_id": 1})
    again, problems = whole.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert type(again) is type(model) and not any(problems.values()), problems
    np.testing.assert_allclose(theirs(again.eval())[shown], want[shown], atol=1e-5)
    back, same = huggingface.load(tmp_path / "out")
    assert fields._effective(back) == fields._effective(config)
    jax.tree.map(np.testing.assert_array_equal, same, params)


WHISPER = {
    "vocab_size": 90,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 6,
    "max_source_positions": 24,
    "max_target_positions": 72,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 3,
    "init_std": 0.2,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
SOUNDS = rng.normal(size=(3, 48, 6)).astype(np.float32)
WHISPERS = {
    "plain": {},
    "odd": {"d_model": 42, "encoder_attention_heads": 3, "decoder_attention_heads": 3, "activation_function": "relu"}
    | {"vocab_size": 97},
    # It does not scale, whatever it says.
    "untied": {"tie_word_embeddings": False, "scale_embedding": True},
}


@oracles
@pytest.mark.parametrize("head", ["ForConditionalGeneration", "Model"])
@pytest.mark.parametrize("name", WHISPERS)
def test_whisper_hears_and_says_what_it_does_in_transformers(name, head, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(len(name))
    kind = getattr(transformers, f"Whisper{head}")
    made = transformers.WhisperConfig(**WHISPER | WHISPERS[name])
    model = kind._from_config(made, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "in")
    config, params = huggingface.load(tmp_path / "in")
    sounds, targets = torch.as_tensor(SOUNDS), torch.as_tensor(TARGETS % 90)

    def theirs(model):
        with torch.no_grad():
            found = model(input_features=sounds.transpose(1, 2), decoder_input_ids=targets)
        return (found.logits if head != "Model" else found.last_hidden_state).numpy()

    want, ours = theirs(model), Transformer(config)
    hidden, _ = ours.apply({"params": params}, jnp.asarray(TARGETS % 90), source_BS=jnp.asarray(SOUNDS))
    got = logits(config, params, hidden) if head != "Model" else hidden
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, atol=2e-4)
    huggingface.save(tmp_path / "out", config, params, model_type="whisper")
    again, problems = kind.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(problems.values()), problems
    np.testing.assert_allclose(theirs(again.eval()), want, atol=1e-5)
    if head == "Model":
        return
    prompts = [np.array([2])] * 3
    with torch.no_grad():
        found = model.model.encoder(sounds.transpose(1, 2))
        tokens = torch.full((3, 1), 2)
        for _ in range(64):
            step = model(encoder_outputs=found, decoder_input_ids=tokens).logits[:, -1]
            tokens = torch.cat([tokens, step.argmax(-1, keepdim=True)], dim=1)
    said = Engine(ours).generate(params, prompts, max_new_tokens=64, sources=list(SOUNDS))
    np.testing.assert_array_equal(said, tokens[:, 1:].numpy())


@oracles
@pytest.mark.parametrize("name", ["t5", "t5, untied"])
def test_generation_gives_the_tokens_of_transformers(name, tmp_path):
    import torch

    model = hugging_model(name)
    model.save_pretrained(tmp_path)
    config, params = huggingface.load(tmp_path)
    prompts, sources = [np.array([0])] * 3, [row[:n] for row, n in zip(SOURCES, LENGTHS, strict=True)]

    def generated(**options):
        inputs = {"input_ids": torch.as_tensor(SOURCES), "attention_mask": torch.as_tensor(VALID.astype(int))}
        with torch.no_grad():
            return model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)

    want = generated(max_new_tokens=64, do_sample=False, num_beams=1, eos_token_id=None).sequences[:, 1:].numpy()
    got = Engine(Transformer(config)).generate(params, prompts, max_new_tokens=64, sources=sources)
    np.testing.assert_array_equal(got, want)

    # Ids that occur, so that hypotheses end at different lengths.
    ends = sorted({int(row[i]) for row, i in zip(want, (3, 9, 5), strict=True)})
    for beams, penalty in ((2, 1.0), (4, 0.0), (4, 2.0), (5, 1.0)):
        options = {"num_beams": beams, "length_penalty": penalty, "eos_token_id": ends, "pad_token_id": 0}
        found = generated(max_new_tokens=24, do_sample=False, **options)
        engine = BeamEngine(Transformer(config), beams, penalty)
        tokens, scores = engine.generate(params, prompts, max_new_tokens=24, end_ids=ends, sources=sources)
        for row, their in zip(tokens, found.sequences[:, 1:].numpy(), strict=True):
            np.testing.assert_array_equal(row, their[: len(row)])
            assert len(row) == len(their) or their[len(row)] in ends
        np.testing.assert_allclose(scores, found.sequences_scores.numpy(), rtol=1e-4)


# ---- By itself ----

SMALL = ModelConfig(
    vocab_size=96,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_length=64,
    position="relative",
    relative_buckets=8,
    relative_distance=16,
    encoder=EncoderConfig(num_layers=2, num_heads=2, mlp_width=40),
)


@functools.cache
def made(config=SMALL):
    return jax.jit(lambda key: initialize(Transformer(config), key)[0])(jax.random.key(0))


def in_pieces(config, params, **options):
    """The logits of two calls with a cache."""
    model = Transformer(config, **options)
    cache = start_cache(model, params, 3, 30, jnp.asarray(SOURCES), jnp.asarray(VALID))
    first, cache = model.apply({"params": params}, jnp.asarray(TARGETS[:, :5]), cache)
    rest, _ = model.apply({"params": params}, jnp.asarray(TARGETS[:, 5:]), cache)
    return logits(config, params, jnp.concatenate([first, rest], 1))


@sweep("position", ["relative", "rope", "learned"], quick=0)
def test_a_cache_gives_what_the_whole_sequence_gives(position):
    config = dataclasses.replace(SMALL, position=position)
    params = made(config)
    np.testing.assert_allclose(in_pieces(config, params), ours(config, params), atol=1e-5)
    approximate = in_pieces(config, params, execution=ExecutionConfig(cache="int8"))
    assert 0 < np.max(np.abs(approximate - ours(config, params))) < 0.1


@sweep("transform", [prompt_tuning(tokens=3), prefix_tuning(tokens=3), freeze(top_layers=1)], quick=0)
def test_a_cache_holds_what_transforms_put_before_the_text_and_under_it(transform):
    params = transform(made(), jax.random.key(1))
    np.testing.assert_allclose(in_pieces(SMALL, params), ours(SMALL, params), atol=1e-5)


@pytest.mark.slow
def test_padding_of_a_source_is_seen_by_nobody():
    params, valid = made(), jnp.asarray(VALID)

    def outputs(sources):
        return Transformer(SMALL).apply(
            {"params": params}, jnp.asarray(TARGETS), source_BS=sources, source_valid_BS=valid
        )[0]

    other = jnp.where(valid, jnp.asarray(SOURCES), 95 - jnp.asarray(SOURCES))
    np.testing.assert_array_equal(outputs(jnp.asarray(SOURCES)), outputs(other))


@pytest.mark.slow
def test_bfloat16_and_rematerialisation_change_nothing_but_rounding():
    params = made()
    want = ours(SMALL, params)
    half = ours(SMALL, params, execution=ExecutionConfig(compute="bfloat16"))
    np.testing.assert_allclose(half, want, atol=0.1)
    np.testing.assert_array_equal(ours(SMALL, params, execution=ExecutionConfig(remat="full", unroll="always")), want)


@sweep("channels", [1, 6], quick=1)
def test_sounds_of_the_wrong_shape_are_refused_and_waveforms_are_no_ids(channels):
    config = dataclasses.replace(SMALL, audio=AudioConfig(channels, (32,), (4,), (2,)))
    sound = np.asarray(SOUNDS[0, :, :channels] if channels > 1 else SOUNDS[0, :, 0])
    generate = functools.partial(Engine(Transformer(config)).generate, made(config), max_new_tokens=2)
    prompt = [np.array([0])]
    (said,) = generate(prompt, sources=[sound])
    assert said.shape == (2,)
    assert generate(prompt, sources=[np.ones(sound.shape, int)])[0].shape == (2,)
    for sources, message in (
        ([sound[:2]], "too short for a frame, which takes 4"),
        ([np.stack([sound] * 8)], "model.audio takes"),
        ([sound[:0]], "A source is empty"),
        ([sound, sound[:9]], "pad or cut them to one"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(prompt * len(sources), sources=sources)


@pytest.mark.long
def test_beams_share_what_their_source_holds():
    config = dataclasses.replace(SMALL, max_length=1024)
    model, params = Transformer(config), made(config)
    engine = BeamEngine(model, 4)
    cache = jax.eval_shape(lambda: start_cache(model, params, 2, 8, jnp.zeros((2, 1000), int)))
    inputs = (params, jax.ShapeDtypeStruct((2, 96), jnp.float32), cache)
    memory = engine.search.lower(*inputs, end_ids=(1,), length=8).compile().memory_analysis()
    held = sum(a.size * a.dtype.itemsize for a in (cache.source.key, cache.source.value))
    assert memory.temp_size_in_bytes < 2 * held

    # Rows that share a source give what they give with one each.
    def outputs(rows):
        cache = start_cache(model, params, rows, 4, jnp.asarray(SOURCES[:rows]), jnp.asarray(VALID[:rows]))
        cache = dataclasses.replace(init_cache(config, 6, 4, jnp.float32), source=cache.source)
        return model.apply({"params": params}, jnp.asarray(TARGETS[[0, 1, 2, 0, 1, 2], :4]), cache)[0]

    twice = [start_cache(model, params, 1, 4, jnp.asarray(SOURCES[[i]]), jnp.asarray(VALID[[i]])) for i in range(2)]
    apart = [
        model.apply({"params": params}, jnp.asarray(TARGETS[[j], :4]), cache)[0] for cache in twice for j in range(3)
    ]
    np.testing.assert_allclose(outputs(2), jnp.concatenate(apart), atol=1e-5)


def test_buckets_are_single_distances_and_then_ranges():
    decoder = dataclasses.replace(SMALL, encoder=EncoderConfig())
    behind = relative_buckets(decoder, -jnp.arange(20))
    np.testing.assert_array_equal(behind, [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7])
    np.testing.assert_array_equal(relative_buckets(decoder, jnp.arange(5)), 0)
    both = relative_buckets(SMALL.source, jnp.array([-9, -2, -1, 0, 1, 2, 9]))
    np.testing.assert_array_equal(both, [3, 2, 1, 0, 5, 6, 7])


@pytest.mark.slow
def test_both_stacks_get_smaller():
    rotary = dataclasses.replace(SMALL, position="rope")
    params = shrink(mlp=0.5, heads=0.5, head_dim=8, layers=1)(made(rotary))
    small = resized(rotary, params)
    assert (small.num_layers, small.num_heads, small.mlp_width) == (1, 2, 24)
    assert (small.source.num_layers, small.source.num_heads, small.source.mlp_width) == (1, 1, 20)
    assert ours(rotary, params).shape == (3, 30, 96)
    assert resized(rotary, made(rotary)) == rotary


def test_what_cannot_be_is_said_in_one_sentence():
    model, params = Transformer(SMALL), made()
    with pytest.raises(ValueError, match="reads a source; give one beside the tokens"):
        model.apply({"params": params}, jnp.asarray(TARGETS))
    with pytest.raises(ValueError, match="holds no source"):
        model.apply({"params": params}, jnp.asarray(TARGETS), init_cache(SMALL, 3, 30, jnp.float32))
    with pytest.raises(ValueError, match="give one to start|give one beside"):
        start_cache(model, params, 3, 30)
    engine, prompt = Engine(model), [np.array([0])]
    for sources, said in (
        (None, "a source for each of the 1 prompts"),
        ([np.zeros(3, int)] * 2, "a source for each of the 1 prompts"),
        ([np.zeros(0, int)], "A source is empty"),
        ([np.array([96])], "A source has ids outside 0 to 95"),
        ([np.zeros(65, int)], "longer than the encoder's max_length"),
        ([np.zeros(3)], "no int array"),
        ([np.array(3)], "no int array"),
        ([np.zeros((3, 31))], "Embeddings are of 31 numbers, and model.width is 32"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.generate(params, prompt, max_new_tokens=2, sources=sources)
    with pytest.raises(ValueError, match=r"the shapes \(3, 32\) and \(4, 32\); pad or cut"):
        engine.generate(params, prompt * 2, max_new_tokens=2, sources=[np.zeros((n, 32)) for n in (3, 4)])
    decoder = dataclasses.replace(SMALL, encoder=EncoderConfig())
    heard = Transformer(dataclasses.replace(SMALL, audio=AudioConfig(6, (32,), (3,), (2,))))
    with pytest.raises(ValueError, match="read sources of different kinds"):
        check_pair(model, heard, DistillConfig(teacher="a", logits=1.0))
    with pytest.raises(ValueError, match="no encoder to read sources"):
        Engine(Transformer(decoder)).generate(made(decoder), prompt, max_new_tokens=2, sources=[np.zeros(3, int)])
    for beams, said in ((0, "ask for at least 1"), (49, "more than half of the vocabulary")):
        with pytest.raises(ValueError, match=said):
            BeamEngine(model, beams).generate(params, prompt, max_new_tokens=2, end_ids=[1], sources=[np.zeros(3, int)])
    with pytest.raises(ValueError, match="length penalty is nan; give a finite number"):
        BeamEngine(model, 4, float("nan"))
    for changes, said in (
        ({"causal": False}, "only a causal decoder has"),
        ({"relative_buckets": 6}, "multiple of 4"),
        ({"relative_distance": 4}, "must be above half"),
        ({"encoder": {"num_layers": 2, "num_heads": 3, "num_kv_heads": 2}}, "must be a multiple of"),
        ({"experts": 4}, "are both on"),
    ):
        encoder = changes.pop("encoder", None)
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(SMALL, **changes, **({"encoder": EncoderConfig(**encoder)} if encoder else {}))


@pytest.mark.slow
def test_one_beam_is_greedy_and_more_find_what_is_as_likely():
    params, prompts = made(), [np.array([0]), np.array([0, 5, 7]), np.array([3])]
    sources = [row[:n] for row, n in zip(SOURCES, LENGTHS, strict=True)]
    options = {"sources": sources, "max_new_tokens": 12}
    greedy = Engine(Transformer(SMALL)).generate(params, prompts, **options)
    one, low = BeamEngine(Transformer(SMALL), 1, 0.0).generate(params, prompts, end_ids=[], **options)
    np.testing.assert_array_equal(one, greedy)
    _, high = BeamEngine(Transformer(SMALL), 6, 0.0).generate(params, prompts, end_ids=[], **options)
    assert np.all(high >= low - 1e-5)


def test_classes_of_an_encoder_alone_and_of_labels_have_tensors_of_their_own(tmp_path):
    names = {}
    for end in ("EncoderModel", "ForTokenClassification", "ForSequenceClassification"):
        given = T5 | {"architectures": [f"T5{end}"], "num_labels": 3}
        tensors = tensors_of(given)
        names[end] = {name.partition(".block")[0] for name in tensors if ".block." in name}
        folder = tmp_path / end
        folder.mkdir()
        write(folder, given, tensors)
        config, params = huggingface.load(folder)
        assert bool(config.encoder.num_layers) == config.causal == (end == "ForSequenceClassification")
        assert config.head.outputs == (0 if end == "EncoderModel" else 3)
        written = fields.fields_of(config, "t5")
        assert written["architectures"] == [f"T5{end}"] and written["is_encoder_decoder"] == config.causal
        huggingface.save(tmp_path / f"{end} out", config, params, model_type="t5")
        jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path / f"{end} out")[1], params)
    assert names["EncoderModel"] == {"encoder"} and names["ForTokenClassification"] == {"transformer.encoder"}
    assert names["ForSequenceClassification"] == {"transformer.encoder", "transformer.decoder"}


def test_only_logits_are_scaled():
    assert families.config_of(T5).scale_outputs
    assert not families.config_of(T5 | {"architectures": ["T5Model"]}).scale_outputs


def test_what_a_family_cannot_hold_is_named_once():
    for config, model_type, said in (
        (
            dataclasses.replace(SMALL, encoder=EncoderConfig()),
            "t5",
            r"t5 does not .* \(The config lacks num_layers",
        ),
        (SMALL, "whisper", "whisper does not have a model with such fields"),
        (replaced(SPEECH, num_heads=2), "whisper", "encoder_attention_heads is 2 and decoder_attention_heads 4"),
        (replaced(T5, mlp_width=40), "t5", "t5 does not have model.encoder.mlp_width = 40"),
        (replaced(T5, max_length=40), "t5", "t5 does not have model.encoder.max_length = 40"),
    ):
        with pytest.raises(families.UnsupportedModel, match=said) as raised:
            fields.fields_of(config, model_type)
        assert len(str(raised.value)) < 250


def replaced(fields, **options):
    """The config of a checkpoint, with other options of its encoder."""
    config = families.config_of(fields)
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **options))


def test_relative_positions_of_the_source_in_the_first_checkpoints_are_left_out(tmp_path):
    config = families.config_of(T5)
    params = made(config)
    huggingface.save(tmp_path / "new", config, params, model_type="t5")
    spare = np.zeros((8, 4), np.float32)
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    stored = safetensors.read_header(tmp_path / "new/model.safetensors")
    tensors = [safetensors.Tensor(path, one.dtype, one.shape, one.read) for path, one in stored.items()]
    tensors.append(safetensors.Tensor(name, spare.dtype, spare.shape, lambda: spare))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_bytes((tmp_path / "new/config.json").read_bytes())
    safetensors.write(tmp_path / "old/model.safetensors", tensors)
    _, same = huggingface.load(tmp_path / "old")
    jax.tree.map(np.testing.assert_array_equal, same, params)
    (tmp_path / "old/config.json").write_text(json.dumps(T5 | {"num_decoder_layers": 10**8}))
    with pytest.raises(ValueError, match="too few for the 100000003 layers"):
        huggingface.load(tmp_path / "old")


T5 = SIZES | {"model_type": "t5"}
SPEECH = WHISPER | {"model_type": "whisper"}


@pytest.mark.parametrize(
    "changes, said",
    [
        (T5 | {"num_decoder_layers": 0}, "num_decoder_layers is 0; it must be a whole number of at least 1"),
        (T5 | {"vocab_size": 10**15}, r"vocab_size is 1000000000000000, more than 2\^31"),
        (T5 | {"feed_forward_proj": "glu-relu"}, "feed_forward_proj is 'glu-relu', but only"),
        (T5 | {"architectures": ["T5ForQuestionAnswering"]}, "'T5ForQuestionAnswering' is not one of T5 and ForCond"),
        (T5 | {"decoder_start_token_id": [0]}, r"model.encoder.start is \[0\]; it must be a whole number"),
        (T5 | {"decoder_start_token_id": 96}, "model.encoder.start is 96; it must be a token"),
        (T5 | {"tie_word_embeddings": None}, "model.tie_embeddings is None; it must be true or false"),
        (SPEECH | {"architectures": ["WhisperForCausalLM"]}, "'WhisperForCausalLM' is not one of"),
        (SPEECH | {"encoder_attention_heads": 2}, "encoder_attention_heads is 2 and decoder_attention_heads 4"),
    ],
)
def test_configs_that_are_none_of_ours_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        families.config_of(changes)
