"""Other clients of OpenAI's API, unchanged: litellm, and the evaluation harness lm-eval."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import test_api_answers
import test_api_pooling
import test_api_speech
from serving import TOKENIZER, alone, log_probabilities
from test_api import TEMPLATE, serving, text_of

from jaxcost.data.pretrained import read_tokenizer, write_tokenizer
from jaxcost.data.sounds import read_sound
from jaxcost.data.spectrogram import SAMPLE_RATE

pytestmark = pytest.mark.oracles


@pytest.fixture
def litellm(monkeypatch):
    # It would fetch a table of prices.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    return litellm


def test_litellm_completes_and_chats(litellm, tmp_path):
    fields = write_tokenizer(TOKENIZER, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    with serving(read_tokenizer(tmp_path)) as (port, _):
        where = {"api_base": f"http://127.0.0.1:{port}/v1", "api_key": "none", "temperature": 0}
        whole = litellm.text_completion(model="text-completion-openai/small", prompt="abc", max_tokens=9, **where)
        assert whole.choices[0].text == text_of("abc", 9) and whole.usage.completion_tokens == 9
        messages = [{"role": "user", "content": "hello"}]
        options = {"model": "openai/small", "messages": messages, "max_tokens": 8, **where}
        chat = litellm.completion(**options)
        assert chat.choices[0].finish_reason == "length" and chat.usage.completion_tokens == 8
        pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**options, stream=True)]
        assert "".join(pieces) == chat.choices[0].message.content
        with pytest.raises(litellm.BadRequestError, match="more than the 96 that the model takes"):
            litellm.completion(**options | {"max_tokens": 1000})


def test_litellm_embeds(litellm):
    with test_api_pooling.serving("encoder") as (port, _):
        where = {"api_base": f"http://127.0.0.1:{port}/v1", "api_key": "none"}
        found = litellm.embedding(model="openai/small", input=["a", "some words"], **where)
    for entry, text in zip(found.data, ["a", "some words"], strict=True):
        np.testing.assert_allclose(entry["embedding"], test_api_pooling.embedding("encoder", text), atol=1e-5)


def test_litellm_transcribes(litellm):
    content = test_api_speech.file(test_api_speech.sound(0.2))
    with test_api_speech.serving(test_api_speech.make("dictated")) as port:
        where = {"api_base": f"http://127.0.0.1:{port}/v1", "api_key": "none"}
        found = litellm.transcription(model="openai/small", file=("a.wav", content), language="en", **where)
    samples = read_sound(content, SAMPLE_RATE, 9)
    assert found.text == test_api_speech.dictation(samples, [300, 301, 303, 305]).strip() != ""


def test_litellm_translates_texts(litellm):
    with test_api_answers.serving() as (port, _):
        where = {"api_base": f"http://127.0.0.1:{port}/v1", "api_key": "none", "temperature": 0, "max_tokens": 9}
        found = litellm.text_completion(model="text-completion-openai/small", prompt=test_api_answers.TEXTS[1], **where)
    assert found.choices[0].text == test_api_answers.text_of(test_api_answers.TEXTS[1], 9)


QUESTIONS = [
    {"question": "one two", "choices": ["three", "seven"], "answer": 0},
    {"question": "red green", "choices": ["cat", "blue"], "answer": 1},
    {"question": "a", "choices": ["b", "c"], "answer": 0},
]
TASKS = {
    "own_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "own_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\u0000"], "max_gen_toks": 7, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def test_lm_eval_scores_and_generates(tmp_path):
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}}}
    for name, task in TASKS.items():
        # JSON is YAML.
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    with serving() as (port, _):
        where = f"model=small,base_url=http://127.0.0.1:{port}/v1/completions,tokenizer_backend=remote,max_length=96"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", where]
        command += ["--tasks", ",".join(TASKS), "--include_path", str(tmp_path), "--log_samples"]
        command += ["--output_path", str(tmp_path / "out"), "--batch_size", "2"]
        environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {name: _samples(tmp_path / "out", name) for name in TASKS}
    for question, sample in zip(QUESTIONS, samples["own_choices"], strict=True):
        for choice, (found, _) in zip(question["choices"], sample["filtered_resps"], strict=True):
            assert float(found) == pytest.approx(likelihood(question["question"], " " + choice), abs=1e-3)
    for question, sample in zip(QUESTIONS, samples["own_answers"], strict=True):
        assert sample["resps"][0][0] == TOKENIZER.decode(alone(TOKENIZER.encode(question["question"]), 7))


def _samples(folder, task):
    """What lm-eval has noted of each question, in their order."""
    [file] = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def likelihood(context, continuation):
    """Log-likelihood of a text behind another; lm-eval puts nothing before them."""
    ids = TOKENIZER.encode(context + continuation).tolist()
    new = len(TOKENIZER.encode(continuation))
    return log_probabilities(ids)[np.arange(len(ids) - 1), ids[1:]][-new:].sum()
