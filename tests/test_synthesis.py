"""New examples of a language model: asked for over a socket, sifted, paid once, priced; what addresses get wrong."""

import collections
import contextlib
import dataclasses
import http.server
import json
import sys
import threading

import numpy as np
import pytest
from labels import LABELS, experiment, session_of, write_folder

from jaxcost.cost.purchases import PriceConfig
from jaxcost.data.synthesis import SynthesisConfig
from jaxcost.data.synthesis.client import Answer, Writer
from jaxcost.labelling import write_folder as write_examples
from jaxcost.session import load_run
from jaxcost.synthesis import prompts, sifted, synthesize
from jaxcost.training.config import TrainingConfig


@contextlib.contextmanager
def address(answer, models=("small",)):
    """A server of OpenAI's API at a free port, and the bodies of its requests; `answer` gives each status and JSON."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"path": self.path, "key": self.headers["Authorization"]})
            self._send(*answer(body, len(asked)))

        def _send(self, status, body):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(body, bytes) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", asked
        finally:
            server.shutdown()
            thread.join()


def completion(text, reason="stop", read=7, generated=3):
    usage = {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}
    choice = {"index": 0, "finish_reason": reason, "text": text, "message": {"role": "assistant", "content": text}}
    return 200, {
        "id": "x",
        "object": "text_completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def written(body, _):
    """A text of the label that the prompt asks for; one in three of each label is of another."""
    label = body["prompt"].split("'")[1]
    word = {"red": "blue", "blue": "green", "green": "red"}[label] if body["seed"] // 3 % 3 == 2 else label
    letters = np.random.default_rng(body["seed"]).choice(list("xyz"), 12)
    return completion(f' "{word} {"".join(letters)}"\n')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher") / "run"
    session_of(experiment(folder, LABELS, "labels")).train(directory)
    return load_run(directory)[:2]


def session(folder, config, **changes):
    prices = PriceConfig(label_usd=0.1, read_token_usd=1e-6, generated_token_usd=1e-4)
    changes = {"prices": prices} | changes
    value = experiment(folder, LABELS, "labels", synthesis=config, **changes)
    return session_of(value)


@pytest.mark.slow
def test_new_examples_are_sifted_paid_once_and_priced_in_the_ledger(folder, teacher, tmp_path):
    config = SynthesisConfig(texts_per_label=6, examples=2, seed=3)
    with address(written) as (url, asked):
        made_by = session(folder, dataclasses.replace(config, url=url))
        found, counts = synthesize(made_by, teacher, tmp_path / "cache")
        assert len(asked) == 18 and all(body["path"] == "/v1/completions" for body in asked)
        assert counts["asked"] == 18 and counts["disagreed"] == 6 and counts["kept"] == len(found) == 12
        # A rerun asks for nothing, and more texts of each label only for what is new.
        assert synthesize(made_by, teacher, tmp_path / "cache") == (found, counts) and len(asked) == 18
        longer = session(folder, dataclasses.replace(config, url=url, texts_per_label=8))
        assert synthesize(longer, teacher, tmp_path / "cache")[1]["asked"] == 24 == len(asked)
    labels = made_by.train_stream.labels
    assert all(record["text"].startswith(f"{labels[record['label']]} ") for record in found)
    assert {(record["origin"], record["teacher"]) for record in found} == {("generated", f"small at {url}")}
    for record in found:
        kept = json.loads((tmp_path / "cache" / f"answer-{record['request']}.json").read_text())
        assert record["text"] in kept["answer"]["text"] and "'" + labels[record["label"]] in kept["asked"]["prompt"]
    # What was thrown away is paid for too.
    assert sum(record["tokens"] for record in found) == counts["generated_tokens"] == 18 * 3
    assert sum(record["read_tokens"] for record in found) == counts["read_tokens"] == 18 * 7

    write_examples(made_by, found, tmp_path / "out")
    student = session(tmp_path / "out", config, training=TrainingConfig(steps=2))
    student.train(tmp_path / "student")
    last = json.loads((tmp_path / "student" / "ledger.jsonl").read_text().splitlines()[-1])
    assert (last["labels"], last["generated_tokens"], last["read_tokens"]) == (120, 54, 126)
    assert last["data_usd"] == pytest.approx(120 * 0.1 + 54e-4 + 126e-6)
    # Whom new texts were asked of does not touch a training, which is done already.
    other = session(tmp_path / "out", SynthesisConfig(model="other"), training=TrainingConfig(steps=2))
    assert other.train(tmp_path / "student").steps == 2


def test_prompts_show_examples_of_their_label_and_a_label_may_have_its_own(folder):
    own = (("red", "Say {label} as in {examples}!"),)
    config = SynthesisConfig(prompts=own, texts_per_label=3, examples=2)
    train = session(folder, config).train_stream
    made = prompts(config, train)
    assert made == prompts(config, train) != prompts(dataclasses.replace(config, seed=1), train)
    texts = {" ".join(example["text"].split()): example["label"] for example in train}
    for label, prompt in made:
        name = train.labels[label]
        shown = prompt.removeprefix(f"Say {name} as in ").removesuffix("!").splitlines()
        shown = shown if name == "red" else prompt.splitlines()[1:]
        assert len(shown) == 2 and all(texts[text] == label for text in shown)
    assert len({prompt for _, prompt in made}) == 9
    # Braces in the data stay what they are.
    assert config.prompt("red", ("{label}",)) == "Say red as in {label}!"


def test_answers_that_are_no_new_texts_are_counted_by_the_reason():
    said = ["", " \n", "cut off here", "word", "one two three four five six", "A known text.", "held out words"]
    said += ["a new text", "A new  text!", "“another one entirely”"]
    answers = [Answer(text, text != "cut off here", 1, 1, str(i)) for i, text in enumerate(said)]
    config = SynthesisConfig(most_words=5)
    found, counts = sifted(config, range(10), answers, ["a known text", "held out words"])
    assert [(record["text"], record["label"]) for record in found] == [("a new text", 7), ("another one entirely", 9)]
    assert counts == {"asked": 10, "empty": 2, "unfinished": 1, "short": 1, "long": 1, "duplicates": 3}


def test_a_chat_is_asked_with_the_key_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with address(lambda *_: completion("an answer")) as (url, asked):
        writer = Writer(SynthesisConfig(url=url, api="chat", seed=5, stop=()), tmp_path)
        (answer,) = writer.answers(writer.model(), ["Write."])
    assert (answer.text, answer.finished, answer.read_tokens, answer.generated_tokens) == ("an answer", True, 7, 3)
    (body,) = asked
    assert body["path"] == "/v1/chat/completions" and body["key"] == "Bearer secret" and "stop" not in body
    assert body["messages"] == [{"role": "user", "content": "Write."}] and body["seed"] == 5
    assert not any("secret" in file.read_text() for file in tmp_path.iterdir())


def test_a_request_that_fails_is_sent_again_up_to_the_limit_and_what_was_answered_stays(tmp_path):
    failing = collections.Counter()

    def busy(body, _):
        failing[body["prompt"]] += 1
        broken = body["prompt"] == "broken" or failing[body["prompt"]] == 1
        return (503, {"error": {"message": "Too much to do."}}) if broken else completion("fine words")

    with address(busy) as (url, asked):
        writer = Writer(SynthesisConfig(url=url, retries=1, at_once=1), tmp_path)
        assert [answer.text for answer in writer.answers("small", ["a"])] == ["fine words"] and failing["a"] == 2
        with pytest.raises(
            ValueError, match=r"failed on a request and 1 retries \(503: Too much to do\); run this again"
        ):
            writer.answers("small", ["a", "broken", "never"])
        assert failing == {"a": 2, "broken": 2}
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "answer, message",
    [
        (
            (404, {"error": {"message": "No such model."}}),
            "knows no model 'big', but one, two; set synthesis.model to one",
        ),
        (
            (401, {"error": {"message": "Who is it?"}}),
            r"does not let this key in \(Who is it\?\); put one .* OPENAI_API_KEY",
        ),
        (
            (400, {"error": {"message": "It has no chat template."}}),
            r"refuses a request \(400: It has no chat template\)",
        ),
        ((200, {"choices": [], "usage": None}), "does not answer as OpenAI's API does .* set synthesis.url"),
        ((200, {"hello": 1}), "does not answer as OpenAI's API does"),
        ((200, b"<html>Hello</html>"), "does not answer as OpenAI's API does"),
    ],
)
def test_what_an_address_refuses_or_gets_wrong_is_one_sentence(tmp_path, answer, message):
    with address(lambda *_: answer, models=("two", "one")) as (url, _):
        writer = Writer(SynthesisConfig(url=url, retries=0), tmp_path)
        with pytest.raises(ValueError, match=message) as refused:
            writer.answers("big", ["a"])
        assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match=r"has 2 models \(one, two\); set synthesis.model to one"):
            writer.model()


def test_an_address_where_nobody_is_and_answers_of_no_use_are_one_sentence(folder, tmp_path, monkeypatch):
    with address(lambda *_: completion("", "length")) as (url, _):
        useless = session(folder, SynthesisConfig(url=url, texts_per_label=2))
        with pytest.raises(
            ValueError, match=r"None of the 6 answers of 'small' is an example \(empty 6\); change synth"
        ):
            synthesize(useless, cache_dir=tmp_path)
    writer = Writer(SynthesisConfig(url=url, retries=0), tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot be reached, with 0 retries \(.*\); start a server there, set synthesis.u"
    ):
        writer.model()
    with pytest.raises(ValueError, match="has one for 'pink', which is no label; the labels are blue, green, red"):
        synthesize(session(folder, SynthesisConfig(prompts=(("pink", "x"),))), cache_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"takes openai; `pip install 'jaxcost\[synthesis\]'`"):
        Writer(SynthesisConfig(), tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"url": "127.0.0.1:8000"}, "synthesis.url is '127.0.0.1:8000'; give an address such as http"),
        ({"api": "speech"}, "synthesis.api is 'speech'; use 'completions' or 'chat'"),
        ({"texts_per_label": 0}, "synthesis.texts_per_label is 0; it must be at least 1"),
        ({"retries": -1}, "synthesis.retries is -1; it cannot be negative"),
        ({"least_words": 9, "most_words": 8}, "most_words .8. is below synthesis.least_words .9.; raise it"),
        ({"likeness": 0.1}, "synthesis.likeness is 0.1; use a likeness from 0.3 to 1"),
        ({"timeout_seconds": 0.0}, "synthesis.timeout_seconds is 0.0; it must be above 0"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        SynthesisConfig(**settings)
