"""Asks ten times of a server what it can answer, and says whether it stays up and is soon as before."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.cost.hardware import HardwareConfig


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Overload a server of OpenAI's API; exit status 1 if a request fails, or memory or time go beyond the limits."""

    url: Positional[str]
    """Address of the server, such as http://127.0.0.1:8000."""
    times: float = 10.0
    """How much more is asked of it than it can do."""
    seconds: float = 60.0
    """For how long."""
    burst: int = 32
    """Requests by which its capacity is measured, no more than it takes on at once."""
    new_tokens: tuple[int, int] = (32, 64)
    """Tokens of an answer, at least and at most."""
    deadline_seconds: float = 10.0
    """Of each request: answered by then, or refused."""
    recovery_seconds: float = 5.0
    """Limit on the time from the last arrival until the server answers as before."""
    memory_bytes: int = 100_000_000
    """Limit on the growth of its memory."""
    key: str = "none"
    """API key."""
    hardware: HardwareConfig = HardwareConfig()
    """The chips that the server runs on."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints and returns what the overload came to."""
    from jaxcost.cost.hardware import resolve
    from jaxcost.serving.benchmark import table
    from jaxcost.serving.overload import overload

    a = arguments
    options = {"times": a.times, "seconds": a.seconds, "burst": a.burst, "new_tokens": a.new_tokens}
    found = overload(a.url, a.key, resolve(a.hardware), deadline_seconds=a.deadline_seconds, **options)
    print(table([found.load]))
    print(
        f"can answer {found.capacity_requests_per_second:.1f} requests/s; 99 of 100 answers within "
        f"{found.slowest_seconds:.1f} s; as before {found.recovery_seconds:.1f} s after the last arrival; memory "
        f"{found.memory_before_bytes / 1e6:.0f} MB before, {found.memory_after_bytes / 1e6:.0f} MB after"
    )
    failures = found.failures(a.recovery_seconds, a.memory_bytes)
    for failure in failures:
        print(failure)
    return {"schema": "jaxcost-overload-1", **dataclasses.asdict(found), "exit_status": int(bool(failures))}


if __name__ == "__main__":
    run(main, Arguments)
