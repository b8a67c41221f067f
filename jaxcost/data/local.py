"""Files and folders of one's own as splits of records, of which the corrupt ones are counted, named and left out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcost.data.config import DataConfig
from jaxcost.data.files import atomic_write
from jaxcost.data.images import SUFFIXES, ImageFiles, read_image
from jaxcost.data.records import ArrowTable, BadRecord, Csv, Lines, Records, TextFiles, decoded, parquet

_LOGGER = logging.getLogger(__name__)

_TEXT = (".txt", ".md", ".rst")
_TABLES = (".jsonl", ".ndjson", ".csv", ".parquet", ".arrow")
_SPLITS = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}
_NAMED = 5
"""Corrupt records that a message names."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A split of a source of one's own."""

    records: Sequence[dict[str, Any]]
    """Its sound records."""
    identity: str
    """JSON that tells its content from any other's."""
    classes: tuple[str, ...]
    """Names of the labels, where the source has them."""
    skipped: tuple[str, ...]
    """Each record that was left out, and why."""


class Chosen(Sequence):
    """Chosen records of several readers, one reader behind the other."""

    def __init__(self, readers: Sequence[Records], chosen: np.ndarray):
        """`chosen` are int64 places among the records of all readers."""
        self._readers, self._chosen = list(readers), chosen
        self._ends = np.cumsum([len(reader) for reader in readers])

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = int(self._chosen[index])
        number = int(np.searchsorted(self._ends, place, side="right"))
        return self._readers[number][place - (int(self._ends[number - 1]) if number else 0)]


def open_local(config: DataConfig, path: Path, split: str, cache_dir: Path) -> Opened:
    """Opens a split of a file or a folder; its records are read once to find the corrupt ones, then by index.

    A folder's files are of the split that begins their name, or that of the folder within it that holds them (`train`,
    `validation` or `test`), and other files beside such ones are none of the data; where no name begins so, all are of
    `train`. A split may be cut as in TFDS (`train[:95%]`).

    Args:
      config: names the fields, and says how much may be corrupt.
      path: a file or folder of text, JSON lines, CSV, Parquet or Arrow, or what `datasets` saved to disk; where images
        are read, a folder with a folder for each label.
      split: split in TFDS's notation.
      cache_dir: where the places of sound records are kept, and Parquet as Arrow.

    Raises:
      ValueError: there is nothing to read, the split does not exist, a field is missing, or too much is corrupt.
    """
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"data.sources names '{path}', which does not exist; give a file or a folder.")
    suffixes = SUFFIXES if config.of_images else (*_TEXT, *_TABLES)
    files = _files_by_split(path, cache_dir, suffixes)
    if not files:
        raise ValueError(f"'{path}' holds no file that can be read; give one of {', '.join(suffixes)}.")
    if config.of_images:
        _check_labelled(path, [file for of_split in files.values() for file in of_split])
    used = [name for name in files if re.search(rf"\b({re.escape(name)}|all)\b", split)]
    readers: list[Records] = []
    sound: dict[str, np.ndarray] = dict.fromkeys(files, np.zeros(0, np.int64))
    skipped: list[str] = []
    for name in used:
        before = sum(map(len, readers))
        opened = _open_files(config, path, files[name], cache_dir)
        good, bad = _checked(config, opened, _identity(config, path, files[name]), cache_dir)
        readers += opened
        sound[name] = before + good
        skipped += bad
    check_corrupt(skipped, config.max_corrupt_records, f"'{path}'")
    parts = _cut(path, split, {name: len(good) for name, good in sound.items()})
    chosen = np.concatenate([np.zeros(0, np.int64), *(sound[name][start:stop] for name, start, stop in parts)])
    if not len(chosen):
        raise ValueError(f"Split '{split}' of '{path}' holds no documents; choose a larger one.")
    identity = {"files": [_identity(config, path, files[name]) for name in used], "parts": parts}
    return Opened(Chosen(readers, chosen), json.dumps(identity), _class_names(path, config.label_field), tuple(skipped))


def check_corrupt(skipped: Sequence[str], limit: int, where: str) -> None:
    """Names what is corrupt, as a warning, or as a ValueError where it is more than the limit."""
    if not skipped:
        return
    said = "; ".join(skipped[:_NAMED]) + ("; and so on" if len(skipped) > _NAMED else "")
    if len(skipped) > limit:
        raise ValueError(
            f"{len(skipped)} records of {where} are corrupt, more than data.max_corrupt_records ({limit}): {said}. "
            "Mend them or raise the limit."
        )
    _LOGGER.warning("%d corrupt records of %s are left out: %s.", len(skipped), where, said)


def _files_by_split(path: Path, cache_dir: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each split, in the order of their names; hidden ones and what is derived are none."""
    if path.is_file():
        return {"train": [path]} if path.suffix.lower() in suffixes else {}
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return {name: _saved_files(path / name) for name in names}
    if (path / "state.json").is_file():
        return {"train": _saved_files(path)}
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        hidden = any(part.startswith(".") for part in parts) or cache_dir.resolve() in file.resolve().parents
        if hidden or not file.is_file() or file.suffix.lower() not in suffixes:
            continue
        named = _SPLITS.match(parts[0])
        name = named[1].lower() if named else ""
        found.setdefault(_ALIASES.get(name, name), []).append(file)
    others = found.pop("", [])
    return found or ({"train": others} if others else {})


def _check_labelled(path: Path, images: Sequence[Path]) -> None:
    """ValueError for an image that no folder gives a label to: it lies beside the folders, or in that of its split."""
    for image in images:
        folders = () if path == image else image.relative_to(path).parts[:-1]
        if len(folders) <= bool(folders and _SPLITS.match(folders[0])):
            raise ValueError(
                f"The image '{image}' lies in no folder that names its label; put it into one, and name the folder "
                "above in data.sources."
            )


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset that `datasets` saved to disk."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"'{folder}' is not what save_to_disk() of `datasets` wrote; save it again.") from error


def _class_names(path: Path, field: str) -> tuple[str, ...]:
    """The names of the labels, which `datasets` saves beside them; none elsewhere."""
    for file in sorted(path.glob("dataset_info.json")) or sorted(path.glob("*/dataset_info.json")):
        feature = (json.loads(file.read_text(encoding="utf-8")).get("features") or {}).get(field) or {}
        return tuple(feature.get("names") or ())
    return ()


def _open_files(config: DataConfig, path: Path, files: Sequence[Path], cache_dir: Path) -> list[Records]:
    if config.of_images:
        return [ImageFiles(files, path, (config.text_field, config.label_field))]
    texts = [file for file in files if file.suffix.lower() in _TEXT]
    readers: list[Records] = [TextFiles(texts, config.text_field, config.max_record_bytes)] if texts else []
    for file in files:
        kind = file.suffix.lower()
        if kind in (".jsonl", ".ndjson"):
            readers.append(Lines(file, config.max_record_bytes))
        elif kind == ".csv":
            readers.append(Csv(file, config.max_record_bytes))
        elif kind == ".arrow":
            readers.append(ArrowTable(file))
        elif kind == ".parquet":
            key = _key({"file": _stamp(file), "path": str(file.resolve()), "fields": config.fields})
            readers.append(parquet(file, config.fields, cache_dir / f"{file.stem}-{key}.arrow"))
    return readers


def _checked(
    config: DataConfig, readers: Sequence[Records], identity: dict[str, Any], cache_dir: Path
) -> tuple[np.ndarray, list[str]]:
    """The places of the sound records, int64, and what is wrong with each of the others; read once, kept on disk."""
    kept = cache_dir / f"records-{_key(identity)}.json"
    total = sum(map(len, readers))
    try:
        bad = {int(place): why for place, why in json.loads(kept.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError):
        bad = {}
        place = 0
        for reader in readers:
            for i in range(len(reader)):
                try:
                    record = reader[i]
                    _check_record(record, config.fields)
                    if config.of_images:
                        read_image(record[config.text_field], config.max_record_bytes)
                except BadRecord as error:
                    bad[place + i] = f"{reader.name(i)} {error}"
                except KeyError as error:
                    raise ValueError(
                        f"{reader.name(i)} has no field {error}, but {', '.join(sorted(reader[i])) or 'none'}; set "
                        "data.text_field and data.label_field to fields that it has."
                    ) from error
            place += len(reader)
        with atomic_write(kept) as file:
            file.write(json.dumps(bad).encode())
    return np.setdiff1d(np.arange(total), np.fromiter(bad, np.int64, len(bad))), list(bad.values())


def _check_record(record: dict[str, Any], fields: Sequence[str]) -> None:
    """BadRecord unless every field is text that is not empty, or a number; KeyError where one is missing."""
    for field in fields:
        value = record[field]
        value = decoded(value) if isinstance(value, bytes) else value
        if isinstance(value, str):
            if not value.strip():
                raise BadRecord(f"is empty in {field!r}")
        elif field == fields[0] or not isinstance(value, int | float):
            raise BadRecord(f"holds {type(value).__name__} and no text in {field!r}")


def _cut(path: Path, split: str, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """The pieces of splits, (name, first, behind the last), that TFDS's notation asks for."""
    import tensorflow_datasets as tfds

    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0) for name, size in sizes.items()}
    try:
        pieces = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"'{path}' has no split '{split}'; choose data.train_split and data.validation_split from "
            f"{', '.join(sorted(sizes))}, or slices of them such as 'train[:95%]' and 'train[95%:]'."
        ) from error
    return [(p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else p.to) for p in pieces]


def _identity(config: DataConfig, path: Path, files: Sequence[Path]) -> dict[str, Any]:
    """What the records of files, and which of them are sound, depend on."""
    base = path if path.is_dir() else path.parent
    stamps = {file.relative_to(base).as_posix(): _stamp(file) for file in files}
    read = {"fields": config.fields, "max_record_bytes": config.max_record_bytes}
    # What was written of texts, before there were images, keeps its name.
    return {"files": stamps, **read, **({"inputs": "images"} if config.of_images else {})}


def _stamp(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
