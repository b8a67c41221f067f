"""The live view of a study: what its folder says before, while and after it runs, and who may ask."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from fastapi.testclient import TestClient

from jaxcost.cost.ledger import Ledger
from jaxcost.study.watch import create_app, state

SCRIPT = Path(__file__).parent.parent / "scripts" / "watch.py"


def start_training(folder, steps=10, lines=()):
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(json.dumps({"training": {"steps": steps}}))
    if lines:
        (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def step(number):
    return {"step": number, "loss": 9.0 - number, "tokens_per_second": 100.0 * number}


def test_a_study_that_starts_later_is_followed_to_its_end(tmp_path):
    folder = tmp_path / "study"
    client = TestClient(create_app(folder))
    asked = client.get("/state.json")
    assert asked.json() == {"lines": [], "runs": [], "quiet_seconds": None, "finished": False}
    assert asked.headers["cache-control"] == "no-store" and client.get("/report.html").status_code == 404

    start_training(folder / "base", 10, [step(1), step(2)])
    start_training(folder / "recoveries" / "waiting")
    start_training(folder / "recoveries" / "0123", 3, [step(1)])
    (run, other) = sorted(client.get("/state.json").json()["runs"], key=lambda run: run["name"])
    assert other["name"] == "recoveries/0123" and other["steps"] == 3
    assert run == {"name": "base", "steps": 10, "step": 2, "loss": 7.0, "tokens_per_second": 200.0}

    ledger = Ledger(folder / "ledger.jsonl")
    ledger.charge(seconds=5, tokens=7)
    line = ledger.record(0, event="base", score=2.0)
    found = client.get("/state.json").json()
    assert found["lines"] == [line] and not found["finished"] and 0 <= found["quiet_seconds"] < 60

    (folder / "report.html").write_text("the report")
    (folder / "study.json").write_text("{}")
    assert client.get("/state.json").json()["finished"] and client.get("/report.html").text == "the report"
    later = (folder / "study.json").stat().st_mtime + 5
    os.utime(folder / "ledger.jsonl", (later, later))
    assert not client.get("/state.json").json()["finished"], "a study that was started again is running"


def test_a_line_that_is_half_written_waits_and_a_damaged_one_is_said(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    whole = ledger.record(0, event="base", score=2.0)
    text = json.dumps(whole | {"step": 1, "recipe": "é"}, ensure_ascii=False).encode()
    for cut in (1, len(text) // 2, text.index("é".encode()) + 1, len(text)):
        with open(tmp_path / "ledger.jsonl", "ab") as file:
            file.write(text[:cut])
        assert state(tmp_path)["lines"] == [whole]
        os.truncate(tmp_path / "ledger.jsonl", len(json.dumps(whole)) + 1)
    (tmp_path / "ledger.jsonl").write_bytes(text + b"\n")
    assert state(tmp_path)["lines"][0]["recipe"] == "é"
    (tmp_path / "ledger.jsonl").write_bytes(b"{\n" + text + b"\n")
    asked = TestClient(create_app(tmp_path)).get("/state.json")
    assert asked.status_code == 500 and "Line 1" in asked.json()["error"]


def test_the_newest_step_of_a_long_file_is_read_from_its_end(tmp_path):
    start_training(tmp_path / "base", 1000, [step(number) for number in range(1, 1001)])
    assert (tmp_path / "base" / "steps.jsonl").stat().st_size > 50_000
    with open(tmp_path / "base" / "steps.jsonl", "a") as file:
        file.write('{"step": 1001, "lo')
    assert state(tmp_path)["runs"][0]["step"] == 1000
    (tmp_path / "base" / "steps.jsonl").write_text('{"step": 1')
    assert state(tmp_path)["runs"][0]["step"] is None


def test_the_page_says_its_folder_as_text_and_may_ask_nobody_else(tmp_path):
    shown = TestClient(create_app(Path("<b>runs</b>"))).get("/")
    assert "<b>runs" not in shown.text and "&lt;b&gt;runs" in shown.text
    assert "connect-src 'self'" in shown.headers["content-security-policy"]


def test_pages_of_other_sites_cannot_read_it_under_a_name_of_theirs(tmp_path):
    app = create_app(tmp_path, ("127.0.0.1", "localhost"))
    assert TestClient(app, base_url="http://localhost:8001").get("/state.json").status_code == 200
    assert TestClient(app, base_url="http://attacker.example").get("/state.json").status_code == 400


def test_the_script_serves_until_it_is_told_to_stop(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), str(tmp_path / "later"), "--port", "0", "--json", str(out)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        try:
            line = started.stdout.readline()
            assert line.startswith("serving at http://127.0.0.1:"), started.stderr.read()
            address = line.split()[-1]
            Ledger(tmp_path / "later" / "ledger.jsonl").record(0, event="base", score=2.0)
            with urllib.request.urlopen(f"{address}/state.json", timeout=30) as answered:
                assert json.load(answered)["lines"][0]["score"] == 2.0
            started.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert started.wait(timeout=30) == 0 and time.monotonic() - began < 20
        finally:
            started.kill()
    assert json.loads(out.read_text())["schema"] == "jaxcost-watch-1"


def test_a_file_is_no_folder_of_a_study(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "file")]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and "--workdir" in ended.stderr
