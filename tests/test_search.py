"""The search of a space of recipes: what it may try, what that may cost, and that a kill changes nothing."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from quick import QUICK_TO_COMPILE
from sweep import sweep

from jaxcost.config import Experiment, load
from jaxcost.data import DataConfig
from jaxcost.evaluation.score import EvaluationConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.session import Session
from jaxcost.study import run, surrogate
from jaxcost.study.estimates import count
from jaxcost.study.measure import weight_bytes
from jaxcost.study.parts import Parts, divided
from jaxcost.study.recipes import Budget, Recipe, SearchConfig, StudyConfig, VerifyConfig
from jaxcost.study.space import Choice, Range, Space, each, features
from jaxcost.study.trials import Trials
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from jaxcost.transforms import factorize, prune, quantize
from jaxcost.workdir import alone_in

SPACE = Space(
    transforms=(Choice((None, *each(prune, sparsity=Choice((0.3, 0.5, 0.7, 0.9))))),),
    finish=(Choice((None, quantize())),),
    learning_rate=Range(1e-3, 1e-1, 3, log=True),
)
HALF = Budget("half of the grid", "flops", share=0.5, of="study")


def experiment(data_dir, spaces=(SPACE,), budgets=(HALF,), **search):
    """A small model's, and a search whose trials the tests make up."""
    study = StudyConfig(
        recovery_steps=8,
        spaces=spaces,
        budgets=budgets,
        topology="v99:1x1",
        search=SearchConfig(**search),
        verify=VerifyConfig(on=False),
    )
    return Experiment(
        model=ModelConfig(
            0, width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64, max_length=32
        ),
        data=DataConfig(name="python_text/reference", sequence_length=32, batch_size=8, data_dir=str(data_dir)),
        execution=ExecutionConfig(unroll="never"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        training=TrainingConfig(steps=6),
        evaluation=EvaluationConfig(max_tokens=1024),
        checkpoint=CheckpointConfig(every_steps=6),
        study=study,
    )


def options(recipe):
    sparsity = next((t.sparsity for t in recipe.transforms if isinstance(t, prune)), 0.0)
    return sparsity, recipe.learning_rate or 1e-2, bool(recipe.finish)


def score(recipe, steps, seed):
    """Lower with steps, higher the sparser, best at a rate of 1e-2."""
    sparsity, rate, codes = options(recipe)
    return 2 + sparsity**2 / 2 + 0.1 * abs(np.log10(rate) + 2) + 0.02 * codes + 0.5 / steps + 0.001 * seed


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def bases():
    """Trainings of the base, by the step that they were stopped at."""
    return {}


@pytest.fixture
def made_up(monkeypatch, bases):
    """Trials whose scores are made up; returns the stages and rows that were computed, in order.

    The base is trained once for all tests, and no page is written.
    """
    done, train = [], Session.train

    def trained(session, directory, make_params=None, title="train", teacher=None, until=None):
        if until not in bases:
            bases[until] = train(session, directory, make_params, title, teacher, until)
        return bases[until]

    monkeypatch.setattr(Session, "train", trained)
    monkeypatch.setattr(run.baselines, "measured", lambda _: {"unigram": 5.0, "trigram": 3.0, "five_gram": 2.0})
    monkeypatch.setattr(run.report, "draw", lambda *_: None, raising=False)
    monkeypatch.setattr(run.report, "write", lambda *_: None)

    def stage(trials, recipe, steps, seed):
        done.append((recipe.name, steps, seed))
        data = trials.session(recipe).experiment.data
        tokens = steps * data.batch_size * data.sequence_length
        # A mask saves no FLOPs, so that a step costs what the base's does.
        flops = bases[None].cost.total_flops * steps
        totals = {"seconds": 0.1 * steps, "tokens": tokens, "flops": flops, "bytes": 0}
        found = {"score": score(recipe, steps, seed), "steps": steps, "seed": seed, "scoring_seconds": 0.01}
        return found | {"recovery": trials.training_of(recipe, seed), "recovery_totals": totals}

    def row(trials, recipe):
        steps = trials.study.steps_of(recipe)
        last = stage(trials, recipe, steps, 0)
        done[-1] = (recipe.name, "row")
        costs = ("weight_bytes", "step_flops", "step_seconds", "inference_flops_per_token", "usd", "hours", "kwh")
        costs += ("flops", "decode_seconds_per_token", "usd_per_million_tokens", "kwh_per_million_tokens")
        sparsity, _, codes = options(recipe)
        share = 0.25 if codes else 1.0
        found = dict.fromkeys(costs, 1.0) | {"weight_bytes": share, "checkpoint_bytes": 1000 * (1 - sparsity) * share}
        return {
            **last,
            **found,
            "name": recipe.name,
            "description": recipe.describe(),
            "task": recipe.task,
            "control": recipe.name == "control",
            "transforms": [],
            "metric": "made up",
            "score_before_recovery": 3.0,
            "score_interval": None,
            "step_peak_bytes": 1,
            "trainable_parameters": 1,
            "decode_tokens_per_second": 1.0,
            "recovery_steps": steps,
            "figures": dict.fromkeys(("checkpoint_bytes", "inference_flops_per_token", "step_seconds", "usd"), "made"),
            "kg_co2": 0.0,
        }

    def beforehand(trials, recipe, decoding):
        sparsity, _, codes = options(recipe)
        return {"checkpoint_bytes": 1000 * (1 - sparsity) / (4 if codes else 1), "scoring_seconds": 0.01}

    monkeypatch.setattr(Trials, "_stage", stage)
    monkeypatch.setattr(Trials, "_row", row)
    monkeypatch.setattr(Trials, "_beforehand", beforehand)
    return done


def search(value, folder):
    return run.run_study(value, folder, quiet=True, devices=jax.devices()[:1])


# ---- The space ----


def test_a_space_is_every_combination_with_names_that_stay():
    names = list(SPACE.settings())
    assert len(names) == 5 * 2 * 3 - 3 == len(set(names))
    assert "prune_50-int8_weights-lr_0_01" in names
    fewer = dataclasses.replace(SPACE, learning_rate=Choice((1e-2,)))
    assert set(fewer.settings()) <= set(names)
    assert dict(SPACE.settings()) == dict(SPACE.settings())


def test_recipes_that_a_description_does_not_tell_apart_have_names_of_their_own():
    space = Space(transforms=(Choice(each(prune, sparsity=0.5, block=Choice((64, 128)))),))
    names = list(space.settings())
    assert len(set(names)) == 2 and all(name.startswith("prune_50-") for name in names)


def test_the_config_of_a_search_is_the_space_that_it_says():
    study = load("configs/search.py").study
    recipes = study.complete()
    assert len(recipes) == 61 and recipes[0].name == "control"
    assert {budget.of for budget in study.budgets} == {"study", "recipe"}


def test_each_number_of_steps_has_its_control():
    space = Space(transforms=(Choice((prune(),)),), recovery_steps=Choice((4, 8)))
    names = [recipe.name for recipe in StudyConfig(recovery_steps=8, spaces=(space,)).complete()]
    assert names == ["control-steps_4", "prune_50-steps_4", "control", "prune_50-steps_8"]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Space().settings(), "empty but for the untouched model"),
        (lambda: Choice(()), "Choice of a space is empty"),
        (lambda: Space(transforms=(Choice(("prune",)),)).settings(), "where a transform is wanted"),
        (lambda: Range(3, 1), "is no range"),
        (lambda: Budget("x", "usd"), "either a share or an at_most"),
        (lambda: Budget("x", "usd", 1.0, 2.0), "either a share or an at_most"),
        (lambda: Budget("x", "usd", at_most=-1.0), "must be positive"),
        (lambda: Budget("x", "weight_bytes", at_most=1.0, of="study"), "a study pays usd, hours, kwh, flops"),
        (lambda: StudyConfig(budgets=(HALF,)), "a list of recipes is tried whole"),
        (lambda: SearchConfig(rungs=(0.5,)), "the last of them 1"),
        (lambda: StudyConfig(spaces=(SPACE,), recipes=(Recipe("a", task="shifted"),)), "recipes of another task"),
    ],
)
def test_bad_input_is_one_sentence(make, said):
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_features_tell_recipes_apart():
    recipes = StudyConfig(spaces=(SPACE,)).complete()
    table = features(recipes)
    assert len(np.unique(table, axis=0)) == len(recipes)
    assert table.min() == 0 and table.max() == 1


def test_the_surrogate_ranks_what_it_has_not_seen():
    recipes = StudyConfig(spaces=(SPACE,)).complete()
    table = features(recipes)
    truth = np.array([score(recipe, 8, 0) for recipe in recipes])
    tried = [0, *surrogate.spread_order(table, 0, range(1, len(recipes)))[:12]]
    mean, error = surrogate.predict(table, tried, truth[tried])
    unseen = np.setdiff1d(np.arange(len(recipes)), tried)
    assert np.corrcoef(mean[unseen], truth[unseen])[0, 1] > 0.7
    assert error[unseen].mean() > error[tried].mean()
    assert surrogate.predict(table, [0, 1], [1.0, 2.0]) == (None, None)


# ---- The search ----


def test_it_finds_the_best_within_its_budget_and_pays_no_more(tmp_path, data_dir, made_up):
    most = Budget("most of the grid", "flops", share=0.5, of="study")
    result = search(experiment(data_dir, budgets=(most,), finalists=2, seeds=3), tmp_path)
    recipes = {name: Recipe(name, **settings) for name, settings in SPACE.settings().items()}
    scores = {name: score(recipe, 8, 0) for name, recipe in recipes.items()}
    best = result["answer"]["recipe"]
    assert scores[best] <= 1.02 * min(scores.values())
    assert result["kind"] == "search" and result["schema"] == "jaxcost-study-2"
    [limit] = [each for each in result["budget"] if each["of"] == "study"]
    assert limit["used"] <= limit["limit"]
    trials = {trial["name"]: trial for trial in result["trials"]}
    assert set(trials) == {"control", *SPACE.settings()}
    assert sum(trial["status"] == "finalist" for trial in trials.values()) == 3
    assert {trial["status"] for trial in trials.values()} >= {"stopped", "unaffordable"}
    assert all(trial["why"] for trial in trials.values() if trial["status"] == "unaffordable")
    # The control had what the finalists had, each stage estimated beforehand.
    stages = [[(s["steps"], s["seed"]) for s in trials[name]["stages"]] for name in ("control", best)]
    assert stages[0] == stages[1] == [(2, 0), (4, 0), (8, 0), (8, 1), (8, 2)]
    assert all(s["estimated_flops"] > 0 for s in trials["control"]["stages"])
    for finalist in result["finalists"]:
        assert finalist["seeds"] == [0, 1, 2] and finalist["score"]["low"] < finalist["score"]["mean"]
    assert result["surrogate"]["rank_correlation"] > 0


def test_the_parts_of_the_ledger_are_its_total_to_the_cent(tmp_path, data_dir, made_up):
    result = search(experiment(data_dir), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    for name in ("usd", "kwh", "seconds", "flops", "tokens"):
        assert sum(part[name] for part in result["ledger"]) == pytest.approx(result["totals"][name], rel=1e-9)
    assert lines[-1]["tokens"] == result["totals"]["tokens"]
    assert result["totals"]["estimated_flops"] > 0 and result["totals"]["estimated_usd"] > 0
    assert [part["stage"] for part in result["ledger"] if part["estimated_seconds"] is None] == []
    # What stages paid is what the ledger was charged, but for rows and what was measured beforehand.
    paid = sum(stage["flops"] for trial in result["trials"] for stage in trial["stages"])
    base = next(part["flops"] for part in result["ledger"] if part["stage"] == "base")
    assert paid + base == pytest.approx(result["totals"]["flops"])


@sweep("after", [1, 4, 9, 13], quick=1)
def test_a_kill_repeats_nothing_that_was_finished_and_ends_with_the_same_winner(
    tmp_path, data_dir, made_up, monkeypatch, after
):
    value = experiment(data_dir)
    whole = search(value, tmp_path / "whole")
    expected, original = list(made_up), Trials._stage
    made_up.clear()

    def killed(trials, *arguments):
        if len(made_up) == after:
            raise KeyboardInterrupt
        return original(trials, *arguments)

    monkeypatch.setattr(Trials, "_stage", killed)
    with pytest.raises(KeyboardInterrupt):
        search(value, tmp_path / "killed")
    monkeypatch.setattr(Trials, "_stage", original)
    result = search(value, tmp_path / "killed")
    assert made_up == expected
    same = ("answer", "trials", "finalists", "rows")
    assert [strip(result[name]) for name in same] == [strip(whole[name]) for name in same]


def strip(value):
    """Without what is measured on the clock, or estimated from it."""
    if isinstance(value, dict):
        clocked = ("seconds", "usd", "estimated_seconds", "estimated_usd")
        return {name: strip(item) for name, item in value.items() if name not in clocked}
    return [strip(item) for item in value] if isinstance(value, list) else value


def test_a_trial_that_fails_is_written_down_and_the_search_goes_on(tmp_path, data_dir, made_up, monkeypatch):
    original, asked = Trials._stage, []

    def failing(trials, recipe, *arguments):
        if recipe.name == "int8_weights-lr_0_01":
            asked.append(recipe.name)
            raise RuntimeError("no memory\nis left")
        return original(trials, recipe, *arguments)

    monkeypatch.setattr(Trials, "_stage", failing)
    result = search(experiment(data_dir), tmp_path)
    trial = next(t for t in result["trials"] if t["name"] == "int8_weights-lr_0_01")
    assert trial["status"] == "failed" and trial["why"] == "RuntimeError: no memory is left"
    assert result["answer"]["recipe"] not in (None, "int8_weights-lr_0_01")
    search(experiment(data_dir), tmp_path)
    assert len(asked) == 1


def test_a_recipe_that_cannot_be_done_is_a_failed_trial(tmp_path, data_dir, made_up):
    impossible = Space(transforms=(Choice((prune(pattern="2:4"), prune(pattern="3:7"))),))
    result = search(experiment(data_dir, (impossible,), ()), tmp_path)
    status = {trial["name"]: trial["status"] for trial in result["trials"]}
    assert status == {"control": "finalist", "prune_2_4": "finalist", "prune_3_7": "failed"}


def test_a_failing_control_ends_the_study(tmp_path, data_dir, made_up, monkeypatch):
    def failing(trials, recipe, *arguments):
        raise RuntimeError("the control is lost")

    monkeypatch.setattr(Trials, "_stage", failing)
    with pytest.raises(RuntimeError, match="the control is lost"):
        search(experiment(data_dir), tmp_path)


def test_limits_of_recipes_hold_together_and_what_exceeds_them_is_not_trained(tmp_path, data_dir, made_up):
    budgets = (Budget("60 % of the bytes", "checkpoint_bytes", share=0.6), Budget("codes", "weight_bytes", share=0.6))
    result = search(experiment(data_dir, budgets=budgets), tmp_path)
    trained = {name for name, *_ in made_up} - {"control"}
    assert trained and all("int8" in name for name in trained)
    assert result["answer"]["recipe"] == "int8_weights-lr_0_01"
    assert {trial["status"] for trial in result["trials"] if "int8" not in trial["name"]} == {"over_budget", "finalist"}
    assert all(limit["used"] <= limit["limit"] for limit in result["budget"] if limit["metric"] == "checkpoint_bytes")


def test_what_nothing_meets_says_what_the_cheapest_costs(tmp_path, data_dir, made_up):
    few = Budget("a tenth", "weight_bytes", share=0.01)
    with pytest.raises(ValueError, match=r"No recipe meets the budget 'a tenth', .* the cheapest, .*int8.*, takes"):
        search(experiment(data_dir, budgets=(few,)), tmp_path / "counted")
    assert not (tmp_path / "counted" / "ledger.jsonl").exists() and not made_up
    measured = Budget("a hundredth", "checkpoint_bytes", share=0.01)
    result = search(experiment(data_dir, budgets=(measured,)), tmp_path / "measured")
    assert result["answer"]["recipe"] is None and result["verification"] is None
    assert "the cheapest that was tried, prune_90-int8_weights" in result["answer"]["text"]
    assert {name for name, *_ in made_up} == {"control"}


def test_a_budget_that_pays_for_nothing_says_what_the_least_is(tmp_path, data_dir, made_up):
    with pytest.raises(ValueError, match=r"allows 1 flops, and the least that this search takes is .*base"):
        search(experiment(data_dir, budgets=(Budget("one", "flops", at_most=1.0, of="study"),)), tmp_path)
    assert not made_up


def test_money_without_a_price_is_refused(tmp_path, data_dir, made_up):
    value = experiment(data_dir, budgets=(Budget("all", "usd", at_most=1.0, of="study"),))
    # No price of this chip is public.
    value = dataclasses.replace(value, hardware=dataclasses.replace(value.hardware, chip="tpu7x"))
    with pytest.raises(ValueError, match="hardware.usd_per_chip_hour"):
        search(value, tmp_path)


def test_two_studies_in_one_folder_are_refused(tmp_path, data_dir):
    with alone_in(tmp_path), pytest.raises(ValueError, match="Another process is working in"):
        search(experiment(data_dir), tmp_path)


@pytest.mark.slow
def test_counts_are_what_the_weights_then_are(data_dir):
    base = Session(experiment(data_dir), quiet=True, devices=jax.devices()[:1])
    dense = jax.eval_shape(base.base_params)
    params = base.base_params()
    for recipe in (Recipe("a"), Recipe("b", (factorize(),), (quantize(),)), Recipe("c", (prune(),))):
        made = params
        for transform in (*recipe.transforms, *recipe.finish):
            made = transform(made, jax.random.key(0))
        assert count(base, recipe, dense).weight_bytes == weight_bytes(made)
    thin, whole = (count(base, recipe, dense).step_flops for recipe in (Recipe("b", (factorize(),)), Recipe("a")))
    assert thin < whole


# ---- Several trials at once ----


def at_once(value, number, folder):
    tried = dataclasses.replace(value.study.search, parallel=number)
    value = dataclasses.replace(value, study=dataclasses.replace(value.study, search=tried))
    return run.run_study(value, folder, quiet=True, devices=jax.devices()[:number])


@pytest.mark.parametrize("number", [2, 3])
def test_trials_at_once_pay_for_the_parts_that_wait_and_are_the_same_every_time(tmp_path, data_dir, made_up, number):
    value = dataclasses.replace(
        experiment(data_dir), data=dataclasses.replace(experiment(data_dir).data, batch_size=12)
    )
    result = at_once(value, number, tmp_path)
    first = sorted(map(str, made_up))
    trials = {trial["name"]: trial for trial in result["trials"]}
    assert len({name for name, *_ in made_up}) > number and result["answer"]["recipe"] in trials
    [limit] = [each for each in result["budget"] if each["of"] == "study"]
    assert limit["used"] <= limit["limit"]
    # Finalists and their control are three: on two parts the last of each seed is alone, and the other part waits.
    search = next(part for part in result["ledger"] if part["stage"] == "search")
    own = [s["seconds"] for t in result["trials"] if not t["control"] for s in t["stages"] if s["seed"] == 0]
    rows = sum(row["scoring_seconds"] for row in result["rows"] if not row["control"])
    assert search["seconds"] > sum(own) + rows
    assert sum(part["usd"] for part in result["ledger"]) == pytest.approx(result["totals"]["usd"], rel=1e-9)
    again = at_once(value, number, tmp_path)
    assert sorted(map(str, made_up)) == first
    assert strip(again["trials"]) == strip(result["trials"]) and again["totals"] == result["totals"]


def test_parts_are_equal_and_priced_by_their_chips(data_dir):
    value = experiment(data_dir)
    value = dataclasses.replace(value, hardware=dataclasses.replace(value.hardware, chip="v5e", num_chips=4))
    base = Session(value, quiet=True, devices=jax.devices()[:8])
    parts = divided(base, 4)
    assert [device for part in parts for device in part.devices] == base.devices
    assert sum(part.hardware.usd(3600.0) for part in parts) == pytest.approx(base.hardware.usd(3600.0))
    with pytest.raises(ValueError, match="8 devices do not divide into so many parts"):
        divided(base, 3)
    with pytest.raises(ValueError, match="must be at least 1"):
        SearchConfig(parallel=0)


def test_jobs_of_one_name_share_a_part_and_failures_are_raised_when_all_have_ended(data_dir):
    base = Session(experiment(data_dir), quiet=True, devices=jax.devices()[:2])
    parts = Parts(divided(base, 2), base.base_params(), Path(), {})
    where = parts.run([(name, lambda trials: trials.devices[0]) for name in ("a", "b", "a", "c")])
    assert where == [base.devices[i] for i in (0, 1, 0, 0)]
    ended = []

    def fails(trials):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        parts.run([("a", fails), ("b", ended.append)])
    assert len(ended) == 1


# ---- The whole, with real trainings ----

SMALL = Space(transforms=(Choice((None, prune())),), finish=(Choice((None, quantize())),))
PROGRAM = """
import sys
from pathlib import Path
import jax
from test_search import SMALL, real
from jaxcost.study.run import run_study
run_study(real(sys.argv[1]), Path(sys.argv[2]), quiet=True, devices=jax.devices()[:1])
"""


def real(data_dir):
    """A search of three recipes, all of it real."""
    budgets = (Budget("all", "flops", share=1.0, of="study"), Budget("bytes", "checkpoint_bytes", share=0.9))
    value = experiment(data_dir, (SMALL,), budgets, rungs=(0.5, 1.0), seeds=2, finalists=1)
    verify = VerifyConfig(resamples=200, safety_tokens=4)
    return dataclasses.replace(value, study=dataclasses.replace(value.study, verify=verify, decode_tokens=8))


@pytest.mark.slow
def test_real_trials_at_once_come_to_what_they_come_to_one_after_the_other(tmp_path, data_dir):
    one, two = (at_once(real(data_dir), number, tmp_path / str(number)) for number in (1, 2))
    assert one["answer"]["recipe"] == two["answer"]["recipe"] and len(two["finalists"]) == 2

    stages = [{t["name"]: t["stages"] for t in result["trials"]} for result in (one, two)]
    for name, expected in stages[0].items():
        found = stages[1][name]
        assert [(s["steps"], s["seed"]) for s in found] == [(s["steps"], s["seed"]) for s in expected]
        # The base was trained on one device and on two, whose sums differ in their last bits.
        assert [s["score"] for s in found] == pytest.approx([s["score"] for s in expected], rel=1e-6)


@pytest.mark.long
def test_a_real_search_survives_kills_at_any_moment(tmp_path, data_dir):
    whole = search(real(data_dir), tmp_path / "whole")
    assert whole["answer"]["recipe"] and whole["verification"]["test"]["examples"] > 8
    assert json.loads((tmp_path / "whole" / "study.json").read_text()) == whole
    command = [sys.executable, "-c", PROGRAM, str(data_dir), str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"}
    environment["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {os.environ['XLA_FLAGS']}"  # as this process compiles
    draw, seen = random.Random(0), {}
    for seconds in (*(draw.uniform(10, 30) for _ in range(6)), None):
        process = subprocess.Popen(command, env=environment)
        try:
            assert process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for path in (tmp_path / "killed").glob("recipes/*/*.json"):
            assert seen.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert len(seen) > 3
    result = json.loads((tmp_path / "killed" / "study.json").read_text())
    assert result["answer"]["recipe"] == whole["answer"]["recipe"]
    for one, other in zip(result["trials"], whole["trials"], strict=True):
        assert [s["score"] for s in one["stages"]] == [s["score"] for s in other["stages"]]
