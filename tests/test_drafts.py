"""A draft in the slots: requests get the tokens of the model alone, or its distribution, whatever is proposed."""

import dataclasses
import functools
import threading
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from serving import CONFIG, MODEL, SLOTS, TOKENIZER, alone, check_log_probabilities, params, prompts
from sweep import sweep
from test_generation import SETTINGS, exact, p_value, tiny
from test_scheduler import Asked, compilations, scheduler, tuned

from jaxcost import session
from jaxcost.cost.hardware import HardwareConfig, resolve
from jaxcost.models.config import EncoderConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.transformer import Transformer, axes_of, initialize
from jaxcost.serving.adapters import with_adapters
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.engine import Engine
from jaxcost.serving.prefix import PrefixCache
from jaxcost.serving.sampling import GREEDY, Sampling
from jaxcost.serving.scheduler import Scheduler
from jaxcost.serving.slots import Slots, SlotsConfig
from jaxcost.serving.speculative import Draft, SpeculativeEngine
from jaxcost.serving.worker import SchedulerConfig
from jaxcost.sharding import MeshConfig, make_mesh, shardings
from jaxcost.transforms import prefix_tuning, quantize

PROPOSALS = 3


@functools.cache
def near():
    """Weights that often agree with the model's, and often do not."""
    return jax.tree.map(lambda own, other: 0.95 * own + 0.05 * other, params(), params(1))


@functools.cache
def other():
    """A draft of other sizes, which agrees by chance alone."""
    model = Transformer(dataclasses.replace(CONFIG, width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=24))
    return Draft(model, jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(2)), PROPOSALS)


@functools.cache
def drafted():
    """Shared by all tests of a process, one scheduler after the other."""
    few = dataclasses.replace(SLOTS, decode_slots=(SLOTS.slots,))
    return Slots(MODEL, params(), few, Draft(MODEL, near(), PROPOSALS))


def kept_share(asked):
    """Of all proposals of some requests."""
    kept = [count for one in asked for count in one.ticket.kept]
    assert all(0 <= count <= PROPOSALS for count in kept)
    return sum(kept) / (PROPOSALS * len(kept))


def test_clients_get_what_the_model_alone_gives_and_nothing_is_compiled():
    # Some up to the last token of a slot, or behind a beginning that was read before, and all beside those who draw.
    beginning = prompts(1, seed=8, lengths=(50,))[0][:33]
    given = prompts(20, seed=1) + [np.concatenate([beginning, prompt[:9]]) for prompt in prompts(4, seed=2)]
    lengths = np.random.default_rng(1).integers(1, 30, len(given)).tolist()
    lengths[:3] = [CONFIG.max_length - len(prompt) for prompt in given[:3]]
    want = [
        alone(prompt, CONFIG.max_length - len(prompt))[:length] for prompt, length in zip(given, lengths, strict=True)
    ]
    prefixes = PrefixCache(drafted(), 1 << 20)
    asked = [None] * len(given)
    with scheduler(held=drafted(), prefixes=prefixes) as running:

        def client(i):
            Asked(running, given[i], 5, sampling=Sampling(1.0, 7, 0.9, seed=i), scored=i % 2 == 0, stop=("e",)).all()
            asked[i] = Asked(running, given[i], lengths[i])

        with compilations() as compiled:
            threads = [threading.Thread(target=client, args=(i,)) for i in range(len(given))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            got = [one.tokens() for one in asked]
    assert not compiled
    for tokens, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(tokens, expected)
    assert 0.2 < kept_share(asked) < 0.8
    # A third of the tokens of each round at least is the model's own.
    assert all(sum(one.ticket.kept) + len(one.ticket.kept) + 1 >= len(t) for one, t in zip(asked, got, strict=True))
    assert prefixes.hit_tokens > 0 and any(one.ticket.cached_tokens for one in asked)
    assert not running._running and not running.num_waiting


def test_draws_are_those_of_the_same_rule_without_slots():
    given = prompts(5, seed=3)
    each = [
        Sampling(0.8, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=11),
        Sampling(1.0, min_p=0.05, seed=12),
        Sampling(0.7, seed=13),
        Sampling(repetition_penalty=1.5),
        GREEDY,
    ]
    with scheduler(held=drafted()) as running:
        asked = [Asked(running, p, 12, sampling=s) for p, s in zip(given, each, strict=True)]
        got = [one.tokens() for one in asked]
        again = Asked(running, given[0], 12, sampling=dataclasses.replace(each[0], seed=14)).tokens()
    both = SpeculativeEngine(MODEL, MODEL, PROPOSALS)
    want, _ = both.generate(params(), near(), given, max_new_tokens=12, sampling=each)
    for tokens, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(tokens, expected)
    assert not np.array_equal(again, got[0])


def test_log_probabilities_are_those_of_the_model():
    prompt = prompts(1, seed=5)[0]
    with scheduler(held=drafted()) as running:
        asked = Asked(running, prompt, 9, scored=True, score_prompt=True, sampling=Sampling(1.0, seed=3))
        pieces = asked.all()
    assert sum(len(piece.scores.tokens) for piece in pieces) == 9
    check_log_probabilities(prompt, pieces, asked.prompt_scores[0])


def test_a_request_ends_within_a_round():
    prompt = prompts(1, seed=7)[0]
    tokens = alone(prompt, 20)
    text = TOKENIZER.decode(tokens)
    with scheduler(held=drafted()) as running:
        for place in range(4, 9):
            by_id = Asked(running, prompt, 20, stop_ids=(int(tokens[place]),)).all()
            first = tokens.tolist().index(tokens[place])
            assert by_id[-1].reason == "stop" and sum(len(piece.scores.tokens) for piece in by_id) == first
        by_string = Asked(running, prompt, 20, stop=(text[7:9],)).all()
        assert by_string[-1].reason == "stop"
        assert "".join(piece.text for piece in by_string) == text[: text.index(text[7:9])]
        for length in (1, 2, 7):
            np.testing.assert_array_equal(Asked(running, prompt, length).tokens(), tokens[:length])


def test_who_is_gone_or_late_leaves_a_slot_whole():
    with scheduler(SchedulerConfig(deadline_seconds=30), drafted()) as running:
        asked = [Asked(running, prompt, 40) for prompt in prompts(12, seed=2)]
        late = Asked(running, prompts(1)[0], 40, deadline_seconds=1e-6)
        for one in asked[:9]:
            one.ticket.cancel()
        assert late.all()[-1].reason == "deadline"
        reasons = [one.all()[-1].reason for one in asked]
        assert set(reasons[9:]) == {"length"} and "cancelled" in reasons[:9]
        assert running.num_running == running.num_waiting == 0
        for prompt in prompts(5, seed=4):
            np.testing.assert_array_equal(Asked(running, prompt, 9).tokens(), alone(prompt, 9))


def test_a_model_keeps_all_that_it_proposes_to_itself(monkeypatch):
    monkeypatch.setattr(drafted(), "_all_params", (drafted().params, drafted().params))
    with scheduler(held=drafted()) as running:
        given = prompts(6, seed=6, lengths=(3, 17, 32))
        asked = [Asked(running, prompt, 21) for prompt in given]
        for prompt, one in zip(given, asked, strict=True):
            np.testing.assert_array_equal(one.tokens(), alone(prompt, 21))
    # The first token comes before the first round's proposals, and the model adds one to each round's.
    assert all(one.ticket.kept == [PROPOSALS] * 5 for one in asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, "The draft has a vocabulary of 300, the model one of 384; take a draft with"),
        ({"max_length": 95}, "The draft takes 95 tokens, fewer than the 96 of a slot; set engine.max_length"),
        ({"encoder": EncoderConfig(num_layers=1)}, "The draft does not continue texts by itself"),
        ({"tokens": 0}, "0 proposals were asked for; ask for at least 1"),
    ],
)
def test_drafts_that_do_not_fit_are_refused_before_anything_is_compiled(change, message):
    tokens = change.pop("tokens", PROPOSALS)
    draft = Draft(Transformer(dataclasses.replace(CONFIG, **change)), near(), tokens)
    params()
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        Slots(MODEL, params(), SLOTS, draft)
    assert not compiled


def test_a_draft_reads_text_as_the_model_does(monkeypatch):
    run = types.SimpleNamespace(tokenizer=TOKENIZER, model=MODEL)
    monkeypatch.setattr(session, "load_run", lambda directory: (run, near(), 7))
    model, own = session.load_draft(Path("small"), TOKENIZER)
    assert model is MODEL and own is near()
    with pytest.raises(ValueError, match="--draft small reads text with another tokenizer; name a training with"):
        session.load_draft(Path("small"), types.SimpleNamespace(fingerprint="another"))


def test_metrics_count_proposals_by_vllm_s_names():
    metrics = Metrics("small", resolve(HardwareConfig("h100", 1)))
    with scheduler(held=drafted()) as running:
        metrics.watch(running)
        asked = [Asked(running, prompt, 15) for prompt in prompts(5, seed=6)]
        for one in asked:
            metrics.ended(one.ticket, one.all()[-1].reason)

    def counted(name, **labels):
        labels = {"model_name": "small", **labels}
        return metrics.registry.get_sample_value(f"vllm:spec_decode_num_{name}_total", labels)

    drafts = sum(len(one.ticket.kept) for one in asked)
    assert counted("drafts") == drafts and counted("draft_tokens") == PROPOSALS * drafts
    assert counted("accepted_tokens") == sum(sum(one.ticket.kept) for one in asked) > 0
    places = [counted("accepted_tokens_per_pos", position=str(place)) for place in range(PROPOSALS)]
    assert sum(places) == counted("accepted_tokens") and places == sorted(places, reverse=True)
    # What the draft costs is part of what a request costs: it runs in the same dispatches.
    assert min(one.ticket.device_seconds for one in asked) > 0


# ---- What takes longer ----


@sweep("name", SETTINGS, quick=0)
def test_what_is_drawn_in_slots_has_exactly_the_models_distribution(name):
    count, sampling, prompt = 2000, SETTINGS[name], np.array([3, 1], np.int32)
    (draft, draft_params), (model, own) = tiny(1, sharpness=1.2), tiny(0, sharpness=1.2)
    draft_params = jax.tree.map(lambda mine, theirs: 0.85 * mine + 0.15 * theirs, own, draft_params)
    few = SlotsConfig(slots=32, prefill_tokens=(2,), decode_slots=(32,), top_logprobs=1)
    held = Slots(model, own, few, Draft(draft, draft_params, 2))
    running = Scheduler(held, lambda ids: "", SchedulerConfig(queue=count))
    asked = [Asked(running, prompt, 3, sampling=dataclasses.replace(sampling, seed=seed)) for seed in range(count)]
    got = [one.tokens() for one in asked]
    assert running.close(60)
    kept = [kept for one in asked for kept in one.ticket.kept]
    assert 0.2 < sum(kept) / (2 * len(kept)) < 0.6
    assert p_value(got, exact(model, own, sampling, prompt)) > 1e-3
    assert p_value(got, exact(draft, draft_params, sampling, prompt)) < 1e-6


@pytest.mark.slow
def test_adapters_mix_in_a_batch_over_a_draft_of_other_sizes():
    trees = {"first": tuned(1), "second": tuned(2)}
    held = Slots(MODEL, with_adapters(params(), trees), SLOTS, other())
    running = Scheduler(held, TOKENIZER.decode, prefixes=PrefixCache(held, 1 << 20))
    prompt = prompts(1, seed=6, lengths=(17,))[0]
    asked = [Asked(running, prompt, 12, adapter=number) for number in (-1, 0, 1, 0, -1, 1)]
    got = [one.tokens() for one in asked]
    assert running.close(60)
    want = [alone(prompt, 12, own) for own in (params(), *trees.values())]
    for tokens, number in zip(got, (-1, 0, 1, 0, -1, 1), strict=True):
        np.testing.assert_array_equal(tokens, want[number + 1])
    assert [one.ticket.cached_tokens for one in asked[3:]] == [16, 16, 16]


@pytest.mark.slow
def test_caches_of_codes_and_virtual_tokens_of_either_model_are_their_own():
    model = Transformer(CONFIG, ExecutionConfig(cache="int8"))
    own = prefix_tuning(tokens=3)(quantize()(params(), jax.random.key(0)), jax.random.key(1))
    draft = Draft(MODEL, prefix_tuning(tokens=5)(near(), jax.random.key(2)), PROPOSALS)
    held = Slots(model, own, dataclasses.replace(SLOTS, max_length=80), draft)
    running = Scheduler(held, TOKENIZER.decode, prefixes=PrefixCache(held, 1 << 20))
    given = prompts(5, seed=9, lengths=(17, 33))
    given.append(given[-1])
    asked = [Asked(running, prompt, 80 - len(prompt)) for prompt in given]
    got = [one.tokens() for one in asked]
    assert running.close(60) and kept_share(asked) > 0
    for prompt, tokens in zip(given, got, strict=True):
        [want] = Engine(model).generate(own, [prompt], max_new_tokens=80 - len(prompt))
        np.testing.assert_array_equal(tokens, want)


@pytest.mark.slow
def test_a_sharded_model_has_a_whole_draft_beside_each_part():
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:2])
    own = jax.device_put(params(), shardings(params(), axes_of(MODEL, params()), mesh))
    held = Slots(MODEL, own, SLOTS, Draft(MODEL, near(), PROPOSALS))
    spread, whole = (cache.key.sharding.spec for cache in held.state.caches)
    assert spread[3] == "tensor" and "tensor" not in whole
    running = Scheduler(held, TOKENIZER.decode, prefixes=PrefixCache(held, 1 << 20))
    asked = [Asked(running, prompt, 10) for prompt in prompts(6, seed=9)]
    for prompt, one in zip(prompts(6, seed=9), asked, strict=True):
        np.testing.assert_array_equal(one.tokens(), alone(prompt, 10))
    assert running.close(60) and kept_share(asked) > 0


@pytest.mark.slow
def test_rounds_of_all_sizes_give_the_same():
    """What a round leaves out, of slots and of their tokens, is masked in a larger one."""
    few = dataclasses.replace(SLOTS, prefill_tokens=(16,), decode_slots=(2, 4), decode_lengths=(48,), exact=False)
    held, prompt = Slots(MODEL, params(), few, Draft(MODEL, near(), PROPOSALS)), prompts(1, seed=4, lengths=(32,))[0]
    found = []
    for program in held._decode_programs.values():
        held.admit(0, GREEDY, prompt)
        for start, count in held.pieces(30):
            held.prefill(0, prompt[:30], start, count)
        made = []
        for _ in range(3):
            held.state, (tokens, *_) = program(held._all_params, held.state, np.arange(4) == 0, np.bool_(False))
            made += [token for token in np.asarray(tokens)[0].tolist() if token >= 0]
        found.append(made)
    assert len(found) == 4 and len(found[0]) >= 4 and found == [found[0]] * 4
