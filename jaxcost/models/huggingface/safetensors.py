"""Reading and writing a safetensors file one tensor at a time, without holding the rest.

A file is the length of a JSON header (8 bytes, little-endian), the header (name → dtype, shape, offsets), and the
arrays' bytes. Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, read-only, mapped from the file."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to write, made when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    """Returns its values, of this dtype and shape."""

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, tensors: Sequence[Tensor], done: Callable[[int], None] = lambda _: None) -> None:
    """Writes a file to disk, one tensor after the other; `done` is told the bytes of each.

    Raises:
        ValueError: a tensor is made with another shape or dtype than it was announced with.
        OSError: the disk is full, or the file cannot be made.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        offsets = [end, end + tensor.bytes]
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for tensor in tensors:
            value = np.ascontiguousarray(tensor.make()).reshape(tensor.shape)
            if value.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name} was announced as {tensor.dtype} and made as {value.dtype}.")
            file.write(value.view(np.uint8).data if value.size else b"")
            done(tensor.bytes)
        file.flush()
        os.fsync(file.fileno())


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; their bytes are read when asked for.

    Raises:
        ValueError: the file is not whole or not of this format, with the tensor's name where there is one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        if size < _LENGTH_BYTES or start > size:
            raise ValueError(f"{path} is cut off or no safetensors file: its header does not end within it.")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, AttributeError):
            raise ValueError(f"{path} is no safetensors file: its header is not JSON.") from None
    return {name: _stored(path, name, entry, start, size) for name, entry in entries.items()}


def _stored(path: Path, name: str, entry: dict, start: int, size: int) -> Stored:
    try:
        dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        first, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{path}: the entry of {name} lacks its dtype, shape or offsets.") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{path}: {name} has the dtype {dtype}, which is not one of {', '.join(_DTYPES)}.")
    if min(shape, default=0) < 0 or not 0 <= first <= end or end - first != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{path}: the bytes of {name} are not those of its shape {shape} and dtype {dtype}.")
    if start + end > size:
        raise ValueError(f"{path} is cut off: {name} ends at byte {start + end}, the file at {size}.")
    return Stored(path, name, _DTYPES[dtype], shape, start + first)
