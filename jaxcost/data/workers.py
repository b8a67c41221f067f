"""Batches that processes beside this one prepare: the same, with the same positions, for any number of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grain

_READY_BATCHES = 2
"""Batches that each process prepares ahead."""


class WorkerBatches:
    """An endless iterator like Grain's own, whose batches come from worker processes in turn.

    They start with the first batch, and end with `close`, with the iterator, and with this process, however it ends.
    """

    def __init__(self, batch: Callable[[int], Any], stop: int, workers: int, start: int = 0):
        """Nothing is started.

        Args:
          batch: makes the batch of a step, by the step alone; it and what it holds are pickled.
          stop: steps that there are.
          workers: processes, at least 1.
          start: the first step.
        """
        self._batch, self._stop, self._workers, self._next = batch, stop, workers, start
        self._iterator: grain.DatasetIterator | None = None

    def __iter__(self) -> WorkerBatches:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._started()
        found = next(self._iterator)
        self._next += 1
        return found

    def get_state(self) -> dict[str, int]:
        """The position after the batch last handed out, in the form that Grain gives one without workers."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a position; the processes are started anew."""
        self.close()
        self._next = int(state["next_index"])

    def close(self) -> None:
        """Ends the processes; the next batch would start them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _started(self) -> grain.DatasetIterator:
        import grain
        from absl import flags

        # Grain asks absl's flags, which only programs that absl starts have read.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        steps = grain.MapDataset.range(self._next, self._stop).map(self._batch)
        # Each process works on its own steps in their order, so it needs no threads of its own.
        alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_READY_BATCHES)
        return iter(steps.to_iter_dataset(alone).mp_prefetch(options, worker_init_fn=_begin))


def _begin(number: int, workers: int) -> None:
    """What a worker does first: it leaves signals to the process that it works for, and ends when that one does."""
    del number, workers
    # A job's end is asked of all its processes, and the step under way may still need a batch.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow():
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
