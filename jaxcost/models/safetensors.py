"""Reading a safetensors file one tensor at a time, without loading the rest.

A file is the length of a JSON header (8 bytes, little-endian), the header (name → dtype, shape, offsets), and the
arrays' bytes. Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LENGTH_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    def read(self) -> np.ndarray:
        """The tensor, read-only, mapped from the file."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


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
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
            raise ValueError(f"{path} is no safetensors file: its header is not JSON.") from None
    return {name: _stored(path, name, entry, start, size) for name, entry in entries.items()}


def _stored(path: Path, name: str, entry: dict, start: int, size: int) -> Stored:
    try:
        dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        first, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: the entry of {name} lacks its dtype, shape or offsets.") from None
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: {name} has the dtype {dtype}, which is not one of {', '.join(_DTYPES)}.")
    if not 0 <= first <= end or end - first != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{path}: the bytes of {name} are not those of its shape {shape} and dtype {dtype}.")
    if start + end > size:
        raise ValueError(f"{path} is cut off: {name} ends at byte {start + end}, the file at {size}.")
    return Stored(path, name, _DTYPES[dtype], shape, start + first)
