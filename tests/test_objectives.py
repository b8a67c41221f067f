"""What is learned: labels, answers and hidden tokens, end to end through a session, and what each refuses."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from labels import ENCODER, LABELS, NUMBER, experiment, session_of, write_folder

from jaxcost.conversion import export_run
from jaxcost.data import DataConfig
from jaxcost.data.examples import answer_row, label_row, open_examples
from jaxcost.data.masking import Masking
from jaxcost.data.tokenizers import ByteTokenizer
from jaxcost.evaluation.labels import label_score
from jaxcost.evaluation.losses import squared_error
from jaxcost.evaluation.regression import regression_score
from jaxcost.models.config import EncoderConfig, HeadConfig
from jaxcost.models.heads import Output
from jaxcost.objectives import check_model, chosen_vocabulary
from jaxcost.planning.plan import vocabulary_of
from jaxcost.planning.steps import trace_step
from jaxcost.session import load_run
from jaxcost.training.config import TrainingConfig
from jaxcost.transforms import lora, prune

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("texts"))


@pytest.mark.slow
def test_labels_are_learned_and_an_interrupted_run_ends_alike(folder, tmp_path):
    value = experiment(folder, LABELS, "labels")
    fitted = session_of(value).train(tmp_path / "whole")
    assert fitted.metrics["accuracy"] == fitted.metrics["macro_f1"] == 1.0
    assert fitted.metrics["scored_examples"] == 30
    lines = [json.loads(line) for line in (tmp_path / "whole" / "ledger.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["data", "evaluation", "evaluation"]
    assert (lines[0]["examples"], lines[0]["truncated_examples"], lines[0]["skipped_records"]) == (120, 0, 0)

    broken = session_of(value)
    evaluate, calls = broken.evaluate, []

    def interrupt(params):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(params)

    broken.evaluate = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.train(tmp_path / "broken")
    again = session_of(value).train(tmp_path / "broken")
    assert again.metrics == fitted.metrics and again.losses == fitted.losses[20:]


def numbers(folder, model=NUMBER):
    return experiment(folder, model, "regression", data={"label_field": "number"})


@pytest.mark.slow
def test_numbers_are_learned_and_scored(folder, tmp_path):
    session = session_of(numbers(folder))
    fitted = session.train(tmp_path)
    # Numbers of an even mixture of the three have a variance of 2.
    assert fitted.metrics["mean_squared_error"] < 0.1 and fitted.metrics["pearson"] > 0.98
    assert fitted.metrics["spearman"] > 0.9 and fitted.metrics["scored_examples"] == 30
    assert fitted.losses[-1] < 0.2 < fitted.losses[0]
    again, params, step = load_run(tmp_path, jax.devices()[:1])
    assert step == 40 and again.evaluate(params) == {n: fitted.metrics[n] for n in fitted.metrics if n != "train_loss"}
    # To transformers, one output would else be one label.
    export_run(tmp_path, tmp_path / "out", quiet=True)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["problem_type"] == "regression" and list(written["id2label"]) == ["0"]


READS_TWICE = dataclasses.replace(
    ENCODER, causal=True, encoder=EncoderConfig(num_layers=1), head=HeadConfig(outputs=1, pooling="last")
)


@pytest.mark.parametrize("model", [NUMBER, READS_TWICE], ids=["encoder", "encoder-decoder"])
def test_a_regression_is_planned_with_the_batches_that_are_learned_from(model, folder):
    session = session_of(numbers(folder, model))
    check_model("regression", session.model.config)
    step = trace_step("train", session.experiment, session.model.config.vocab_size, session.mesh)
    batch = next(session.train_batches())
    assert batch["targets"].dtype == np.float32 and set(batch["targets"].ravel().tolist()) <= {-1.5, 0.25, 2.0}
    step.jitted.trace(*step.arguments)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        name: (a.shape, a.dtype) for name, a in step.arguments[1].items()
    }


def test_squared_errors_and_correlations_are_those_of_the_definition():
    found, right = np.array([1.0, 2.0, 2.0, 5.0]), np.array([2.0, 1.0, 4.0, 5.0])
    score = regression_score(found, right)
    assert score.mean_squared_error == pytest.approx((1 + 1 + 4 + 0) / 4) and score.scored_examples == 4
    assert score.pearson == pytest.approx(np.corrcoef(found, right)[0, 1])
    # Equal numbers share the mean of their ranks.
    assert score.spearman == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [2, 1, 3, 4])[0, 1])
    flat = regression_score(np.ones(4), right)
    assert flat.pearson is flat.spearman is None and flat.mean_squared_error == pytest.approx((1 + 0 + 9 + 16) / 4)
    with pytest.raises(ValueError, match="0 numbers for 0 texts"):
        regression_score(np.zeros(0), np.zeros(0))
    hidden, output = np.arange(4.0).reshape(4, 1, 1), Output(np.full((1, 1), 2.0, np.float32), np.ones(1, np.float32))
    total, count = squared_error(hidden, output, np.zeros((4, 1), np.float32), np.array([[1.0], [1], [0], [1]]))
    assert (float(total), float(count)) == (1 + 9 + 49, 3)
    with pytest.raises(ValueError, match="set model.head.outputs to 1"):
        squared_error(hidden, output, np.zeros((4, 2), np.float32), np.ones((4, 2)))


def test_what_is_no_number_is_named_and_left_out(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [("a", 0.5), ("b", "much"), ("c", "1.5"), ("d", 2), ("e", float("nan"))]
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    config = DataConfig(sources=(str(path),), objective="regression", cache_dir=str(tmp_path))
    examples = open_examples(config, "train")
    assert [example["label"] for example in examples] == [0.5, 1.5, 2.0] and examples.labels == ()
    assert examples.skipped == (
        "record 1 has the label 'much', which is no finite number",
        "record 4 has the label nan, which is no finite number",
    )
    # To whom labels are names, a fraction is none.
    named = open_examples(dataclasses.replace(config, objective="labels", labels=("0", "1", "2")), "train")
    assert [example["label"] for example in named] == [2] and "the label 0.5, which is none of 0, 1" in named.skipped[0]


def test_an_encoder_learns_hidden_tokens(folder, tmp_path):
    fitted = session_of(experiment(folder, ENCODER, "masked_tokens")).train(tmp_path)
    assert fitted.losses[-1] < fitted.losses[0] - 2
    assert fitted.metrics["scored_tokens"] > 30 and fitted.metrics["masked_accuracy"] > 0.3


def test_a_mask_behind_the_last_token_has_a_row_in_sessions_and_plans(folder):
    full = types.SimpleNamespace(vocab_size=384, mask_id=384)
    assert chosen_vocabulary("masked_tokens", full) == 512 and chosen_vocabulary("labels", full) == 384
    for model, objective in ((ENCODER, "masked_tokens"), (LABELS, "labels")):
        value = experiment(folder, model, objective)
        assert session_of(value).model.config.vocab_size == vocabulary_of(value) == 384


@pytest.mark.slow
def test_labels_are_learned_from_an_encoder_that_learned_hidden_tokens(folder, tmp_path):
    steps = TrainingConfig(steps=2)
    session_of(experiment(folder, ENCODER, "masked_tokens", training=steps)).train(tmp_path / "first")
    _, found, _ = load_run(tmp_path / "first")
    session = session_of(experiment(folder, LABELS, "labels", start=str(tmp_path / "first"), training=steps))
    params = session.fresh_params()
    assert params.keys() == {*found, "head"} - {"unembed"} and params["head"]["output"]["kernel"].shape == (32, 3)
    np.testing.assert_array_equal(params["embed"]["table"], found["embed"]["table"])
    assert session.train(tmp_path / "second").metrics["scored_examples"] == 30
    # And from there on with the same head.
    again = session_of(experiment(folder, LABELS, "labels", start=str(tmp_path / "second"), training=steps))
    _, found, _ = load_run(tmp_path / "second")
    np.testing.assert_array_equal(again.fresh_params()["head"]["output"]["kernel"], found["head"]["output"]["kernel"])
    with pytest.raises(ValueError, match="The 8 training examples are fewer than one batch of 16"):
        session_of(experiment(folder, LABELS, "labels", data={"train_split": "train[:8]"})).train(tmp_path / "few")


def test_answers_alone_are_learned(folder, tmp_path):
    model = dataclasses.replace(ENCODER, causal=True)
    fitted = session_of(experiment(folder, model, "answers", data={"text_field": "label"})).train(tmp_path)
    assert fitted.metrics["nats_per_token"] < 0.5
    words = [json.loads(line)["answer"] for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert fitted.metrics["scored_tokens"] == sum(len(word) + 1 for word in words)


def test_an_answer_row_asks_for_the_answer_and_its_end_alone():
    example = {"text": "abc", "answer": "de"}
    row = answer_row(TOKENIZER, 8, example)
    assert row["inputs"].tolist() == [256, 97, 98, 99, 100, 101, 256, 0]
    assert row["targets"][row["mask"] > 0].tolist() == [100, 101, 256]
    # The text gives way to the answer, and an answer that is too long loses its end.
    row = answer_row(TOKENIZER, 4, example)
    assert row["inputs"].tolist() == [98, 99, 100, 101][:4] and row["targets"].tolist() == [99, 100, 101, 256]
    assert row["mask"].tolist() == [0, 1, 1, 1]
    row = answer_row(TOKENIZER, 2, {"text": "abc", "answer": "defg"})
    assert row["targets"].tolist() == [100, 101] and row["mask"].tolist() == [1, 1]


def test_a_label_row_keeps_the_first_tokens():
    row = label_row(TOKENIZER, 4, None, {"text": "abcdef", "label": 2})
    assert row["inputs"].tolist() == [97, 98, 99, 100] and row["valid"].all()
    row = label_row(TOKENIZER, 4, None, {"text": "ab", "label": 2})
    assert row["valid"].tolist() == [True, True, False, False] and row["targets"].tolist() == [2]
    # A decoder reads it a token later, so that it stands at the last valid place when it has read all.
    read = label_row(TOKENIZER, 4, 9, {"text": "ab", "label": 2})
    assert read["source"].tolist() == row["inputs"].tolist() and read["source_valid"].tolist() == row["valid"].tolist()
    assert read["inputs"].tolist() == [9, 97, 98, 0] and read["valid"].tolist() == row["valid"].tolist()


def test_masking_hides_as_much_as_asked_and_nothing_that_is_padding():
    masking = Masking(0.2, 257, 256, 257)
    tokens = np.where(np.arange(40_000) % 10 == 0, 256, np.arange(40_000) % 100).reshape(4, -1)
    valid = np.ones(tokens.shape, np.float32)
    valid[3] = 0
    row = masking({"inputs": tokens, "targets": tokens, "mask": valid}, np.random.default_rng(0))
    asked = row["mask"] > 0
    np.testing.assert_array_equal(row["targets"], tokens)
    assert not asked[3].any() and not asked[tokens == 256].any()
    assert asked[:3][tokens[:3] != 256].mean() == pytest.approx(0.2, abs=0.01)
    assert (row["inputs"][asked] == 257).mean() == pytest.approx(0.8, abs=0.02)
    assert (row["inputs"][asked] == tokens[asked]).mean() == pytest.approx(0.1, abs=0.02)
    np.testing.assert_array_equal(row["inputs"][~asked], tokens[~asked])


def test_label_scores_are_those_of_the_definition():
    probabilities = np.array([[0.7, 0.2, 0.1, 0], [0.6, 0.3, 0.1, 0], [0.1, 0.8, 0.1, 0], [0.2, 0.5, 0.3, 0]])
    score = label_score(probabilities, np.array([0, 1, 1, 2]))
    # F1: label 0 has one hit of two given, label 1 one of two given and two there, label 2 none; label 3 is not met.
    assert score.accuracy == 0.5 and score.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert score.nats_per_label == pytest.approx(-np.mean(np.log([0.7, 0.3, 0.8, 0.3])))
    with pytest.raises(ValueError, match="1 labels to score among 4"):
        label_score(probabilities[:1], np.array([4]))


def test_labels_out_of_range_are_named_and_counted(folder, tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [("red", 0), ("x", "purple"), ("y", 7), ("blue", "blue")]
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    config = DataConfig(sources=(str(path),), objective="labels", labels=("red", "blue"), cache_dir=str(tmp_path))
    examples = open_examples(config, "train")
    assert [example["label"] for example in examples] == [0, 1]
    assert examples.skipped[0] == "record 1 has the label 'purple', which is none of red, blue"
    with pytest.raises(ValueError, match="2 records of .* are corrupt, more than data.max_corrupt_records"):
        open_examples(dataclasses.replace(config, max_corrupt_records=1), "train")
    # Without names, the labels are those of the train split, numbers by size.
    path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in (10, 9, 10)))
    examples = open_examples(dataclasses.replace(config, labels=()), "train")
    assert examples.labels == ("9", "10") and [example["label"] for example in examples] == [1, 0, 1]


def test_a_model_that_cannot_learn_the_objective_is_refused_before_anything_starts(folder, tmp_path):
    fewer = dataclasses.replace(LABELS, head=HeadConfig(outputs=2, pooling="mean"))
    cases = [
        (LABELS, "next_token", "takes a causal model"),
        (ENCODER, "labels", "set model.head.outputs to the number of labels"),
        (LABELS, "regression", "set model.head.outputs to 1"),
        (dataclasses.replace(ENCODER, causal=True), "masked_tokens", "turn model.causal off"),
        (fewer, "labels", r"have 3 labels, more than model.head.outputs \(2\)"),
        (
            dataclasses.replace(ENCODER, vocab_size=257),
            "masked_tokens",
            r"smaller than the tokenizer's vocabulary \(258\)",
        ),
    ]
    for model, objective, said in cases:
        with pytest.raises(ValueError, match=said):
            session_of(experiment(folder, model, objective)).train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_transforms_and_plans_meet_labels_too(folder):
    value = experiment(folder, LABELS, "labels", transforms=(prune(method="wanda"), lora(rank=2)))
    session = session_of(value)
    params = session.fresh_params()
    assert 0 <= session.evaluate(params)["accuracy"] <= 1
    step = trace_step("train", value, session.model.config.vocab_size, session.mesh)
    batch = next(session.train_batches())
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        name: (a.shape, a.dtype) for name, a in step.arguments[1].items()
    }
