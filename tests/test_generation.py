"""How tokens are chosen and when sequences end; speculative decoding is exact. Parity needs torch (`oracles`)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from small import CONFIG, MODEL, dense_params
from sweep import sweep

from jaxcost.models.config import HeadConfig, ModelConfig
from jaxcost.models.transformer import Transformer, initialize, logits
from jaxcost.serving.engine import Engine
from jaxcost.serving.sampling import Sampling, choose, probabilities, processed, rows_of
from jaxcost.serving.speculative import SpeculativeEngine
from jaxcost.serving.stopping import Stop

PROMPTS = [np.array([3, 9, 4]), np.array([8]), np.array([2, 2, 6, 1])]


@functools.cache
def engine():
    return Engine(MODEL)


def random_logits(rows, vocab_size=32, seed=0):
    return 3 * np.random.default_rng(seed).normal(size=(rows, vocab_size)).astype(np.float32)


def test_what_nobody_asks_for_is_not_there():
    assert not jax.tree.leaves(rows_of([Sampling()] * 3, PROMPTS, 32))
    rows = rows_of([Sampling(), Sampling(temperature=1.0), Sampling(temperature=2.0, top_k=3)], PROMPTS, 32)
    assert rows.top_p_B is None and rows.penalty_B is None and rows.top_k_B.tolist() == [0, 0, 3]


def test_each_row_has_its_own_settings():
    x = random_logits(3)
    each = [Sampling(), Sampling(temperature=1.0, top_k=2), Sampling(temperature=0.5, min_p=1.0)]
    got = np.asarray(processed(rows_of(each, PROMPTS, 32), x))
    np.testing.assert_array_equal(got[0], x[0])
    assert np.sum(np.isfinite(got[1])) == 2 and np.sum(np.isfinite(got[2])) == 1
    shares = np.asarray(probabilities(rows_of(each, PROMPTS, 32), x))
    assert shares[0].max() == shares[2].max() == 1 and np.count_nonzero(shares[1]) == 2
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-6)


def test_draws_have_the_probabilities_of_the_softmax():
    many = [Sampling(temperature=0.7, top_k=5, seed=seed) for seed in range(4000)]
    x = np.repeat(random_logits(1, 8), 4000, axis=0)
    rows = rows_of(many, [np.zeros(0, int)] * 4000, 8)
    tokens, after = choose(rows, x)
    counts = np.bincount(tokens, minlength=8)
    want = np.asarray(probabilities(rows, x))[0]
    kept = want > 0
    assert kept.sum() == 5 and not counts[~kept].any()
    want = want.astype(np.float64) / want.sum(dtype=np.float64)
    assert scipy.stats.chisquare(counts[kept], 4000 * want[kept]).pvalue > 1e-3
    # The next draw of a row is another one.
    assert np.mean(np.asarray(choose(after, x)[0]) == tokens) < 0.9


def test_a_row_draws_the_same_whatever_stands_beside_it():
    each = [Sampling(temperature=1.0, seed=seed, repetition_penalty=1.1) for seed in range(3)]
    options = {"max_new_tokens": 8, "tokens_per_dispatch": 4}
    together = engine().generate(dense_params(), PROMPTS, sampling=each, **options)
    # In another place, beside other prompts, settings and seeds.
    neighbours = [np.array([1, 2, 3, 4]), PROMPTS[0], np.array([5, 5])]
    others = [Sampling(temperature=2.0, seed=7), each[0], Sampling(repetition_penalty=2.0)]
    again = engine().generate(dense_params(), neighbours, sampling=others, **options)
    np.testing.assert_array_equal(again[1], together[0])
    assert len({tuple(row) for row in (*together, *again)}) == 5


def test_sequences_end_at_ids_and_strings():
    decode = lambda ids: "".join(chr(97 + i) for i in ids)  # noqa: E731
    tokens = np.array([0, 1, 2, 3, 1, 2])
    stop = Stop([3, 9], ["bc"], decode)
    assert stop.length(tokens) == 3 and stop.length(tokens[:2]) is None
    assert stop.cut(decode(tokens)) == "a" and stop.cut("xyz") == "xyz"
    assert Stop([2]).length(tokens) == 2 and Stop().length(tokens) is None
    assert Stop([1], ["bc"], decode).length(tokens) == 1
    plain = engine().generate(dense_params(), PROMPTS, max_new_tokens=9)
    text = decode(plain[0])
    stop = Stop(strings=[text[4:6]], decode=decode)
    got = engine().generate(dense_params(), PROMPTS, max_new_tokens=9, stop=stop, tokens_per_dispatch=3)
    assert decode(got[0]) == text[: text.index(text[4:6]) + 2]
    with pytest.raises(ValueError, match="Stop strings need the tokenizer's decode"):
        Stop(strings=["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": 1e300}, "repetition_penalty is 1e"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e300}, "temperature is 1e"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**change)


def test_extreme_settings_leave_the_likeliest_or_all():
    x = random_logits(2)
    rows = rows_of([Sampling(temperature=1.0, top_p=1e-46), Sampling(temperature=1.0, top_k=10**12)], PROMPTS[:2], 32)
    shares = np.asarray(probabilities(rows, x))
    assert shares[0, np.argmax(x[0])] == 1 and np.count_nonzero(shares[1]) == 32


@pytest.mark.parametrize(
    "change", [{"causal": False}, {"head": HeadConfig(outputs=2)}, {"head": HeadConfig(outputs=2, pooling="last")}]
)
def test_what_is_no_language_model_generates_nothing(change):
    with pytest.raises(ValueError, match="Generation takes a causal model with logits of the vocabulary"):
        Engine(Transformer(dataclasses.replace(CONFIG, **change)))


def test_dispatches_are_of_tokens():
    with pytest.raises(ValueError, match="tokens_per_dispatch is 0"):
        engine().generate(dense_params(), PROMPTS, max_new_tokens=1, tokens_per_dispatch=0)


def test_there_are_as_many_settings_as_prompts():
    with pytest.raises(ValueError, match="There are 3 prompts and 1 settings"):
        engine().generate(dense_params(), PROMPTS, max_new_tokens=1, sampling=[Sampling()])


# ---- Speculative ----

TINY = ModelConfig(
    vocab_size=6, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8, max_length=32
)


@functools.cache
def tiny(seed, width=8, sharpness=3.0):
    model = Transformer(dataclasses.replace(TINY, width=width))
    params = jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(seed))
    return model, {**params, "unembed": {"kernel": sharpness * params["unembed"]["kernel"]}}


@sweep("proposals", [3, 1, 6], quick=1)
def test_greedy_tokens_are_those_of_the_model_whatever_the_draft(proposals):
    (model, params), (draft, draft_params) = tiny(0), tiny(1, width=4)
    prompts = [prompt % 6 for prompt in PROMPTS]
    want = Engine(model).generate(params, prompts, max_new_tokens=17)
    both = SpeculativeEngine(model, draft, proposals)
    got, kept = both.generate(params, draft_params, prompts, max_new_tokens=17)
    np.testing.assert_array_equal(got, want)
    assert 0 < kept < 1
    stop = Stop([int(want[1][3])])
    got, _ = both.generate(params, draft_params, prompts, max_new_tokens=17, stop=stop)
    for row, full in zip(got, want, strict=True):
        np.testing.assert_array_equal(row, full[: stop.length(full)])


@pytest.mark.slow
def test_a_model_keeps_all_that_it_proposes_to_itself():
    model, params = tiny(0)
    prompts = [prompt % 6 for prompt in PROMPTS]
    got, kept = SpeculativeEngine(model, model).generate(params, params, prompts, max_new_tokens=17)
    np.testing.assert_array_equal(got, Engine(model).generate(params, prompts, max_new_tokens=17))
    assert kept == 1


SETTINGS = {
    "all": Sampling(temperature=0.9, top_k=5, repetition_penalty=1.4),
    "plain": Sampling(temperature=1.0),
    "top-p": Sampling(temperature=1.3, top_p=0.8),
    "min-p": Sampling(temperature=1.0, min_p=0.2, repetition_penalty=0.8),
}
ROWS = 3000


def exact(model, params, sampling, prompt):
    """The probability of every continuation by three tokens, (V, V, V), from one full pass."""
    size = model.config.vocab_size
    rows = np.array([[*prompt, first, second] for first in range(size) for second in range(size)])
    hidden, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(rows))
    found = np.asarray(logits(model.config, params, hidden))[:, len(prompt) - 1 :]

    def following(step):
        each = rows_of([sampling] * len(rows), [row[: len(prompt) + step] for row in rows], size)
        return np.asarray(probabilities(each, found[:, step]), np.float64).reshape(size, size, size)

    return following(0)[0, 0][:, None, None] * following(1)[:, 0][:, :, None] * following(2)


def p_value(got, shares):
    counts = np.zeros(shares.shape)
    np.add.at(counts, tuple(np.array(got).T), 1)
    if counts[shares == 0].any():
        return 0.0
    # Rare continuations are counted together, as the test asks for several of each.
    common = shares * len(got) >= 5
    observed, expected = counts[common].tolist(), (shares[common] * len(got)).tolist()
    observed, expected = [*observed, counts[~common].sum()], [*expected, len(got) - sum(expected)]
    keep = np.array(expected) > 1e-6
    return scipy.stats.chisquare(np.array(observed)[keep], np.array(expected)[keep], sum_check=False).pvalue


@sweep("name", SETTINGS, quick=0)
def test_what_is_drawn_has_exactly_the_models_distribution(name):
    (draft, draft_params), (model, params) = tiny(1, sharpness=1.2), tiny(0, sharpness=1.2)
    draft_params = jax.tree.map(lambda own, other: 0.85 * own + 0.15 * other, params, draft_params)
    prompt, sampling = np.array([3, 1]), SETTINGS[name]
    shares = exact(model, params, sampling, prompt)
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-5)
    each = [dataclasses.replace(sampling, seed=seed) for seed in range(ROWS)]
    options = {"max_new_tokens": 3, "sampling": each}
    got, kept = SpeculativeEngine(model, draft, 2).generate(params, draft_params, [prompt] * ROWS, **options)
    assert 0.2 < kept < 0.6
    assert p_value(got, shares) > 1e-3
    # The draft alone would be found out, and so would the wrong settings.
    assert p_value(Engine(draft).generate(draft_params, [prompt] * ROWS, **options), shares) < 1e-6
    other = exact(model, params, dataclasses.replace(sampling, temperature=sampling.temperature + 0.3), prompt)
    assert p_value(got, other) < 1e-6


@pytest.mark.slow
def test_a_row_draws_the_same_in_any_speculative_batch():
    (model, params), (draft, draft_params) = tiny(0), tiny(1, width=4)
    both = SpeculativeEngine(model, draft, 3)
    prompts = [prompt % 6 for prompt in PROMPTS]
    each = [Sampling(temperature=1.0, seed=seed) for seed in range(3)]
    together, _ = both.generate(params, draft_params, prompts, max_new_tokens=9, sampling=each)
    turned, _ = both.generate(params, draft_params, prompts[::-1], max_new_tokens=9, sampling=each[::-1])
    for row, same in zip(together, turned[::-1], strict=True):
        np.testing.assert_array_equal(row, same)


@pytest.mark.slow
def test_proposals_behind_the_last_learned_position_reach_nothing_before_it():
    model = Transformer(dataclasses.replace(TINY, position="learned", max_length=12))
    params = jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))
    params["unembed"]["kernel"] *= 3
    prompts = [np.array([3, 5, 4, 1])]
    want = Engine(model).generate(params, prompts, max_new_tokens=8)
    got, _ = SpeculativeEngine(model, model, 5).generate(params, params, prompts, max_new_tokens=8)
    np.testing.assert_array_equal(got, want)


def test_drafts_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="The draft has a vocabulary of 32, the model one of 6"):
        SpeculativeEngine(Transformer(TINY), Transformer(CONFIG))


# ---- Against transformers ----


@pytest.mark.oracles
@pytest.mark.parametrize("seed", range(4))
def test_processors_are_those_of_transformers(seed):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    x, rng = random_logits(5, 300, seed), np.random.default_rng(seed)
    prompts = rng.integers(0, 300, (5, 40))
    settings = {
        "repetition_penalty": (1.7, theirs.RepetitionPenaltyLogitsProcessor),
        "temperature": (0.6, theirs.TemperatureLogitsWarper),
        "top_k": (50, theirs.TopKLogitsWarper),
        "top_p": (0.9, theirs.TopPLogitsWarper),
        "min_p": (0.02, theirs.MinPLogitsWarper),
    }
    chain = theirs.LogitsProcessorList()
    options = {"temperature": 1.0}
    for name, (value, kind) in settings.items():
        chain.append(kind(value))
        # Each by itself, and all so far together.
        for ours, processor in (({"temperature": 1.0, name: value}, kind(value)), (options | {name: value}, chain)):
            got = processed(rows_of([Sampling(**ours)] * 5, list(prompts), 300), x)
            want = processor(torch.as_tensor(prompts), torch.as_tensor(x)).numpy()
            np.testing.assert_allclose(got, want, rtol=1e-5)
            assert not np.array_equal(got, x)
        options[name] = value
    # Without drawing, the penalty alone is left.
    greedy = processed(rows_of([Sampling(repetition_penalty=1.7, top_k=3)] * 5, list(prompts), 300), x)
    np.testing.assert_allclose(
        greedy, settings["repetition_penalty"][1](1.7)(torch.as_tensor(prompts), torch.as_tensor(x)).numpy(), rtol=1e-6
    )
