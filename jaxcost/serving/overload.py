"""What a server does when ten times as much is asked of it as it can answer, and how soon it is as before."""

from __future__ import annotations

import dataclasses
import re
import time

from jaxcost.cost.hardware import Hardware
from jaxcost.serving.benchmark import Answer, BadServer, Load, LoadResult, Server, measure

_MEMORY = re.compile(rb"^process_resident_memory_bytes (\S+)$", re.MULTILINE)
_PROBE_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class OverloadResult:
    """What an overload came to; measured."""

    capacity_requests_per_second: float
    """Answered of a burst that the server can hold."""
    load: LoadResult
    """Under the overload."""
    slowest_seconds: float
    """The last percentile of those that were answered."""
    recovery_seconds: float
    """From the end of the arrivals until a request is answered as fast as one was before them, or half a second."""
    memory_before_bytes: int
    """Resident memory of the server after the burst."""
    memory_after_bytes: int
    """And when it has recovered."""

    def failures(self, recovery_seconds: float, memory_bytes: int) -> list[str]:
        """What went wrong, a sentence each: failures, or more than so much time or memory."""
        found = []
        if self.load.failed:
            found.append(f"{self.load.failed} requests failed.")
        if self.recovery_seconds > recovery_seconds:
            found.append(f"It took {self.recovery_seconds:.1f} s until the server was as before.")
        grown = self.memory_after_bytes - self.memory_before_bytes
        if grown > memory_bytes:
            found.append(f"The server's memory grew by {grown / 1e6:.0f} MB.")
        return found


def overload(
    url: str,
    key: str,
    hardware: Hardware,
    *,
    times: float,
    seconds: float,
    burst: int,
    new_tokens: tuple[int, int],
    deadline_seconds: float,
) -> OverloadResult:
    """Finds out what a server can do, asks for more for a while, and waits until it is as before.

    Args:
      url: address of the server.
      key: an API key.
      hardware: what it runs on.
      times: how much more is asked of it than it can do.
      seconds: for how long.
      burst: requests by which its capacity is measured, no more than it takes on at once.
      new_tokens: of each answer, at least and at most.
      deadline_seconds: of each request of the overload.

    Raises:
      BadServer: there is no server, it cannot take the burst, or it is not as before within a minute.
    """
    if not (times > 0 and seconds > 0 and deadline_seconds > 0):
        raise ValueError("--times, --seconds and --deadline-seconds must be above 0.")
    sizes = {"prompt_tokens": (8, 32), "new_tokens": new_tokens, "first_token_seconds": 1.0, "token_seconds": 0.1}
    measure(url, key, 1e6, Load(burst, **sizes), hardware)
    held = measure(url, key, 1e6, Load(burst, seed=1, **sizes), hardware)
    if held.answered < burst:
        raise BadServer(f"The server answered {held.answered} of {burst} requests at once; give a smaller --burst.")
    capacity = burst / held.seconds
    server = Server(url, key)
    alone = min(_probe(server) for _ in range(3))
    before = _memory(server)
    requests = max(1, round(times * capacity * seconds))
    load = Load(requests, seed=2, deadline_seconds=deadline_seconds, **sizes)
    found = measure(url, key, times * capacity, load, hardware)
    # The arrivals have ended before the last answer.
    ended = time.monotonic()
    while _probe(server) > max(2 * alone, 0.5):
        if time.monotonic() - ended > 60:
            raise BadServer("A minute after the overload, the server is still slower than before it.")
        time.sleep(_PROBE_SECONDS)
    recovered = max(0.0, found.seconds - seconds) + time.monotonic() - ended
    slowest = found.request_seconds.get("p99", 0.0)
    return OverloadResult(capacity, found, slowest, recovered, before, _memory(server))


def _probe(server: Server) -> float:
    """Seconds that one short request takes, infinite if it is not answered."""
    answer = Answer(1)
    body = {"model": server.model, "prompt": [0], "max_tokens": 1, "stream": True, "ignore_eos": True}
    server.ask(body | {"stream_options": {"include_usage": True}}, answer, time.monotonic())
    return float("inf") if answer.seconds is None else answer.seconds


def _memory(server: Server) -> int:
    found = _MEMORY.search(server.get("/metrics"))
    if found is None:
        raise BadServer("The server does not tell process_resident_memory_bytes at /metrics; run it on Linux.")
    return int(float(found[1]))
