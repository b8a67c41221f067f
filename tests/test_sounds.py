"""Recordings in files, the pieces that they are heard in, and what a checkpoint says of its outputs."""

import io
import json

import numpy as np
import pytest
import soundfile

from jaxcost.data.characters import Characters, read_characters
from jaxcost.data.pretrained import BadTokenizer
from jaxcost.data.records import BadRecord
from jaxcost.data.sounds import read_sound, windows
from jaxcost.serving.speech import Instructions, read_instructions

RATE = 16_000


def file(samples, rate, **options):
    made = io.BytesIO()
    soundfile.write(made, samples, rate, **{"format": "WAV", "subtype": "FLOAT"} | options)
    return made.getvalue()


def tone(seconds, rate):
    return np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def test_samples_are_those_of_the_file():
    samples = np.random.default_rng(0).uniform(-1, 1, 3 * 65_536 + 5).astype(np.float32)
    np.testing.assert_array_equal(read_sound(file(samples, RATE), RATE, 60), samples)
    both = np.stack([samples, -0.5 * samples], axis=1)
    np.testing.assert_allclose(read_sound(file(both, RATE), RATE, 60), 0.25 * samples, atol=1e-6)
    packed = read_sound(file(samples, RATE, format="FLAC", subtype="PCM_16"), RATE, 60)
    np.testing.assert_allclose(packed, samples, atol=2**-15)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_another_rate_is_the_same_sound(rate):
    got, want = read_sound(file(tone(0.5, rate), rate), RATE, 9), tone(0.5, RATE)
    assert got.dtype == np.float32 and abs(len(got) - len(want)) <= 1
    # The filter rings at both ends.
    np.testing.assert_allclose(got[400:-400], want[400 : len(got) - 400], atol=5e-3)


def test_a_file_that_says_more_than_it_holds_is_refused_or_read_to_its_end():
    content = bytearray(file(tone(0.1, RATE), RATE, format="FLAC", subtype="PCM_16"))
    content[22:26] = b"\xff\xff\xff\xff"  # samples in all, in the first block
    with pytest.raises(BadRecord, match="more than 9 s"):
        read_sound(bytes(content), RATE, 9)
    with pytest.raises(BadRecord, match="cannot be read as sound"):
        read_sound(file(tone(0.5, RATE), RATE, format="FLAC", subtype="PCM_16")[:2000], RATE, 9)


def test_formats_that_cannot_be_searched_are_read_too():
    """Such as that of telephones, GSM 06.10."""
    got = read_sound(file(tone(0.5, 8_000), 8_000, subtype="GSM610"), 8_000, 9)
    np.testing.assert_allclose(got[: len(tone(0.5, 8_000))][400:], tone(0.5, 8_000)[400:], atol=0.3)


def test_samples_of_any_integers_are_read_and_others_so_loud_are_refused():
    """A model would make no numbers of them, and keep these."""
    np.testing.assert_array_equal(read_sound(file(np.full(99, 2.0**31), RATE), RATE, 9), np.full(99, 2.0**31))
    with pytest.raises(BadRecord, match="no numbers, or beyond"):
        read_sound(file(np.full(99, -3e38), RATE), RATE, 9)


@pytest.mark.parametrize("length", [1, 999, 1000, 1001, 12_345])
def test_pieces_are_the_recording_and_none_is_too_long(length):
    samples = np.random.default_rng(length).normal(size=length).astype(np.float32)
    pieces = windows(samples, 1000, RATE)
    np.testing.assert_array_equal(np.concatenate(pieces), samples)
    assert all(1 <= len(piece) <= 1000 for piece in pieces) and all(len(piece) > 800 for piece in pieces[:-1])


def test_pieces_are_cut_where_it_is_quiet():
    samples = np.ones(25_000, np.float32)
    samples[9_300:9_700] = 0
    assert [len(piece) for piece in windows(samples, 10_000, 4_000)][0] in range(9_301, 9_700)


CHARACTERS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "'": 6}


def written(folder, vocabulary, **files):
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


def test_characters_of_a_checkpoint(tmp_path):
    found = read_characters(written(tmp_path, CHARACTERS), 8)
    assert found == Characters(("", "", "", "", " ", "A", "'", ""), 0)
    assert found.text([4, 5, 1, 4, 6, 5, 4]) == "A 'A"
    tokens = {"pad_token": {"content": "'"}, "word_delimiter_token": "A", "do_lower_case": True}
    other = read_characters(written(tmp_path, CHARACTERS | {"B": 7}, tokenizer_config=tokens), 8)
    assert other == Characters(("<pad>", "", "", "", "|", " ", "", "b"), 6)
    assert read_characters(written(tmp_path, CHARACTERS, config={"pad_token_id": 5}), 8).blank == 5


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        ({}, "holds no vocab.json"),
        ({"en": {"a": 0}}, "cut it to one language"),
        ({"a": 8, "<pad>": 0}, "below the model's 8 outputs"),
        ({"a": 1}, "names no pad_token_id"),
    ],
)
def test_characters_that_cannot_be_read_are_refused(vocabulary, said, tmp_path):
    with pytest.raises(BadTokenizer, match=said):
        read_characters(written(tmp_path, vocabulary), 8)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(BadTokenizer, match="cannot be read as JSON"):
        read_characters(tmp_path, 8)


TOLD = {
    "lang_to_id": {"<|en|>": 51, "<|yue|>": 52},
    "task_to_id": {"transcribe": 53, "translate": 54},
    "no_timestamps_token_id": 57,
    "prev_sot_token_id": 56,
    "suppress_tokens": [3, 1],
    "begin_suppress_tokens": [7],
}


def test_instructions_of_a_checkpoint(tmp_path):
    assert read_instructions(tmp_path, 50, 60) == Instructions(50)
    assert Instructions(50).prompt(None, False).tolist() == [50] and not Instructions(50).translates
    (tmp_path / "generation_config.json").write_text(json.dumps(TOLD))
    found = read_instructions(tmp_path, 50, 60)
    assert found.languages == {"en": 51, "yue": 52} and found.translates
    assert found.never == (1, 3, 50, 53, 54, 57, 58, 59) and found.not_first == (7,)
    assert found.prompt("yue", True).tolist() == [50, 52, 54, 57]
    assert found.prompt("en", False, np.array([9, 8])).tolist() == [56, 9, 8, 50, 51, 53, 57]


@pytest.mark.parametrize(
    "change",
    [{"lang_to_id": [1]}, {"suppress_tokens": 3}, {"no_timestamps_token_id": "a"}, {"begin_suppress_tokens": [60]}],
)
def test_instructions_that_make_no_sense_are_refused(change, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(TOLD | change))
    with pytest.raises(BadTokenizer, match="none from 0 to 59"):
        read_instructions(tmp_path, 50, 60)
