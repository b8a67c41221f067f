"""Documents by index: of any TFDS dataset, prepared on first use and read without TensorFlow, quietly, or of files."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from jaxcost.data.config import DataConfig
from jaxcost.data.files import atomic_write
from jaxcost.data.local import Chosen, Opened, open_local

_LOGGER = logging.getLogger(__name__)
_TFDS = "tfds:"
_CHATTY_LOGGERS = ("absl", "urllib3", "huggingface_hub")


@dataclasses.dataclass(frozen=True)
class DocumentSource(Sequence):
    """The documents of one split, as strings, by index."""

    records: Sequence[dict[str, Any]]
    """Records by index, such as TFDS's random-access source."""
    text_field: str
    """Feature that holds the text, as a string or as UTF-8 bytes."""
    identity: str
    """JSON that tells this content from that of any other dataset, version, split or field."""
    label: str
    """Dataset and split as people name them, safe in a file name."""
    cache_dir: Path
    """Folder for what is derived from the dataset."""
    classes: tuple[str, ...] = ()
    """Names of the labels, where the dataset tells them."""
    skipped: tuple[str, ...] = ()
    """Corrupt records that were left out, and why."""
    files: tuple[str, ...] = ()
    """Features whose bytes are those of a file, and no text."""
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Documents that `config.select` left out, by the reason."""

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"Document {index} was asked of {self.label}, which holds {len(self)}.")
        return _as_text(self.records[index % len(self)][self.text_field])

    def record(self, index: int, fields: Sequence[str]) -> dict[str, str | bytes | int | float]:
        """Returns some features of a record, text as strings, numbers as Python's, and files of images as they are."""
        record = self.records[index]
        return {name: record[name] if name in self.files else _as_plain(record[name]) for name in fields}


def open_source(config: DataConfig, split: str) -> DocumentSource:
    """Opens a split of `config.sources`, or of the TFDS dataset that `config` names where there are none.

    The train split is without what `config.select` leaves out of it.

    Raises:
      ValueError: what `open_tfds` and `open_local` raise it for, or nothing is left.
    """
    source = _open_sources(config, split) if config.sources else open_tfds(config, split)
    return _selected(config, source) if config.select.active and split == config.train_split else source


def _open_sources(config: DataConfig, split: str) -> DocumentSource:
    cache_dir = _cache_dir(config, config.data_dir or _default_data_dir())
    opened = [_open_one(config, name, split, cache_dir) for name in config.sources]
    label = re.sub(r"[^\w.]+", "-", f"{'-'.join(Path(name).stem for name in config.sources)[:80]} {split}").strip("-")
    weights = config.weights if split == config.train_split else ()
    identity = json.dumps({"sources": [one.identity for one in opened], "weights": weights}, sort_keys=True)
    classes = next((one.classes for one in opened if one.classes), ())
    records = _joined([one.records for one in opened], weights)
    skipped = sum((one.skipped for one in opened), ())
    files = (config.text_field,) if config.of_images else ()
    return DocumentSource(records, config.text_field, identity, label, cache_dir, classes, skipped, files)


def _selected(config: DataConfig, source: DocumentSource) -> DocumentSource:
    """A train split without duplicates and without what is held out; what is left out is found once, kept on disk."""
    from jaxcost.data.selection.duplicates import find_contaminated, find_duplicates

    select = config.select
    held_out = open_source(config, config.validation_split) if select.contamination else None
    said = {"source": source.identity, "select": dataclasses.astuple(select)}
    said |= {"held_out": held_out.identity} if held_out else {}
    identity = json.dumps(said, sort_keys=True)
    path = source.cache_dir / f"selected-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {"duplicates": [], "contaminated": []}
        if select.duplicates:
            found["duplicates"] = sorted(find_duplicates(source, select.duplicates).of)
        if held_out:
            found["contaminated"] = sorted(find_contaminated(source, held_out, select.contamination))
        with atomic_write(path) as file:
            file.write(json.dumps(found).encode())
    kept = np.setdiff1d(np.arange(len(source)), np.array(sum(found.values(), []), np.int64))
    if not len(kept):
        raise ValueError(f"data.select leaves out all {len(source)} documents of '{source.label}'; raise its likeness.")
    left_out = {name: len(places) for name, places in found.items()}
    return dataclasses.replace(source, records=Chosen([source.records], kept), identity=identity, left_out=left_out)


def _open_one(config: DataConfig, name: str, split: str, cache_dir: Path) -> DocumentSource | Opened:
    if name.startswith(_TFDS):
        return open_tfds(dataclasses.replace(config, name=name.removeprefix(_TFDS), sources=(), weights=()), split)
    return open_local(config, Path(name), split, cache_dir)


def _joined(records: Sequence[Sequence[dict[str, Any]]], weights: Sequence[float]) -> Sequence[dict[str, Any]]:
    """Records of several sources, one behind the other, or mixed by weights until the first runs out."""
    import grain

    if len(records) == 1:
        return records[0]
    parts = [grain.MapDataset.source(one) for one in records]
    return grain.MapDataset.mix(parts, weights) if weights else grain.MapDataset.concatenate(parts)


def open_tfds(config: DataConfig, split: str) -> DocumentSource:
    """Opens a split of the dataset that `config` names, and prepares the dataset if it is not on disk.

    Preparing is atomic: TFDS writes into a folder of its own and renames it, so a build that is killed leaves
    nothing that would be read, and of two builds at once the first to finish stands.

    Args:
      config: names the dataset, its folder and the feature that holds the text.
      split: split in TFDS's notation; usually `config.train_split` or `config.validation_split`.

    Returns:
      The split's documents in the dataset's stored order. Bytes that are not UTF-8 read as U+FFFD.

    Raises:
      ValueError: the dataset, its configuration, the split or the text feature does not exist, the split is empty,
        or the dataset can be neither read nor prepared.
    """
    import tensorflow_datasets as tfds

    with _quiet():
        builder = _prepared_builder(config)
        info = builder.info
        try:
            instructions = info.splits[split].file_instructions
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"Dataset '{config.name}' has no split '{split}'; choose data.train_split and data.validation_split "
                f"from {', '.join(sorted(info.splits))}, or slices of them such as 'train[:95%]'."
            ) from error
        if not instructions:
            raise ValueError(f"Split '{split}' of dataset '{config.name}' holds no documents; choose a larger one.")
        _check_fields(config, info.features)
        try:
            # Images stay the files that they are until they are looked at, so that labels are read without them.
            whole = {config.text_field: tfds.decode.SkipDecoding()} if config.of_images else None
            records = builder.as_data_source(split, decoders=whole)
        except NotImplementedError as error:
            raise ValueError(
                f"Dataset '{config.name}' lies in '{builder.data_dir}' as {info.file_format.value}, which has no "
                "random access; set data.data_dir to another folder, where it will be prepared as array_record."
            ) from error
        except Exception as error:
            raise ValueError(_unusable(config, "be read", error)) from error
    parts = [(Path(part.filename).name, part.skip, part.take) for part in instructions]
    # TFDS gives no size for a slice, so the sizes of the whole splits stand for the content.
    sizes = {name: whole.num_bytes for name, whole in info.splits.items()}
    identity = {"dataset": info.full_name, "bytes": sizes, "parts": parts, "field": config.text_field}
    identity |= {"inputs": "images"} if config.of_images else {}
    return DocumentSource(
        records=records,
        text_field=config.text_field,
        identity=json.dumps(identity, sort_keys=True),
        label=re.sub(r"[^\w.]+", "-", f"{info.full_name} {split}").strip("-"),
        cache_dir=_cache_dir(config, os.fspath(builder.data_dir_root)),
        classes=_class_names(dict(info.features.items()).get(config.label_field)),
        files=(config.text_field,) if config.of_images else (),
    )


def _prepared_builder(config: DataConfig) -> Any:
    """Returns the TFDS builder of the dataset, prepared on disk."""
    builder = _builder(config)
    if builder.is_prepared():
        return builder
    # Python's own text takes a second; a download may take hours, so it should be seen that one has begun.
    level = logging.INFO if builder.name == "python_text" else logging.WARNING
    _LOGGER.log(level, "Preparing dataset %s in %s, once; this may download it.", config.name, builder.data_dir)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        # Another process may have finished the same dataset first, and then there is nothing to do.
        if not builder.is_prepared():
            raise ValueError(_unusable(config, "be prepared", error)) from error
    return _builder(config)  # a builder reads the dataset's description when it is made


def _builder(config: DataConfig) -> Any:
    """Returns TFDS's builder for `config.name`."""
    import tensorflow_datasets as tfds

    import jaxcost.data.corpus
    import jaxcost.data.synthetic  # noqa: F401  (both register datasets)

    data_dir = None if config.data_dir is None else os.path.expanduser(config.data_dir)
    try:
        return tfds.builder(config.name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        name = config.name.split("/")[0].split(":")[0]
        raise ValueError(
            f"TFDS knows no dataset '{name}'{_nearest(name, tfds.list_builders(with_community_datasets=False))}; "
            "set data.name to the name of a TFDS dataset, or data.data_dir to the folder where it was prepared."
        ) from error
    except Exception as error:
        name, _, variant = config.name.partition("/")
        configs = _config_names(tfds, name)
        if variant and configs and variant.split(":")[0] not in configs:
            raise ValueError(
                f"TFDS dataset '{name}' has no configuration '{variant}'{_nearest(variant, configs)}; "
                f"set data.name to '{name}/CONFIGURATION' with one of {', '.join(configs[:8])}"
                f"{' and so on' if len(configs) > 8 else ''}."
            ) from error
        raise ValueError(_unusable(config, "be opened", error)) from error


def _config_names(tfds: Any, name: str) -> list[str]:
    """Returns the names of the dataset's configurations, none if it isn't registered."""
    try:
        return sorted(tfds.builder_cls(name).builder_configs)
    except Exception:
        return []


def _check_fields(config: DataConfig, features: Any) -> None:
    """Raises ValueError unless the dataset's features hold text, or images, under `config.text_field`, and what else is
    read."""
    import tensorflow_datasets as tfds

    kind, wanted = ("image", tfds.features.Image) if config.of_images else ("text", tfds.features.Text)
    found = sorted(name for name, feature in features.items() if isinstance(feature, wanted))
    if config.text_field not in found:
        choice = f"data.text_field to one of {', '.join(found)}" if found else f"data.name to a dataset of {kind}s"
        raise ValueError(f"Dataset '{config.name}' has no {kind} feature '{config.text_field}'; set {choice}.")
    setting = "label_field" if config.one_answer else "answer_field"
    for field in config.fields[1:]:
        if field not in features:
            raise ValueError(
                f"Dataset '{config.name}' has no feature '{field}'; set data.{setting} to one of "
                f"{', '.join(sorted(features))}."
            )


def _class_names(feature: Any) -> tuple[str, ...]:
    """The names of a TFDS feature's labels; none if it is of another kind."""
    import tensorflow_datasets as tfds

    return tuple(feature.names or ()) if isinstance(feature, tfds.features.ClassLabel) else ()


def _as_plain(value: Any) -> str | int | float:
    if isinstance(value, str | bytes):
        return _as_text(value)
    return float(value) if isinstance(value, float | np.floating) else int(value)


def _as_text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", errors="replace")


def _default_data_dir() -> str:
    import tensorflow_datasets as tfds

    return str(tfds.core.constants.DATA_DIR)


def _cache_dir(config: DataConfig, data_dir_root: str) -> Path:
    """Returns the local folder for derived files."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    if "://" in data_dir_root:
        raise ValueError(
            f"The dataset lies in '{data_dir_root}', where token arrays cannot be mapped into memory; "
            "set data.cache_dir to a local folder."
        )
    return Path(data_dir_root).expanduser() / "jaxcost_cache"


def _nearest(name: str, candidates: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, candidates, n=3)
    return f" (nearest: {', '.join(matches)})" if matches else ""


def _unusable(config: DataConfig, action: str, error: Exception) -> str:
    """Returns one sentence from an error of TFDS's, whose messages run over many lines."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given").rstrip(".:")
    return (
        f"Dataset '{config.name}' could not {action} ({type(error).__name__}: {reason}); check the network, "
        "the disk and data.data_dir, or set data.name to a dataset that is on disk."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's progress bars, prints and warnings off the terminal; leaves the bars on, which is their default."""
    import tensorflow_datasets as tfds

    levels = {name: logging.getLogger(name).level for name in _CHATTY_LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
