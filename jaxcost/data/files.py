"""Files and folders that are either whole or absent, however a process that writes them ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name, replacing what was there, only once it is complete and on disk.

    Args:
      path: where the file will stand; its folder is made if it is missing.

    Yields:
      A seekable binary file to write to; if the block raises, nothing changes under `path`.

    Raises:
      ValueError: the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(temporary, "wb")  # noqa: SIM115  (closed below, before the rename)
    except OSError as error:
        raise ValueError(
            f"'{path.parent}' cannot be written to ({error.strerror}); set data.cache_dir to a folder that can."
        ) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Makes a folder that appears under its name only once everything in it is complete and on disk.

    Args:
      path: where the folder will stand; nothing, or an empty folder, may stand there now.

    Yields:
      A folder beside it to write to; if the block raises, it is removed.

    Raises:
      ValueError: something stands there already, or the folder cannot be made.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists already; name a folder that does not, or remove it.")
    temporary = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be made ({error.strerror}); name another folder.") from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
