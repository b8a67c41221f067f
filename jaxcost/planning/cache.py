"""Programs that were compiled before: a compilation takes a minute, and the same question has the same answer.

An entry's key covers what was asked, the part of jaxcost's own source that decides the program, and the versions of the
libraries that compile; what is read from a program is not cached. An entry is a compressed pickle that this user wrote;
a folder that others can write to should not be named.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import pickle
import zlib
from collections.abc import Callable
from typing import TypeVar

from jaxcost.data.files import atomic_write

_T = TypeVar("_T")
# What a compiled step comes from: rooms, and files without their endings.
_SOURCES = (
    "weights",
    "sharding",
    "transforms",
    "models",
    "training",
    "evaluation",
    "serving",
    "planning/memory",
    "planning/steps",
    "planning/topology",
    "planning/nvidia",
    "cost/chips",
)
_LOGGER = logging.getLogger(__name__)
_LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax", "aqtp", "jax-cuda12-plugin")


def directory() -> pathlib.Path:
    """Where programs are kept: $JAXCOST_PLAN_CACHE, or a folder under the user's cache."""
    named = os.environ.get("JAXCOST_PLAN_CACHE")
    if named:
        return pathlib.Path(named)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "jaxcost" / "plans"


def cached(question: str, make: Callable[[], _T]) -> _T:
    """What `make` returns, from the cache if the same question was answered before.

    A broken entry is made again; an answer that cannot be kept is logged and returned all the same.
    """
    path = directory() / hashlib.sha256(f"{_code_version()}\n{question}".encode()).hexdigest()
    try:
        return pickle.loads(zlib.decompress(path.read_bytes()))
    except OSError:
        pass
    except (zlib.error, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError):
        path.unlink(missing_ok=True)
    result = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(zlib.compress(pickle.dumps(result), level=3))
    except OSError as error:
        _LOGGER.error("The plan is not kept (%s); set JAXCOST_PLAN_CACHE to a folder that can be written to.", error)
    return result


@functools.cache
def _code_version() -> str:
    """A digest of all that decides what a compilation gives: our source and the libraries' versions."""
    digest = hashlib.sha256()
    package = pathlib.Path(__file__).parent.parent
    for source in _SOURCES:
        for path in sorted((package / source).rglob("*.py")) + sorted(package.glob(f"{source}.*")):
            digest.update(path.read_bytes())
    for name in _LIBRARIES:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"{name} none".encode())
    return digest.hexdigest()
