"""The ledger: totals, and a killed and resumed run that leaves what an uninterrupted one does."""

import itertools
import json

import numpy as np
import pytest

from jaxcost.cost import hardware
from jaxcost.cost.ledger import Ledger

HARDWARE = hardware.resolve(
    hardware.HardwareConfig(chip="v5e", num_chips=2, usd_per_chip_hour=3.6, watts_per_chip=100, pue=1.0)
)


def train(ledger, steps, saved):
    """One charge a step, a line every second step, totals saved after the line."""
    for step in steps:
        ledger.charge(seconds=0.1, tokens=512, flops=1.5e9, bytes=1000)
        if step % 2 == 0:
            ledger.record(step, loss=1 / step)
            saved[step] = ledger.totals


def open_ledger(path):
    return Ledger(path, HARDWARE, clock=lambda: 0.0)


def test_line_holds_the_cost_so_far_beside_the_metrics(tmp_path):
    ledger = Ledger(tmp_path / "runs" / "ledger.jsonl", HARDWARE, clock=lambda: 7.0)
    ledger.charge(seconds=1800, tokens=10, flops=2e9, bytes=5)
    ledger.charge(seconds=1800, tokens=10, flops=2e9)
    line = ledger.record(3, event="evaluation", loss=np.float32(0.5))
    assert line == {
        "time": 7.0,
        "step": 3,
        "event": "evaluation",
        "seconds": 3600,
        "tokens": 20,
        "flops": 4e9,
        "bytes": 5,
        "usd": pytest.approx(7.2),
        "kwh": pytest.approx(0.2),
        "loss": 0.5,
    }
    assert ledger.lines() == [line]


def test_unknown_price_is_null(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.charge(seconds=1)
    assert ledger.record(0)["usd"] is None
    assert '"kwh": null' in (tmp_path / "ledger.jsonl").read_text()


def test_metric_that_is_not_finite_is_null(tmp_path):
    assert Ledger(tmp_path / "ledger.jsonl").record(0, loss=float("nan"))["loss"] is None


def test_metric_cannot_take_a_fields_name(tmp_path):
    with pytest.raises(ValueError, match="already has a field 'seconds'"):
        Ledger(tmp_path / "ledger.jsonl").record(0, seconds=1.0)


def test_negative_charge_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be negative"):
        Ledger(tmp_path / "ledger.jsonl").charge(seconds=-1)


@pytest.mark.parametrize("killed_at", [5, 6, 7])
@pytest.mark.parametrize("torn", ["", '{"time": 0.0, "ste'])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, killed_at, torn):
    """Killed at any step, the last checkpoint being of step 4."""
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    train(open_ledger(whole), range(1, 11), {})

    saved = {}
    train(open_ledger(resumed), range(1, killed_at + 1), saved)
    with resumed.open("a") as file:
        file.write(torn)
    checkpoint = json.loads(json.dumps(saved[4]))

    ledger = open_ledger(resumed)
    ledger.restore(checkpoint)
    ledger.rewind(4)
    train(ledger, range(5, 11), {})
    assert resumed.read_text() == whole.read_text()


def test_every_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "ledger.jsonl"
    train(open_ledger(path), range(1, 5), {})
    text = path.read_text()
    first = text.splitlines(keepends=True)[0]
    for length in itertools.chain(range(len(first), len(first) + 20), [len(text) - 1]):
        path.write_text(text[:length])
        open_ledger(path)
        assert path.read_text() == first


def test_damage_before_the_last_line_is_an_error(tmp_path):
    path = tmp_path / "ledger.jsonl"
    train(open_ledger(path), range(1, 5), {})
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match="Line 1 of .* is no JSON object with a step"):
        open_ledger(path)


def test_totals_of_another_version_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lack flops, bytes"):
        Ledger(tmp_path / "ledger.jsonl").restore({"seconds": 1, "tokens": 2})
