"""Latency, throughput and price of a server under load that does not wait for it."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.cost.hardware import HardwareConfig


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Send requests to a server of OpenAI's API at random times, as many a second as asked for, whatever it answers."""

    url: Positional[str]
    """Address of the server, such as http://127.0.0.1:8000."""
    requests_per_second: tuple[float, ...] = (0.0,)
    """Mean rates of arrival (Poisson), one run for each; 0 sends the next request when the last has ended."""
    requests: int = 64
    """Requests of each run."""
    prompt_tokens: tuple[int, int] = (16, 128)
    """Tokens of a prompt, at least and at most."""
    new_tokens: tuple[int, int] = (16, 64)
    """Tokens of an answer, at least and at most."""
    first_token_seconds: float = 1.0
    """A request counts for the goodput if its first token came within this time."""
    token_seconds: float = 0.1
    """And if each further token took, in the mean, at most this."""
    key: str = "none"
    """API key."""
    seed: int = 0
    """Of the lengths, the tokens and the times of arrival."""
    hardware: HardwareConfig = HardwareConfig()
    """The chips that the server runs on, for the price of a million tokens."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Prints and returns what each rate came to."""
    from jaxcost.cost.hardware import resolve
    from jaxcost.serving.benchmark import Load, measure, table

    a = arguments
    hardware = resolve(a.hardware)
    load = Load(a.requests, a.prompt_tokens, a.new_tokens, a.first_token_seconds, a.token_seconds, a.seed)
    runs = [measure(a.url, a.key, rate, load, hardware) for rate in a.requests_per_second]
    print(table(runs))
    return {"schema": "jaxcost-benchmark-serving-1", "runs": [dataclasses.asdict(run) for run in runs]}


if __name__ == "__main__":
    run(main, Arguments)
