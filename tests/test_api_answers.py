"""The API of models that answer to a text through an encoder: what each client gets is what the model says alone."""

import contextlib
import dataclasses
import functools
import json
import threading

import jax
import numpy as np
import openai
import pytest
from serving import TOKENIZER
from test_api import ask, client, listening
from test_scheduler import compilations

from jaxcost.cost.hardware import HardwareConfig, resolve
from jaxcost.models.config import EncoderConfig, ModelConfig
from jaxcost.models.transformer import Transformer, initialize, logits
from jaxcost.serving.api.app import create_app
from jaxcost.serving.api.generation import AnsweringModel
from jaxcost.serving.api.kinds import answering_model, model_of_kind
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.engine import Engine
from jaxcost.serving.slots import SlotsConfig
from jaxcost.serving.sources import SourceScheduler, SourceSlots
from jaxcost.serving.vocabulary import Vocabulary
from jaxcost.serving.worker import SchedulerConfig
from jaxcost.transforms import prefix_tuning

CONFIG = ModelConfig(
    vocab_size=384,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    max_length=48,
    position="relative",
    relative_buckets=8,
    relative_distance=16,
    encoder=EncoderConfig(num_layers=1, max_length=64, start=7),
)
MODEL = Transformer(CONFIG)
SLOTS = SlotsConfig(slots=4, decode_slots=(4,), decode_lengths=(1000,))
TEXTS = ["ab, c", "0123456789abcdef!", "".join(chr(33 + 37 * i % 90) for i in range(64))]
"""Shorter than one of the lengths that sources are padded to, of one, and as long as the model takes."""


@functools.cache
def params():
    made = jax.jit(lambda key: initialize(MODEL, key)[0])(jax.random.key(0))
    # As in `serving.params`, and with attention to the source that no answer is alike without.
    kernel = (6 * made["unembed"]["kernel"]).at[:, TOKENIZER.vocab_size :].set(0)
    sharper = jax.tree.map(lambda a: 3 * a, made["layers"]["cross_attention"])
    return {**made, "unembed": {"kernel": kernel}, "layers": {**made["layers"], "cross_attention": sharper}}


@functools.cache
def slots():
    """Shared by all tests of a process."""
    return SourceSlots(MODEL, params(), SLOTS, lengths=(16, 64))


@contextlib.contextmanager
def serving(queue=256):
    """A server at a free port, and the model behind it."""
    vocabulary = Vocabulary(TOKENIZER)
    model = AnsweringModel("small", vocabulary, SourceScheduler(slots(), vocabulary.decode, SchedulerConfig(queue)))
    metrics = Metrics("small", resolve(HardwareConfig("h100", 1)))
    metrics.watch(model.worker)
    with listening(create_app(model, metrics)) as port:
        yield port, model
    assert not model.healthy


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


@functools.cache
def likeliest():
    def made(own, tokens_1T, source_1S):
        hidden_1TD, _ = MODEL.apply({"params": own}, tokens_1T, source_BS=source_1S)
        return logits(CONFIG, own, hidden_1TD[0]).argmax(-1)

    return jax.jit(made)


@functools.cache
def alone(text, count=40):
    """What the model answers to a text by itself, unpadded, without a cache: so many ids, those of ends included."""
    tokens = np.full((1, CONFIG.max_length), CONFIG.encoder.start, np.int32)
    for i in range(count):
        tokens[0, i + 1] = likeliest()(params(), tokens, TOKENIZER.encode_source(text)[None])[i]
    return tokens[0, 1 : count + 1].tolist()


def text_of(text, count):
    return TOKENIZER.decode(np.array(alone(text)[:count], np.int32))


def test_answers_differ_by_their_sources():
    assert len({text_of(text, 8) for text in TEXTS}) == len(TEXTS)
    assert not any(set(alone(text)) & set(TOKENIZER.stop_ids) for text in TEXTS)
    assert max(len(set(alone(text))) for text in TEXTS) > 8


@pytest.mark.slow
def test_the_library_s_engine_says_the_same():
    prompt, sources = [np.array([CONFIG.encoder.start], np.int32)], [TOKENIZER.encode_source(TEXTS[1])]
    [found] = Engine(MODEL).generate(params(), prompt, max_new_tokens=40, sources=sources)
    assert found.tolist() == alone(TEXTS[1])


def test_many_clients_get_what_each_gets_alone_and_nothing_is_compiled(server):
    port, _ = server
    want, found = {text: text_of(text, 24) for text in TEXTS}, {}

    def one(i):
        body = {"prompt": [TEXTS[i % 3], TEXTS[(i + 1) % 3]], "max_tokens": 24, "temperature": 0, "stream": i % 2 == 0}
        found[i] = ask(port, "/v1/completions", body)

    with compilations() as compiled:
        threads = [threading.Thread(target=one, args=(i,)) for i in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not compiled
    for i, (status, _, content) in found.items():
        assert status == 200
        texts = ["", ""]
        if i % 2 == 0:
            events = [line[6:] for line in content.decode().split("\n\n") if line.startswith("data: {")]
            chunks = [choice for event in events for choice in json.loads(event)["choices"]]
        else:
            chunks = json.loads(content)["choices"]
        for choice in chunks:
            texts[choice["index"]] += choice["text"]
        assert texts == [want[TEXTS[i % 3]], want[TEXTS[(i + 1) % 3]]]


def test_openai_s_client_gets_counts_stops_seeds_and_likelihoods(server):
    ask_for = client(server[0]).completions.create
    options = {"model": "small", "prompt": TEXTS[1], "max_tokens": 12, "temperature": 0}
    whole = ask_for(**options, logprobs=2)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text_of(TEXTS[1], 12), "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (17, 12) and whole.usage.cost_usd > 0
    assert len(whole.choices[0].logprobs.tokens) == 12
    want = text_of(TEXTS[1], 12)
    stopped = ask_for(**options, stop=[want[4:6]]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (want[: want.index(want[4:6])], "stop")
    drawn = [ask_for(**options | {"temperature": 1, "seed": seed}).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    two = ask_for(**options | {"temperature": 1, "seed": 1}, n=2).choices
    assert two[0].text == drawn[0] != two[1].text
    ids = ask_for(**options | {"prompt": TOKENIZER.encode(TEXTS[1]).tolist()})
    assert ids.choices[0].text == want


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "a", "echo": True}, "leave echo out"),
        ({"prompt": ""}, "A prompt is empty"),
        ({"prompt": "a" * 65}, "65 characters, more than the 64 tokens"),
        ({"prompt": [1] * 65}, "has 65 tokens, more than the 64 that the model takes"),
        ({"prompt": [384]}, "ids outside 0 to 383"),
        ({"prompt": "a", "max_tokens": 48}, "ask for at most 47"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_answered_is_refused(server, body, said):
    status, _, text = ask(server[0], "/v1/completions", body)
    assert status == 400 and said in json.loads(text)["error"]["message"]


def test_other_addresses_say_what_the_model_does(server):
    with pytest.raises(openai.BadRequestError, match="answers to texts, and does not embed texts"):
        client(server[0]).embeddings.create(model="small", input="a")
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client(server[0]).chat.completions.create(model="small", messages=[{"role": "user", "content": "a"}])
    assert client(server[0]).models.retrieve("small").max_model_len == 64
    assert 'vllm:request_success_total{finished_reason="length"' in ask(server[0], "/metrics", method="GET")[2].decode()


def test_overload_is_refused_and_late_or_vanished_clients_leave_their_places():
    with serving(queue=1) as (port, model):
        found, body = [], {"prompt": TEXTS[0], "max_tokens": 40, "temperature": 0}
        threads = [threading.Thread(target=lambda: found.append(ask(port, "/v1/completions", body)[0]))
                   for _ in range(16)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {200, 429}
        assert ask(port, "/v1/completions", body | {"deadline_seconds": 1e-9})[0] == 408
        stream = client(port).completions.create(model="small", stream=True, **body)
        next(iter(stream))
        stream.close()
        waited = threading.Event()
        while model.worker.num_running or model.worker.num_waiting:
            assert not waited.wait(0.01)
        answer = json.loads(ask(port, "/v1/completions", body)[2])
        assert answer["choices"][0]["text"] == text_of(TEXTS[0], 40)


def test_what_cannot_be_served_is_said():
    alone = dataclasses.replace(CONFIG, encoder=EncoderConfig())
    with pytest.raises(ValueError, match="does not answer to texts or recordings"):
        SourceSlots(Transformer(alone), params(), SLOTS)
    with pytest.raises(ValueError, match=r"batches.lengths ends with 65, more than the 64"):
        SourceSlots(MODEL, params(), SLOTS, lengths=(65,))
    with pytest.raises(ValueError, match="virtual tokens"):
        SourceSlots(MODEL, prefix_tuning(tokens=2)(params(), jax.random.key(0)), SLOTS)
    broken = jax.tree.map(lambda a: a * np.nan, params())
    with pytest.raises(ValueError, match="The weights of small give outputs that are no numbers"):
        answering_model("small", MODEL, broken, TOKENIZER, SLOTS, lengths=(64,))


@pytest.mark.slow
def test_a_checkpoint_is_served_as_its_config_says(tmp_path):
    model = model_of_kind("small", MODEL, params(), TOKENIZER, tmp_path, slots=SLOTS)
    assert isinstance(model, AnsweringModel) and model.scheduler.slots.lengths == (16, 32, 64)
    model.close()
