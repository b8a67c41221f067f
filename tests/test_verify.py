"""Verification: paired tests, slices and flags, and that planted harm is found where it was planted."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from labels import LABELS, experiment, session_of
from small import CONFIG

from jaxcost import weights
from jaxcost.evaluation import paired as evaluation_paired
from jaxcost.evaluation.answers import Answers, answers
from jaxcost.evaluation.paired import corrected, paired, reliability
from jaxcost.study import safety, verify
from jaxcost.study.recipes import VerifyConfig
from jaxcost.study.slices import Cut, HeldOut, check_groups, held_out
from jaxcost.study.verify import verify_params
from jaxcost.transforms import prune, rule

TABLE = prune(sparsity=0.1, rules=(rule("embed/table"),))
RARE = "blue"


# ---- Statistics ----


def test_a_difference_is_found_and_chance_is_not():
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 9, 200)
    noise = draw.normal(0, 1, 200) * counts
    found = paired(noise + 0.5 * counts, counts, 500)
    assert found.low < found.difference < found.high and found.low > 0 and found.p_value < 0.01
    none = paired(noise - noise.sum() / counts.sum() * counts, counts, 500)
    assert none.low < 0 < none.high and none.p_value > 0.5
    assert paired(np.zeros(5), np.ones(5), 500).p_value == 1.0
    # Two signs of three examples: the exact test has eight permutations.
    assert paired(np.ones(3), np.ones(3), 500).p_value == pytest.approx(2 / 8)
    with pytest.raises(ValueError, match="no examples"):
        paired(np.zeros(0), np.zeros(0), 500)


def test_p_values_together_are_corrected_by_holm():
    assert corrected([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert corrected([]) == [] and corrected([0.9, 0.8]) == [1.0, 1.0]


def test_the_calibration_error_is_the_gap_weighted_by_counts():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.35, 1.0])
    right = np.array([1, 1, 0, 0, 0, 1], bool)
    error, bins = reliability(confidence, right, 10)
    # The bin of 0.9 to 1 has five with a mean of 0.96, of which 0.6 are right; that of 0.3 one.
    assert error == pytest.approx((5 * abs(0.96 - 0.6) + 1 * 0.35) / 6)
    assert [one["count"] for one in bins] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 5]


# ---- Planted harm ----


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model that tells three labels, one of which is rare and served by weights much smaller than all others."""
    folder = tmp_path_factory.mktemp("labels")
    draw = np.random.default_rng(0)
    for split, count in (("train", 400), ("validation", 300)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                word = str(draw.choice(["red", "green", RARE], p=[0.45, 0.45, 0.1]))
                text = f"{word} {''.join(draw.choice(list('xyz '), 6))}"
                dialect = "south" if word == RARE else "north"
                file.write(json.dumps({"text": text, "label": word, "dialect": dialect}) + "\n")
    value = experiment(folder, LABELS, "labels", data={"group_field": "dialect"})
    value = dataclasses.replace(value, training=dataclasses.replace(value.training, steps=60, evaluate_every=0))
    session = session_of(value)
    params = session.train(folder / "run").params
    ids = sorted({int(i) for i in session.tokenizer.encode("blu")})
    table = params["embed"]["table"]
    # The norm before each layer makes up for the size of an embedding, so that little changes but the magnitude.
    small = params | {"embed": params["embed"] | {"table": table.at[np.array(ids)].multiply(0.005)}}
    return session, small, ids


def test_a_class_that_only_small_weights_serve_is_found_and_flagged(planted):
    session, control, ids = planted
    cut = TABLE(control, jax.random.key(0))
    mask = np.asarray(cut["embed"]["table"].mask)
    assert mask[ids].mean() < 0.1 and mask.mean() > 0.89
    found = verify_params(session, control, cut, VerifyConfig(resamples=500))
    harmed = {(one["by"], one["name"]) for one in found["slices"] if one["harmed"]}
    assert ("label", RARE) in harmed and ("dialect", "south") in harmed
    assert not harmed & {("label", "red"), ("label", "green"), ("dialect", "north")}
    rare = next(one for one in found["slices"] if one["name"] == RARE)
    assert rare["control_accuracy"] > 0.9 and rare["accuracy"] < 0.5
    assert found["flags"][0]["kind"] == "slice" and found["flags"][0]["name"] in (RARE, "south")
    assert RARE in " ".join(flag["text"] for flag in found["flags"])
    [dialect, label] = found["fairness"]
    assert (dialect["by"], label["by"]) == ("dialect", "label")
    assert label["worst_group"] == RARE and label["gap"] > label["control_gap"] + 0.3
    assert {one["label"] for one in found["exemplars"][:5]} == {RARE}
    assert found["exemplars"][0]["expected"] == RARE != found["exemplars"][0]["said"]
    assert found["test"]["verdict"] == "worse" and found["calibration"]["ece"] > found["calibration"]["control_ece"]


def test_harm_is_found_in_one_of_very_many_classes(monkeypatch):
    """Corrected for 120 classes, no p-value of 2000 permutations would be significant."""
    label, each = np.repeat(np.arange(120), 20), np.arange(2400)
    cut = Cut("label", tuple(f"class {i}" for i in range(120)), label, served=True)
    data = HeldOut([], label, each, "a text with its label", (cut,), None, lambda *_: "a text", str)
    noise = np.random.default_rng(0).normal(0.2, 0.02, (2, 2400))
    before = Answers(noise[0], label, np.full(2400, 0.8), np.ones(2400, bool))
    harmed = label == 7
    after = Answers(noise[1] + 3.0 * harmed, label - harmed, np.full(2400, 0.8), ~harmed)
    said = iter((before, after))
    monkeypatch.setattr(verify, "held_out", lambda _: data)
    monkeypatch.setattr(verify, "answers", lambda *_: next(said))
    model = SimpleNamespace(config=SimpleNamespace(language_model=False))
    found = verify_params(SimpleNamespace(model=model, mesh=None), None, None, VerifyConfig(resamples=2000))
    assert [one["name"] for one in found["slices"] if one["harmed"]] == ["class 7"]
    assert found["flags"][0]["name"] == "class 7" and "writes none" in found["safety_why_not"]


def test_a_comparison_takes_no_more_memory_the_more_examples_there_are(monkeypatch):
    differences, counts = np.random.default_rng(0).normal(0.1, 1, 300), np.ones(300)
    whole = paired(differences, counts, 500)
    monkeypatch.setattr(evaluation_paired, "_AT_ONCE", 3000)
    assert paired(differences, counts, 500) == whole


def test_the_same_weights_have_no_flags(planted):
    session, control, _ = planted
    found = verify_params(session, control, control, VerifyConfig(resamples=200))
    assert found["flags"] == [] and found["test"]["verdict"] == "no difference found"
    assert found["test"]["p_value"] == 1.0 and found["test"]["difference"] == 0


def test_a_group_attribute_that_is_missing_is_refused(planted):
    session, _, _ = planted
    data = dataclasses.replace(session.experiment.data, group_field="accent")
    other = session.derive(dataclasses.replace(session.experiment, data=data))
    with pytest.raises(ValueError, match="data.group_field is 'accent'"):
        check_groups(other)


# ---- Texts ----


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A language model of documents in two groups, untrained."""
    folder = tmp_path_factory.mktemp("texts")
    for split in ("train", "validation"):
        with open(folder / f"{split}.jsonl", "w") as file:
            for i in range(24):
                file.write(json.dumps({"text": "abc " * (i + 2), "dialect": "ab"[i % 2]}) + "\n")
    model = dataclasses.replace(CONFIG, vocab_size=0, max_length=64)
    value = experiment(folder, model, "next_token", data={"group_field": "dialect", "sequence_length": 16})
    return session_of(value)


def test_the_targets_of_a_text_are_told_apart_by_document(texts):
    data = held_out(texts)
    stream = texts.validation_stream.tokens
    assert np.array_equal(data.target_N, stream[1 : len(data.target_N) + 1])
    cuts = {cut.by: cut for cut in data.cuts}
    assert set(cuts) == {"token frequency", "length", "dialect"}
    # Documents take turns between the groups; the first separator begins the first of them.
    document = np.cumsum(stream == stream[0])[1 : len(data.target_N) + 1] - 1
    assert np.array_equal(cuts["dialect"].part_N, document % 2)
    assert np.array_equal(cuts["length"].part_N, document * 3 // 24)
    counts = np.bincount(texts.train_stream.tokens)
    fifth = cuts["token frequency"].part_N
    assert counts[data.target_N[fifth == fifth.min()]].min() >= counts[data.target_N[fifth == fifth.max()]].max()


def test_answers_are_the_scores(texts):
    params = texts.base_params()
    data = held_out(texts)
    said = answers(texts.model, params, data.batches, texts.mesh)
    assert said.nats_N.mean() == pytest.approx(texts.evaluate(params)["nats_per_token"], rel=1e-5)
    assert np.array_equal(said.right_N, said.said_N == data.target_N)
    assert np.all(said.confidence_N <= 1) and np.all(np.log(said.confidence_N) >= -said.nats_N - 1e-5)


def test_words_and_refusals_are_counted(texts, monkeypatch):
    lists = {"words": ["scum"], "prompts": ["a", "b"], "probes": ["c"], "refusals": ["I cannot"]}
    written = iter([["scummy", "fine", "I cannot do it"], ["fine", "you SCUM", "sure"]])
    monkeypatch.setattr(safety, "_continued", lambda *_: next(written))
    words, refusals = safety.check_safety(texts, None, None, lists, 4)
    assert (words["control_hits"], words["hits"], words["worse"]) == (0, 1, True)
    assert words["examples"] == [{"prompt": "b", "control": "fine", "text": "you SCUM"}]
    assert (refusals["control_hits"], refusals["hits"], refusals["worse"]) == (1, 0, True)


def test_a_model_of_texts_is_verified_whole(texts):
    params = texts.base_params()
    broken = weights.map_weights(lambda path, w: w * 0 if path.endswith("unembed") else w, params)
    found = verify_params(texts, params, broken, VerifyConfig(resamples=200, safety_tokens=4))
    assert [one["name"] for one in found["safety"]] == ["toxicity lexicon", "refusals"]
    assert found["test"]["unit"] == "a window of 16 tokens" and found["why_not"] is None
    assert len(found["exemplars"]) == 10 and all(one["text"] for one in found["exemplars"])
    json.dumps(found, allow_nan=False)


def test_a_list_that_is_none_is_refused(tmp_path):
    (tmp_path / "list.json").write_text('{"words": []}')
    with pytest.raises(ValueError, match="wants a list of texts called 'words'"):
        safety.read_list(str(tmp_path / "list.json"))
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        safety.read_list(str(tmp_path / "absent.json"))
    assert set(safety.read_list()) == {"words", "prompts", "probes", "refusals"}
