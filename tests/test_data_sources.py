"""Files of one's own: every format read alike by index, splits, mixtures, and what is corrupt counted and named."""

import dataclasses
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxcost.data import DataConfig, open_source, tokenize_split
from jaxcost.data.records import Csv, Lines
from jaxcost.data.tokenizers import ByteTokenizer

RECORDS = [{"text": f'Text {i}, "quoted"\nand of two lines é', "label": "ab"[i % 2]} for i in range(10)]


def config(tmp_path, *sources, **changes):
    settings = {"validation_split": "train[8:]", "train_split": "train[:8]", "objective": "labels"}
    settings |= {"cache_dir": str(tmp_path / "cache")}
    return DataConfig(sources=tuple(map(str, sources)), **settings | changes)


def write_lines(path, records=RECORDS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_csv(path):
    quoted = [",".join('"' + v.replace('"', '""') + '"' for v in record.values()) for record in RECORDS]
    path.write_text("text,label\r\n" + "\r\n".join(quoted))
    return path


def table():
    return pa.Table.from_pylist(RECORDS)


def write_parquet(path):
    pq.write_table(table(), path, row_group_size=3)
    return path


def write_saved(path):
    """As save_to_disk() of `datasets` lays a dataset out."""
    path.mkdir()
    with pa.ipc.new_stream(path / "data-00000-of-00001.arrow", table().schema) as writer:
        writer.write_table(table(), max_chunksize=4)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    (path / "dataset_info.json").write_text(json.dumps({"features": features}))
    return path


WRITERS = {"a.jsonl": write_lines, "a.csv": write_csv, "a.parquet": write_parquet, "saved": write_saved}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records_by_index(tmp_path, name):
    asked = config(tmp_path, WRITERS[name](tmp_path / name))
    train, validation = open_source(asked, "train[:8]"), open_source(asked, "train[8:]")
    found = [source.record(i, asked.fields) for source in (train, validation) for i in range(len(source))]
    assert found == RECORDS and (len(train), train[7]) == (8, RECORDS[7]["text"])
    assert train.identity != validation.identity
    assert train.classes == (("a", "b") if name == "saved" else ())
    again = pickle.loads(pickle.dumps(train))
    assert again.record(3, asked.fields) == RECORDS[3]


def test_a_folder_of_text_is_split_by_the_names_in_it(tmp_path):
    for name in ("train/a.txt", "train/b.md", "valid/c.txt", "README.md"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(name)
    asked = config(tmp_path, tmp_path / "texts", objective="next_token", train_split="train", validation_split="test")
    assert list(open_source(asked, "train")) == ["train/a.txt", "train/b.md"]
    assert list(open_source(asked, "validation")) == ["valid/c.txt"]
    assert len(open_source(asked, "train+validation")) == 3
    with pytest.raises(ValueError, match=r"has no split 'test'; choose .* from train, validation, or slices"):
        open_source(asked, "test")


def test_records_are_found_across_the_pieces_that_a_file_is_scanned_in(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxcost.data.records._CHUNK_BYTES", 7)
    lines, rows = Lines(write_lines(tmp_path / "a.jsonl"), 1000), Csv(write_csv(tmp_path / "a.csv"), 1000)
    assert [lines[i] for i in range(len(lines))] == [rows[i] for i in range(len(rows))] == RECORDS


def test_corrupt_records_are_counted_named_and_left_out_up_to_a_limit(tmp_path):
    good = json.dumps(RECORDS[0]).encode()
    bad = [b"{", b'{"text": "\xff", "label": "a"}', b"[1]", b'{"text": "", "label": "a"}', b'{"text": 3, "label": "a"}']
    bad.append(json.dumps({"text": "x" * 500, "label": "a"}).encode())
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, *bad, b"", good]))
    asked = config(tmp_path, path, max_record_bytes=400, train_split="train", validation_split="none")
    for _ in range(2):  # the second time, what was found is read from disk
        source = open_source(asked, "train")
        assert list(source) == [RECORDS[0]["text"]] * 2
        said = " | ".join(source.skipped)
        assert len(source.skipped) == 6 and all(why.startswith("a.jsonl, byte ") for why in source.skipped)
        for why in (
            "is not JSON",
            "not UTF-8",
            "not a JSON object",
            "is empty",
            "holds int",
            "more than data.max_record_bytes",
        ):
            assert why in said, said
    with pytest.raises(ValueError, match=r"6 records of .* are corrupt, more than data.max_corrupt_records \(5\): a.j"):
        open_source(dataclasses.replace(asked, max_corrupt_records=5), "train")
    # What was mended is read anew.
    path.write_bytes(b"\n".join([good] * 3))
    assert open_source(asked, "train").skipped == ()


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    empty, missing = tmp_path / "empty.jsonl", tmp_path / "missing.jsonl"
    empty.touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is not enough")
    cases = [
        (missing, "which does not exist"),
        (tmp_path / "folder", "holds no file that can be read"),
        (empty, "holds no documents"),
        (tmp_path / "bad.parquet", "cannot be read as Parquet"),
        (write_lines(tmp_path / "b.jsonl", [{"body": "x"}]), "has no field 'text', but body; set data.text_field"),
    ]
    for path, said in cases:
        with pytest.raises(ValueError, match=said) as error:
            open_source(config(tmp_path, path, train_split="train"), "train")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="2 shares for 1 data.sources"):
        config(tmp_path, empty, weights=(1.0, 2.0))


def test_a_byte_order_mark_and_a_large_field_are_read_and_hidden_and_derived_files_are_not(tmp_path):
    folder, large = tmp_path / "data", "x" * 200_000
    folder.mkdir()
    (folder / "a.csv").write_bytes(f'\ufefftext,label\n"{large}",a\n'.encode())
    (folder / ".hidden.csv").write_text("no header\n")
    write_parquet(folder / "b.parquet")
    asked = config(tmp_path, folder, cache_dir=str(folder / "cache"), train_split="train")
    for _ in range(2):  # the second time, the Parquet file's copy lies in the folder
        source = open_source(asked, "train")
        assert source[0] == large and len(source) == 11


def test_an_empty_text_file_is_named_and_others_are_read(tmp_path):
    for name, content in (("a.txt", b"a"), ("b.txt", b""), ("c.txt", b"\xe9")):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(content)
    stream = tokenize_split(config(tmp_path, tmp_path / "texts", objective="next_token"), "train", ByteTokenizer())
    np.testing.assert_array_equal(stream.tokens, [256, 97])
    assert [why.split()[0] for why in stream.skipped] == ["b.txt", "c.txt"]


def test_sources_are_mixed_by_weight_and_otherwise_read_one_behind_the_other(tmp_path):
    many = write_lines(tmp_path / "many.jsonl", [{"text": f"m{i}"} for i in range(60)])
    few = write_lines(tmp_path / "few.jsonl", [{"text": f"f{i}"} for i in range(10)])
    plain = config(tmp_path, many, few, objective="next_token", train_split="train", validation_split="train[:50%]")
    assert [text[0] for text in open_source(plain, "train")] == ["m"] * 60 + ["f"] * 10
    mixed = dataclasses.replace(plain, weights=(3.0, 1.0))
    texts = list(open_source(mixed, "train"))
    assert texts == list(open_source(mixed, "train")) and len(set(texts)) == len(texts)
    assert [sum(text[0] == kind for text in texts) for kind in "mf"] == [30, 10]
    assert len(open_source(mixed, "train[:50%]")) == 35
    assert open_source(mixed, "train").identity != open_source(plain, "train").identity
