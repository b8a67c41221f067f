"""A load of requests on a server of OpenAI's API, and what its clients see of it.

Arrivals are open-loop: they come when they come, whatever the server has answered by then, because clients that wait
for each other hide how long a queue gets. Tokens of prompts are random ids, so that no two begin alike.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Sequence

import numpy as np

from jaxcost.cost.hardware import Hardware


class BadServer(ValueError):
    """A server that cannot be reached or does not answer as OpenAI's API does."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent, and what is good enough an answer."""

    requests: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    first_token_seconds: float
    token_seconds: float
    seed: int = 0
    deadline_seconds: float | None = None
    """After which an answer is of no use any more, and the server is told so; none if not given."""

    def __post_init__(self):
        if self.requests < 1:
            raise ValueError(f"requests is {self.requests}; it must be at least 1.")
        for name in ("prompt_tokens", "new_tokens"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(f"{name} is {least} {most}; give two rising numbers of at least 1.")


@dataclasses.dataclass
class Answer:
    """One request as its client saw it; seconds from when it was due."""

    prompt_tokens: int
    status: int = 0
    """0 if the connection failed."""
    first_token_seconds: float | None = None
    seconds: float | None = None
    """None if it was refused or failed."""
    new_tokens: int = 0

    @property
    def token_seconds(self) -> float | None:
        """Mean of the tokens after the first."""
        if self.seconds is None or self.new_tokens < 2:
            return None
        return (self.seconds - self.first_token_seconds) / (self.new_tokens - 1)


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """What a load came to. Percentiles are of those that were answered; measured."""

    requests_per_second: float
    """That were sent; 0 if one at a time."""
    answered: int
    refused: int
    """With status 429 or 503."""
    late: int
    """Ended at their deadline, with status 408 or 504, or in the middle of their stream."""
    failed: int
    seconds: float
    """From the first arrival to the last answer."""
    prompt_tokens: int
    """Of all that were answered."""
    new_tokens: int
    new_tokens_per_second: float
    good_requests_per_second: float
    """Answered within both limits (goodput)."""
    first_token_seconds: dict[str, float]
    """Percentiles p50, p95 and p99."""
    token_seconds: dict[str, float]
    request_seconds: dict[str, float]
    usd_per_million_new_tokens: float | None
    """Price of the whole time over the tokens made; None where the chip's price is unknown."""
    kept_share: float | None = None
    """Of the tokens that the server's draft proposed meanwhile, by its own count; None without a draft."""


def measure(url: str, key: str, requests_per_second: float, load: Load, hardware: Hardware) -> LoadResult:
    """Puts a load on a server; BadServer if there is none."""
    if requests_per_second < 0:
        raise ValueError(f"{requests_per_second} requests a second were asked for; ask for 0 or more.")
    server = Server(url, key)
    random = np.random.default_rng(load.seed)
    lengths = [(int(random.integers(*load.prompt_tokens, endpoint=True)),
                int(random.integers(*load.new_tokens, endpoint=True))) for _ in range(load.requests)]  # fmt: skip
    bodies = [
        {
            "model": server.model,
            "prompt": random.integers(0, server.vocab_size, prompt).tolist(),
            "max_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "deadline_seconds": load.deadline_seconds,
        }
        for prompt, new in lengths
    ]
    answers = [Answer(prompt) for prompt, _ in lengths]
    before, began = server.drafted(), time.monotonic()
    if not requests_per_second:
        for body, answer in zip(bodies, answers, strict=True):
            server.ask(body, answer, time.monotonic())
    else:
        due = began + np.cumsum(random.exponential(1 / requests_per_second, load.requests))
        threads = []
        for body, answer, at in zip(bodies, answers, due, strict=True):
            time.sleep(max(0.0, at - time.monotonic()))
            threads.append(threading.Thread(target=server.ask, args=(body, answer, at), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()
    found = _result(requests_per_second, answers, time.monotonic() - began, load, hardware)
    proposed, kept = (after - first for after, first in zip(server.drafted(), before, strict=True))
    return dataclasses.replace(found, kept_share=kept / proposed) if proposed else found


def _result(rate: float, answers: Sequence[Answer], seconds: float, load: Load, hardware: Hardware) -> LoadResult:
    done = [a for a in answers if a.seconds is not None]
    refused, late = (sum(a.status in which for a in answers) for which in ((429, 503), (408, 504)))
    good = [
        a
        for a in done
        if a.first_token_seconds <= load.first_token_seconds and (a.token_seconds or 0) <= load.token_seconds
    ]
    new_tokens, usd = sum(a.new_tokens for a in done), hardware.usd(seconds)
    return LoadResult(
        requests_per_second=rate,
        answered=len(done),
        refused=refused,
        late=late,
        failed=len(answers) - len(done) - refused - late,
        seconds=seconds,
        prompt_tokens=sum(a.prompt_tokens for a in done),
        new_tokens=new_tokens,
        new_tokens_per_second=new_tokens / seconds,
        good_requests_per_second=len(good) / seconds,
        first_token_seconds=_percentiles([a.first_token_seconds for a in done]),
        token_seconds=_percentiles([a.token_seconds for a in done if a.token_seconds is not None]),
        request_seconds=_percentiles([a.seconds for a in done]),
        usd_per_million_new_tokens=None if usd is None or not new_tokens else 1e6 * usd / new_tokens,
    )


def table(results: Sequence[LoadResult]) -> str:
    """The results for people."""
    lines = ["requests/s  answered refused late failed  tokens/s  good req/s  first token p50/p95/p99 s  "
             "token p50/p95/p99 ms  USD/1M tokens  draft kept"]  # fmt: skip
    for r in results:
        first = "/".join(f"{value:.2f}" for value in r.first_token_seconds.values())
        each = "/".join(f"{1000 * value:.1f}" for value in r.token_seconds.values())
        usd = "unknown" if r.usd_per_million_new_tokens is None else f"{r.usd_per_million_new_tokens:.4f}"
        kept = "" if r.kept_share is None else f"{r.kept_share:.2f}"
        rate = f"{r.requests_per_second:g}" if r.requests_per_second else "one by one"
        lines.append(
            f"{rate:>10}  {r.answered:>8} {r.refused:>7} {r.late:>4} {r.failed:>6}  {r.new_tokens_per_second:>8.1f}  "
            f"{r.good_requests_per_second:>10.2f}  {first:>25}  {each:>20}  {usd:>13}  {kept:>10}"
        )
    return "\n".join(lines)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)} if values else {}


class Server:
    """The server under load."""

    def __init__(self, url: str, key: str):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadServer(f"{url} is no address of a server; give one such as http://127.0.0.1:8000.")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect = lambda: kind(parts.hostname, parts.port, timeout=600)
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.model = json.loads(self.get("/v1/models"))["data"][0]["id"]
        self.vocab_size = json.loads(self.get("/tokenizer_info"))["vocab_size"]

    def get(self, path: str) -> bytes:
        """The body of an address; BadServer if there is none."""
        status, content = self._answer(path)
        if status != 200:
            raise BadServer(f"The server answers {path} with status {status}; check its --key.")
        return content

    def drafted(self) -> tuple[float, float]:
        """Tokens that a draft of the server has proposed so far, and those that were kept; 0 where nothing is said of
        them."""
        status, content = self._answer("/metrics")
        lines = [line.split() for line in content.decode().splitlines()] if status == 200 else []
        names = (f"vllm:spec_decode_num_{kind}_tokens_total" for kind in ("draft", "accepted"))
        return tuple(sum(float(line[-1]) for line in lines if line and line[0].startswith(name)) for name in names)

    def _answer(self, path: str) -> tuple[int, bytes]:
        """Status and body of an address; BadServer if it cannot be reached."""
        connection = self._connect()
        try:
            connection.request("GET", path, headers=self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError as error:
            raise BadServer(f"The server cannot be reached ({error}); start it with scripts/serve.py.") from None
        finally:
            connection.close()

    def ask(self, body: dict, answer: Answer, due: float) -> None:
        """Sends a request that was due at a time of `time.monotonic`, and notes what comes of it."""
        connection = self._connect()
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers)
            response = connection.getresponse()
            answer.status = response.status
            if response.status != 200:
                return
            for line in response:
                if line.startswith(b"data: {"):
                    self._note(json.loads(line[len(b"data: ") :]), answer, time.monotonic() - due)
        except OSError:
            answer.status, answer.seconds = 0, None
        finally:
            connection.close()

    @staticmethod
    def _note(event: dict, answer: Answer, seconds: float) -> None:
        if event.get("choices") and answer.first_token_seconds is None:
            answer.first_token_seconds = seconds
        if event.get("error", {}).get("type") == "timeout_error":
            answer.status = 408
        if event.get("usage"):
            answer.new_tokens, answer.seconds = event["usage"]["completion_tokens"], seconds
