"""How long a checkpoint holds a training up: the call that saves, and the steps that run while it is written.

The call is what the trainer waits for. Beside the steps the writing takes its share of the host's processors, which
slows them where these are the devices too.

python scripts/benchmarks/checkpoints.py configs/quickstart.py
"""

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

from tyro.conf import Positional

from jaxcost.command_line import run
from jaxcost.config import Overrides

_BEHIND = 3
"""Steps after a save that count as run beside the writing."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time what checkpoints cost a training."""

    config: Positional[Path]
    """Config file; its fields are the flags below."""
    experiment: Overrides
    saves: int = 8
    """Checkpoints written."""
    every_steps: int = 10
    """Steps between them."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def main(arguments: Arguments) -> dict:
    """Trains for a few checkpoints, prints the medians and returns them."""
    from jaxcost.session import Session
    from jaxcost.training.checkpoints import Checkpoints
    from jaxcost.training.config import CheckpointConfig

    calls: list[float] = []

    def timed(*given, save=Checkpoints.save):
        start = time.perf_counter()
        save(*given)
        calls.append(time.perf_counter() - start)

    steps = arguments.saves * arguments.every_steps + _BEHIND
    experiment = arguments.experiment
    training = dataclasses.replace(experiment.training, steps=steps, evaluate_every=0)
    checkpoint = CheckpointConfig(every_steps=arguments.every_steps)
    session = Session(dataclasses.replace(experiment, training=training, checkpoint=checkpoint), quiet=True)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Checkpoints, "save", timed):
        session.train(Path(folder))
        lines = [json.loads(line) for line in (Path(folder) / "steps.jsonl").read_text().splitlines()]
    behind = [
        line["seconds"]
        for line in lines[arguments.every_steps :]
        if 1 <= line["step"] % arguments.every_steps <= _BEHIND
    ]
    free = [line["seconds"] for line in lines[2:] if not 1 <= line["step"] % arguments.every_steps <= _BEHIND]
    step = statistics.median(free)
    # The first one compiles what sums, and the last one belongs to the end of the run.
    call = statistics.median(calls[1:-1])
    slower = statistics.mean(behind) - step
    result = {
        "schema": "jaxcost-checkpoints-1",
        "step_seconds": step,
        "save_seconds": call,
        "slower_step_seconds": slower,
        "saving_of_a_step": call / step,
        "saving_and_slowing_of_a_step": (call + _BEHIND * slower) / step,
    }
    for name, value in result.items():
        print(f"{name:28} {value if isinstance(value, str) else format(value, '.4g')}")
    return result


if __name__ == "__main__":
    run(main, Arguments)
