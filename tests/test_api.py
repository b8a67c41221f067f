"""The API as its clients see it, over a socket: OpenAI's client, what is malformed, who may ask, and who goes away."""

import contextlib
import http.client
import json
import math
import socket
import threading
import time

import numpy as np
import openai
import pytest
import uvicorn
from serving import CONFIG, MODEL, SLOTS, TOKENIZER, alone, log_probabilities, params, slots

from jaxcost.cost.hardware import HardwareConfig, resolve
from jaxcost.data.pretrained import read_tokenizer, write_tokenizer
from jaxcost.data.synthesis import SynthesisConfig
from jaxcost.data.synthesis.client import Writer
from jaxcost.serving.api.app import create_app
from jaxcost.serving.api.config import ApiConfig
from jaxcost.serving.api.generation import TextModel
from jaxcost.serving.api.load import text_model
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.api.protection import read_keys
from jaxcost.serving.prefix import PrefixCache
from jaxcost.serving.scheduler import Scheduler
from jaxcost.serving.vocabulary import Vocabulary
from jaxcost.serving.worker import SchedulerConfig

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@contextlib.contextmanager
def serving(tokenizer=TOKENIZER, keys=(), config=ApiConfig(), queue=256, **options):  # noqa: B008
    """A server at a free port, and the model behind it."""
    vocabulary = Vocabulary(tokenizer)
    model = TextModel("small", vocabulary, Scheduler(slots(), vocabulary.decode, SchedulerConfig(queue), **options))
    metrics = Metrics("small", resolve(HardwareConfig("h100", 1)))
    metrics.watch(model.scheduler)
    with listening(create_app(model, metrics, keys, config)) as port:
        yield port, model
    assert not model.scheduler.healthy


@contextlib.contextmanager
def listening(app):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With a chat template, shared by tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("tokenizer")
    fields = write_tokenizer(TOKENIZER, folder)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with serving(read_tokenizer(folder), prefixes=PrefixCache(slots(), 1 << 20)) as (port, model):
        yield port, model


def client(port, key="none"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


def ask(port, path, body=None, headers=(), method="POST"):
    """Status, headers and body of one request; `body` is sent as JSON unless it is bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, content, {"Content-Type": "application/json", **dict(headers)})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, answer.headers, text


def text_of(prompt, new_tokens):
    """What the model says to a text, alone."""
    ids = np.concatenate([[TOKENIZER.separator_id], TOKENIZER.encode(prompt)]).astype(np.int32)
    return TOKENIZER.decode(alone(ids, new_tokens))


# ---- OpenAI's client ----


def test_completions_whole_and_streamed(server):
    ask_for = client(server[0]).completions.create
    options = {"model": "small", "prompt": "hello wo", "max_tokens": 12, "temperature": 0}
    want = text_of("hello wo", 12)
    whole = ask_for(**options)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (want, "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, 12)
    assert whole.usage.cost_usd > 0 and whole.usage.energy_kwh > 0
    chunks = list(ask_for(**options, stream=True, n=2, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 24 and not chunks[-1].choices
    for index in range(2):
        assert "".join(c.choices[0].text for c in chunks[:-1] if c.choices[0].index == index) == want
    both = ask_for(**options | {"prompt": ["hello wo", "x"]})
    assert [choice.index for choice in both.choices] == [0, 1] and both.choices[0].text == want
    # The second time, the prompt is there already.
    long = options | {"prompt": "0123456789abcdefghij"}
    assert ask_for(**long).choices[0].text == ask_for(**long).choices[0].text
    assert ask_for(**long).usage.prompt_tokens_details.cached_tokens == 16


def test_stop_strings_and_seeds(server):
    ask_for = client(server[0]).completions.create
    want = text_of("abc", 20)
    got = ask_for(model="small", prompt="abc", max_tokens=20, temperature=0, stop=[want[6:8]])
    assert (got.choices[0].text, got.choices[0].finish_reason) == (want[: want.index(want[6:8])], "stop")
    drawn = [ask_for(model="small", prompt="abc", max_tokens=16, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    two = ask_for(model="small", prompt="abc", max_tokens=16, seed=1, n=2).choices
    assert two[0].text == drawn[0] != two[1].text


def test_echo_gives_the_log_probabilities_of_the_prompt(server):
    ids = [256, *TOKENIZER.encode("some words").tolist()]
    for max_tokens in (0, 3):
        got = client(server[0]).completions.create(
            model="small", prompt=ids, max_tokens=max_tokens, temperature=0, echo=True, logprobs=2
        )
        found = got.choices[0].logprobs
        want = log_probabilities(ids)
        own = want[np.arange(len(ids) - 1), ids[1:]]
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        np.testing.assert_allclose(found.token_logprobs[1 : len(ids)], own, atol=1e-4)
        assert len(found.tokens) == len(found.text_offset) == len(ids) + max_tokens
        assert got.choices[0].text.startswith("some words") and found.text_offset[:4] == [0, 0, 1, 2]
        assert max(found.top_logprobs[1].values()) == pytest.approx(want[0].max(), abs=1e-4)


def test_chats_whole_and_streamed(server):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    options = {"model": "small", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    ids = TOKENIZER.encode("user: hello\nassistant:")
    want = TOKENIZER.decode(alone(ids, 8))
    whole = client(server[0]).chat.completions.create(**options, logprobs=True, top_logprobs=3)
    assert whole.choices[0].message.content == want
    entries = whole.choices[0].logprobs.content
    assert len(entries) == 8 and all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == want
    chunks = list(client(server[0]).chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == want
    assert chunks[-1].choices[0].finish_reason == "length"
    # Without a limit, to the end of the room.
    free = client(server[0]).chat.completions.create(model="small", messages=messages, extra_body={"ignore_eos": True})
    assert free.usage.total_tokens == CONFIG.max_length


def test_models_and_tokens(server):
    port = server[0]
    assert [model.id for model in client(port).models.list()] == ["small"]
    assert client(port).models.retrieve("small").max_model_len == CONFIG.max_length
    made = json.loads(ask(port, "/tokenize", {"prompt": "h\u00e9"})[2])
    assert made["tokens"] == [256, 104, 195, 169] and made["count"] == 4
    assert made["token_strs"][1:] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert json.loads(ask(port, "/detokenize", {"tokens": made["tokens"]})[2]) == {"prompt": "h\u00e9"}
    chat = json.loads(ask(port, "/tokenize", {"messages": [{"role": "user", "content": "x"}]})[2])
    assert TOKENIZER.decode(np.array(chat["tokens"])) == "user: x\nassistant:"
    info = json.loads(ask(port, "/tokenizer_info", method="GET")[2])
    assert info["chat_template"] == TEMPLATE and info["eos_token_id"] == [256]


def test_without_a_template_there_is_no_chat():
    with serving() as (port, _), pytest.raises(openai.BadRequestError, match="no chat template"):
        client(port).chat.completions.create(model="small", messages=[{"role": "user", "content": "x"}])


def test_the_page_needs_nothing_from_elsewhere(server):
    status, headers, text = ask(server[0], "/", method="GET")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    page = text.decode()
    assert "http://" not in page and "https://" not in page and 'id="stop"' in page


# ---- What is malformed ----


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_new_texts_for_labels_may_be_asked_of_this_server(server, tmp_path, api):
    url = f"http://127.0.0.1:{server[0]}/v1"
    writer = Writer(SynthesisConfig(url=url, api=api, temperature=0.0, max_tokens=5, stop=()), tmp_path)
    (answer,) = writer.answers(writer.model(), ["abc"])
    completed = np.concatenate([[TOKENIZER.separator_id], TOKENIZER.encode("abc")])
    ids = TOKENIZER.encode("user: abc\nassistant:") if api == "chat" else completed
    assert answer.text == TOKENIZER.decode(alone(ids, 5))
    assert (answer.finished, answer.read_tokens, answer.generated_tokens) == (False, len(ids), 5)


GOOD = {"model": "small", "prompt": "a", "max_tokens": 1}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        GOOD | {"temperature": math.inf},
        GOOD | {"temperature": -1},
        GOOD | {"temperature": "hot"},
        GOOD | {"temperature": 1e39},
        GOOD | {"repetition_penalty": 1e300},
        GOOD | {"top_p": 0},
        GOOD | {"prompt": []},
        GOOD | {"prompt": [[]]},
        GOOD | {"prompt": [-1]},
        GOOD | {"prompt": [384]},
        GOOD | {"prompt": {"a": 1}},
        GOOD | {"prompt": "a" * 3_000_000},
        GOOD | {"prompt": [5] * 100},
        GOOD | {"prompt": ["a"] * 1000},
        GOOD | {"max_tokens": 0},
        GOOD | {"max_tokens": 10**6},
        GOOD | {"n": 0},
        GOOD | {"n": 10**6},
        GOOD | {"logprobs": 10**6},
        GOOD | {"stop": ["s"] * 5000},
        GOOD | {"stop": "s" * 10**6},
        GOOD | {"stop": [1]},
        GOOD | {"seed": 2**70},
        GOOD | {"logit_bias": {"5": 1}},
        GOOD | {"suffix": "b"},
        GOOD | {"best_of": 3},
        GOOD | {"model": "\ud800"},
    ],
    ids=lambda body: repr(body)[:60],
)
def test_what_is_malformed_is_refused_in_openai_s_form(server, body):
    status, _, text = ask(server[0], "/v1/completions", body)
    assert 400 <= status < 500
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and len(error["message"]) < 400


def test_addresses_and_bodies_that_are_not_there_or_too_large(server):
    port = server[0]
    for status, answer in (
        (404, ask(port, "/v1/nothing")),
        (405, ask(port, "/v1/completions", method="GET")),
        (404, ask(port, "/v1/completions", GOOD | {"model": "other"})),
        (413, ask(port, "/v1/completions", b'"' + b"a" * 10_000_000 + b'"')),
    ):
        assert answer[0] == status and json.loads(answer[2])["error"]["message"]
    # In pieces, so that nothing says beforehand how much comes.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.suppress(OSError):
        connection.request(
            "POST", "/v1/completions", iter([b'"' + b"a" * 4_000_000, b"b" * 4_000_000]), encode_chunked=True,
            headers={"Content-Type": "application/json", "Transfer-Encoding": "chunked"},
        )  # fmt: skip
    assert connection.getresponse().status == 413
    connection.close()
    # Half of a surrogate pair has no UTF-8.
    status, _, text = ask(port, "/v1/completions", GOOD | {"prompt": "\ud800", "echo": True, "stop": "\udfff"})
    assert status == 200 and json.loads(text)["choices"][0]["text"].startswith("?")


# ---- Who may ask ----


def test_keys_rates_and_concurrency(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst-secret\n")
    with pytest.raises(ValueError, match="chmod 600"):
        read_keys(file, {})
    file.chmod(0o600)
    keys = read_keys(file, {"JAXCOST_API_KEYS": "second-secret, "})
    with pytest.raises(ValueError, match="fewer than 8 characters"):
        read_keys(None, {"JAXCOST_API_KEYS": "short"})
    with pytest.raises(ValueError, match="cannot be read"):
        read_keys(tmp_path / "none", {})
    config = ApiConfig(requests_per_minute=3, concurrent_requests=1)
    with serving(keys=keys, config=config) as (port, _):
        for wrong in ("none", "first-secre", "first-secret2", "\u00e9"):
            status, headers, text = ask(port, "/v1/models", method="GET", headers={"Authorization": f"Bearer {wrong}"})
            assert status == 401 and headers["WWW-Authenticate"] == "Bearer" and wrong not in text.decode()
        assert [ask(port, path, method="GET")[0] for path in ("/health", "/ready", "/metrics")] == [200] * 3
        assert ask(port, "/docs", method="GET")[0] == 401
        for key in ("first-secret", "second-secret"):
            for _ in range(3):
                assert list(client(port, key).models.list())
            with pytest.raises(openai.RateLimitError, match="3 requests a minute") as refused:
                client(port, key).models.list()
            assert 1 <= int(refused.value.response.headers["Retry-After"]) <= 20


def test_a_browser_s_page_is_let_in_by_name_alone():
    origin = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    for origins, allowed in (((), None), (("https://page.example",), "https://page.example")):
        with serving(config=ApiConfig(cors_origins=origins)) as (port, _):
            answer = ask(port, "/v1/completions", method="OPTIONS", headers=origin)
            assert answer[1].get("Access-Control-Allow-Origin") == allowed


# ---- Load ----


def idle(model):
    """Waits until nothing runs or waits; false if that does not come."""
    deadline = time.monotonic() + 20
    while model.scheduler.num_running or model.scheduler.num_waiting:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def vanish(port, stream):
    """Sends a request, reads a little of its answer if it is a stream, and goes."""
    body = json.dumps(GOOD | {"max_tokens": 80, "stream": stream, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert connection.recv(200)


def test_clients_that_vanish_leave_no_slot():
    with serving() as (port, model):
        threads = [threading.Thread(target=vanish, args=(port, i % 2 == 0)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert idle(model)
        assert client(port).completions.create(**GOOD | {"prompt": "abc", "temperature": 0}).choices[0].text
        numbers = ask(port, "/metrics", method="GET")[2].decode()
    cancelled = [line for line in numbers.splitlines() if 'request_success_total{finished_reason="cancelled"' in line]
    assert float(cancelled[0].split()[-1]) > 0


def test_overload_is_refused_and_passes():
    found = []

    def one(port):
        status, headers, text = ask(port, "/v1/completions", GOOD | {"max_tokens": 60, "ignore_eos": True})
        found.append((status, headers.get("Retry-After")))

    with serving(queue=4) as (port, model):
        threads = [threading.Thread(target=one, args=(port,)) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [status for status, _ in found]
        assert set(statuses) == {200, 429} and statuses.count(200) >= SLOTS.slots + 4
        assert all(int(after) >= 1 for status, after in found if status == 429)
        assert idle(model) and ask(port, "/v1/completions", GOOD)[0] == 200


def test_what_is_late_is_said_to_be(server):
    late = GOOD | {"max_tokens": 80, "deadline_seconds": 1e-4, "ignore_eos": True}
    status, _, text = ask(server[0], "/v1/completions", late)
    assert status == 408 and json.loads(text)["error"]["type"] == "timeout_error"
    with pytest.raises(openai.APIError, match="not done by its deadline"):
        list(client(server[0]).completions.create(**GOOD, stream=True, extra_body={"deadline_seconds": 1e-4}))


def test_metrics_have_vllm_s_names(server):
    client(server[0]).completions.create(**GOOD)
    numbers = ask(server[0], "/metrics", method="GET")[2].decode()
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_hits",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        'vllm:request_success_total{finished_reason="length"',
        "jaxcost:request_cost_usd_total",
    ):
        assert name in numbers, name


@pytest.mark.slow
def test_a_failure_of_the_model_is_said_to_all(monkeypatch):
    def fail(*_):
        raise RuntimeError("the device is gone")

    with serving() as (port, _):
        monkeypatch.setattr(slots(), "decode", fail)
        with pytest.raises(openai.InternalServerError, match="The model has failed"):
            client(port).completions.create(**GOOD)
        assert ask(port, "/health", method="GET")[0] == ask(port, "/ready", method="GET")[0] == 503
        assert ask(port, "/v1/completions", GOOD)[0] == 503


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_refused():
    broken = {**params(), "unembed": {"kernel": params()["unembed"]["kernel"].at[3].set(np.nan)}}
    with pytest.raises(ValueError, match="The weights of small give outputs that are no numbers"):
        text_model("small", MODEL, broken, TOKENIZER, SLOTS)
