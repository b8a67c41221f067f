"""Labels that a model gives: those it is sure of, with where they came from, learned from and priced like others."""

import dataclasses
import json

import pytest
from labels import LABELS, experiment, session_of, write_folder

from jaxcost.cost.purchases import PriceConfig
from jaxcost.labelling import agreed, choose, pseudo_label, write_labelled
from jaxcost.labelling import write_folder as write_examples
from jaxcost.session import load_run
from jaxcost.training.config import TrainingConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    """A training on a part of the labels."""
    directory = tmp_path_factory.mktemp("teacher") / "run"
    value = experiment(folder, LABELS, "labels", data={"train_split": "train[:60]"})
    session_of(value).train(directory)
    session, params, _ = load_run(directory)
    return session, params


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_that_is_sure(teacher, folder, tmp_path):
    session, params = teacher
    counts = write_labelled(session, params, "teacher, step 40", tmp_path / "out", split="train[60:]", threshold=0.9)
    truth = {record["text"]: record["label"] for record in lines(folder / "train.jsonl")}
    made = lines(tmp_path / "out" / "train.jsonl")
    pseudo = [record for record in made if record.get("origin") == "pseudo_label"]
    assert counts["labels"] == 60 == len(made) - len(pseudo) and counts["kept"] == len(pseudo) > 30
    assert counts["texts"] == counts["duplicates"] + counts["unsure"] + counts["kept"]
    assert sum(record["label"] == truth[record["text"]] for record in pseudo) > 0.9 * len(pseudo)
    assert all(record["confidence"] >= 0.9 and record["teacher"] == "teacher, step 40" for record in pseudo)
    assert len(lines(tmp_path / "out" / "validation.jsonl")) == 30

    data = {"sources": (str(tmp_path / "out"),)}
    prices = PriceConfig(label_usd=0.1, read_token_usd=1e-6)
    value = experiment(folder, LABELS, "labels", data=data, prices=prices, training=TrainingConfig(steps=4))
    student = session_of(value)
    student.train(tmp_path / "student")
    last = lines(tmp_path / "student" / "ledger.jsonl")[-1]
    read = sum(len(record["text"].encode()[:16]) for record in pseudo)
    assert (last["labels"], last["read_tokens"]) == (60, read)
    assert last["data_usd"] == pytest.approx(6 + read * 1e-6)
    unknown = dataclasses.replace(value, prices=PriceConfig(label_usd=0.1))
    assert session_of(unknown).purchases["data_usd"] is None
    # What a label costs does not touch the training, which is done already.
    assert session_of(unknown).train(tmp_path / "student").steps == 4


def test_texts_that_are_the_same_are_labelled_once(teacher):
    session, params = teacher
    found, counts = pseudo_label(session, params, ["red x", "RED  x!", "blue y"], ("blue", "green", "red"), 0.0)
    assert [record["text"] for record in found] == ["red x", "blue y"] and counts["duplicates"] == 1
    none, counts = pseudo_label(session, params, ["red x"], ("blue", "green", "red"), 1.0)
    assert counts["kept"] == len(none) and counts["unsure"] == 1 - len(none)
    with pytest.raises(ValueError, match="it is a probability, from 0 to 1"):
        pseudo_label(session, params, ["red x"], ("blue", "green", "red"), 1.5)


def test_copies_are_kept_where_the_model_agrees_and_written_with_names(teacher, tmp_path):
    session, params = teacher
    labels = session.train_stream.labels
    made = [{"text": f"{word} x", "label": labels.index("red"), "origin": "translated"} for word in ("red", "blue")]
    kept, disagreed = agreed(session, params, made)
    assert kept == made[:1] and disagreed == 1 and agreed(session, params, []) == ([], 0)
    write_examples(session, kept, tmp_path / "out")
    assert lines(tmp_path / "out" / "train.jsonl")[-1] == {"text": "red x", "label": "red", "origin": "translated"}
    with pytest.raises(ValueError, match="exists already"):
        write_examples(session, kept, tmp_path / "out")


def test_a_price_cannot_be_negative_and_what_was_not_bought_needs_none():
    with pytest.raises(ValueError, match="prices.label_usd is -1; a price cannot be negative"):
        PriceConfig(label_usd=-1)
    assert PriceConfig(label_usd=0.5).usd({"labels": 4, "read_tokens": 0}) == 2.0
    assert PriceConfig().usd({"labels": 0}) == 0.0 and PriceConfig().usd({"labels": 1}) is None


@pytest.mark.parametrize("by", ["margin", "entropy", "coreset"])
def test_texts_worth_a_label_are_chosen_among_those_without(teacher, folder, by):
    session, params = teacher
    found = choose(session, params, split="train[60:]", count=10, by=by)
    known = {example["text"] for example in session.train_stream}
    texts = {record["text"] for record in lines(folder / "train.jsonl")[60:]}
    assert len({record["text"] for record in found}) == 10 and {record["text"] for record in found} <= texts - known
    shares = [record["share"] for record in found]
    if by == "margin":
        everything = choose(session, params, split="train[60:]", count=len(texts - known), by=by)
        assert max(shares) < min(record["share"] for record in everything[-10:])
    with pytest.raises(ValueError, match="cannot be chosen; ask for 1 to"):
        choose(session, params, split="train[60:]", count=1000, by=by)
