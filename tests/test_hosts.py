"""Several processes of one job: what joins them, the losses and bits of one alone, and a process that is lost."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from quick import QUICK_TO_COMPILE
from sweep import sweep
from test_training import bits

from jaxcost import hosts

ROOT = Path(__file__).parent.parent
CONFIG = """
from jaxcost.config import Experiment
from jaxcost.data import DataConfig
from jaxcost.evaluation.score import EvaluationConfig
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.sharding import MeshConfig
from jaxcost.training.config import CheckpointConfig, TrainingConfig, WatchConfig

experiment = Experiment(
    model=ModelConfig(
        vocab_size=0, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64, max_length=32
    ),
    data=DataConfig(name="python_text/reference", sequence_length=32, batch_size=8, data_dir={data_dir!r}),
    mesh=MeshConfig(data=2, fsdp=2),
    execution=ExecutionConfig(unroll="never"),
    training=TrainingConfig(steps=30, evaluate_every=15),
    checkpoint=CheckpointConfig(every_steps=5),
    evaluation=EvaluationConfig(max_tokens=512),
    watch=WatchConfig(records=True),
)
"""


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "slurm"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "tpu"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "explicit"),
    ],
)
def test_what_joins_processes_is_read_off_the_environment(environment, kind):
    assert hosts.cluster(environment) == kind


def test_an_environment_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS is set, but JAX_NUM_PROCESSES is not; set all"):
        hosts.cluster({"JAX_COORDINATOR_ADDRESS": "a:1"})
    with pytest.raises(ValueError, match="JAX_PROCESS_ID is '2'; the second must be a number from 0"):
        hosts.cluster({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"})


def test_launching_says_what_it_would_run():
    said = launch_local("--dry-run", "2", "scripts/train.py", "a config.py", PORT="1234", DEVICES="4", XLA_FLAGS="")
    lines = said.stdout.splitlines()
    assert len(lines) == 2
    for index, line in enumerate(lines):
        assert f"JAX_PROCESS_ID={index} " in line and "JAX_NUM_PROCESSES=2 " in line
        assert "JAX_COORDINATOR_ADDRESS=127.0.0.1:1234 " in line and r"device_count=4" in line
        assert line.strip().endswith(r"scripts/train.py a\ config.py")
    for wrong in ((), ("0", "scripts/train.py"), ("two", "scripts/train.py"), ("2",)):
        said = launch_local(*wrong)
        assert (said.returncode, said.stderr.count("\n")) == (2, 1) and "how many processes" in said.stderr


def launch_local(*arguments, **environment):
    command = ["bash", ROOT / "scripts" / "launch_local.sh", *arguments]
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@dataclasses.dataclass(frozen=True)
class Job:
    """A training by several processes that share four devices."""

    processes: list[subprocess.Popen]
    workdir: Path

    def wait_for_step(self, step):
        end = time.monotonic() + 120
        while time.monotonic() < end:
            path = self.workdir / "steps.jsonl"
            if path.exists() and len(path.read_text().splitlines()) >= step:
                return
            assert self.processes[0].poll() is None, self.processes[0].communicate()
            time.sleep(0.02)
        raise AssertionError(f"step {step} did not come")

    def end(self, seconds=120):
        """The exit statuses and what went to standard error."""
        said = [process.communicate(timeout=seconds)[1] for process in self.processes]
        return [process.returncode for process in self.processes], said


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    config = folder / "tiny.py"
    config.write_text(CONFIG.format(data_dir=str(folder / "data")))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(name, count, *flags):
        port = launch_local("--dry-run", "1", "x").stdout.split("127.0.0.1:")[1].split()[0]
        workdir, processes = folder / name, []
        for index in range(count):
            flags_here = f"{QUICK_TO_COMPILE} --xla_force_host_platform_device_count={4 // count}"
            own = environment | {"XLA_FLAGS": flags_here}
            if count > 1:
                own |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
                own |= {"JAX_PROCESS_ID": str(index)}
            command = [sys.executable, "scripts/train.py", str(config), "--workdir", str(workdir), *flags]
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=own, cwd=ROOT, **pipes))
        return Job(processes, workdir)

    return start


@pytest.fixture(scope="module")
def whole(start):
    """The run of one process, and the same of two, both undisturbed."""
    jobs = {}
    for count in (1, 2):
        jobs[count] = start(f"whole {count}", count)
        statuses, said = jobs[count].end()
        assert statuses == [0] * count, said
    return {count: job.workdir for count, job in jobs.items()}


def steps(workdir):
    """The losses of all steps, and the records that each read, over all processes."""
    logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in workdir.glob("steps*.jsonl")]
    first = [json.loads(line) for line in (workdir / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in first] == list(range(1, 31))
    records = {step: [] for step in range(1, 31)}
    for line in sum(logs, []):
        records[line["step"]] += line["records"]
    return [line["loss"] for line in first], {step: sorted(found) for step, found in records.items()}


def assert_same_run(workdir, other):
    (losses, records), (want, wanted) = steps(workdir), steps(other)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert records == wanted


@pytest.mark.slow
def test_two_processes_and_four_train_as_one(start, whole):
    job = start("four", 4)
    statuses, said = job.end()
    assert statuses == [0] * 4, said
    assert_same_run(job.workdir, whole[1])
    assert_same_run(whole[2], whole[1])


@sweep("killed", [1, 0], quick=0)
def test_a_killed_process_ends_all_and_others_go_on(start, whole, killed):
    """Half as many processes, or twice as many, take the job up where the last checkpoint left it."""
    name = f"killed {killed}"
    job = start(name, 2)
    job.wait_for_step(12)
    job.processes[killed].kill()
    begun = time.monotonic()
    statuses, said = job.end(60)
    assert time.monotonic() - begun < 60
    assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] not in (0, None)
    assert "lost another one of the job" in said[1 - killed] or "another task died" in said[1 - killed]
    statuses, said = start(name, (1, 4)[killed]).end()
    assert set(statuses) == {0}, said
    assert_same_run(job.workdir, whole[1])


@sweep("count", [2, 1], quick=0)
def test_a_notice_of_preemption_saves_and_the_restart_has_the_same_bits(start, whole, count):
    job = start(f"asked {count}", count)
    job.wait_for_step(12)
    job.processes[-1].terminate()
    begun = time.monotonic()
    statuses, said = job.end(20)
    assert time.monotonic() - begun < 20 and statuses == [128 + signal.SIGTERM] * count, said
    assert all("Asked to end; step" in text and "is saved in" in text for text in said)
    saved = max(int(folder.name) for folder in (job.workdir / "checkpoints").iterdir())
    assert 12 <= saved < 30
    again = start(f"asked {count}", count)
    statuses, said = again.end()
    assert statuses == [0] * count, said
    assert bits(job.workdir) == bits(whole[count])
    assert_same_run(job.workdir, whole[1])
