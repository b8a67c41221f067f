"""What a person sees of a run while it goes on."""

from __future__ import annotations

import time

from rich import progress as bars
from rich.console import Console


class Progress:
    """A bar with loss, tokens a second and model-FLOP utilisation; plain lines where there is no terminal.

    Used as a context manager around the run.
    """

    def __init__(
        self, title: str, peak_flops_per_second: float | None, model_flops_per_step: float, quiet: bool = False
    ):
        """Names the run.

        Args:
          title: stands before the bar.
          peak_flops_per_second: of all devices, in the compute dtype; None hides the utilisation.
          model_flops_per_step: what the model's arithmetic asks for, without recomputation.
          quiet: show nothing.
        """
        self._title = title
        self._peak = peak_flops_per_second
        self._model_flops = model_flops_per_step
        self._console = Console(stderr=True, quiet=quiet)
        self._bar: bars.Progress | None = None
        self._last_line = 0.0

    def start(self, steps: int, done: int, tokens_per_step: int) -> None:
        """Shows the bar at `done` of `steps`; leaving the `with` block takes it down."""
        self._steps, self._done, self._tokens = steps, done, tokens_per_step
        if done:
            self._console.print(f"{self._title}: goes on from step {done} of {steps}")
        if self._console.is_terminal:
            self._bar = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeRemainingColumn(),
                bars.TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(self._title, total=steps, completed=done, figures="")
            self._bar.start()

    def figures(self, step_seconds: float, tokens: int) -> dict[str, float | None]:
        """Tokens a second and model-FLOP utilisation, null where the peak is unknown, of a step of so many seconds.

        The model's FLOPs of a step with fewer tokens are in proportion, which counts its attention as a little more.
        """
        share = tokens / self._tokens
        utilisation = self._model_flops * share / step_seconds / self._peak if self._peak else None
        return {"tokens_per_second": tokens / step_seconds, "mfu": utilisation}

    def advance(self, loss: float, step_seconds: float, tokens: int) -> None:
        """One more step is done."""
        self._done += 1
        speed = self.figures(step_seconds, tokens)
        figures = f"loss {loss:.3f}  {speed['tokens_per_second']:,.0f} tokens/s"
        if speed["mfu"] is not None:
            figures += f"  MFU {speed['mfu']:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, figures=figures)
        elif time.monotonic() - self._last_line > 15 or self._done == self._steps:
            self._last_line = time.monotonic()
            self._console.print(f"{self._title}: step {self._done}/{self._steps}  {figures}")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
