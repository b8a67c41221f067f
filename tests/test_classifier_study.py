"""The study of models that give labels: grid and search, what is measured and said of them, and whom a cut harms."""

import dataclasses
import html
import json
import shlex

import jax
import numpy as np
import pytest
from labels import LABELS, experiment, session_of
from test_image_folders import MODEL, write_images
from test_report import Arguments

from jaxcost.config import parse
from jaxcost.cost.hlo import compiled_cost
from jaxcost.cost.purchases import PriceConfig
from jaxcost.serving.pooled import BatchesConfig, Pooled
from jaxcost.session import Session
from jaxcost.study import baselines, picture, quality, report
from jaxcost.study.measure import measure_requests, meter, requests
from jaxcost.study.recipes import Budget, Recipe, SearchConfig, StudyConfig, VerifyConfig
from jaxcost.study.regressions import Tolerances, compare_studies
from jaxcost.study.run import run_study
from jaxcost.study.space import Choice, Space
from jaxcost.training.config import CheckpointConfig, TrainingConfig
from jaxcost.training.distill import DistillConfig
from jaxcost.transforms import factorize, lora, prune, quantize, rule

RARE = "blue"
WORDS = ("red", "green", RARE)
VERIFY = VerifyConfig(resamples=500)


def write_texts(folder, train=300, validation=200):
    """Texts whose first word is their label; the rare one is of a dialect of its own."""
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                word = str(draw.choice(WORDS, p=[0.45, 0.45, 0.1]))
                text = f"{word} {''.join(draw.choice(list('xyz '), 6))}"
                dialect = "south" if word == RARE else "north"
                file.write(json.dumps({"text": text, "label": word, "dialect": dialect}) + "\n")
    return folder


def study_of(folder, **changes):
    """A classifier of those texts, and what is given of its study."""
    study = {
        "recovery_steps": 4,
        "recovery_learning_rate": 1e-3,
        "budgets": (),
        "verify": VERIFY,
        "topology": "v99:1x1",
    }
    value = experiment(folder, LABELS, "labels", data={"group_field": "dialect"})
    return dataclasses.replace(
        value,
        training=TrainingConfig(steps=40),
        checkpoint=CheckpointConfig(every_steps=40),
        prices=PriceConfig(label_usd=0.05),
        study=StudyConfig(**study | changes),
    )


def run(value, folder):
    return run_study(value, folder, quiet=True, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def rounded(texts, tmp_path_factory):
    """A study of one recipe, which shares its recovery with the control, and its folder; its picture is not drawn."""
    value = study_of(
        texts,
        recipes=(Recipe("rounded", finish=(quantize(bits=4),)),),
        budgets=(
            Budget("fewer bytes", "checkpoint_bytes", 0.9),
            Budget("a request", "seconds_per_request", at_most=9.0),
        ),
    )
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture, "draw", lambda *_: None)
        return value, folder, run(value, folder)


# ---- A grid ----


def test_a_classifier_is_studied_by_its_labels_and_its_requests(rounded):
    _, folder, result = rounded
    assert json.loads((folder / "study.json").read_text()) == result
    control, cut = result["rows"]
    for row in (control, cut):
        assert row["objective"] == "labels" and row["metric"].startswith("nats per label, ")
        assert row["accuracy_interval"]["low"] < row["accuracy"] <= row["accuracy_interval"]["high"]
        assert row["requests_per_second"] > 0 and row["usd_per_million_requests"] > 0
        assert not any("token" in name for name in row if name != "recovery_totals")
    assert cut["inference_flops_per_request"] > 0 and cut["checkpoint_bytes"] < 0.9 * control["checkpoint_bytes"]
    assert result["answer"]["recipe"] == "rounded" and set(result["answer"]["cost_shares"]) >= {"seconds_per_request"}
    assert "of the labels right, the control" in result["answer"]["text"]
    assert result["findings"][0]["claim"] == "base_beats_label_frequencies" and result["findings"][0]["holds"]
    found = result["verification"]
    assert {one["by"] for one in found["slices"]} == {"label", "length", "dialect"}
    assert {one["by"] for one in found["fairness"]} == {"label", "dialect"}
    assert found["test"]["unit"] == "a text with its label" and found["test"]["examples"] == 200
    assert len(found["exemplars"]) == 10 and {one["expected"] for one in found["exemplars"]} <= set(WORDS)
    assert result["estimates"]["memory_bytes"]["kv_cache_bytes"] == 0


def test_its_report_speaks_of_labels_and_leaves_the_safety_list_out(rounded):
    value, folder, result = rounded
    files = report.texts(result, folder)
    said = html.unescape(files["report.html"])
    assert "bits per byte" not in said and "bits/byte" not in said
    for words in (
        "nats per label, held out",
        "each of a text padded to 16 tokens",
        "one forward pass",
        "this one writes none",
    ):
        assert words in said, words
    assert "Safety list" not in said and "decoded token" not in said
    heading = files["recipes.csv"].splitlines()[0]
    assert "accuracy (measured)" in heading and "requests_per_second (measured)" in heading
    assert "nats/label" in files["tables.tex"]
    for name, command in report._commands(result, folder):
        again = parse(Arguments, shlex.split(command)[2:]).experiment
        assert again.data == value.data and name in ("the whole study", *(r.name for r in again.study.complete()))
    headings = [str(column.header) for column in report.table(result).columns]
    assert headings[1] == "nats/label" and "right" in headings and "requests\na second" in headings


def test_its_labels_are_paid_for_and_its_ledger_says_what_its_scores_are(rounded):
    value, folder, result = rounded
    parts = {part["stage"]: part for part in result["ledger"]}
    assert parts["data"]["usd"] == pytest.approx(300 * value.prices.label_usd)
    assert result["totals"]["usd"] == pytest.approx(sum(part["usd"] for part in parts.values()))
    first = json.loads((folder / "ledger.jsonl").read_text().splitlines()[0])
    assert first["unit"] == "nats per label" and first["score"] == result["base"]["metrics"]["nats_per_label"]


def test_two_of_its_studies_are_compared_by_shares_of_no_less_than_one_nat(rounded):
    _, _, result = rounded
    for rise, expected in ((0.009, 0), (0.011, 1)):
        new = json.loads(json.dumps(result))
        new["rows"][1]["score"] += rise
        found = compare_studies(result, new, Tolerances())
        assert len([one for one in found["comparisons"] if one["worse"]]) == expected
    assert "rounded: nats/label rose" in found["regressions"][0]
    new = json.loads(json.dumps(result))
    new["rows"][0]["accuracy"] -= 0.02
    (text,) = compare_studies(result, new, Tolerances())["regressions"]
    assert text.startswith("control: right fell from ") and text.endswith("; at most 1.0% less is allowed.")
    assert not compare_studies(new, result, Tolerances())["regressions"]


# ---- What it asks ----


def test_a_request_is_one_forward_pass(texts):
    session = session_of(study_of(texts, decode_batch_size=6))
    params = session.base_params()
    batch = requests(session, 6)
    assert batch["inputs"].shape == (6, 16) and (batch["mask"] == 1).all()
    found = meter(session)(params)
    # What /v1/classify runs for as many texts at once.
    served = Pooled(session.model, params, BatchesConfig(lengths=(16,), rows=(1, 6)))
    assert found.flops * 6 == pytest.approx(compiled_cost(served._programs[16, 6]).total_flops, rel=0.01)
    thin = measure_requests(jax.jit(session.forward), batch, factorize(parameters=0.25)(params))
    assert thin.flops < found.flops and found.per_second > 0


def test_the_frequencies_of_labels_are_a_baseline(texts):
    session = session_of(study_of(texts))
    counts = session.train_stream.label_counts()
    assert counts.sum() == 300 and dict(zip(session.train_stream.labels, counts, strict=True))[RARE] == counts.min()
    held_out = session.validation_stream.label_counts()
    nats = -(held_out * np.log((counts + 1) / 303)).sum() / 200
    assert baselines.measured(session) == {"label_frequencies": pytest.approx(nats)}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data": {"objective": "regression"}}, "data.objective is 'regression', of which a study has no score"),
        ({"data": {"objective": "masked_tokens"}}, "data.objective is 'masked_tokens', of which a study has no score"),
        ({"data": {"objective": "next_token"}}, "set model.causal"),
        ({"model": {"head": dataclasses.replace(LABELS.head, pooling="none")}}, "gives one answer for each"),
        ({"data": {"group_field": "accent"}}, "data.group_field is 'accent', which a record of"),
        ({"data": {"label_field": "mood"}}, "mood"),
        (
            {"study": {"budgets": (Budget("decoding", "decode_seconds_per_token", 0.5),)}},
            "The budget 'decoding' limits decode_seconds_per_token, and what this model is served for is a request",
        ),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_trained(texts, tmp_path, changes, said):
    value = study_of(texts, recipes=(Recipe("pruned", transforms=(prune(),)),))
    rooms = {name: dataclasses.replace(getattr(value, name), **fields) for name, fields in changes.items()}
    with pytest.raises(ValueError, match=said) as error:
        run(dataclasses.replace(value, **rooms), tmp_path / "study")
    assert "\n" not in str(error.value) and not (tmp_path / "study" / "base" / "checkpoints").exists()


def test_labels_of_a_shifted_task_are_those_of_the_base(texts, tmp_path):
    shifted = (Recipe("moved", task="shifted"),)
    value = study_of(texts, recipes=shifted, shifted_data="synthetic_financial_news")
    value = dataclasses.replace(value, data=dataclasses.replace(value.data, data_dir=str(tmp_path), group_field=""))
    with pytest.raises(
        ValueError, match="whose labels are negative, neutral, positive, and the base learns blue, green"
    ):
        run(value, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_every_cost_that_is_served_can_be_limited():
    for metric in quality.SERVED_COSTS:
        Budget("any", metric, 0.5)
    with pytest.raises(ValueError, match="'regression'"):
        quality.of("regression")


# ---- Whole studies ----

RECIPES = (
    Recipe("sparse", transforms=(prune(sparsity=0.5),), finish=(quantize(),)),
    Recipe("thin", transforms=(factorize(parameters=0.5),)),
    Recipe("adapter", transforms=(lora(rank=2),), learning_rate=1e-2),
    Recipe("taught", transforms=(prune(sparsity=0.7),), distill=DistillConfig(logits=1.0)),
)


@pytest.mark.slow
def test_a_grid_of_every_kind_of_recipe_goes_on_after_a_kill(texts, tmp_path):
    value = study_of(texts, recipes=RECIPES)
    result = run(value, tmp_path)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["control", "sparse", "thin", "adapter", "taught"]
    control = rows["control"]
    assert rows["thin"]["inference_flops_per_request"] < control["inference_flops_per_request"]
    assert rows["sparse"]["inference_flops_per_request"] >= control["inference_flops_per_request"]
    assert rows["sparse"]["checkpoint_bytes"] < control["checkpoint_bytes"]
    assert rows["adapter"]["trainable_parameters"] < control["trainable_parameters"]
    assert rows["taught"]["step_flops"] > control["step_flops"]
    assert all(row["accuracy"] > 0.4 and row["accuracy_interval"]["high"] <= 1 for row in rows.values())
    assert (tmp_path / "pareto.svg").stat().st_size > 0
    assert {one["claim"] for one in result["findings"]} >= {"sparse_recovers", "taught_gains_from_its_teacher"}
    (tmp_path / "study.json").unlink()
    (tmp_path / "recipes" / "taught" / "row.json").unlink()
    again = run(value, tmp_path)
    same = ("score", "accuracy", "checkpoint_bytes", "recovery")
    assert [[row[key] for key in same] for row in again["rows"]] == [
        [row[key] for key in same] for row in rows.values()
    ]
    assert again["totals"]["tokens"] == result["totals"]["tokens"]


@pytest.mark.slow
def test_a_search_keeps_within_limits_of_requests(texts, tmp_path):
    """Half of the parameters take fewer FLOPs for a request; a mask does not, and is not trained."""
    space = Space(
        transforms=(Choice((None, prune(), factorize(parameters=0.5))),), finish=(Choice((None, quantize())),)
    )
    value = study_of(
        texts,
        spaces=(space,),
        search=SearchConfig(rungs=(0.5, 1.0), seeds=2, finalists=1),
        budgets=(
            Budget("fewer FLOPs", "inference_flops_per_request", 0.9),
            Budget("all", "flops", share=1.0, of="study"),
        ),
    )
    result = run(value, tmp_path)
    trials = {trial["name"]: trial for trial in result["trials"]}
    stopped = {name for name, trial in trials.items() if trial["status"] == "over_budget"}
    assert {"prune_50", "prune_50-int8_weights"} <= stopped and not any(trials[name]["stages"] for name in stopped)
    assert all("inference_flops_per_request is" in trials[name]["why"] for name in stopped)
    assert "low_rank" in result["answer"]["recipe"]
    [limit, _] = result["budget"]
    assert limit["used"] <= limit["limit"]
    best = next(one for one in result["finalists"] if not one["control"])
    assert best["score"]["low"] <= best["score"]["mean"] <= best["score"]["high"] and len(best["seeds"]) == 2
    assert result["verification"]["fairness"] and result["verification"]["safety"] == []
    assert "nats/label there" in (tmp_path / "report.html").read_text()
    assert sum(part["usd"] for part in result["ledger"]) == pytest.approx(result["totals"]["usd"])


@pytest.mark.slow
def test_a_class_that_only_small_weights_serve_is_flagged_on_the_first_screen(texts, tmp_path, monkeypatch):
    """The base's embeddings of the rare label's letters are made small: the norm behind them makes up for their size,
    and a cut by magnitude takes them first."""
    train, planted = Session.train, []

    def trained(session, directory, *arguments, **named):
        fitted = train(session, directory, *arguments, **named)
        if directory.name != "base":
            return fitted
        ids = np.array(sorted({int(i) for i in session.tokenizer.encode("blu")}))
        planted.append(ids)
        table = fitted.params["embed"]["table"].at[ids].multiply(0.02)
        return dataclasses.replace(fitted, params=fitted.params | {"embed": fitted.params["embed"] | {"table": table}})

    monkeypatch.setattr(Session, "train", trained)
    cut = prune(sparsity=0.1, rules=(rule("embed/table"),))
    recipes = (Recipe("cut", transforms=(cut,)),)
    # The control has more bytes than this allows, so that the cut is recommended, and verified.
    budgets = (Budget("fewer bytes", "checkpoint_bytes", 0.99),)
    value = study_of(texts, recipes=recipes, recovery_steps=1, recovery_learning_rate=1e-6, budgets=budgets)
    result = run(dataclasses.replace(value, training=TrainingConfig(steps=100)), tmp_path)
    assert planted and result["answer"]["recipe"] == "cut" and result["answer"]["flagged"]
    harmed = {(one["by"], one["name"]) for one in result["verification"]["slices"] if one["harmed"]}
    assert harmed >= {("label", RARE), ("dialect", "south")}
    assert not harmed & {("label", "red"), ("label", "green"), ("dialect", "north")}
    label = next(one for one in result["verification"]["fairness"] if one["by"] == "label")
    assert label["worst_group"] == RARE and label["gap"] > label["control_gap"] + 0.3
    page = html.unescape((tmp_path / "report.html").read_text())
    assert page.index(f"label {RARE}: ") < page.index("<nav")
    assert result["answer"]["text"].startswith("Harm was found in cut: ")


@pytest.mark.slow
def test_a_classifier_of_images_is_studied_too(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    data = {"inputs": "images", "sequence_length": 4, "cache_dir": str(tmp_path / "cache")}
    value = experiment(write_images(folder), MODEL, "labels", data=data, training=TrainingConfig(steps=20))
    study = StudyConfig(
        recipes=(Recipe("rounded", finish=(quantize(bits=4),)),),
        recovery_steps=2,
        budgets=(Budget("fewer bytes", "checkpoint_bytes", 0.9),),
        verify=VERIFY,
        decode_batch_size=4,
        topology="v99:1x1",
    )
    result = run(dataclasses.replace(value, study=study), tmp_path / "study")
    row = result["rows"][1]
    assert row["requests_per_second"] > 0 and result["verification"]["test"]["unit"] == "an image with its label"
    assert result["verification"]["why_not"] and result["totals"]["usd"] is None
    assert "each of an image, would come to" in (tmp_path / "study" / "report.html").read_text()
    assert result["data"]["name"] == str(folder)
