"""Token arrays: what they hold, that they are made once, and that a damaged one is noticed and made again."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxcost.data import DataConfig, build_tokenizer, tokenize_split
from jaxcost.data.files import atomic_write
from jaxcost.data.tokenizers import ByteTokenizer

DOCUMENTS = {
    "train": ["def add(x, y):\n    return x + y\n" * 5, "", "naïve 🙂", "class A:\n    pass\n"],
    "validation": ["x = 1\n", "y = add(x, 2)\n"],
}


class PackedDocuments(tfds.core.GeneratorBasedBuilder):
    """A dataset that isn't ours, with a text field of another name."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "size": np.int32})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in DOCUMENTS}

    def _generate_examples(self, split):
        for i, text in enumerate(DOCUMENTS[split]):
            yield i, {"body": text, "size": len(text)}


@dataclasses.dataclass(frozen=True)
class CountingTokenizer(ByteTokenizer):
    """Bytes, and how often it was asked."""

    calls: list = dataclasses.field(default_factory=list)

    def encode(self, text):
        self.calls.append(text)
        return super().encode(text)


@pytest.fixture
def config(tmp_path):
    return DataConfig(name="packed_documents", text_field="body", data_dir=str(tmp_path), bpe_vocab_size=280)


def _arrays(config):
    return sorted(Path(config.data_dir, "jaxcost_cache").glob("*.npy"))


def test_every_document_stands_behind_a_separator(config):
    stream = tokenize_split(config, "train", ByteTokenizer())
    assert stream.tokens.dtype == np.uint16
    starts = np.flatnonzero(stream.tokens == 256)
    assert starts[0] == 0
    pieces = [bytes(piece[1:].tolist()).decode() for piece in np.split(stream.tokens, starts[1:])]
    assert sorted(pieces) == sorted(DOCUMENTS["train"])
    assert stream.num_documents == 4
    assert stream.text_bytes == sum(len(text.encode()) + 1 for text in DOCUMENTS["train"]) == len(stream.tokens)


def test_bits_per_byte_have_one_denominator_whatever_the_tokeniser(config):
    bpe_config = dataclasses.replace(config, tokenizer="bpe")
    tokenizer = build_tokenizer(bpe_config)
    as_bytes = tokenize_split(config, "train", build_tokenizer(config))
    as_bpe = tokenize_split(bpe_config, "train", tokenizer)
    assert len(as_bpe.tokens) < len(as_bytes.tokens)
    assert as_bpe.text_bytes == as_bytes.text_bytes
    np.testing.assert_array_equal(tokenizer.symbols(as_bpe.tokens), as_bytes.tokens)


def test_tokenised_once_and_again_only_for_another_split_or_tokeniser(config):
    tokenizer = CountingTokenizer()
    first = tokenize_split(config, "train", tokenizer)
    assert len(tokenizer.calls) == 4
    second = tokenize_split(config, "train", tokenizer)
    assert len(tokenizer.calls) == 4
    assert isinstance(second.tokens, np.memmap)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert (first.text_bytes, first.num_documents) == (second.text_bytes, second.num_documents)
    tokenize_split(config, "train[:50%]", tokenizer)
    assert len(tokenizer.calls) == 6
    tokenize_split(config, "train", build_tokenizer(dataclasses.replace(config, tokenizer="bpe")))
    assert len(_arrays(config)) == 3
    assert not list(Path(config.data_dir).rglob("*.tmp"))


def _truncate(array, description):
    array.write_bytes(array.read_bytes()[:-10])


def _empty(array, description):
    array.write_bytes(b"")


def _garble(array, description):
    content = bytearray(array.read_bytes())
    content[-20:-10] = bytes(10)
    array.write_bytes(content)


def _lose_description(array, description):
    description.unlink()


def _break_description(array, description):
    description.write_text("[]")


def _replace_by_another_splits(array, description):
    validation = next(file for file in array.parent.glob("*.npy") if "validation" in file.name)
    shutil.copy(validation, array)
    shutil.copy(validation.with_suffix(".json"), description)


@pytest.mark.parametrize(
    "damage",
    [_truncate, _empty, _garble, _lose_description, _break_description, _replace_by_another_splits],
)
def test_a_damaged_array_is_made_again(config, damage):
    tokenizer = CountingTokenizer()
    tokenize_split(config, "validation", tokenizer)
    whole = np.array(tokenize_split(config, "train", tokenizer).tokens)
    (array,) = (file for file in _arrays(config) if "train" in file.name)
    damage(array, array.with_suffix(".json"))
    tokenizer.calls.clear()
    np.testing.assert_array_equal(tokenize_split(config, "train", tokenizer).tokens, whole)
    assert len(tokenizer.calls) == 4
    np.testing.assert_array_equal(tokenize_split(config, "train", tokenizer).tokens, whole)
    assert len(tokenizer.calls) == 4


def test_a_trained_tokeniser_is_kept_and_a_damaged_one_trained_again(config):
    config = dataclasses.replace(config, tokenizer="bpe")
    first = build_tokenizer(config)
    (path,) = Path(config.data_dir, "jaxcost_cache").glob("*bpe280*.json")
    modified = path.stat().st_mtime_ns
    assert build_tokenizer(config).fingerprint == first.fingerprint
    assert path.stat().st_mtime_ns == modified
    path.write_text(path.read_text()[:100])
    assert build_tokenizer(config).fingerprint == first.fingerprint


def test_a_dataset_with_the_same_name_and_another_text_is_not_taken_for_it(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))
    tokenize_split(config, "train", ByteTokenizer())
    shutil.rmtree(tmp_path / "packed_documents")
    monkeypatch.setitem(DOCUMENTS, "train", ["one", "two", "three", "four and more"])
    stream = tokenize_split(config, "train", ByteTokenizer())
    assert stream.text_bytes == len("onetwothreefour and more") + 4


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_many_ids_take_four_bytes(config):
    class WideTokenizer(ByteTokenizer):
        vocab_size = 2**16 + 1
        fingerprint = "wide"

        def __init__(self):
            pass

    stream = tokenize_split(config, "validation", WideTokenizer())
    assert stream.tokens.dtype == np.uint32
    np.testing.assert_array_equal(stream.tokens, tokenize_split(config, "validation", ByteTokenizer()).tokens)


def test_an_empty_split_and_a_folder_that_cannot_be_written_say_what_to_change(config, tmp_path):
    with pytest.raises(ValueError, match="holds no documents; choose a larger one"):
        tokenize_split(config, "train[:0]", ByteTokenizer())
    (tmp_path / "file").write_text("")
    blocked = dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="set data.cache_dir to a folder that can"):
        tokenize_split(blocked, "train", ByteTokenizer())


def test_a_field_that_is_not_text_is_refused(config):
    with pytest.raises(ValueError, match="no text feature 'size'; set data.text_field to one of body"):
        tokenize_split(dataclasses.replace(config, text_field="size"), "train", ByteTokenizer())
