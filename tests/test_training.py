"""The trainer: resuming to the same bits, refusing damaged checkpoints, full disks and non-finite losses."""

import dataclasses
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from sweep import sweep

from jaxcost import weights
from jaxcost.config import Experiment
from jaxcost.data import DataConfig
from jaxcost.evaluation.score import EvaluationConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.transformer import Transformer, initialize
from jaxcost.session import Session, load_run
from jaxcost.sharding import MeshConfig
from jaxcost.training import checkpoints
from jaxcost.training.checkpoints import CheckpointError, Checkpoints
from jaxcost.training.clock import LOSSES
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig, WatchConfig
from jaxcost.training.distill import DistillConfig
from jaxcost.training.loop import NonFiniteError
from jaxcost.training.optimizer import make_optimizer, make_schedule
from jaxcost.training.step import init_state, make_train_step
from jaxcost.transforms import SET, Gradual, RigL, chain, lora, prune, quantize

ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(
    vocab_size=0, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64, max_length=32
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where the corpus is built, once for all tests of this file."""
    return str(tmp_path_factory.mktemp("data"))


def experiment(data_dir, **changes):
    settings = {
        "model": MODEL,
        "data": DataConfig(name="python_text/reference", sequence_length=32, batch_size=8, data_dir=data_dir),
        "mesh": MeshConfig(data=-1),
        "execution": ExecutionConfig(unroll="never"),
        "training": TrainingConfig(steps=12, evaluate_every=4),
        "checkpoint": CheckpointConfig(every_steps=4),
        "evaluation": EvaluationConfig(max_tokens=512),
    }
    return Experiment(**settings | changes)


def session_of(value):
    """One device unless the mesh asks for all: most of what is tested here does not depend on it."""
    return Session(value, quiet=True, devices=jax.devices()[: 1 if value.mesh == MeshConfig(data=-1) else 8])


def fitted(value, directory):
    return session_of(value).train(directory)


def bits(directory):
    """Every array of the newest checkpoint, optimizer and key included, as saved checksums."""
    newest = max((p for p in (directory / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    metadata = json.loads((newest / "metadata" / "metadata").read_text())
    return int(newest.name), metadata["checksums"], metadata["position"]


def ledger(directory):
    """The lines of a run's ledger without what a clock put there."""
    lines = map(json.loads, (directory / "ledger.jsonl").read_text().splitlines())
    return [{key: line[key] for key in ("step", "event", "tokens", "flops", "bits_per_byte")} for line in lines]


def forget_after(directory, step):
    """As if the run had ended right after a checkpoint."""
    for folder in (directory / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)


class Interrupted(Exception):
    """Stands for whatever ends a run between two checkpoints."""


@sweep(
    "transforms",
    [
        (),
        (chain(quantize(), lora(rank=2)),),
        (prune(sparsity=0.7, gradual=Gradual(end_step=9, every_steps=2)),),
        (prune(method="random", sparsity=0.7, budget="erk", regrow=SET(end_step=9, every_steps=2)),),
        (prune(method="random", sparsity=0.7, regrow=RigL(end_step=9, every_steps=2)),),
        (prune(method="movement", sparsity=0.7, gradual=Gradual(end_step=9, every_steps=2)),),
        (quantize(mode="training", stochastic_rounding=True),),
    ],
    ids=["dense", "qlora", "gradual", "set", "rigl", "movement", "stochastic"],
    quick=1,
)
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, data_dir, monkeypatch, transforms):
    value = experiment(data_dir, transforms=transforms)
    whole = fitted(value, tmp_path / "whole")

    session = session_of(value)
    evaluate, calls = session.evaluate, []

    def interrupt(params):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted
        return evaluate(params)

    monkeypatch.setattr(session, "evaluate", interrupt)
    with pytest.raises(Interrupted):
        session.train(tmp_path / "broken")
    assert bits(tmp_path / "broken")[0] == 4
    again = fitted(value, tmp_path / "broken")

    assert bits(tmp_path / "broken") == bits(tmp_path / "whole")
    assert again.metrics == whole.metrics
    assert again.losses == whole.losses[4:]
    assert ledger(tmp_path / "broken") == ledger(tmp_path / "whole")


@pytest.mark.slow
def test_a_training_that_stops_on_the_way_goes_on_to_the_same_bits(tmp_path, data_dir):
    value = experiment(data_dir)
    whole = fitted(value, tmp_path / "whole")
    stopped = session_of(value).train(tmp_path / "stopped", until=5)
    assert stopped.steps == 5 and stopped.metrics["bits_per_byte"] > whole.metrics["bits_per_byte"]
    again = session_of(value).train(tmp_path / "stopped", until=5)
    assert again.metrics == stopped.metrics and again.totals == stopped.totals
    fitted(value, tmp_path / "stopped")
    assert bits(tmp_path / "stopped") == bits(tmp_path / "whole")
    with pytest.raises(ValueError, match="is at step 12 already, and step 5 is asked for"):
        session_of(value).train(tmp_path / "stopped", until=5)
    with pytest.raises(ValueError, match="of 12 steps cannot stop at step 13"):
        session_of(value).train(tmp_path / "other", until=13)


def test_a_finished_run_comes_back_at_once_and_learned_something(tmp_path, data_dir):
    value = experiment(data_dir, training=TrainingConfig(steps=40), optimizer=OptimizerConfig(learning_rate=1e-2))
    first = fitted(value, tmp_path)
    again = fitted(value, tmp_path)
    assert first.losses[-1] < first.losses[0] - 1.0
    assert again.losses == () and again.metrics == first.metrics and again.step_seconds == first.step_seconds
    session, params, step = load_run(tmp_path, jax.devices()[:1])
    assert step == 40 and session.evaluate(params)["bits_per_byte"] == first.metrics["bits_per_byte"]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first.params, params)), strict=True))


@pytest.mark.slow
def test_a_run_is_loaded_onto_the_mesh_it_was_trained_on(tmp_path, data_dir):
    trained = fitted(experiment(data_dir, mesh=MeshConfig(data=2, fsdp=4)), tmp_path)
    session, params, _ = load_run(tmp_path)
    assert session.mesh.size == 8 and session.evaluate(params)["bits_per_byte"] == trained.metrics["bits_per_byte"]


@pytest.mark.slow
def test_a_run_opens_on_one_device_where_its_mesh_does_not_fit(tmp_path, data_dir):
    trained = fitted(experiment(data_dir, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path)
    assert load_run(tmp_path, jax.devices()[:2])[0].mesh.size == 1
    session, params, _ = load_run(tmp_path, jax.devices()[:3])
    score = session.evaluate(params)["bits_per_byte"]
    assert session.mesh.size == 1 and score == pytest.approx(trained.metrics["bits_per_byte"], rel=1e-5)


def test_two_processes_do_not_train_in_one_folder(tmp_path, data_dir):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Another process is training"):
            fitted(experiment(data_dir), tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        fitted(experiment(data_dir), tmp_path / "file")


def test_what_is_wrong_with_the_data_is_said_before_the_folder_is_claimed(tmp_path, data_dir):
    data = experiment(data_dir).data
    for split in ({"validation_split": "nope"}, {"train_split": "train[:0%]"}):
        with pytest.raises(ValueError):
            fitted(experiment(data_dir, data=dataclasses.replace(data, **split)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, data_dir):
    one = fitted(experiment(data_dir, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path / "one")
    training = TrainingConfig(steps=12, evaluate_every=4, accumulation=2)
    two = fitted(experiment(data_dir, mesh=MeshConfig(data=2, fsdp=2, tensor=2), training=training), tmp_path / "two")
    np.testing.assert_allclose(one.losses, two.losses, rtol=1e-5)


def test_another_experiment_is_not_continued(tmp_path, data_dir):
    fitted(experiment(data_dir), tmp_path)
    other = experiment(data_dir, optimizer=OptimizerConfig(learning_rate=1.0))
    with pytest.raises(ValueError, match=r"another optimizer\.learning_rate"):
        fitted(other, tmp_path)


def test_a_run_goes_on_on_another_mesh(tmp_path, data_dir):
    whole = fitted(experiment(data_dir, checkpoint=CheckpointConfig(every_steps=4, keep=3)), tmp_path)
    forget_after(tmp_path, 4)
    moved = fitted(experiment(data_dir, mesh=MeshConfig(fsdp=2, tensor=2, data=2)), tmp_path)
    np.testing.assert_allclose(moved.losses, whole.losses[4:], rtol=1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, data_dir):
    fitted(experiment(data_dir), tmp_path / "good")
    value = experiment(data_dir, optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=0, clip_norm=0))
    with pytest.raises(NonFiniteError, match=r"step 6, the last of 5 in a row; there is no checkpoint"):
        fitted(value, tmp_path / "bad")
    strict = dataclasses.replace(value, training=TrainingConfig(steps=12, skip_limit=0))
    with pytest.raises(NonFiniteError, match=r"not finite at step 2; there is no checkpoint"):
        fitted(strict, tmp_path / "strict")
    # Later than the first checkpoint: it stays, and is whole.
    late = dataclasses.replace(value, optimizer=OptimizerConfig(learning_rate=1e30, schedule="constant", clip_norm=0))
    late = dataclasses.replace(late, training=TrainingConfig(steps=12))
    late = dataclasses.replace(late, checkpoint=CheckpointConfig(every_steps=1))
    try:
        fitted(late, tmp_path / "late")
    except NonFiniteError as error:
        assert "last good checkpoint" in str(error) or "no checkpoint" in str(error)
    else:
        pytest.fail("a learning rate of 1e30 trained")


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(data_dir):
    value = experiment(data_dir, transforms=(lora(rank=2),))
    session = session_of(value)
    params = session.fresh_params()
    tx = make_optimizer(value.optimizer, 12)
    step = jax.jit(make_train_step(session.model, tx, session.transform))
    state = init_state(params, tx, 0)
    tokens = np.arange(8 * 32).reshape(8, 32) % 50
    batch = {"inputs": tokens, "targets": tokens, "mask": np.ones((8, 32), np.float32)}
    state, first = step(state, batch)
    broken = batch | {"mask": np.full((8, 32), np.inf, np.float32)}
    after, result = step(state, broken)
    assert (float(first["skipped"]), float(result["skipped"])) == (0, 1)
    assert int(after.step) == int(state.step) + 1
    for name in ("params", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    again, result = step(after, batch)
    assert float(result["skipped"]) == 0 and np.isfinite(float(result["loss"]))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (again.params, after.params)), strict=True))


def test_the_run_says_what_each_step_came_to_and_where_its_seconds_went(tmp_path, data_dir):
    watch = WatchConfig(records=True, profile="2:3")
    done = fitted(experiment(data_dir, watch=watch), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == pytest.approx(list(done.losses))
    assert all(len(set(line["records"])) == 8 and line["seconds"] > 0 and line["skipped"] == 0 for line in lines)
    assert 0 < lines[-1]["goodput"] <= 1 and set(done.lost_seconds) == set(LOSSES)
    assert 0 < done.goodput < 1 - done.lost_seconds["compile"] / done.totals["seconds"] + 0.01
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="watch.profile is '3'; give the first and the last step"):
        WatchConfig(profile="3")


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@sweep("damage", ["flipped", "truncated", "missing", "metadata"], quick=1)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_earlier_one_used_once_it_is_gone(tmp_path, data_dir, damage):
    whole = fitted(experiment(data_dir), tmp_path)
    newest = tmp_path / "checkpoints" / "12"
    victim = largest_file(newest / "tree")
    if damage == "flipped":
        content = bytearray(victim.read_bytes())
        for position in range(len(content) // 3, len(content), 997):
            content[position] ^= 0x10
        victim.write_bytes(content)
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    elif damage == "missing":
        shutil.rmtree(newest / "tree")
    else:
        (newest / "metadata" / "metadata").write_text("{")
    with pytest.raises(CheckpointError) as error:
        fitted(experiment(data_dir), tmp_path)
    assert str(newest) in str(error.value) and "remove that folder to go on from step 8" in str(error.value)
    assert "\n" not in str(error.value)
    shutil.rmtree(newest)
    assert fitted(experiment(data_dir), tmp_path).losses == whole.losses[8:]


def test_a_checkpoint_written_half_is_never_picked(tmp_path, data_dir):
    fitted(experiment(data_dir), tmp_path)
    done = bits(tmp_path)
    shutil.copytree(tmp_path / "checkpoints" / "12", tmp_path / "checkpoints" / "16.orbax-checkpoint-tmp")
    assert fitted(experiment(data_dir), tmp_path).steps == 12
    assert bits(tmp_path) == done


def train_command(workdir, data_dir, *extra):
    config = ROOT / "configs" / "quickstart.py"
    flags = "--model.width 32 --model.num-layers 2 --model.num-heads 2 --model.num-kv-heads 1 --model.head-dim 16"
    flags += " --model.mlp-width 64 --data.name python_text/reference --data.tokenizer bytes --data.sequence-length 32"
    flags += " --data.batch-size 8 --execution.compute float32 --training.steps 60 --training.evaluate-every 20"
    flags += " --evaluation.max-tokens 512 --checkpoint.every-steps 5"
    script = [sys.executable, str(ROOT / "scripts" / "train.py"), str(config)]
    return [*script, *flags.split(), "--data.data-dir", data_dir, "--workdir", str(workdir), *extra]


def environment():
    return os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, data_dir):
    subprocess.run(train_command(tmp_path, data_dir, "--checkpoint.keep", "100"), env=environment(), check=True)
    forget_after(tmp_path, 5)
    before = bits(tmp_path)

    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    env = environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    run = subprocess.run(
        train_command(tmp_path, data_dir), env=env, preexec_fn=no_room, capture_output=True, text=True, timeout=300
    )
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert run.returncode == 1 and len(errors) == 1, run.stderr
    assert "could not be written" in errors[0] and "step 5, is intact" in errors[0], errors
    assert "Traceback" not in run.stderr
    assert bits(tmp_path) == before


@pytest.mark.long
def test_kill_at_any_moment_and_the_same_command_ends_with_the_same_bits(tmp_path, data_dir):
    longer = ("--training.steps", "2400", "--training.evaluate-every", "200", "--checkpoint.every-steps", "40")
    # Twice: the first fills the compilation cache, so that the second says how long the killed runs will take.
    for name in ("first", "whole"):
        start = time.monotonic()
        command = train_command(tmp_path / name, data_dir, *longer)
        subprocess.run(command, env=environment(), check=True, capture_output=True)
        seconds = time.monotonic() - start
    assert bits(tmp_path / "first") == bits(tmp_path / "whole")

    # A notice of preemption saves, a kill does not; either may come while a checkpoint is written.
    draw, kills = random.Random(0), 0
    killed = train_command(tmp_path / "killed", data_dir, *longer)
    while True:
        process = subprocess.Popen(killed, env=environment(), stderr=subprocess.PIPE, text=True)
        try:
            # From the imports to the checkpoints; after the last kill the run may end.
            _, said = process.communicate(timeout=seconds * draw.uniform(0.1, 0.45) if kills < 8 else None)
            assert process.returncode == 0, said
            break
        except subprocess.TimeoutExpired:
            process.send_signal(draw.choice((signal.SIGKILL, signal.SIGTERM)))
            process.communicate(timeout=20)
            kills += 1
    assert kills >= 4
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
    assert ledger(tmp_path / "killed") == ledger(tmp_path / "whole")


def test_schedules_warm_up_and_end_where_they_should():
    for schedule in ("cosine", "wsd"):
        rate = make_schedule(OptimizerConfig(1.0, schedule, warmup_steps=10, final_fraction=0.1), 100)
        values = np.array([float(rate(step)) for step in range(101)])
        assert values[0] == pytest.approx(0.1) and values[:10].max() <= 1 and values.max() == pytest.approx(1.0)
        assert values[100] == pytest.approx(0.1, abs=1e-6)
        assert np.all(np.diff(values[10:]) <= 1e-7)
    flat = make_schedule(OptimizerConfig(1.0, "constant", warmup_steps=0), 10)
    assert [float(flat(step)) for step in (0, 9)] == [1.0, 1.0]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_no_array_of_the_state_becomes_wider_from_step_to_step(kept, accumulation):
    execution = ExecutionConfig(compute="bfloat16", weights=kept, gradients="bfloat16")
    model = Transformer(dataclasses.replace(MODEL, vocab_size=64), execution)
    optimizer, transform = make_optimizer(OptimizerConfig(first_moment="bfloat16"), 10), chain()
    state = jax.eval_shape(lambda: init_state(initialize(model, jax.random.key(0))[0], optimizer, 0))
    tokens = jax.ShapeDtypeStruct((4, 32), np.int32)
    batch = {"inputs": tokens, "targets": tokens, "mask": jax.ShapeDtypeStruct((4, 32), np.float32)}
    after, _ = jax.eval_shape(make_train_step(model, optimizer, transform, accumulation=accumulation), state, batch)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


@pytest.mark.slow
def test_a_narrow_first_moment_halves_its_bytes_and_trains_alike(tmp_path, data_dir):
    losses, sizes = {}, {}
    for dtype in ("float32", "bfloat16"):
        optimizer = OptimizerConfig(learning_rate=1e-2, first_moment=dtype)
        losses[dtype] = fitted(experiment(data_dir, optimizer=optimizer), tmp_path / dtype).losses
        params = {"w": jax.ShapeDtypeStruct((8, 8), np.float32)}
        state = jax.eval_shape(make_optimizer(optimizer, 10).init, params)
        sizes[dtype] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert (sizes["float32"], sizes["bfloat16"]) == (2 * 64 * 4, 64 * 4 + 64 * 2)
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)


def test_moments_exist_for_what_trains_alone(data_dir):
    session = session_of(experiment(data_dir, transforms=(lora(rank=2),)))
    params = session.fresh_params()
    state = init_state(params, make_optimizer(OptimizerConfig(), 10), 0)
    adapter = weights.partition(params)[0]
    assert adapter and all(name.endswith(("/a", "/b")) for name in adapter)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in adapter.values())


def test_checksums_of_large_stacks_are_those_of_small_ones(monkeypatch):
    tree = {"a": jax.random.normal(jax.random.key(0), (3, 5, 7)).astype("bfloat16"), "b": jax.numpy.arange(4.0)}

    def sums():
        return checkpoints._finish_sums(checkpoints._start_sums(tree))

    whole = sums()
    words = np.asarray(tree["a"]).view(np.uint16).astype(np.uint64).sum() % 2**32
    assert whole["a"] == words
    monkeypatch.setattr(checkpoints, "_LARGE_BYTES", 0)
    assert sums() == whole


def test_what_is_saved_may_be_donated_at_once(tmp_path):
    place = jax.sharding.NamedSharding(jax.make_mesh((8,), ("fsdp",)), jax.sharding.PartitionSpec("fsdp"))
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    tree = {str(i): jax.device_put(jax.random.normal(jax.random.key(i), (512, 512)), place) for i in range(4)}
    with Checkpoints(tmp_path, CheckpointConfig(keep=9)) as kept:
        want = {}
        for step in range(4):
            want[step] = jax.tree.map(np.array, tree)
            kept.save(step, tree, {})
            tree = change(tree)
        kept.wait()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        for step in range(4):
            jax.tree.map(np.testing.assert_array_equal, kept.restore(step, shapes)[0], want[step])


# ---- Starting from another training ----


@pytest.fixture(scope="module")
def first(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    fitted(experiment(data_dir, training=TrainingConfig(steps=2, evaluate_every=2)), folder)
    return folder


@pytest.mark.slow
def test_a_training_starts_from_the_weights_of_another(data_dir, first, tmp_path):
    _, found, _ = load_run(first)
    # The model asked for is another one: that of the folder takes its place.
    asked = experiment(data_dir, model=dataclasses.replace(MODEL, num_layers=5), start=str(first))
    session = session_of(asked)
    assert session.model.config.num_layers == 2
    jax.tree.map(np.testing.assert_array_equal, session.fresh_params(), found)
    half = dataclasses.replace(asked, execution=ExecutionConfig(unroll="never", weights="bfloat16"))
    assert {a.dtype for a in jax.tree.leaves(session_of(half).fresh_params())} == {np.dtype("bfloat16")}

    adapted = dataclasses.replace(asked, transforms=(lora(rank=2),), training=TrainingConfig(steps=2))
    result = fitted(adapted, tmp_path / "tuned")
    # The same command again finds its training done.
    assert result.steps == 2 and fitted(adapted, tmp_path / "tuned").steps == 2
    session, tuned, _ = load_run(tmp_path / "tuned")
    frozen, kept = (weights.partition(params)[1] for params in (tuned, lora(rank=2)(found)))
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)

    # What the folder's weights went through stands before what comes now.
    again = session_of(experiment(data_dir, start=str(tmp_path / "tuned"), transforms=(quantize(),)))
    assert again.experiment.transforms == (lora(rank=2), quantize())


def test_there_must_be_something_to_start_from(data_dir, tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        session_of(experiment(data_dir, start=str(tmp_path / "nowhere"))).train(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="leave one of them out"):
        distilled = DistillConfig(teacher="elsewhere", from_layers=True)
        experiment(data_dir, start="somewhere", distill=distilled)
