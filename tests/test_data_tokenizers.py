"""Tokenisers: exact round trips, a separator that no text can spell, the same result every time, files that last."""

import json

import numpy as np
import pytest

from jaxcost.data.tokenizers import SEPARATOR_SYMBOL, BpeTokenizer, ByteTokenizer, load_tokenizer

CORPUS = ["def add(x, y):\n    return x + y\n", "class A:\n    def add(self):\n        return self\n"] * 20
TEXTS = [
    "",
    "def add(x, y):\n\treturn x + y\r\n",
    "naïve café — 東京 🙂\x00\x7f\u2028",
    "<|separator|><|endoftext|></s>[SEP]",
    "".join(map(chr, [*range(0xD800), *range(0xE000, 0xE800), 0xFFFF, 0x10FFFF])),
]
BPE = BpeTokenizer.train(CORPUS, 280)
TOKENIZERS = [ByteTokenizer(), BPE]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_survives_the_round_trip_and_cannot_spell_the_separator(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator_id not in ids
    np.testing.assert_array_equal(tokenizer.symbols(ids), np.frombuffer(text.encode(), np.uint8))
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])
def test_separators_are_symbols_but_not_text(tokenizer):
    ids = np.concatenate([[tokenizer.separator_id], tokenizer.encode("ab"), [tokenizer.separator_id]])
    assert tokenizer.symbols(ids).tolist() == [SEPARATOR_SYMBOL, 97, 98, SEPARATOR_SYMBOL]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.separator_id] == 1


def test_broken_utf8_is_shown_and_not_raised():
    assert ByteTokenizer().decode(np.array([97, 0xE2, 0x82, 98])) == "a\ufffdb"
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\ud800")) == "a?"
    assert BPE.decode(BPE.encode("a\ud800")) == "a?"


def test_bpe_learns_from_its_text_alone():
    assert BPE.vocab_size == 280
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) * 0.7
    again = BpeTokenizer.train(list(CORPUS), 280)
    assert (again.serialized, again.fingerprint) == (BPE.serialized, BPE.fingerprint)
    other = BpeTokenizer.train(["something else altogether"], 300)
    assert other.fingerprint != BPE.fingerprint
    assert 257 < other.vocab_size < 300  # too few distinct pairs for 300
    assert BpeTokenizer.train(CORPUS, 257).vocab_size == 257


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])
def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    path = tmp_path / "new_folder" / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode(TEXTS[2]), tokenizer.encode(TEXTS[2]))
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("content", ["", "{", json.dumps({"type": "other"}), json.dumps([1])])
def test_a_file_that_is_no_tokeniser_says_so(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="could not be read as a tokeniser"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match="could not be read as a tokeniser"):
        load_tokenizer(tmp_path / "missing.json")
