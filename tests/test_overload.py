"""Ten times what a server can do: what it does not answer it refuses or ends in time, and then it is as before."""

import dataclasses

import pytest
from test_api import serving
from test_serve_script import FEW, process, run  # noqa: F401 (a fixture)

from jaxcost.cost.hardware import HardwareConfig, resolve
from jaxcost.serving.benchmark import BadServer
from jaxcost.serving.overload import overload

HARDWARE = resolve(HardwareConfig("h100", 1))
OPTIONS = {"times": 10, "seconds": 5, "burst": 6, "new_tokens": (200, 250), "deadline_seconds": 10.0}


@pytest.mark.slow
def test_an_overload_passes(run):  # noqa: F811
    with process(run, "--scheduler.queue", "4", *FEW, "--engine.max-length", "300") as (_, port):
        found = overload(f"http://127.0.0.1:{port}", "none", HARDWARE, **OPTIONS)
    load = found.load
    assert load.failed == 0 and load.answered > 0 and load.refused > load.answered
    # Measured by its client, which has the same cores; the deadline counts from where the server has read a request.
    assert found.slowest_seconds < OPTIONS["deadline_seconds"] + 5
    assert not found.failures(recovery_seconds=5.0, memory_bytes=100_000_000)
    bad = dataclasses.replace(found, load=dataclasses.replace(load, failed=1), recovery_seconds=9.0)
    assert len(bad.failures(5.0, -(10**12))) == 3


def test_a_burst_that_is_not_held_is_said_so():
    with serving(queue=1) as (port, _), pytest.raises(BadServer, match="give a smaller --burst"):
        overload(f"http://127.0.0.1:{port}", "none", HARDWARE, **OPTIONS | {"burst": 40, "new_tokens": (8, 16)})
    with pytest.raises(ValueError, match="must be above 0"):
        overload("http://127.0.0.1:1", "none", HARDWARE, **OPTIONS | {"times": 0})
