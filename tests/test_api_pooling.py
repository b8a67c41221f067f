"""The API of models that answer once for a text, as their clients see it: embeddings, labels and ranks in batches."""

import base64
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
from sweep import sweep
from test_api import ask, client, listening
from test_scheduler import compilations

from jaxcost.cost.hardware import HardwareConfig, resolve
from jaxcost.models.config import EncoderConfig, HeadConfig, ModelConfig
from jaxcost.models.transformer import Transformer, initialize, logits
from jaxcost.serving.api.app import create_app
from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.load import pooled_model
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.api.pooling import Labels, PooledModel
from jaxcost.serving.batches import Batcher, BatchesConfig
from jaxcost.serving.pooled import Pooled, Text, answering
from jaxcost.serving.vocabulary import Vocabulary
from jaxcost.serving.worker import SchedulerConfig

BASE = ModelConfig(
    vocab_size=384, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, max_length=64
)
CONFIGS = {
    "encoder": dataclasses.replace(BASE, causal=False, token_types=2, head=HeadConfig(embed=True)),
    "decoder": dataclasses.replace(BASE, head=HeadConfig(embed=True)),
    "labels": dataclasses.replace(BASE, causal=False, head=HeadConfig(outputs=3, pooling="mean", bias=True)),
    "rank": dataclasses.replace(BASE, causal=False, token_types=2, head=HeadConfig(outputs=1, pooling="first")),
    "answer": dataclasses.replace(
        BASE, encoder=EncoderConfig(num_layers=1, start=7), head=HeadConfig(outputs=3, pooling="last")
    ),
}
BATCHES = BatchesConfig(lengths=(16, 64), rows=(1, 4), tokens=128)
TEXTS = ["a", "some words", "0123456789abcdef", "0123456789abcdefghijkl", "x" * 64]


@functools.cache
def params(kind):
    model = Transformer(CONFIGS[kind])
    return jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))


@functools.cache
def pooled(kind):
    """Shared by all tests of a process."""
    return Pooled(Transformer(CONFIGS[kind]), params(kind), BATCHES)


@contextlib.contextmanager
def serving(kind, queue=256, config=ApiConfig(), **options):  # noqa: B008
    """A server at a free port, and the model behind it."""
    model = PooledModel("small", Vocabulary(TOKENIZER), Batcher(pooled(kind), SchedulerConfig(queue)), **options)
    metrics = Metrics("small", resolve(HardwareConfig("h100", 1)))
    metrics.watch(model.worker)
    with listening(create_app(model, metrics, config=config)) as port:
        yield port, model
    assert not model.healthy


@pytest.fixture(scope="module")
def encoder():
    with serving("encoder") as server:
        yield server


@functools.cache
def model_of(kind):
    """The model by itself, as a function of a text's padded ids, their types and how many are valid."""
    model = Transformer(CONFIGS[kind])

    def states(ids, types, length):
        valid = np.arange(64)[None] < length
        return model.apply({"params": params(kind)}, ids[None], valid_BT=valid, types_BT=types[None])[0][0]

    return jax.jit(states)


def states(kind, ids, types=()):
    """Hidden states of one text alone, float32 (T, D), or (1, D) of a head that pools them."""
    padded = [np.pad(np.asarray(a, np.int32), (0, 64 - len(a))) for a in (ids, types)]
    return np.asarray(model_of(kind)(*padded, len(ids)))[: len(ids)]


def embedding(kind, text):
    hidden = states(kind, TOKENIZER.encode(text))
    made = hidden[-1] if kind == "decoder" else hidden.mean(axis=0)
    return made / np.linalg.norm(made)


def outputs(kind, ids, types=()):
    return np.asarray(logits(CONFIGS[kind], params(kind), states(kind, ids, types)[0]))


# ---- Embeddings ----


@sweep("kind", ["encoder", "decoder"], quick=1)
def test_embeddings_are_those_of_each_text_alone(kind):
    with serving(kind) as (port, _):
        got = client(port).embeddings.create(model="small", input=TEXTS, encoding_format="float")
    assert [entry.index for entry in got.data] == list(range(len(TEXTS)))
    for entry, text in zip(got.data, TEXTS, strict=True):
        np.testing.assert_allclose(entry.embedding, embedding(kind, text), atol=1e-5)
    tokens = sum(map(len, TEXTS))
    assert (got.usage.prompt_tokens, got.usage.total_tokens) == (tokens, tokens) and got.usage.cost_usd > 0


def test_embeddings_of_ids_and_in_base64(encoder):
    ids = TOKENIZER.encode("some words").tolist()
    one, two = ask(encoder[0], "/v1/embeddings", {"input": ids}), ask(encoder[0], "/v1/embeddings", {"input": [ids]})
    want = embedding("encoder", "some words")
    for _, _, text in (one, two):
        np.testing.assert_allclose(json.loads(text)["data"][0]["embedding"], want, atol=1e-5)
    packed = json.loads(ask(encoder[0], "/v1/embeddings", {"input": ids, "encoding_format": "base64"})[2])
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4"), want, atol=1e-5)
    # OpenAI's client asks for base64 by itself and unpacks it.
    [entry] = client(encoder[0]).embeddings.create(model="small", input="some words").data
    np.testing.assert_allclose(entry.embedding, want, atol=1e-5)


def test_many_clients_get_what_each_gets_alone_and_nothing_is_compiled(encoder, monkeypatch):
    port, _ = encoder
    want = {text: embedding("encoder", text) for text in TEXTS}
    found, batches = {}, []
    run = pooled("encoder").run

    def counted(texts):
        batches.append(len(texts))
        return run(texts)

    def one(i):
        body = {"input": [TEXTS[i % 5], TEXTS[(i + 1) % 5]]}
        found[i] = json.loads(ask(port, "/v1/embeddings", body)[2])["data"]

    monkeypatch.setattr(pooled("encoder"), "run", counted)
    with compilations() as compiled:
        threads = [threading.Thread(target=one, args=(i,)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not compiled
    for i, data in found.items():
        for entry, text in zip(data, (TEXTS[i % 5], TEXTS[(i + 1) % 5]), strict=True):
            np.testing.assert_allclose(entry["embedding"], want[text], atol=1e-5)
    assert sum(batches) == 64 and max(batches) > 1


# ---- Labels and ranks ----


def test_labels_have_names_and_probabilities():
    with serving("labels", labels=Labels(("bad", "fair", "good"))) as (port, _):
        status, _, text = ask(port, "/v1/classify", {"model": "small", "input": TEXTS})
        single = json.loads(ask(port, "/v1/classify", {"input": TEXTS[1]})[2])["data"]
        refused = [ask(port, path, body) for path, body in EVERY.items() if path != "/v1/classify"]
    assert status == 200
    data = json.loads(text)["data"]
    for entry, given in zip(data, TEXTS, strict=True):
        want = np.exp(outputs("labels", TOKENIZER.encode(given)))
        np.testing.assert_allclose(entry["probs"], want / want.sum(), atol=1e-5)
        assert entry["label"] == ("bad", "fair", "good")[want.argmax()] and entry["num_classes"] == 3
    np.testing.assert_allclose(single[0]["probs"], data[1]["probs"], atol=1e-5)
    for status, _, text in refused:
        assert status == 400 and "The model small gives labels, and does not" in json.loads(text)["error"]["message"]
    shares = Labels(("a", "b"), several=True).probabilities(np.array([0.0, 100.0]))
    np.testing.assert_allclose(shares, [0.5, 1.0])


@pytest.mark.slow
def test_a_decoder_labels_a_text_that_its_encoder_reads_by_reading_it_a_token_later():
    model, ids = Transformer(CONFIGS["answer"]), TOKENIZER.encode(TEXTS[1])
    shifted = np.concatenate([[7], ids[:-1]])
    hidden, _ = jax.jit(model.apply)({"params": params("answer")}, shifted[None], source_BS=ids[None])
    want = logits(model.config, params("answer"), hidden[:, 0])
    # Alone, and behind a longer text in one batch.
    texts = [Text(np.asarray(ids, np.int32)), Text(np.arange(16, dtype=np.int32))]
    for batch in (texts[:1], texts):
        np.testing.assert_allclose(pooled("answer").run(batch)[0], want[0], atol=1e-5)
    states = dataclasses.replace(model.config, head=HeadConfig(embed=True))
    with pytest.raises(ValueError, match="neither continues texts nor gives embeddings"):
        answering(states)


def test_a_cross_encoder_ranks_documents():
    documents = ["first", {"text": "the second one"}, "third"]
    with serving("rank") as (port, _):
        body = {"query": "which", "documents": documents}
        whole = json.loads(ask(port, "/v1/rerank", body)[2])
        best = json.loads(ask(port, "/v1/rerank", body | {"top_n": 1, "return_documents": False})[2])
        none = ask(port, "/v1/rerank", body | {"documents": []})
    texts = ["first", "the second one", "third"]
    want = [1 / (1 + np.exp(-outputs("rank", *TOKENIZER.encode_pair("which", text))[0])) for text in texts]
    assert [result["index"] for result in whole["results"]] == np.argsort(want)[::-1].tolist()
    for result in whole["results"]:
        assert result["relevance_score"] == pytest.approx(want[result["index"]], abs=1e-5)
        assert result["document"]["text"] == texts[result["index"]]
    assert best["results"] == [{key: whole["results"][0][key] for key in ("index", "relevance_score")}]
    assert whole["usage"]["prompt_tokens"] == sum(len("which") + 1 + len(text) for text in texts)
    assert none[0] == 400


def test_embeddings_rank_by_their_cosine(encoder):
    body = {"query": TEXTS[0], "documents": TEXTS}
    results = json.loads(ask(encoder[0], "/v1/rerank", body)[2])["results"]
    want = [embedding("encoder", text) @ embedding("encoder", TEXTS[0]) for text in TEXTS]
    assert results[0]["index"] == 0 and results[0]["relevance_score"] == pytest.approx(1, abs=1e-5)
    assert [r["relevance_score"] for r in results] == pytest.approx(sorted(want, reverse=True), abs=1e-5)


# ---- What holds for every model ----

EVERY = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/embeddings": {"input": "a"},
    "/v1/classify": {"input": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
}


def test_addresses_that_are_not_for_the_model_say_so(encoder):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/classify"):
        status, _, text = ask(encoder[0], path, EVERY[path])
        error = json.loads(text)["error"]
        assert status == 400 and error["code"] == "unsupported_model" and "gives embeddings" in error["message"]
    with pytest.raises(openai.BadRequestError, match="does not continue texts"):
        client(encoder[0]).completions.create(model="small", prompt="a")


def test_models_tokens_and_metrics(encoder):
    port = encoder[0]
    assert client(port).models.retrieve("small").max_model_len == 64
    assert json.loads(ask(port, "/tokenize", {"prompt": "hi"})[2])["tokens"] == [104, 105]
    assert json.loads(ask(port, "/detokenize", {"tokens": [104, 105]})[2]) == {"prompt": "hi"}
    ask(port, "/v1/embeddings", EVERY["/v1/embeddings"])
    numbers = ask(port, "/metrics", method="GET")[2].decode()
    for name in ("num_requests_running", "num_requests_waiting", "prompt_tokens_total", "e2e_request_latency_seconds"):
        assert f"vllm:{name}" in numbers
    assert 'vllm:request_success_total{finished_reason="stop",model_name="small"}' in numbers
    assert ask(port, "/health", method="GET")[0] == ask(port, "/ready", method="GET")[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        {"input": []},
        {"input": [[]]},
        {"input": ""},
        {"input": [384]},
        {"input": [-1]},
        {"input": "a" * 65},
        {"input": "a" * 3_000_000},
        {"input": ["a"] * 3000},
        {"input": "a", "dimensions": 8},
        {"input": "a", "encoding_format": "int8"},
        {"input": "a", "model": "other"},
        {"input": None},
        {"input": "a", "deadline_seconds": 1e-9},
    ],
    ids=lambda body: repr(body)[:50],
)
def test_what_is_malformed_is_refused_in_openai_s_form(encoder, body):
    status, _, text = ask(encoder[0], "/v1/embeddings", body)
    error = json.loads(text)["error"]
    assert 400 <= status < 500 and set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 400


def test_overload_is_refused_and_passes():
    found = []

    def one(port):
        found.append(ask(port, "/v1/embeddings", {"input": TEXTS * 20})[0])

    with serving("encoder", queue=2) as (port, model):
        threads = [threading.Thread(target=one, args=(port,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {200, 429}
        deadline = threading.Event()
        while model.worker.num_running or model.worker.num_waiting:
            assert not deadline.wait(0.01)
        assert ask(port, "/v1/embeddings", {"input": "a"})[0] == 200


def test_a_failure_of_the_model_is_said_to_all(monkeypatch):
    def fail(_):
        raise RuntimeError("the device is gone")

    with serving("encoder") as (port, _):
        monkeypatch.setattr(pooled("encoder"), "run", fail)
        assert ask(port, "/v1/embeddings", {"input": "a"})[0] == 500
        assert ask(port, "/health", method="GET")[0] == 503
        assert ask(port, "/v1/embeddings", {"input": "a"})[0] == 503


# ---- What is not served ----


@pytest.mark.parametrize(
    ("config", "batches", "said"),
    [
        (BASE, BATCHES, "neither continues texts nor gives embeddings"),
        (dataclasses.replace(BASE, causal=False, head=HeadConfig(outputs=3)), BATCHES, "every token has labels"),
        (CONFIGS["encoder"], BatchesConfig(lengths=(16, 65)), "more than the 64 tokens"),
    ],
)
def test_what_cannot_be_served_is_refused(config, batches, said):
    with pytest.raises(ValueError, match=said):
        Pooled(Transformer(config), params("encoder"), batches)


def test_sizes_that_make_no_sense_are_refused():
    for change, said in (
        ({"lengths": (8, 4)}, "batches.lengths"),
        ({"rows": (4,)}, "must begin with 1"),
        ({"tokens": 0}, "batches.tokens is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            BatchesConfig(**change)
    broken = jax.tree.map(lambda a: a * np.nan, params("encoder"))
    with pytest.raises(ValueError, match="The weights of small give outputs that are no numbers"):
        pooled_model("small", Transformer(CONFIGS["encoder"]), broken, TOKENIZER, BATCHES)
    # By default, powers of two and the model's own length.
    rows = BatchesConfig(rows=(1, 8), tokens=256)
    made = Pooled(Transformer(dataclasses.replace(CONFIGS["encoder"], max_length=40)), params("encoder"), rows)
    assert made.lengths == (16, 32, 40)
    assert [made.most(length) for length in made.lengths] == [8, 8, 1]
    assert made.run([Text(np.zeros(33, np.int32))]).shape == (1, 32)
