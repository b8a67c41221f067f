"""The study: its rows, its fronts and winners, its report, and that a kill repeats nothing that was finished."""

import dataclasses
import html
import json

import jax
import pytest

from jaxcost import serialization
from jaxcost.config import Experiment, load
from jaxcost.data import DataConfig
from jaxcost.evaluation.score import EvaluationConfig
from jaxcost.models.config import EncoderConfig, ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.sharding import MeshConfig
from jaxcost.study import compare, quality, report, run
from jaxcost.study.recipes import Budget, Recipe, StudyConfig
from jaxcost.study.trials import Trials
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from jaxcost.transforms import RuleError, factorize, lora, prune, quantize, rule

NEEDED = {
    "name",
    "transforms",
    "metric",
    "score",
    "score_before_recovery",
    "control_score",
    "trainable_parameters",
    "checkpoint_bytes",
    "step_flops",
    "step_seconds",
    "decode_tokens_per_second",
    "usd",
    "kwh",
    "pareto",
    "figures",
}


def small_study(data_dir):
    return Experiment(
        model=ModelConfig(
            0, width=64, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=32, mlp_width=128, max_length=64
        ),
        data=DataConfig(name="python_text/reference", sequence_length=64, batch_size=8, data_dir=data_dir),
        mesh=MeshConfig(data=-1),
        execution=ExecutionConfig(unroll="never"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        training=TrainingConfig(steps=40),
        evaluation=EvaluationConfig(max_tokens=4096),
        checkpoint=CheckpointConfig(every_steps=20),
        study=StudyConfig(
            recovery_steps=10,
            shifted_data="python_text/library",
            decode_tokens=8,
            topology="v99:1x1",
            recipes=(
                Recipe("sparse", transforms=(prune(sparsity=0.5),)),
                Recipe("thin", transforms=(factorize(),)),
                Recipe("codes", finish=(quantize(),)),
                Recipe("adapter", transforms=(lora(rank=2),), task="shifted", learning_rate=1e-2),
            ),
        ),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study of two tasks, run once, and its folder."""
    folder = tmp_path_factory.mktemp("study")
    experiment = small_study(str(tmp_path_factory.mktemp("data")))
    return experiment, folder, run.run_study(experiment, folder, quiet=True, devices=jax.devices()[:1])


@pytest.mark.slow
def test_every_row_has_what_machines_read(finished):
    _, folder, result = finished
    assert json.loads((folder / "study.json").read_text()) == result
    assert result["schema"] == "jaxcost-study-2"
    assert set(result["baselines"]) == {"unigram", "trigram", "five_gram"}
    names = [row["name"] for row in result["rows"]]
    assert names == ["control", "sparse", "thin", "codes", "control_shifted", "adapter"]
    for row in result["rows"]:
        assert set(row) >= NEEDED
        assert set(row["figures"].values()) <= {"measured", "compiled", "estimated"}
        assert row["checkpoint_bytes"] > 0 and row["decode_tokens_per_second"] > 0 and row["usd"] > 0
    by_name = {row["name"]: row for row in result["rows"]}
    control = by_name["control"]
    assert by_name["sparse"]["step_flops"] == control["step_flops"]
    assert by_name["thin"]["step_flops"] < control["step_flops"]
    assert by_name["codes"]["step_flops"] == control["step_flops"] and by_name["codes"]["score"] != control["score"]
    assert by_name["codes"]["checkpoint_bytes"] < 0.6 * control["checkpoint_bytes"]
    assert by_name["adapter"]["control_score"] == by_name["control_shifted"]["score"]
    assert by_name["adapter"]["trainable_parameters"] < by_name["control_shifted"]["trainable_parameters"] / 10
    assert result["plan"]["fits"] is None and "v99" in result["plan"]["why"]


@pytest.mark.slow
def test_the_ledger_adds_up(finished):
    _, folder, result = finished
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [line.get("recipe") for line in lines] == [None, *(row["name"] for row in result["rows"])]
    recoveries = {row["recovery"]: row["recovery_totals"] for row in result["rows"]}
    base = json.loads((folder / "base" / "ledger.jsonl").read_text().splitlines()[-1])
    assert lines[-1]["tokens"] == base["tokens"] + sum(each["tokens"] for each in recoveries.values())
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["codes"]["recovery"] == rows["control"]["recovery"] and len(recoveries) == 5
    assert result["totals"]["flops"] == lines[-1]["flops"]


@pytest.mark.slow
def test_the_report_stands_beside_the_study(finished):
    _, folder, result = finished
    page = html.unescape((folder / "report.html").read_text())
    assert (folder / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    for row in result["rows"]:
        assert row["name"] in page
    for finding in result["findings"]:
        assert finding["text"] in page
    assert report.answer(result) in page
    assert load(folder / "config.py") == serialization.from_json(result["experiment"])


@pytest.mark.slow
def test_a_second_run_repeats_nothing(finished, monkeypatch):
    experiment, folder, result = finished

    def never(*args, **kwargs):
        pytest.fail("a finished recipe was run again")

    monkeypatch.setattr(Trials, "_row", never)
    again = run.run_study(experiment, folder, quiet=True, devices=jax.devices()[:1])
    assert again["rows"] == result["rows"] and again["totals"] == result["totals"]


@pytest.mark.slow
def test_a_study_killed_between_two_recipes_pays_a_shared_recovery_once(finished):
    experiment, folder, result = finished
    (folder / "recipes" / "codes" / "row.json").unlink()
    again = run.run_study(experiment, folder, quiet=True, devices=jax.devices()[:1])
    assert again["totals"]["tokens"] == result["totals"]["tokens"]
    same = ("score", "checkpoint_bytes", "step_flops", "inference_flops_per_token", "recovery")
    pairs = zip(again["rows"], result["rows"], strict=True)
    assert all(one[key] == other[key] for one, other in pairs for key in same)


@pytest.mark.slow
def test_a_changed_recipe_is_run_again_and_the_others_are_not(finished, monkeypatch):
    experiment, folder, _ = finished
    recipes = (Recipe("sparse", transforms=(prune(sparsity=0.6),)), *experiment.study.recipes[1:])
    changed = dataclasses.replace(experiment, study=dataclasses.replace(experiment.study, recipes=recipes))
    done, original = [], Trials._row
    monkeypatch.setattr(Trials, "_row", lambda trials, recipe: done.append(recipe.name) or original(trials, recipe))
    run.run_study(changed, folder, quiet=True, devices=jax.devices()[:1])
    assert done == ["sparse"]


def test_a_study_without_recipes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no recipes"):
        run.run_study(Experiment(), tmp_path, quiet=True, devices=jax.devices()[:1])


def test_a_model_that_text_alone_does_not_train_is_refused_before_its_recipes(tmp_path):
    experiment = small_study(str(tmp_path / "data"))
    answering = dataclasses.replace(experiment.model, encoder=EncoderConfig(num_layers=1))
    recipes = (Recipe("lost", transforms=(prune(rules=(rule("no/such"),)),)),)
    study = dataclasses.replace(experiment.study, recipes=recipes)
    broken = dataclasses.replace(experiment, model=answering, study=study)
    with pytest.raises(ValueError, match="next token of a text alone"):
        run.run_study(broken, tmp_path, quiet=True, devices=jax.devices()[:1])
    assert not (tmp_path / "base").exists()


def test_a_recipe_that_cannot_work_fails_before_the_base_is_trained(tmp_path):
    experiment = small_study(str(tmp_path / "data"))
    recipes = (Recipe("lost", transforms=(prune(rules=(rule("no/such"),)),)),)
    broken = dataclasses.replace(experiment, study=dataclasses.replace(experiment.study, recipes=recipes))
    with pytest.raises(RuleError, match="matches no weight"):
        run.run_study(broken, tmp_path, quiet=True, devices=jax.devices()[:1])
    assert not (tmp_path / "base").exists()


def row(name, score, cost, task="base", control=False):
    costs = dict.fromkeys(compare.drawn_costs(quality.TOKEN), cost)
    return {
        "name": name,
        "task": task,
        "control": control,
        "transforms": [],
        "score": score,
        "score_before_recovery": score,
        "recovery_steps": 1,
        "kwh": None,
        "step_flops": cost,
        **costs,
    }


def test_the_first_untouched_recipe_of_a_task_is_its_control():
    rows = [row("control", 2.0, 1.0, control=True), row("hot", 3.0, 1.0, control=True)]
    result = compare.compare(rows, (), BASELINES, 2.0)
    assert [each["control_score"] for each in result["rows"]] == [2.0, 2.0]


BASELINES = {"unigram": 5.0, "trigram": 3.0, "five_gram": 2.0}


def test_fronts_and_winners():
    rows = [
        row("control", 2.0, 10.0, control=True),
        row("good", 2.1, 5.0),
        row("beaten", 2.2, 6.0),
        row("cheap", 2.5, 1.0),
        row("control_shifted", 1.0, 1.0, task="shifted", control=True),
    ]
    budgets = (
        Budget("any", "usd", 1.0),
        Budget("half", "usd", 0.5),
        Budget("none", "usd", 0.01),
        Budget("x", "kwh", 1.0),
    )
    result = compare.compare(rows, budgets, BASELINES, 2.0)
    assert [r["name"] for r in result["rows"] if r["pareto"]] == ["control", "good", "cheap", "control_shifted"]
    assert [w["recipe"] for w in result["winners"]] == ["control", "good", None, None]
    assert "cheap" in result["winners"][2]["why"] and "unknown" in result["winners"][3]["why"]
    assert result["findings"][0]["holds"]
    assert not compare.compare(rows, budgets, BASELINES, 3.5)["findings"][0]["holds"]


def test_the_quickstart_asks_for_what_the_readme_promises():
    study = load("configs/quickstart.py").study
    assert len(study.budgets) == 3
    said = " ".join(repr(recipe) for recipe in study.complete())
    for transform in ("prune(", "'2:4'", "factorize(", "lora(", "quantize(", "'training'"):
        assert transform in said
