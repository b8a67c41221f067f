"""scripts/serve.py as a process: it starts, is asked by many, and goes without losing what it took."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from checkpoints import FIELDS, tensors_of, write
from serving import TOKENIZER
from test_api import ask, client
from test_api_images import file as image_file
from test_api_images import image, part
from test_api_speech import file as sound_file
from test_api_speech import sound

from jaxcost.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    TrainingConfig,
)
from jaxcost.conversion import import_checkpoint
from jaxcost.cost.hardware import HardwareConfig, resolve
from jaxcost.data.pretrained import write_tokenizer
from jaxcost.serving.benchmark import Load, measure
from jaxcost.session import Session
from jaxcost.transforms import lora

ROOT = Path(__file__).parent.parent
FEW = ("--engine.slots", "4", "--engine.decode-slots", "4", "--engine.max-length", "100")
"""Few programs to compile."""
SMALL = FIELDS | {"vocab_size": 257, "max_position_embeddings": 512, "model_type": "llama"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "source").mkdir()
    ids = write_tokenizer(TOKENIZER, folder / "source")
    write(folder / "source", SMALL | ids, tensors_of(SMALL))
    import_checkpoint(folder / "source", folder / "small", quiet=True)
    return folder / "small"


def command(run, *arguments):
    return [sys.executable, str(ROOT / "scripts" / "serve.py"), str(run), "--port", "0", *arguments]


@contextlib.contextmanager
def process(run, *arguments):
    """The script, and the port that it says it serves at."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command(run, *arguments), **options) as started:
        try:
            line = started.stdout.readline()
            assert line.startswith("serving at http://127.0.0.1:"), started.stderr.read()
            yield started, int(line.rpartition(":")[2])
        finally:
            started.kill()


def post(port, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse


@pytest.mark.slow
def test_sigterm_under_load_loses_no_request_that_was_accepted(run, tmp_path):
    result = tmp_path / "result.json"
    with process(run, "--json", str(result)) as (started, port):
        sent = [post(port, {"prompt": "a" * (i + 1), "max_tokens": 300, "ignore_eos": True, "stream": i % 2 == 0})
                for i in range(24)]  # fmt: skip
        answers = []

        def read(get):
            answer = get()
            answers.append((answer.status, answer.read().decode()))

        threads = [threading.Thread(target=read, args=(get,)) for _, get in sent]
        for thread in threads:
            thread.start()
        # They are all in the server's hands once its log has as many as its queue and slots.
        wait_until_taken(port, 24)
        started.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        log = started.stderr.read()
        assert started.wait(60) == 0, log
    assert [status for status, _ in answers] == [200] * 24
    assert all('"finish_reason":"length"' in text.replace('": "', '":"') for _, text in answers)
    assert json.loads(result.read_text())["model"] == "small"
    assert "aaa" not in log and '"status": 200' in log


def metrics(port):
    """The lines of /metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return lines


def wait_until_taken(port, count):
    for _ in range(1000):
        lines = metrics(port)
        gauges = [line for line in lines if line.startswith(("vllm:num_requests_", "vllm:request_success_total"))]
        if sum(float(line.split()[-1]) for line in gauges) >= count:
            return
    raise AssertionError(lines)


@pytest.fixture(scope="module")
def tuned(run, tmp_path_factory):
    """A few steps of lora on it."""
    folder = tmp_path_factory.mktemp("tuned")
    data = {"name": "python_text/reference", "data_dir": str(folder / "data")}
    experiment = Experiment(
        start=str(run),
        data=DataConfig(batch_size=8, sequence_length=32, **data),
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=1),
        training=TrainingConfig(steps=4, evaluate_every=4),
        evaluation=EvaluationConfig(max_tokens=64),
        transforms=(lora(rank=2),),
    )
    Session(experiment, quiet=True).train(folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_a_canary_is_scored_while_it_serves(tuned):
    script = [sys.executable, str(ROOT / "scripts" / "canary.py"), str(tuned), "--count", "2", "--length", "24"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(script, check=True, env=environment, timeout=300)
    with process(tuned, "--canary-seconds", "0.1", *FEW) as (started, port):
        shown = {}
        while not shown.get("jaxcost:canary_rounds"):
            shown = {line.split("{")[0]: float(line.split()[-1]) for line in metrics(port) if line[0] != "#"}
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
    assert shown["jaxcost:canary_drifted"] == 0
    reference = shown["jaxcost:canary_reference_nats_per_token"]
    assert shown["jaxcost:canary_nats_per_token"] == pytest.approx(reference, abs=1e-3)


@pytest.mark.slow
def test_adapters_are_asked_for_by_name(run, tuned):
    body = {"prompt": "abc", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    with process(run, "--adapters", f"other={tuned}", "--name", "base") as (_, port):
        answers = [json.loads(post(port, body | {"model": name})[1]().read()) for name in ("base", "other", "none")]
    assert answers[2]["error"]["code"] == "model_not_found"
    of_base, of_other = (answer["choices"][0]["logprobs"]["token_logprobs"] for answer in answers[:2])
    assert len(of_base) == len(of_other) == 40 and of_base != of_other


SIZES = {"num_layers": 2, "num_heads": 2, "d_model": 8, "d_kv": 4, "d_ff": 12, "vocab_size": 257}
SPEECH = {"d_model": 8, "num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 100, "vocab_size": 257}
SPEECH |= {f"{part}_{size}": n for part in ("encoder", "decoder")
           for size, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 12))}  # fmt: skip
CHECKPOINTS = {
    "t5": SIZES | {"architectures": ["T5ForConditionalGeneration"], "decoder_start_token_id": 0},
    "whisper": SPEECH | {"architectures": ["WhisperForConditionalGeneration"], "decoder_start_token_id": 1},
    "vit": {"architectures": ["ViTForImageClassification"], "hidden_size": 8, "num_hidden_layers": 1, "image_size": 8}
    | {"num_attention_heads": 2, "intermediate_size": 12, "patch_size": 4, "id2label": {"0": "cat", "1": "dog"}},
}


def imported(name, folder):
    """A training's folder of a small random checkpoint of a family."""
    fields = CHECKPOINTS[name] | {"model_type": name}
    (folder / "source").mkdir()
    ids = write_tokenizer(TOKENIZER, folder / "source")
    write(folder / "source", fields | ids, tensors_of(fields))
    import_checkpoint(folder / "source", folder / "small", quiet=True)
    return folder / "small"


@pytest.mark.slow
def test_an_encoder_decoder_says_what_generate_says(tmp_path):
    run = imported("t5", tmp_path)
    body = {"prompt": "some words", "max_tokens": 20, "temperature": 0}
    with process(run, *FEW) as (_, port):
        [choice] = json.loads(post(port, body)[1]().read())["choices"]
    script = [sys.executable, str(ROOT / "scripts" / "generate.py"), str(run), "--source", "some words"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    options = ["--tokens", "20", "--temperature", "0", "--json", str(tmp_path / "said.json")]
    subprocess.run([*script, *options], check=True, env=environment, timeout=300)
    assert choice["text"] == json.loads((tmp_path / "said.json").read_text())["text"] != ""


@pytest.mark.slow
def test_recordings_and_images_are_taken_by_the_models_for_them(tmp_path):
    (tmp_path / "speech").mkdir()
    (tmp_path / "vision").mkdir()
    with process(imported("whisper", tmp_path / "speech"), *FEW) as (_, port), client(port) as openai:
        said = openai.audio.transcriptions.create(
            file=("a.wav", sound_file(sound(0.5))), model="small", response_format="verbose_json"
        )
    assert said.duration == 0.5 and len(said.segments) == 1
    picture = {"input": part(image_file(image(1)))}
    with process(imported("vit", tmp_path / "vision")) as (_, port):
        status, _, text = ask(port, "/v1/classify", picture)
    assert status == 200 and json.loads(text)["data"][0]["label"] in ("cat", "dog")


@pytest.mark.slow
def test_a_draft_changes_no_answer_and_its_proposals_are_counted(run, tuned):
    bodies = [{"prompt": "abc"[:n], "max_tokens": 40, "temperature": 0, "ignore_eos": True} for n in (1, 2, 3)]
    answers, load = [], Load(4, (2, 9), (20, 30), first_token_seconds=60.0, token_seconds=60.0)
    for arguments in ((), ("--draft", str(run)), ("--draft", str(tuned), "--draft-tokens", "2")):
        with process(run, *FEW, *arguments) as (_, port):
            given = [json.loads(post(port, body)[1]().read())["choices"][0]["text"] for body in bodies]
            shown = {line.split("{")[0]: float(line.split()[-1]) for line in metrics(port) if line[0] != "#"}
            loaded = measure(f"http://127.0.0.1:{port}", "none", 0.0, load, resolve(HardwareConfig("h100", 1)))
        answers.append(given)
        if arguments:
            proposed, kept = (shown[f"vllm:spec_decode_num_{name}_tokens_total"] for name in ("draft", "accepted"))
            assert proposed > 0 and (kept == proposed if str(run) in arguments else kept < proposed)
            assert (loaded.kept_share == 1) == (str(run) in arguments)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.slow
def test_what_cannot_be_served_is_said_in_one_line(run, tmp_path):
    def failure(folder, *arguments):
        done = subprocess.run(command(folder, *arguments), capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
        return done.stderr

    assert "holds no run" in failure(tmp_path)
    assert "engine.max_length is 5000, more than the 512" in failure(run, "--engine.max-length", "5000")
    assert "--adapters x: write NAME=FOLDER" in failure(run, "--adapters", "x")
    assert "are the same" in failure(run, "--adapters", "small=x")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is of peft; give it to scripts/convert.py" in failure(run, "--adapters", f"other={tmp_path}")
    assert "0 proposals were asked for" in failure(run, "--draft", str(run), "--draft-tokens", "0")
    assert "holds no run" in failure(run, "--draft", str(tmp_path))
    assert "cannot be listened at" in failure(run, "--host", "203.0.113.7")
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "0" / "tree").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "/checkpoints/0 cannot be read" in failure(tmp_path / "run")
