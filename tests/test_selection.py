"""Duplicates and what is held out: found where planted, nowhere else, and left out of a training."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small

from jaxcost.data import DataConfig, open_source, tokenize_split
from jaxcost.data.pipeline import batches_in_order
from jaxcost.data.selection import SelectConfig
from jaxcost.data.selection.duplicates import find_contaminated, find_duplicates, likeness
from jaxcost.data.selection.scores import coreset, el2n, uncertainty
from jaxcost.data.tokenizers import ByteTokenizer
from jaxcost.evaluation.score import Scorer, row_nats
from jaxcost.sharding import MeshConfig, make_mesh

DRAW = np.random.default_rng(0)
WORDS = ["".join(DRAW.choice(list("abcdefghij"), size)) for size in DRAW.integers(3, 9, 2000)]


def texts(count, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, 40)) for _ in range(count)]


def near_copy(text, seed):
    draw, words = np.random.default_rng(seed), text.split()
    words[int(draw.integers(len(words)))] = "changed"
    return " ".join(words).upper() + "!"


def test_planted_duplicates_are_found_and_few_others():
    originals = texts(2000, 1)
    copies = {2000 + i: i * 9 for i in range(200)}
    planted = [*originals, *(near_copy(originals[i], i) for i in copies.values())]
    found = find_duplicates(planted, 0.7)
    assert sum(found.of.get(i) == original for i, original in copies.items()) >= 0.95 * 200
    assert len(found.of.keys() - copies.keys()) < 0.01 * 2000 and not found.exact
    assert len(found.kept) == found.documents - len(found.of)


def test_the_same_text_but_for_case_marks_and_spaces_is_exact():
    found = find_duplicates(["Hello,  world", "other words here", "hello world!", "", "...", "ab", "AB"])
    assert found.of == {2: 0, 4: 3, 6: 5} and found.exact == {2, 4, 6}
    assert found.kept.tolist() == [0, 1, 3, 5]


def test_likeness_is_the_jaccard_index_of_five_letters_in_a_row():
    # abcde bcdef cdefg against bcdef cdefg defgh
    assert likeness("abcdefg", "BCDEFGH") == pytest.approx(2 / 4)
    assert likeness("", "") == 1.0


def test_what_is_like_the_held_out_split_is_found():
    held_out, train = texts(50, 2), texts(50, 3)
    train[7], train[9] = near_copy(held_out[30], 0), held_out[4]
    assert find_contaminated(train, held_out, 0.7) == {7: 30, 9: 4}


def test_a_training_leaves_out_what_is_asked_and_says_so(tmp_path):
    held_out, train = texts(20, 4), texts(30, 5)
    train[3], train[20] = held_out[2], near_copy(train[10], 1)
    for split, found in (("train", train), ("validation", held_out)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    plain = DataConfig(sources=(str(tmp_path),), cache_dir=str(tmp_path / "cache"))
    asked = dataclasses.replace(plain, select=SelectConfig(duplicates=0.7, contamination=0.7))
    for _ in range(2):  # the second time, from what was found the first time
        source = open_source(asked, "train")
        assert list(source) == [text for i, text in enumerate(train) if i not in (3, 20)]
        assert source.left_out == {"duplicates": 1, "contaminated": 1}
    assert len(open_source(asked, "validation")) == 20 and len(open_source(plain, "train")) == 30
    stream = tokenize_split(asked, "train", ByteTokenizer())
    assert stream.num_documents == 28 and stream.left_out == source.left_out
    with pytest.raises(ValueError, match="use 0 for none, or a likeness from 0.3 to 1"):
        SelectConfig(duplicates=0.1)


# ---- Scores ----


def test_uncertainty_is_largest_where_labels_are_equally_likely():
    shares = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.6, 0.3, 0.1]])
    np.testing.assert_allclose(uncertainty(shares, "margin"), [1.0, 0.0, 0.7])
    entropy = uncertainty(shares, "entropy")
    assert entropy[0] == pytest.approx(np.log(2)) and entropy[1] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="no uncertainty 'variance'"):
        uncertainty(shares, "variance")


def test_el2n_is_the_mean_distance_to_the_label():
    shares = np.array([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    np.testing.assert_allclose(el2n(shares, [0, 1]), [np.sqrt(2) / 2, np.sqrt(0.5)])


def test_the_perplexity_of_each_text_adds_up_to_the_score_of_all():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    draw = np.random.default_rng(0)
    lengths = np.array([5, 2, 7, 1, 3])
    tokens = draw.integers(1, small.CONFIG.vocab_size, (5, 9))
    mask = (np.arange(8) < lengths[:, None]).astype(np.float32)
    rows = [
        {"inputs": t[:-1].astype(np.int32), "targets": t[1:].astype(np.int32), "mask": m}
        for t, m in zip(tokens, mask, strict=True)
    ]
    batches = list(batches_in_order(rows, 2))
    found = row_nats(small.MODEL, small.dense_params(), batches, mesh)
    whole = Scorer(small.MODEL, batches, np.ones(small.CONFIG.vocab_size, int), mesh)(small.dense_params())
    assert found.shape == (5,) and np.sum(found * lengths) / lengths.sum() == pytest.approx(
        whole.nats_per_token, rel=1e-5
    )
    np.testing.assert_allclose(row_nats(small.MODEL, small.dense_params(), batches[1:], mesh), found[2:], rtol=1e-5)


def test_a_coreset_takes_the_farthest_point_each_time():
    points = np.array([[0.0], [1.0], [10.0], [4.0]])
    assert coreset(points, 3).tolist() == [3, 2, 0]
    assert coreset(points, 2, chosen=np.array([0])).tolist() == [2, 3]
    clusters = np.random.default_rng(0).normal(size=(60, 2)) * 0.1 + np.repeat([[0, 0], [5, 0], [0, 5]], 20, axis=0)
    assert sorted(coreset(clusters, 3) // 20) == [0, 1, 2]
    with pytest.raises(ValueError, match="4 of 3 points cannot be chosen"):
        coreset(points, 4, chosen=np.array([0]))
