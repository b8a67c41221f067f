"""Files of records by index, in any size: text files, JSON lines, CSV, and tables of Arrow and Parquet.

A reader knows where each record lies and reads it when it is asked for, so that files larger than memory can be
shuffled. Nothing here says what a record must hold; what cannot be read at all raises `BadRecord`.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxcost.data.files import atomic_write

_CHUNK_BYTES = 1 << 24
_NEWLINE, _QUOTE = 10, 34
csv.field_size_limit(2**31 - 1)  # records have a limit of their own, and the library's is below what texts need


class BadRecord(ValueError):
    """A record that cannot be read; the message says why."""


class Records(Protocol):
    """What every reader gives."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one record; BadRecord if it cannot be read."""

    def name(self, index: int) -> str:
        """Returns the file and the place of a record in it, as people name it."""


class TextFiles:
    """Whole text files, each a record with one field."""

    def __init__(self, paths: Sequence[Path], field: str, max_bytes: int):
        """Raises nothing: a file that cannot be read is a bad record."""
        self._paths, self._field, self._max_bytes = list(paths), field, max_bytes

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        try:
            check_size(path.stat().st_size, self._max_bytes)
            return {self._field: decoded(path.read_bytes())}
        except OSError as error:
            raise BadRecord(f"cannot be read ({error.strerror})") from error

    def name(self, index: int) -> str:
        return self._paths[index].name


class Lines:
    """A file of JSON objects, one a line; blank lines are none."""

    def __init__(self, path: Path, max_bytes: int):
        self._path, self._max_bytes = path, max_bytes
        self._starts, self._ends = self._find(path)

    def _find(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """The first byte of each line and the one behind its last, int64."""
        ends = _newlines(path)[0]
        size = path.stat().st_size
        ends = ends if size == 0 or (len(ends) and ends[-1] == size - 1) else np.append(ends, size)
        starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
        filled = ends > starts
        return starts[filled], ends[filled]

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self._path, np.uint8, "r")

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file for itself.
        return {name: value for name, value in vars(self).items() if name != "_bytes"}

    def __len__(self) -> int:
        return len(self._starts)

    def _text(self, index: int) -> str:
        start, end = int(self._starts[index]), int(self._ends[index])
        check_size(end - start, self._max_bytes)
        return decoded(self._bytes[start:end].tobytes())

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            found = json.loads(self._text(index))
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadRecord("is not JSON") from error
        if not isinstance(found, dict):
            raise BadRecord("is not a JSON object")
        return found

    def name(self, index: int) -> str:
        return f"{self._path.name}, byte {int(self._starts[index])}"


class Csv(Lines):
    """A file of comma-separated values with a header; quoted values may hold commas and line ends."""

    def __init__(self, path: Path, max_bytes: int):
        super().__init__(path, max_bytes)
        try:
            self._columns = next(csv.reader([self._text(0)])) if len(self) else []
        except (BadRecord, csv.Error) as error:
            raise ValueError(f"The header of '{path}' cannot be read ({error}); mend its first line.") from error
        self._starts, self._ends = self._starts[1:], self._ends[1:]

    def _find(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        newlines, quotes = _newlines(path, quotes=True)
        size = path.stat().st_size
        # A line end behind an odd number of quotes stands within a value; quotes in values are doubled.
        ends = newlines[np.searchsorted(quotes, newlines) % 2 == 0]
        ends = ends if size == 0 or (len(ends) and ends[-1] == size - 1) else np.append(ends, size)
        starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
        filled = ends - starts > 1
        return starts[filled], ends[filled]

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            (values,) = csv.reader([self._text(index)], strict=True)
        except (csv.Error, ValueError) as error:
            raise error if isinstance(error, BadRecord) else BadRecord("is not a row of CSV") from error
        if len(values) != len(self._columns):
            raise BadRecord(f"has {len(values)} columns where the header has {len(self._columns)}")
        return dict(zip(self._columns, values, strict=True))


class ArrowTable:
    """A file of Arrow's stream format, as `datasets` saves it, mapped into memory."""

    def __init__(self, path: Path, shown: str | None = None):
        """ValueError if the file is no such table; `shown` is the name that its records go by."""
        self._path, self._shown = path, shown or path.name
        self._length = self._table.num_rows

    @functools.cached_property
    def _table(self) -> Any:
        import pyarrow as pa

        try:
            return pa.ipc.open_stream(pa.memory_map(str(self._path))).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"'{self._path}' cannot be read as an Arrow table; write it again.") from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_table"}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._table.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadRecord("is not UTF-8") from error

    def name(self, index: int) -> str:
        return f"{self._shown}, row {index}"


def parquet(path: Path, fields: Sequence[str], copy: Path) -> ArrowTable:
    """A Parquet file by index: rows of a group are only found together, so it is written once as Arrow.

    Args:
      path: the file.
      fields: the columns that are needed; those that it lacks are left out.
      copy: where the Arrow file stands, or will.

    Raises:
      ValueError: the file is not Parquet, or the copy cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not copy.exists():
        try:
            source = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"'{path}' cannot be read as Parquet; write it again.") from error
        columns = [name for name in source.schema_arrow.names if name in fields]
        schema = pa.schema([source.schema_arrow.field(name) for name in columns])
        try:
            with atomic_write(copy) as file, pa.ipc.new_stream(file, schema) as writer:
                for batch in source.iter_batches(columns=columns):
                    writer.write_batch(batch)
        except pa.ArrowInvalid as error:
            raise ValueError(f"'{path}' is damaged ({str(error).splitlines()[0]}); write it again.") from error
    return ArrowTable(copy, path.name)


def decoded(content: bytes) -> str:
    """Text of UTF-8, without the mark that some programs begin a file with; BadRecord for other bytes."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadRecord(f"is not UTF-8 from byte {error.start} on") from error


def check_size(size_bytes: int, max_bytes: int) -> None:
    """BadRecord for a record that has more bytes than it may have."""
    if size_bytes > max_bytes:
        raise BadRecord(f"has {size_bytes} bytes, more than data.max_record_bytes ({max_bytes})")


def _newlines(path: Path, quotes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Places of all line ends of a file and, if asked for, of its quotes, int64."""
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    with open(path, "rb") as file:
        start = 0
        while chunk := file.read(_CHUNK_BYTES):
            content = np.frombuffer(chunk, np.uint8)
            found[0].append(start + np.flatnonzero(content == _NEWLINE))
            if quotes:
                found[1].append(start + np.flatnonzero(content == _QUOTE))
            start += len(chunk)
    newlines, quoted = (np.concatenate([np.zeros(0, np.int64), *places]) for places in found)
    return newlines, quoted
