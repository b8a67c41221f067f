"""The launch scripts without a cloud: what they would run, the manifest against its schema, a stand-in for gcloud."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONFIG = "configs/quickstart.py"
FLAGS = ["--mesh.fsdp", "16", "--transforms", "lora(rank=4), prune()"]


def launch(script, *arguments, path=None, **environment):
    environment = {
        "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"],
        "HOME": os.environ["HOME"],
    } | environment
    command = ["bash", ROOT / "scripts" / f"launch_{script}.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT)


def commands(said):
    return [shlex.split(line) for line in said.stdout.splitlines()]


def test_every_launch_script_fits_on_a_page():
    for script in (ROOT / "scripts").glob("launch*.sh"):
        assert len(script.read_text().splitlines()) <= 60, script


def test_a_tpu_slice_is_asked_for_filled_and_given_back():
    said = launch(
        "tpu_vm", "--dry-run", "my-run", "v5e:4x4", CONFIG, "gs://bucket/runs/one", *FLAGS, ZONE="us-west4-a", SPOT="1"
    )
    assert said.returncode == 0, said.stderr
    plan, archive, create, copy, install, mount, train, delete = commands(said)
    assert plan == ["python", "scripts/plan.py", CONFIG, "--topology", "v5e:4x4", *FLAGS]
    assert archive[:2] == ["git", "archive"]
    queue = ["gcloud", "compute", "tpus", "queued-resources"]
    assert create[:6] == [*queue, "create", "my-run"] and "--spot" in create
    assert create[create.index("--accelerator-type") + 1] == "v5litepod-16"
    assert delete[:6] == [*queue, "delete", "my-run"]
    for one in (copy, install, mount, train):
        assert one[one.index("--worker") + 1] == "all" and one[one.index("--zone") + 1] == "us-west4-a"
    assert "gcsfuse --implicit-dirs bucket bucket" in mount[-1]
    remote = shlex.split(train[-1].split("&&")[-1])
    assert remote == ["python", "scripts/train.py", CONFIG, "--workdir", "../bucket/runs/one", *FLAGS]


@pytest.mark.parametrize(("topology", "name"), [("v4:2x2x4", "v4-32"), ("v5p:4x4x4", "v5p-128"), ("v6e:8x8", "v6e-64")])
def test_a_slice_has_the_clouds_name(topology, name):
    said = launch("tpu_vm", "--dry-run", "a", topology, CONFIG, "gs://b/c", ZONE="z")
    create = next(one for one in commands(said) if "create" in one)
    assert create[create.index("--accelerator-type") + 1] == name


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}


def of(required, **properties):
    """A JSON schema of an object with these properties and no others."""
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def listed(schema):
    return {"type": "array", "minItems": 1, "items": schema}


LABELS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = of(
    ["name", "image", "command", "resources"],
    name=TEXT,
    image=TEXT,
    command=listed(TEXT),
    resources=of(["limits"], limits={"type": "object"}, requests={"type": "object"}),
    volumeMounts=listed(of(["name", "mountPath"], name=TEXT, mountPath=TEXT)),
)
CSI = of(["driver"], driver=TEXT, volumeAttributes=LABELS)
POD = of(
    ["containers"],
    restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=LABELS,
    containers=listed(CONTAINER),
    volumes=listed(of(["name", "csi"], name=TEXT, csi=CSI)),
)
META = {"labels": LABELS, "annotations": LABELS}
JOB = of(
    ["template"],
    parallelism=COUNT,
    completions=COUNT,
    backoffLimit=COUNT,
    template=of(["spec"], metadata=of([], **META), spec=POD),
)
JOBSET = of(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=of(["name"], name=TEXT, **META),
    spec=of(
        ["replicatedJobs"],
        failurePolicy=of([], maxRestarts=COUNT),
        replicatedJobs=listed(of(["name", "template"], name=TEXT, replicas=COUNT, template=of(["spec"], spec=JOB))),
    ),
)
"""The part of the JobSet API, version v1alpha2, that the manifest uses."""


def test_the_manifest_is_a_jobset_of_the_right_size():
    arguments = ("--dry-run", "my-run", "2xv5e:4x4", CONFIG, "gs://bucket/runs/one", *FLAGS)
    said = launch("gke", *arguments, IMAGE="here/jaxcost:1", SPOT="1")
    assert said.returncode == 0, said.stderr
    plan, apply, *lines, end = said.stdout.splitlines()
    assert (apply, end) == ("kubectl apply -f - <<MANIFEST", "MANIFEST") and "--topology 2xv5e:4x4" in plan
    manifest = yaml.safe_load("\n".join(lines))
    jsonschema.validate(manifest, JOBSET)
    assert manifest["metadata"]["labels"]["xpk.google.com/workload"] == "my-run"
    job = manifest["spec"]["replicatedJobs"][0]
    assert job["replicas"] == 2
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": 4} and container["image"] == "here/jaxcost:1"
    assert container["command"] == ["python", "scripts/train.py", CONFIG, "--workdir", "/bucket/runs/one", *FLAGS]


def test_a_slurm_job_has_a_process_for_each_gpu_and_queues_itself_again():
    said = launch("slurm", "--dry-run", "my-run", "h100:8x4", CONFIG, "/shared/one", *FLAGS, SBATCH="--partition=gpu")
    assert said.returncode == 0, said.stderr
    plan, start, *job, end = said.stdout.splitlines()
    assert start == "sbatch --partition=gpu <<'JOB'" and end == "JOB"
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", "\n".join(job), re.MULTILINE))
    assert options["nodes"] == "8" and options["ntasks-per-node"] == options["gpus-per-node"] == "4"
    assert options["signal"] == "TERM@60" and "requeue" in options
    run = next(shlex.split(line) for line in job if line.startswith("srun"))
    assert run[2:-2] == ["python", "scripts/train.py", CONFIG, "--workdir", "/shared/one", *FLAGS]
    checked = subprocess.run(["bash", "-n"], input="\n".join(job), text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "said"),
    [
        ("tpu_vm", ["my-run"], {}, "give a name, chips, a config and a folder"),
        ("tpu_vm", ["My_run", "v5e:4x4", CONFIG, "gs://b/c"], {}, "the name 'My_run' must be of small letters"),
        ("tpu_vm", ["a", "v5e", CONFIG, "gs://b/c"], {}, "'v5e' is no topology; write chip:shape"),
        ("tpu_vm", ["a", "v5e:4x4", "none.py", "gs://b/c"], {}, "there is no config file none.py"),
        ("tpu_vm", ["a", "v5e:4x4", CONFIG, "gs://b/c"], {}, "set ZONE to where the chips are"),
        ("tpu_vm", ["a", "v5e:4x4", CONFIG, "/tmp/x"], {"ZONE": "z"}, "'/tmp/x' must be a folder of a bucket"),
        ("tpu_vm", ["a", "h100:1x8", CONFIG, "gs://b/c"], {"ZONE": "z"}, "not h100; use scripts/launch_gke.sh or"),
        ("tpu_vm", ["a", "2xv5e:4x4", CONFIG, "gs://b/c"], {"ZONE": "z"}, "give one, as in v5e:4x4"),
        (
            "tpu_vm",
            ["--now", "a", "v5e:4x4", CONFIG, "gs://b/c"],
            {"ZONE": "z"},
            "there is no flag --now before the name",
        ),
        ("gke", ["a", "v5e:4x4", CONFIG, "gs://b/c"], {}, "set IMAGE to a container image"),
        ("gke", ["a", "l4:1x1", CONFIG, "gs://b/c"], {}, "a GKE slice has v4, v5e, v5p, v6e or tpu7x chips"),
        ("slurm", ["a", "v5p:4x4x4", CONFIG, "/shared/x"], {}, "must be nodes x GPUs a node, as in h100:8x8"),
    ],
)
def test_what_cannot_be_launched_is_said_in_one_line(script, arguments, environment, said):
    found = launch(script, *arguments, **environment)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1 and said in found.stderr


GCLOUD = """#!{python}
import json, sys
from pathlib import Path
folder = Path({folder!r})
log = folder / "log.jsonl"
with log.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
calls = [json.loads(line) for line in log.read_text().splitlines()]
trained = sum("scripts/train.py" in call[-1] for call in calls)
if "describe" in sys.argv:
    created = sum("create" in call for call in calls)
    taken = {preempted} and trained == 1 and created == 1
    print("SUSPENDED" if taken else "ACTIVE")
if "ssh" in sys.argv and "scripts/train.py" in sys.argv[-1]:
    sys.exit(255 if trained == 1 else 0)
"""


@pytest.mark.parametrize("preempted", [True, False])
def test_a_preempted_slice_is_asked_for_again_and_a_failed_training_is_not(tmp_path, preempted):
    for name, text in (("gcloud", GCLOUD.format(python=sys.executable, folder=str(tmp_path), preempted=preempted)),):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    # What plans the cost is tried in its own tests.
    (tmp_path / "python").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "python").chmod(stat.S_IRWXU)
    arguments = ("--yes", "my-run", "v5e:4x4", CONFIG, "gs://bucket/one")
    said = launch("tpu_vm", *arguments, path=tmp_path, ZONE="z", POLL_SECONDS="0")
    calls = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    made = [call[3] for call in calls if call[3] in ("create", "delete")]
    assert made == ["create", "delete"] * (2 if preempted else 1)
    assert said.returncode == (0 if preempted else 255)
    assert ("The slice was preempted" in said.stderr) is preempted


def test_money_is_spent_only_if_that_is_agreed_to(tmp_path):
    for name in ("python", "gcloud"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/log\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    said = launch("tpu_vm", "my-run", "v5e:4x4", CONFIG, "gs://bucket/one", path=tmp_path, ZONE="z")
    assert said.returncode == 2 and "not started; --yes agrees" in said.stderr
    assert (tmp_path / "log").read_text().split() == ["python"]
