"""scripts/benchmark_serving.py: what it sends arrives, and its figures follow from what came back."""

import pytest
from serving import SLOTS
from test_api import serving

from jaxcost.cost.hardware import HardwareConfig, resolve
from jaxcost.serving.benchmark import Answer, BadServer, Load, _result, measure, table

LOAD = Load(6, (2, 9), (3, 8), first_token_seconds=60.0, token_seconds=60.0)


def test_a_load_is_answered_and_priced():
    hardware = resolve(HardwareConfig("h100", 1))
    with serving() as (port, _):
        for rate in (0.0, 1000.0):
            found = measure(f"http://127.0.0.1:{port}", "none", rate, LOAD, hardware)
            assert (found.answered, found.refused, found.failed) == (6, 0, 0)
            assert 6 * 3 <= found.new_tokens <= 6 * 8 and 6 * 2 <= found.prompt_tokens <= 6 * 9
            assert found.good_requests_per_second == pytest.approx(6 / found.seconds)
            assert found.usd_per_million_new_tokens == pytest.approx(
                1e6 * hardware.usd(found.seconds) / found.new_tokens
            )
            assert 0 < found.first_token_seconds["p50"] <= found.request_seconds["p99"]
            assert len(table([found]).splitlines()) == 2 and found.kept_share is None
    with serving(queue=1) as (port, _):
        crowd = Load(30, (2, 9), (60, 80), 60.0, 60.0)
        found = measure(f"http://127.0.0.1:{port}", "none", 1000.0, crowd, hardware)
        assert found.refused > 0 and found.answered >= SLOTS.slots and found.answered + found.refused == 30


def test_figures_are_of_what_was_good():
    answers = [
        Answer(5, 200, 0.5, 2.5, 11),
        Answer(5, 200, 1.5, 2.5, 11),
        Answer(5, 200, 0.5, 4.5, 11),
        Answer(5, 429),
        Answer(5, 0),
    ]
    load = Load(5, (5, 5), (11, 11), first_token_seconds=1.0, token_seconds=0.25)
    found = _result(2.0, answers, 10.0, load, resolve(HardwareConfig("h100", 1, usd_per_chip_hour=3.6)))
    assert (found.answered, found.refused, found.failed, found.new_tokens) == (3, 1, 1, 33)
    assert found.good_requests_per_second == pytest.approx(0.1)
    assert found.usd_per_million_new_tokens == pytest.approx(1e6 * 0.01 / 33)
    assert found.token_seconds["p50"] == pytest.approx(0.2) and found.first_token_seconds["p50"] == 0.5


def test_without_a_server_there_is_one_sentence():
    hardware = resolve(HardwareConfig("h100", 1))
    with pytest.raises(BadServer, match="cannot be reached"):
        measure("http://127.0.0.1:1", "none", 0.0, LOAD, hardware)
    with pytest.raises(BadServer, match="is no address"):
        measure("localhost", "none", 0.0, LOAD, hardware)
    with serving(keys=(b"x" * 32,)) as (port, _), pytest.raises(BadServer, match="status 401; check its --key"):
        measure(f"http://127.0.0.1:{port}", "none", 0.0, LOAD, hardware)
    with pytest.raises(ValueError, match="requests is 0"):
        Load(0, (1, 1), (1, 1), 1.0, 1.0)
    with pytest.raises(ValueError, match="prompt_tokens is 3 2"):
        Load(1, (3, 2), (1, 1), 1.0, 1.0)
