"""What a run says to those who watch it: a line a step for machines, TensorBoard, Weights & Biases, and traces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcost import hosts
from jaxcost.journal import Journal
from jaxcost.training.config import WatchConfig

STEPS = "steps.jsonl"


class Watch:
    """Writes the figures of each step, and traces some; a context manager around the run."""

    def __init__(self, directory: Path, config: WatchConfig):
        """Opens what the config asks for.

        The first of several processes writes; each traces its own devices and, into a file with its number, logs the
        records that it read.

        Args:
          directory: the run's folder.
          config: what is written.

        Raises:
          ValueError: a package that the config asks for is not installed.
        """
        self._directory, self._config = Path(directory), config
        name = STEPS if hosts.is_first() else STEPS.replace(".", f"-{jax.process_index()}.")
        writes = config.steps and (hosts.is_first() or config.records)
        self._steps = Journal(self._directory / name if writes else None)
        self._tracing = False
        self._closing = contextlib.ExitStack()
        self._writers: list[Callable[[int, Mapping[str, float]], None]] = []
        if config.tensorboard and hosts.is_first():
            self._writers.append(self._tensorboard())
        if config.wandb and hosts.is_first():
            self._writers.append(self._wandb())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._trace(False)
        self._closing.close()

    def rewind(self, step: int) -> float:
        """Drops what was written after `step`, which is done again; returns the seconds that it had taken."""
        hosts.meet("before forgetting steps")
        dropped = self._steps.rewind(step) if hosts.is_first() else []
        if hosts.is_first():
            # One process mends the files of all, those of processes that are no longer there among them.
            for path in self._directory.glob(STEPS.replace(".", "-*.")):
                Journal(path).rewind(step)
        hosts.meet("after forgetting steps")
        return sum(line["seconds"] or 0.0 for line in dropped)

    def begin(self, step: int) -> None:
        """Before a step: starts or ends the trace where the config says so."""
        self._trace(step in self._config.profiled)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """After a step."""
        self._steps.append({"step": step, **figures})
        numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        for writer in self._writers:
            writer(step, numbers)

    def _trace(self, on: bool) -> None:
        if on and not self._tracing:
            jax.profiler.start_trace(str(self._directory / "profile"))
        elif self._tracing and not on:
            jax.profiler.stop_trace()
        self._tracing = on

    def _tensorboard(self):
        try:
            import tensorboardX
        except ImportError:
            raise ValueError("watch.tensorboard takes tensorboardX; pip install 'jaxcost[watch]'.") from None
        writer = tensorboardX.SummaryWriter(str(self._directory / "tensorboard"))
        self._closing.callback(writer.close)

        def write(step, numbers):
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        return write

    def _wandb(self):
        try:
            import wandb
        except ImportError:
            raise ValueError("watch.wandb takes wandb; pip install 'jaxcost[watch]'.") from None
        # One run of theirs for one folder of ours, however often it is restarted.
        mark = self._directory / "wandb.id"
        if not mark.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            mark.write_text(wandb.util.generate_id())
        run = wandb.init(project=self._config.wandb, dir=str(self._directory), id=mark.read_text(), resume="allow")
        self._closing.callback(run.finish)
        return lambda step, numbers: run.log(dict(numbers), step=step)
