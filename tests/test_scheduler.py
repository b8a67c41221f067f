"""Continuous batching: what a request gets does not depend on its company, and nothing is compiled for it."""

import contextlib
import dataclasses
import functools
import logging
import queue
import threading

import jax
import numpy as np
import pytest
from serving import CONFIG, MODEL, SLOTS, TOKENIZER, alone, check_log_probabilities, engine, params, prompts, slots
from sweep import sweep

from jaxcost import weights
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.transformer import Transformer, axes_of, initialize
from jaxcost.serving.adapters import with_adapters
from jaxcost.serving.engine import Engine
from jaxcost.serving.prefix import PrefixCache
from jaxcost.serving.sampling import GREEDY, Sampling
from jaxcost.serving.scheduler import Request, Scheduler, Ticket
from jaxcost.serving.slots import Slots, SlotsConfig
from jaxcost.serving.text import TextStream
from jaxcost.serving.worker import Closed, Overloaded, SchedulerConfig
from jaxcost.sharding import MeshConfig, make_mesh, shardings
from jaxcost.transforms import factorize, lora, prefix_tuning, quantize


@contextlib.contextmanager
def scheduler(config=None, held=None, **options):
    made = Scheduler(held or slots(), TOKENIZER.decode, config or SchedulerConfig(), **options)
    try:
        yield made
    finally:
        assert made.close(60)


@contextlib.contextmanager
def compilations():
    """Names of what JAX traces and compiles meanwhile."""
    found = []

    def heard(name, *_, **__):
        if "compile" in name or "trace" in name:
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


class Asked:
    """A request that was sent, and what comes of it."""

    def __init__(self, to, prompt, new_tokens=8, **options):
        self.pieces = queue.Queue()
        self.prompt_scores = []
        to.reserve()
        request = Request(np.asarray(prompt, np.int32), new_tokens, **options)
        self.ticket = Ticket(request, self.pieces.put, self.prompt_scores.append)
        to.submit(self.ticket)

    def all(self):
        """All pieces, up to the last."""
        found = [self.pieces.get(timeout=60)]
        while found[-1].reason is None:
            found.append(self.pieces.get(timeout=60))
        return found

    def tokens(self):
        return np.concatenate([piece.scores.tokens for piece in self.all()])


def test_64_clients_get_what_each_gets_alone_and_nothing_is_compiled():
    asked = prompts(64)
    lengths = np.random.default_rng(1).integers(1, 30, 64).tolist()
    want = [alone(prompt, 30)[:length] for prompt, length in zip(asked, lengths, strict=True)]
    got = [None] * 64
    with scheduler() as running:

        def client(i):
            # A third of the company draws, asks for log-probabilities and is cut off by a string.
            Asked(running, asked[i], 5, sampling=Sampling(1.0, 7, 0.9, seed=i), scored=True, stop=("e",))
            got[i] = Asked(running, asked[i], lengths[i]).tokens()

        with compilations() as compiled:
            threads = [threading.Thread(target=client, args=(i,)) for i in range(64)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not compiled
    for i in range(64):
        np.testing.assert_array_equal(got[i], want[i])
    assert not running._running and not running.num_waiting


def test_draws_depend_on_the_seed_and_not_on_the_company():
    [prompt], settings = prompts(1), Sampling(0.8, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=11)
    with scheduler() as running:
        first = Asked(running, prompt, 12, sampling=settings).tokens()
        crowd = [Asked(running, p, 12, sampling=Sampling(1.0, seed=i)) for i, p in enumerate(prompts(6, seed=3))]
        again = Asked(running, prompt, 12, sampling=settings).tokens()
        other = Asked(running, prompt, 12, sampling=Sampling(0.8, seed=12)).tokens()
        for one in crowd:
            one.all()
    [engines] = engine().generate(params(), [prompt], max_new_tokens=12, sampling=settings)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, engines)
    assert not np.array_equal(first, other)


def test_log_probabilities_are_those_of_the_model():
    prompt = prompts(1, seed=5)[0]
    with scheduler() as running:
        asked = Asked(running, prompt, 6, scored=True, score_prompt=True)
        pieces = asked.all()
    check_log_probabilities(prompt, pieces, asked.prompt_scores[0])


def test_a_request_ends_at_an_id_a_string_or_its_length():
    prompt = prompts(1, seed=7)[0]
    tokens = alone(prompt, 20)
    with scheduler() as running:
        by_id = Asked(running, prompt, 20, stop_ids=(int(tokens[6]),)).all()
        text = TOKENIZER.decode(tokens)
        by_string = Asked(running, prompt, 20, stop=(text[7:9],)).all()
        by_length = Asked(running, prompt, 20).all()
    assert by_id[-1].reason == "stop" and sum(len(p.scores.tokens) for p in by_id) == tokens.tolist().index(tokens[6])
    assert by_string[-1].reason == "stop" and "".join(p.text for p in by_string) == text[: text.index(text[7:9])]
    assert by_length[-1].reason == "length" and "".join(p.text for p in by_length) == text


def test_who_is_gone_or_late_leaves_a_slot_and_the_queue():
    with scheduler(SchedulerConfig(deadline_seconds=30)) as running:
        asked = [Asked(running, prompt, 40) for prompt in prompts(12, seed=2)]
        late = Asked(running, prompts(1)[0], 40, deadline_seconds=1e-6)
        for one in asked[:9]:
            one.ticket.cancel()
        assert late.all()[-1].reason == "deadline"
        reasons = [one.all()[-1].reason for one in asked]
        assert set(reasons[9:]) == {"length"} and "cancelled" in reasons[:9]
        assert running.num_running == running.num_waiting == 0
        # The slots are whole.
        np.testing.assert_array_equal(Asked(running, prompts(1)[0], 9).tokens(), alone(prompts(1)[0], 9))


def test_a_full_queue_refuses_and_a_closed_one_ends_what_it_took():
    with scheduler(SchedulerConfig(queue=3)) as running:
        asked = [Asked(running, prompt, 40) for prompt in prompts(3, seed=4)]
        with pytest.raises(Overloaded, match="wait already") as refused:
            running.reserve(8)
        assert refused.value.retry_after_seconds >= 1
        running.reserve()
        with pytest.raises(ValueError, match="more than the 96 that the model takes; ask for at most 86"):
            running.submit(Ticket(Request(np.zeros(10, np.int32), 90), print))
        running.release()
        assert running.close(60)
        assert [one.all()[-1].reason for one in asked] == ["length"] * 3
        with pytest.raises(Closed):
            running.reserve()


def test_a_request_of_more_than_all_places_is_taken_where_nobody_else_is():
    with scheduler(SchedulerConfig(queue=1)) as running:
        running.reserve()
        with pytest.raises(Overloaded):
            running.reserve(20)
        running.release()
        running.reserve(20)
        with pytest.raises(Overloaded):
            running.reserve()
        running.release(20)


def test_who_would_wait_too_long_is_refused():
    with scheduler(SchedulerConfig(wait_seconds=1e-9)) as running:
        # Before the first has ended, nobody knows how long one takes.
        assert [one.all()[-1].reason for one in [Asked(running, prompt, 9) for prompt in prompts(6)]] == ["length"] * 6
        # As many begin at once as there are free slots, and behind them one waits for nobody who waits.
        for _ in range(SLOTS.slots + 1):
            running.reserve()
        with pytest.raises(Overloaded, match=f"{SLOTS.slots + 1} requests wait already"):
            running.reserve()
        running.release()
        running.reserve()
        running.release(SLOTS.slots + 1)
    with scheduler() as running:
        Asked(running, prompts(1)[0], 9).all()
        running.reserve(SLOTS.slots)
        running.reserve(deadline_seconds=60)
        with pytest.raises(Overloaded, match=f"{SLOTS.slots + 1} requests wait already"):
            running.reserve(deadline_seconds=1e-9)
        running.release()
        running.reserve(deadline_seconds=1e-9)
        running.release(SLOTS.slots + 1)
    with pytest.raises(ValueError, match="scheduler.wait_seconds is 0; it must be above 0"):
        SchedulerConfig(wait_seconds=0)


def test_a_failure_of_the_device_ends_every_request(monkeypatch):
    def fail(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(slots(), "decode", fail)
    running = Scheduler(slots(), TOKENIZER.decode)
    asked = [Asked(running, prompt) for prompt in prompts(6)]
    assert [one.all()[-1].reason for one in asked] == ["error"] * 6
    assert not running.healthy
    with pytest.raises(Closed):
        running.reserve()


def test_prompts_that_begin_alike_are_read_once():
    beginning = prompts(1, seed=8, lengths=(50,))[0]
    both = [np.concatenate([beginning, end]).astype(np.int32) for end in ([1, 2, 3], [9])]
    prefixes = PrefixCache(slots(), 1 << 20)
    with scheduler(prefixes=prefixes) as running:
        asked = [Asked(running, prompt, 12) for prompt in (*both, both[0][:48], both[0])]
        got = [one.tokens() for one in asked]
    for prompt, tokens in zip((*both, both[0][:48], both[0]), got, strict=True):
        np.testing.assert_array_equal(tokens, alone(prompt, 12))
    # The last token of a prompt is read in any case.
    assert asked[3].ticket.cached_tokens == 48 and asked[2].ticket.cached_tokens == 32
    with pytest.raises(ValueError, match="does not hold a single piece"):
        PrefixCache(slots(), 10)


def test_the_least_recently_used_piece_is_dropped_first():
    prefixes = PrefixCache(slots(), 5 * 16 * 2 * 2 * 2 * 8 * 4)
    with scheduler(prefixes=prefixes) as running:
        for seed in range(4):
            Asked(running, prompts(1, seed=seed, lengths=(33,))[0], 1).all()
        assert len(prefixes._held) == 5
        first = Asked(running, prompts(1, seed=0, lengths=(33,))[0], 1)
        last = Asked(running, prompts(1, seed=3, lengths=(33,))[0], 1)
        first.all(), last.all()
    assert first.ticket.cached_tokens == 0 and last.ticket.cached_tokens == 32


@functools.cache
def held_in_parts():
    """Slots with several decode programs."""
    return Slots(
        MODEL, params(), dataclasses.replace(SLOTS, prefill_tokens=(16,), decode_slots=(2, 4), decode_lengths=(48,))
    )


@pytest.mark.slow
def test_a_decode_step_takes_no_more_slots_and_tokens_than_are_in_use(monkeypatch):
    held = held_in_parts()
    called, programs = [], held._decode_programs
    noted = {key: lambda *a, key=key: (called.append(key), programs[key](*a))[1] for key in programs}
    monkeypatch.setattr(held, "_decode_programs", noted)
    running = Scheduler(held, TOKENIZER.decode)
    long, short, *crowd = prompts(2, seed=3, lengths=(50,)) + prompts(8, seed=4, lengths=(1, 3, 17))
    with compilations() as compiled:
        Asked(running, crowd[0], 60).all()
        by_itself = set(called)
        asked = [Asked(running, prompt, 20) for prompt in (long, short, *crowd)]
        got = [one.tokens() for one in asked]
    assert running.close(60) and not compiled
    # Alone, a request grows through all lengths of the first slots; a crowd uses all.
    whole = held._lengths[-1]
    assert by_itself == {(2, 48), (2, whole)} and set(called) >= {(4, 48), (4, whole)}
    for prompt, tokens in zip((long, short, *crowd), got, strict=True):
        np.testing.assert_array_equal(tokens, alone(prompt, 20))
    # And not up to rounding: the programs give the same bits.
    found = []
    for program in programs.values():
        held.admit(0, GREEDY, short)
        for start, count in held.pieces(30):
            held.prefill(0, short[:30], start, count)
        held.state, _ = program(held._all_params, held.state, np.arange(4) == 0, np.bool_(False))
        found.append(np.asarray(held.state.logits[0]))
    assert len(found) == 4 and all(np.array_equal(logits, found[0]) for logits in found)


def test_decode_programs_that_round_otherwise_than_the_largest_are_not_used(caplog):
    """At this width, XLA on a CPU rounds a step of two rows otherwise than one of eight."""
    config = dataclasses.replace(CONFIG, width=256, num_layers=1, num_kv_heads=4, head_dim=64, mlp_width=1024)
    model = Transformer(config)
    weights = jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))
    options = SlotsConfig(slots=8, prefill_tokens=(16,), decode_lengths=(48,))
    with caplog.at_level(logging.INFO):
        exact, fast = (Slots(model, weights, dataclasses.replace(options, exact=exact)) for exact in (True, False))
    assert len(fast._decode_programs) == 4
    left = set(fast._decode_programs) - set(exact._decode_programs)
    assert ("round otherwise than the largest" in caplog.text) == bool(left)
    [prompt] = prompts(1, seed=6, lengths=(16,))

    def numbers(held, others):
        for slot in range(1 + others):
            held.admit(slot, GREEDY, prompt)
            held.prefill(slot, prompt, 0, 16)
        made = [held.decode(np.arange(8) <= others, scored=True) for _ in range(6)]
        return np.stack([one.top_logprobs[0] for one in made])

    np.testing.assert_array_equal(numbers(exact, 0), numbers(exact, 7))
    if left:
        assert not np.array_equal(numbers(fast, 0), numbers(fast, 7))


def test_a_prompt_half_read_is_left_as_it_is_by_a_shorter_step():
    """A step that is shorter than what a neighbour holds already must not write into it."""
    held = held_in_parts()
    long, short = prompts(2, seed=5, lengths=(50,))
    short = short[:3]
    for slot, prompt in enumerate((long, short)):
        held.admit(slot, GREEDY, prompt)
        for start, count in held.pieces(len(prompt))[: 3 if slot == 0 else None]:
            held.prefill(slot, prompt, start, count)
    made = held.decode(np.array([False, True, False, False]))
    np.testing.assert_array_equal(made.tokens[1], alone(short, 4))
    held.prefill(0, long, 48, 2)
    np.testing.assert_array_equal(held.decode(np.array([True, False, False, False])).tokens[0], alone(long, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 0}, "engine.slots is 0"),
        ({"prefill_tokens": (8, 4)}, "give rising positive numbers"),
        ({"prefill_tokens": ()}, "engine.prefill_tokens is empty"),
        ({"decode_slots": (2, 4)}, "end it with engine.slots \\(8\\)"),
        ({"decode_lengths": (0,)}, "engine.decode_lengths is"),
        ({"tokens_per_dispatch": 0}, "engine.tokens_per_dispatch is 0"),
        ({"max_length": -1}, "engine.max_length is -1"),
    ],
)
def test_slots_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SlotsConfig(**change)


def test_slots_are_no_longer_than_the_model():
    with pytest.raises(ValueError, match="more than the 96 tokens that the model takes"):
        Slots(MODEL, params(), SlotsConfig(max_length=97))


# ---- Adapters ----


def tuned(seed, rank=2, **options):
    """The model with adapters that have moved, as if they had been trained."""
    made = lora(rank=rank, **options)(params(), jax.random.key(seed))
    found, rest = weights.partition(made)
    random = np.random.default_rng(seed)
    moved = {path: np.asarray(a) + np.float32(0.3) * random.normal(size=a.shape) for path, a in found.items()}
    moved = {path: jax.numpy.asarray(a, "float32") for path, a in moved.items()}
    return weights.combine(made, moved, rest)


@pytest.mark.slow
def test_adapters_mix_in_a_batch_and_nothing_changes():
    trees = {"first": tuned(1), "second": tuned(2)}
    held = Slots(MODEL, with_adapters(params(), trees), SLOTS)
    running = Scheduler(held, TOKENIZER.decode, prefixes=PrefixCache(held, 1 << 20))
    prompt = prompts(1, seed=6, lengths=(17,))[0]
    asked = [Asked(running, prompt, 12, adapter=number) for number in (-1, 0, 1, 0, -1, 1)]
    got = [one.tokens() for one in asked]
    assert running.close(60)
    want = [alone(prompt, 12, own) for own in (params(), *trees.values())]
    assert len({tuple(tokens) for tokens in want}) == 3
    for tokens, number in zip(got, (-1, 0, 1, 0, -1, 1), strict=True):
        np.testing.assert_array_equal(tokens, want[number + 1])
    # What was read with one adapter is of no use to another.
    assert [one.ticket.cached_tokens for one in asked[3:]] == [16, 16, 16]
    assert [one.ticket.cached_tokens for one in asked[:3]] == [0, 0, 0]


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        (lambda: {"a": tuned(1), "b": tuned(2, rank=3)}, "a, b cannot be served together: .* ranks 2, 3"),
        (lambda: {"a": tuned(1, dora=True)}, "adapter a does not fit: .* \\(DoRA\\)"),
        (lambda: {"a": lora()(params(1), jax.random.key(0))}, "adapter a does not fit: .* is another than the base's"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(trees, message):
    with pytest.raises(ValueError, match=message):
        with_adapters(params(), trees())


KINDS = {
    "int8": quantize(),
    "int4": quantize(bits=4, group=8),
    "w8a8": quantize(activations="dynamic"),
    "low rank": factorize(rank=4),
    "prefix": prefix_tuning(tokens=3),
}


@sweep("change", KINDS.values(), ids=KINDS, quick=0)
def test_weights_of_every_kind_are_served_as_alone_over_an_int8_cache(change):
    model = Transformer(CONFIG, ExecutionConfig(cache="int8"))
    own = change(params(), jax.random.key(0))
    running = Scheduler(Slots(model, own, SLOTS), TOKENIZER.decode)
    asked = prompts(6, seed=9, lengths=(17,))
    with compilations() as compiled:
        got = [one.tokens() for one in [Asked(running, prompt, 10) for prompt in asked]]
    assert running.close(60) and not compiled
    by_itself = Engine(model)
    for prompt, tokens in zip(asked, got, strict=True):
        [want] = by_itself.generate(own, [prompt], max_new_tokens=10)
        np.testing.assert_array_equal(tokens, want)


@pytest.mark.slow
def test_no_decode_program_is_made_that_virtual_tokens_fill():
    own = prefix_tuning(tokens=60)(params(), jax.random.key(0))
    few = dataclasses.replace(SLOTS, max_length=30, decode_slots=(4,), decode_lengths=(48, 64, 65))
    assert Slots(MODEL, own, few)._lengths == (65, 60 + 30 + 16)


@pytest.mark.slow
def test_a_sharded_model_is_served_as_alone():
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:2])
    places = shardings(params(), axes_of(MODEL, params()), mesh)
    held = Slots(MODEL, jax.device_put(params(), places), SLOTS)
    assert held.state.cache.key.sharding.spec[3] == "tensor"
    running = Scheduler(held, TOKENIZER.decode, prefixes=PrefixCache(held, 1 << 20))
    for prompt in prompts(4, seed=9):
        np.testing.assert_array_equal(Asked(running, prompt, 10).tokens(), alone(prompt, 10))
    assert running.close(60)


# ---- Text ----


def test_text_comes_whole_and_never_beyond_a_stop_string():
    text = "naïve 🙂 café </s"
    stream = TextStream(TOKENIZER.decode, ("</stop>",))
    given = [stream.add(int(token)) for token in TOKENIZER.encode(text)]
    assert "\ufffd" not in "".join(given) and "".join(given) == text[:-3]
    assert stream.finish() == "</s" and not stream.stopped
    stream = TextStream(TOKENIZER.decode, ("bc", "cd"))
    assert "".join(stream.add(ord(letter)) for letter in "abc") == "a" and stream.stopped
    broken = TextStream(TOKENIZER.decode)
    assert "".join([broken.add(0xF0), broken.add(ord("a")), broken.finish()]) == "\ufffda"
