"""A disk that fills while data are prepared: one sentence, nothing half-written, and all well once there is room."""

import contextlib
import json
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxcost.data import DataConfig, open_source, tokenize_split
from jaxcost.data.files import atomic_folder, atomic_write
from jaxcost.data.tokenizers import ByteTokenizer

FULL = r"The disk of '{}' is full \(File too large\), so that nothing was written; make room there, or name a folder"


@contextlib.contextmanager
def no_room(file_bytes):
    """No file of this process may grow beyond so many bytes, which fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def config(source, cache, **changes):
    return DataConfig(sources=(str(source),), cache_dir=str(cache), train_split="train[:9]", **changes)


def test_tokens_are_whole_or_absent(tmp_path):
    source, cache = tmp_path / "texts.jsonl", tmp_path / "cache"
    source.write_text("".join(json.dumps({"text": f"{i} " + "words " * 2000}) + "\n" for i in range(10)))
    asked = config(source, cache)
    open_source(asked, "train[:9]")
    before = sorted(cache.iterdir())
    with no_room(50_000), pytest.raises(OSError, match=FULL.format(cache)):
        tokenize_split(asked, "train[:9]", ByteTokenizer())
    assert sorted(cache.iterdir()) == before
    stream = tokenize_split(asked, "train[:9]", ByteTokenizer())
    assert stream.num_documents == 9 and len(stream.tokens) == 9 * (1 + 2 + 12_000)


def test_a_copy_of_a_table_is_whole_or_absent(tmp_path):
    records = [{"text": np.random.default_rng(i).bytes(5000).hex()} for i in range(10)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    asked = config(tmp_path / "a.parquet", tmp_path / "cache")
    with no_room(50_000), pytest.raises(OSError, match=FULL.format(tmp_path / "cache")):
        open_source(asked, "train[:9]")
    assert not list((tmp_path / "cache").iterdir())
    assert list(open_source(asked, "train[:9]")) == [record["text"] for record in records[:9]]


def test_a_file_that_was_there_and_a_folder_that_was_not_stay_so(tmp_path):
    file, folder = tmp_path / "kept.json", tmp_path / "new"
    file.write_text("before")
    # What is still in the buffer when the block ends is written, and fails, behind it.
    for size in (9_000, 100_000):
        with no_room(5_000), pytest.raises(OSError, match=FULL.format(tmp_path)), atomic_write(file) as opened:
            opened.write(bytes(size))
        with no_room(5_000), pytest.raises(OSError, match=FULL.format(tmp_path)), atomic_folder(folder) as made:
            (made / "a").write_bytes(bytes(size))
        assert list(tmp_path.iterdir()) == [file] and file.read_text() == "before"


def test_other_failures_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"), atomic_write(tmp_path / "a"):
        (tmp_path / "missing").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dataset_that_tfds_prepares_is_whole_or_absent(tmp_path):
    asked = DataConfig(name="synthetic_customer_service", data_dir=str(tmp_path), objective="labels")
    with (
        no_room(20_000),
        pytest.raises(ValueError, match="could not be prepared .* check the network, the disk and data"),
    ):
        open_source(asked, "train")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(open_source(asked, "train")) == 4000
