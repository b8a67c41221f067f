"""Two studies side by side: what counts as a regression, what does not, and what the script says and ends with."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from studies import grid, interval, row, study

from jaxcost.study.regressions import Tolerances, compare_studies, read

SCRIPT = Path(__file__).parent.parent / "scripts" / "compare.py"


def changed(made, index, **changes):
    found = copy.deepcopy(made)
    found["rows"][index] |= changes
    return found


def regressions(old, new, **tolerances):
    return compare_studies(old, new, Tolerances(**tolerances))["regressions"]


@pytest.mark.parametrize("made", [study(), grid()], ids=lambda made: made["schema"])
def test_a_study_is_no_worse_than_itself(made):
    found = compare_studies(made, copy.deepcopy(made), Tolerances(0, 0, 0))
    assert found["regressions"] == found["notes"] == found["only_old"] == found["only_new"] == []
    assert len(found["comparisons"]) == len(made["rows"]) * 10


@pytest.mark.parametrize(
    "figure, within, beyond",
    [
        ("score", 1.009, 1.011),
        ("checkpoint_bytes", 1.01, 1.03),
        ("step_flops", 1.01, 1.03),
        ("step_seconds", 1.2, 1.3),
        ("usd", 1.2, 1.3),
        ("usd_per_million_tokens", 1.2, 1.3),
    ],
)
def test_more_than_the_tolerance_is_a_regression_and_less_is_none(figure, within, beyond):
    old = study()
    value = old["rows"][2][figure]
    assert not regressions(old, changed(old, 2, **{figure: value * within}))
    (text,) = regressions(old, changed(old, 2, **{figure: value * beyond}))
    assert text.startswith("cut_2: ")
    assert not regressions(old, changed(old, 2, **{figure: value / beyond}))


def test_an_interval_over_seeds_explains_what_a_tolerance_would_not():
    old, scores = study(), [2.01, 2.014, 2.008]
    worse = [score + 0.008 for score in scores]
    new = changed(old, 1, score=worse[0], score_interval=interval(*worse))
    assert not regressions(old, new)
    (text,) = regressions(old, new, score=0.0)
    assert "cut_1: bits/byte rose from 2.011 to 2.019" in text
    wide = changed(old, 1, score=worse[0], score_interval=interval(1.98, 2.019, 2.058))
    assert not regressions(old, wide, score=0.0)


def test_a_group_that_was_not_harmed_before_is_a_regression():
    harmed = study()
    assert not regressions(harmed, study())
    (text,) = regressions(study(flags=[]), harmed)
    assert text == f"Newly harmed: {harmed['flags'][0]['text']}"
    assert len(regressions(grid(4), harmed)) == 1
    other = study(flags=[harmed["flags"][0] | {"name": "north"}])
    assert len(regressions(harmed, other)) == 1


def test_a_budget_that_nothing_meets_any_more_is_a_regression():
    old = grid()
    lost = old | {"winners": [old["winners"][0] | {"recipe": None, "score": None, "why": "nothing fits"}]}
    assert regressions(old, lost) == ["Nothing meets the budget 'any price' any more; control did."]
    assert not regressions(lost, old)
    worse = old | {"winners": [old["winners"][0] | {"recipe": "cut_2", "score": 2.2}]}
    (text,) = regressions(old, worse)
    assert "cut_2 with 2.200 bits/byte; it was control with 2.000" in text
    searched = study(answer=study()["answer"] | {"recipe": None, "score": None})
    assert regressions(study(), searched) == ["Nothing meets the budget any more; cut_1 did."]


def test_other_machines_compare_bytes_and_scores_alone():
    old, new = study(), study(machine=study()["machine"] | {"cpus": 64})
    new["rows"][1] |= {"step_seconds": 9.0, "step_flops": 9e12}
    found = compare_studies(old, new, Tolerances())
    assert not found["regressions"] and "different machines" in found["notes"][0]
    assert {one["figure"] for one in found["comparisons"]} == {"score", "checkpoint_bytes", "weight_bytes"}
    new["rows"][1]["weight_bytes"] *= 2
    assert len(regressions(old, new)) == 1


def test_recipes_of_one_study_alone_are_named_and_unknown_prices_noted():
    new = study(5)
    for one in new["rows"]:
        one["usd"] = None
    found = compare_studies(study(), new, Tolerances())
    assert found["only_new"] == ["cut_4"] and found["only_old"] == [] and not found["regressions"]
    assert found["notes"] == ["recovery, USD is unknown in the new study."]


def test_studies_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="compare studies that score the same data"):
        compare_studies(study(), changed(study(), 1, metric="bits per byte, other text"), Tolerances())
    with pytest.raises(ValueError, match="no recipe in common"):
        compare_studies(study(), study(rows=1) | {"rows": [row(7)]}, Tolerances())
    with pytest.raises(ValueError, match="tolerance of timing is -1"):
        Tolerances(timing=-1)


@pytest.mark.parametrize("content", [None, "{", '{"schema": "jaxcost-plan-1"}', "[]", b"\xff\xfe"])
def test_what_is_no_study_is_refused(tmp_path, content):
    if content is not None:
        path = tmp_path / "study.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="name the --workdir"):
        read(tmp_path)


@pytest.mark.slow
def test_the_script_ends_with_2_on_a_regression_and_with_1_on_bad_input(tmp_path):
    def run(*arguments):
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(SCRIPT.parent.parent)})

    old, new = tmp_path / "old", tmp_path / "new"
    for folder, made in ((old, study()), (new, changed(study(), 2, score=2.3))):
        folder.mkdir()
        (folder / "study.json").write_text(json.dumps(made))
    ended = run(old, new / "study.json", "--json", tmp_path / "out.json")
    assert ended.returncode == 2, ended.stderr
    assert "regression cut_2: bits/byte rose from 2.020 to 2.300" in " ".join(ended.stdout.split())
    assert json.loads((tmp_path / "out.json").read_text())["schema"] == "jaxcost-compare-1"
    ended = run(new, old)
    assert ended.returncode == 0 and "no regression" in ended.stdout
    assert run(old, new, "--tolerances.score", "0.5").returncode == 0
    ended = run(old, tmp_path / "nowhere")
    assert ended.returncode == 1 and ended.stderr.startswith("error: There is no study") and not ended.stdout
