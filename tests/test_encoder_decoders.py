"""Encoder-decoders against transformers: small random models that it saves give the same logits, tokens and beams here.

Run with `pytest -m oracles`, with torch and transformers installed. Without them, what an encoder-decoder promises by
itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost.models import huggingface
from jaxcost.models.huggingface import fields
from jaxcost.models.transformer import Transformer, logits, start_cache
from jaxcost.serving.beam import BeamEngine
from jaxcost.serving.engine import Engine

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
    "mt5": ("MT5", {"untied": True, "num_decoder_layers": 1}),
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
