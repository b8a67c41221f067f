"""What the server is deployed by says of it what is true: its addresses, flags, user and times."""

import re
from pathlib import Path

import pytest
import yaml
from test_api import ask, serving

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "scripts" / "deploy"
DEPLOYMENT, SERVICE = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]
[CONTAINER] = POD["spec"]["containers"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def test_the_manifest_holds_together():
    assert (DEPLOYMENT["apiVersion"], DEPLOYMENT["kind"]) == ("apps/v1", "Deployment")
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("v1", "Service")
    labels = POD["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == SERVICE["spec"]["selector"] == labels
    [port] = CONTAINER["ports"]
    [served] = SERVICE["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    assert POD["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    volumes = {volume["name"] for volume in POD["spec"]["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes
    flags = dict(zip(CONTAINER["args"][::2], CONTAINER["args"][1::2], strict=True))
    pause = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["spec"]["terminationGracePeriodSeconds"] > float(flags["--drain-seconds"]) + pause


def test_the_probes_ask_for_what_the_server_has():
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {CONTAINER["ports"][0]["name"]}
    with serving(keys=(b"x" * 32,)) as (port, _):
        for probe in [*probes.values(), {"path": POD["metadata"]["annotations"]["prometheus.io/path"]}]:
            assert ask(port, probe["path"], method="GET")[0] == 200


def test_the_image_runs_the_script_as_the_manifest_expects():
    uid = int(re.search(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)[1])
    assert uid == POD["spec"]["securityContext"]["runAsUser"] and f"--uid {uid}" in DOCKERFILE
    assert f"EXPOSE {CONTAINER['ports'][0]['containerPort']}" in DOCKERFILE
    [entry] = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    command = yaml.safe_load(entry)
    assert (ROOT / command[1]).is_file() and command[2] in {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    cache = re.search(r"XDG_CACHE_HOME=(\S+)", DOCKERFILE)[1]
    assert cache in {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    copied = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())


@pytest.mark.parametrize("argument", ["--drain-seconds", "--host"])
def test_the_flags_are_those_of_the_script(argument):
    assert argument in (*CONTAINER["args"], *DOCKERFILE.split('"'))
    assert argument[2:].replace("-", "_") + ":" in (ROOT / "scripts" / "serve.py").read_text()
