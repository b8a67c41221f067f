"""Files and folders that are either whole or absent, however a process that writes them ends."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says of a disk without room, a user's quota that is used up, and a file that may not grow further."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name, replacing what was there, only once it is complete and on disk.

    Args:
      path: where the file will stand; its folder is made if it is missing.

    Yields:
      A seekable binary file to write to; if the block raises, nothing changes under `path`.

    Raises:
      ValueError: the folder cannot be written to.
      OSError: the disk is full.
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
        with _saying_what_is_full(path.parent):
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
      OSError: the disk is full.
    """
    check_free(path)
    temporary = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be made ({error.strerror}); name another folder.") from error
    try:
        with _saying_what_is_full(path.absolute().parent):
            yield temporary
            for file in temporary.rglob("*"):
                _flush(file)
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(path: Path) -> None:
    """ValueError where `atomic_folder` could not make a folder; for before the work that it waits for."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists already; name a folder that does not, or remove it.")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"{path} cannot be made, as {above} is no folder that can be written to; name another folder.")


@contextlib.contextmanager
def _saying_what_is_full(folder: Path) -> Iterator[None]:
    """OSError with the folder's name where the system's own has none."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            f"The disk of '{folder}' is full ({error.strerror}), so that nothing was written; make room there, or name "
            "a folder on another disk."
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
