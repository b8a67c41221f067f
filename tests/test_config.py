"""Configs, overrides and the one-line errors of the scripts."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from sweep import sweep

from jaxcost import serialization
from jaxcost.config import ConfigError, Experiment, Overrides, load, parse
from jaxcost.data import DataConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.session import Session
from jaxcost.sharding import MeshConfig
from jaxcost.study.recipes import Budget, Recipe, StudyConfig
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from jaxcost.transforms import Gradual, lora, prune, rule

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a script takes."""

    config: Path
    """The config."""
    experiment: Overrides
    """Its fields."""


def parsed(*argv):
    return parse(Arguments, ["--config", str(ROOT / "configs" / "quickstart.py"), *argv]).experiment


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_survives_json_and_says_what_it_is(path):
    experiment = load(path)
    assert serialization.from_json(json.loads(json.dumps(serialization.to_json(experiment)))) == experiment
    assert path.read_text().startswith('"""')
    assert len({recipe.name for recipe in experiment.study.recipes}) == len(experiment.study.recipes)


def test_overrides_reach_every_level():
    experiment = parsed(
        "--model.width", "64", "--optimizer.schedule", "cosine", "--mesh.fsdp", "2", "--study.only", "lora"
    )
    assert experiment.model.width == 64 and experiment.optimizer.schedule == "cosine"
    assert experiment.mesh.fsdp == 2 and experiment.study.only == ("lora",)
    assert experiment.data == load(ROOT / "configs" / "quickstart.py").data


def test_transforms_and_recipes_are_written_as_python():
    experiment = parsed("--transforms", "prune(rules=(rule('mlp/', sparsity=0.7),)), lora(rank=4)")
    assert experiment.transforms == (prune(rules=(rule("mlp/", sparsity=0.7),)), lora(rank=4))
    experiment = parsed("--study.recipes", "Recipe('control'), Recipe('sparse', transforms=(prune(),))")
    assert [recipe.name for recipe in experiment.study.recipes] == ["control", "sparse"]


def test_budgets_of_a_config_give_way_to_those_of_the_command_line(tmp_path):
    (tmp_path / "own.py").write_text(
        "from jaxcost.config import Experiment\nfrom jaxcost.study.recipes import Budget, StudyConfig\n"
        "experiment = Experiment(study=StudyConfig(budgets=(Budget('one', 'usd', 0.5), Budget('two', 'kwh', 0.5))))\n"
    )
    for said, wanted in (("", ()), ("Budget('three', 'usd', 0.1)", (Budget("three", "usd", 0.1),))):
        arguments = ["--config", str(tmp_path / "own.py"), "--study.budgets", said]
        assert parse(Arguments, arguments).experiment.study.budgets == wanted


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model.widht", "3"], "--model.width"),
        (["--model.width", "wide"], "--model.width"),
        (["--model.width", "0"], "model.width is 0"),
        (["--model.num-kv-heads", "3"], "multiple of model.num_kv_heads"),
        (["--data.sequence-length", "4096"], "longer than model.max_length"),
        (["--training.accumulation", "3"], "multiple of training.accumulation"),
        (["--transforms", "prume()"], "prume"),
        (["--transforms", "__import__('os').getcwd()"], "__import__"),
        (["--transforms", "lora(rnk=2)"], "rnk"),
        (["--optimizer.learning-rate", "-1"], "learning_rate is -1"),
        (["--mesh.fsdp", "0"], "mesh.fsdp is 0"),
        (["--mesh.data", "-1", "--mesh.fsdp", "-1"], "Only one mesh axis"),
        (["--hardware.chip", "v99"], "v99"),
        (["--study.only", "nothing"], "nothing"),
        (["--execution.save", "quary"], "quary"),
        (["--data.tokenizer", "words"], "tokenizer"),
        (["--optimizer.epsilon", "nan"], "optimizer.epsilon is nan"),
        (["--hardware.usd-per-chip-hour", "inf"], "usd_per_chip_hour is inf"),
        (["--transforms", "lora"], "parentheses"),
        (["--training.seed", "99999999999"], "training.seed"),
    ],
)
def test_what_cannot_work_is_one_sentence(argv, said):
    with pytest.raises(ValueError) as error:
        parsed(*argv)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_config_file_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "broken.py").write_text("experiment = 1 +")
    (tmp_path / "empty.py").write_text("x = 1")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    for name, said in (
        ("missing.py", "no config file"),
        ("broken.py", "cannot be read"),
        ("empty.py", "does not define"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModelConfig(head_dim=3),
        lambda: ModelConfig(vocab_size=-1),
        lambda: ExecutionConfig(save=("query",), offload=("query",)),
        lambda: OptimizerConfig(beta2=1.0),
        lambda: TrainingConfig(steps=0),
        lambda: CheckpointConfig(keep=0),
        lambda: Gradual(end_step=0),
        lambda: Recipe("a b"),
        lambda: Budget("none", "usd", 0),
        lambda: StudyConfig(recipes=(Recipe("a"), Recipe("a"))),
        lambda: StudyConfig(recovery_steps=0),
        lambda: Experiment(transforms=(prune(gradual=Gradual(end_step=500)),), training=TrainingConfig(steps=100)),
    ],
)
def test_impossible_values_and_combinations_are_refused(make):
    with pytest.raises(ValueError) as error:
        make()
    assert "\n" not in str(error.value) and str(error.value).endswith((".", ")"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": MeshConfig(data=3)}, "does not fit 8 devices"),
        ({"mesh": MeshConfig(data=-1), "data": DataConfig(batch_size=12)}, "make data.batch_size a multiple of 8"),
        ({"mesh": MeshConfig(tensor=8)}, "model.num_heads (4) must be a multiple of mesh.tensor (8)"),
        ({"mesh": MeshConfig(fsdp=8), "model": ModelConfig(vocab_size=0, width=100)}, "model.width (100)"),
        ({"model": ModelConfig(vocab_size=100)}, "smaller than the tokenizer's vocabulary"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_read(changes, said):
    with pytest.raises(ValueError) as error:
        Session(Experiment(**changes), quiet=True)
    assert said in str(error.value)


def test_json_of_another_project_is_refused():
    with pytest.raises(ValueError, match="not a type of jaxcost"):
        serialization.from_json({"type": "os:system"})
    with pytest.raises(ValueError, match="another version"):
        serialization.from_json({"type": "jaxcost.sharding:MeshConfig", "rings": 3})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_documents_its_flags(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--debug", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 0
    for flag in ("--json", "--debug"):
        assert flag in said
    if "--model.width" in said:
        for field in ("--data.name", "--mesh.fsdp", "--optimizer.schedule", "--execution.remat", "--hardware.chip"):
            assert field in said


@sweep(
    ("arguments", "said"),
    [
        (["--data.name", "no_such_dataset"], "no_such_dataset"),
        (["--transforms", "prune(rules=(rule('no/such/weight'),))"], "matches no weight"),
        (["--data.batch-size", "7", "--mesh.data", "1", "--mesh.fsdp", "2"], "does not fit"),
        (["--nonsense", "1"], "nonsense"),
        (["--data.validation-split", "nope"], "nope"),
        (["--json", "/proc/nope/result.json"], "--json"),
    ],
    quick=1,
)
def test_a_script_that_fails_says_so_in_one_line(tmp_path, arguments, said):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(ROOT / "configs" / "quickstart.py")]
    command += ["--workdir", str(tmp_path / "run"), "--data.data-dir", str(tmp_path / "data"), *arguments]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    lines = run.stderr.strip().splitlines()
    assert run.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: "), run.stderr
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


def test_importing_the_package_is_light():
    code = "import time, jax; start = time.perf_counter(); import jaxcost; print(time.perf_counter() - start)"
    seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert seconds < 1.0
