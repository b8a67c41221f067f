"""What every script shares: quiet set-up, results as JSON, failures as one line."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxcost.config import parse
from jaxcost.data.files import atomic_write

_T = TypeVar("_T")


def run(main: Callable[[_T], dict[str, Any]], arguments_class: type[_T], argv: Sequence[str] | None = None) -> None:
    """Parses the arguments, calls `main` with them, writes what it returns to `--json`, and exits.

    `arguments_class` is a dataclass with `json: Path | None` and `debug: bool`. A failure is one line on standard
    error and exit status 1; with `--debug`, a traceback. A result may name its own `exit_status`.
    """
    debug = "--debug" in (sys.argv if argv is None else argv)
    if not debug:
        _be_quiet()
    try:
        arguments = parse(arguments_class, argv)
        if arguments.json is not None:
            _check_writable(arguments.json)
        _choose_platform()
        _keep_memory()
        _compile_once()
        result = main(arguments)
        if arguments.json is not None and _is_first():
            with atomic_write(arguments.json) as file:
                file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        if result.get("exit_status"):
            sys.exit(result["exit_status"])
    except KeyboardInterrupt:
        _fail("Interrupted; the same command goes on from the last checkpoint.", 130)
    except Exception as error:
        if debug:
            raise
        said = str(error).strip() or type(error).__name__
        expected = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("jaxcost")
        kind = "" if expected else f"{type(error).__name__}: "
        status = getattr(error, "exit_status", 1)
        if status != 1:
            _leave()
        _fail(kind + " ".join(said.split()), status)


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--json {path}: its folder cannot be made ({error.strerror}); name another file.") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--json {path} cannot be written; name a file in a folder that can.")


def _choose_platform() -> None:
    """Keeps the compilers that planning needs from looking for chips where there are none."""
    import jax

    tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    compilers = importlib.util.find_spec("libtpu") or importlib.util.find_spec("jax_plugins")
    if "JAX_PLATFORMS" not in os.environ and compilers and not tpu:
        jax.config.update("jax_platforms", "cuda,cpu" if glob.glob("/dev/nvidia[0-9]*") else "cpu")


def _is_first() -> bool:
    from jaxcost import hosts

    return hosts.is_first()


def _leave() -> None:
    """Lets the other processes of a job, which end alike, end before the one that they all report to."""
    from jaxcost import hosts

    hosts.leave()


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    # Threads of a failed run (checkpoints, data) must not hold the process or print after this line.
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status)


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # What fails in a thread (a checkpoint's write) is raised again where its result is awaited, and said there.
    threading.excepthook = lambda _: None
    sys.unraisablehook = lambda _: None


def _keep_memory() -> None:
    """Lets the C library keep freed buffers instead of giving their pages back and faulting them in again.

    A train step on a CPU takes 0.78 of the time with it (scripts/benchmarks/train_step.py, 2 cores).
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # the names of glibc's malloc.h
        library.mallopt(m_mmap_max, 0)
        library.mallopt(m_trim_threshold, 2**31 - 1)
        library.mallopt(m_arena_max, 1)


def _compile_once() -> None:
    """Keeps compiled programs between runs, unless JAX's own environment variable says where."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxcost" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))
