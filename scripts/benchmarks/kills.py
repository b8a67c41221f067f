"""Kills one training again and again, and compares what it ends with with the same training left in peace.

    python scripts/benchmarks/kills.py --kills 50

Each kill is SIGKILL or SIGTERM, at a random moment from the start of the process on, while it compiles, trains, scores
or writes a checkpoint. The exit status is 1 if the weights, the optimizer's state or the position in the data differ.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxcost.command_line import run

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Kill a training at random moments and compare its end with that of an undisturbed one."""

    kills: int = 50
    """How often the training is killed."""
    steps: int = 3000
    """Its length."""
    every_steps: int = 50
    """Steps between its checkpoints."""
    seed: int = 0
    """Of the moments and the signals."""
    json: Path | None = None
    """File for the result as JSON."""
    debug: bool = False
    """Show a traceback on failure."""


def _command(workdir: Path, arguments: Arguments) -> list[str]:
    model = {"width": 32, "num-layers": 2, "num-heads": 2, "num-kv-heads": 2, "head-dim": 16, "mlp-width": 64}
    flags = [f for name, value in model.items() for f in (f"--model.{name}", str(value))]
    flags += ["--data.name", "python_text/reference", "--data.sequence-length", "32", "--data.batch-size", "8"]
    flags += ["--training.steps", str(arguments.steps), "--training.evaluate-every", str(10 * arguments.every_steps)]
    flags += ["--checkpoint.every-steps", str(arguments.every_steps), "--evaluation.max-tokens", "512"]
    return [sys.executable, "scripts/train.py", "configs/quickstart.py", "--workdir", str(workdir), *flags]


def _end(workdir: Path) -> tuple[str, dict, dict]:
    """The last step, the checksum of every array, and the position in the data."""
    last = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    saved = json.loads((last / "metadata" / "metadata").read_text())
    return last.name, saved["checksums"], saved["position"]


def main(arguments: Arguments) -> dict:
    """Runs, prints what came of it and returns it."""
    draw, sent = random.Random(arguments.seed), {"SIGKILL": 0, "SIGTERM": 0}
    options = {"env": os.environ | {"JAX_PLATFORMS": "cpu"}, "cwd": ROOT, "text": True}
    options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        start = time.monotonic()
        subprocess.run(_command(whole, arguments), check=True, **options)
        seconds = time.monotonic() - start
        started = 1
        while True:
            process = subprocess.Popen(_command(killed, arguments), **options)
            # The last one may end.
            patience = draw.uniform(0, min(seconds, 12)) if sum(sent.values()) < arguments.kills else None
            try:
                _, said = process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                name = draw.choice(sorted(sent))
                process.send_signal(getattr(signal, name))
                process.communicate(timeout=60)
                sent[name] += 1
                started += 1
                continue
            if process.returncode:
                raise RuntimeError(f"the training failed by itself: {said}")
            break
        same = _end(killed) == _end(whole)
    print(f"{sum(sent.values())} kills ({sent}), {started} starts: the end is {'the same' if same else 'ANOTHER'}")
    result = {"schema": "jaxcost-kills-1", "kills": sent, "starts": started, "same_bits": same}
    return result | {"undisturbed_seconds": seconds, "exit_status": 0 if same else 1}


if __name__ == "__main__":
    run(main, Arguments)
