"""The processes of one job: how they find each other, what the first alone does, and when all of them must stop.

The engine is JAX's own multi-controller runtime: every process runs the same program, holds a part of every array, and
meets the others in collectives. Cloud TPU, GKE and Slurm say in their environment who they are; elsewhere three
variables do (`scripts/launch_local.sh` sets them).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping

import jax
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 20
"""How long a process may be silent before the others end."""

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_LOST = ("Gloo", "NCCL", "Connection closed", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""What the runtimes say when a peer is gone."""


class Preempted(RuntimeError):
    """The job was asked to end, and has saved what it did."""

    exit_status = 128 + signal.SIGTERM


class LostHostError(RuntimeError):
    """Another process of the job no longer answers."""


def cluster(environment: Mapping[str, str]) -> str | None:
    """What joins several processes according to the environment; None for a process that is alone.

    Raises:
      ValueError: some of the variables that join processes explicitly are missing or no numbers.
    """
    given = [name for name in _EXPLICIT if name in environment]
    if given:
        missing = [name for name in _EXPLICIT if name not in given]
        if missing:
            raise ValueError(f"{given[0]} is set, but {missing[0]} is not; set all of {', '.join(_EXPLICIT)}, or none.")
        count, index = (environment[name] for name in _EXPLICIT[1:])
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise ValueError(
                f"JAX_NUM_PROCESSES is {count!r} and JAX_PROCESS_ID is {index!r}; the second must be a number from 0 "
                "to the first less one."
            )
        return "explicit"
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "slurm"
    slices = int(environment.get("MEGASCALE_NUM_SLICES", "1"))
    # Where there is no TPU, libtpu writes a sentence there, commas and all.
    names = environment.get("TPU_WORKER_HOSTNAMES", "")
    if ("," in names and " " not in names) or slices > 1:
        return "tpu"
    return None


def join() -> None:
    """Joins the other processes of the job, where there are any; before anything else of JAX is asked for devices.

    Raises:
      ValueError: the environment contradicts itself.
      LostHostError: the others did not come within five minutes.
    """
    kind = cluster(os.environ)
    if kind is None or jax.distributed.is_initialized():
        return
    explicit = {}
    if kind == "explicit":
        address, count, index = (os.environ[name] for name in _EXPLICIT)
        explicit = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **explicit)
    except RuntimeError as error:
        raise LostHostError(
            f"The other processes of the job did not join ({str(error).splitlines()[0]}); start all of them, and give "
            "each the address of the first."
        ) from error
    if not is_first():
        # What the job has to say, the first process says; failures go to the errors of each.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open as long as the process)


def leave() -> None:
    """Waits until all processes of the job are done with each other; nothing where there is but one."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process writes what the job writes once: checkpoints' descriptions, the ledger, what people see."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def meet(place: str) -> None:
    """Waits here for all processes of the job; `place` names the spot, the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what all processes do: says in one sentence that another is lost, where a collective breaks off.

    One that is silent without closing its connections ends the rest after `HEARTBEAT_SECONDS`, by JAX's own hand.

    Raises:
      LostHostError: as its name says.
    """
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() == 1 or not any(sign in str(error) for sign in _LOST):
            raise
        raise LostHostError(
            f"Process {jax.process_index()} of {jax.process_count()} lost another one of the job; start all of them "
            "again, and they go on from the last checkpoint."
        ) from error


class Preemption:
    """Within the `with` block SIGTERM no longer kills: `reached` says after which step to save and end.

    The main thread alone can take a signal, so that one block of its own around them serves the trainings of all
    threads.
    """

    _asked = threading.Event()

    def __init__(self):
        self._before = None

    def __enter__(self):
        # JAX handles the signal itself where it joins several processes, so that all of them stop at the same step.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: Preemption._asked.set())
        return self

    def __exit__(self, *exception):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            Preemption._asked.clear()

    def reached(self, step: int) -> bool:
        """Whether the job ends after this step, the same in all of its processes; asked once every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return Preemption._asked.is_set()
