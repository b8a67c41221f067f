"""The canary: its score under load is the one it was chosen with, and a model that has changed is told of."""

import json
import logging
import time

import numpy as np
import pytest
from serving import CONFIG, MODEL, TOKENIZER, log_probabilities, params, slots

from jaxcost.serving import canary
from jaxcost.serving.api.metrics import Metrics
from jaxcost.serving.scheduler import Scheduler
from jaxcost.serving.worker import SchedulerConfig

TOKENS = np.random.default_rng(0).integers(0, 256, 2000).astype(np.int32)


@pytest.fixture(scope="module")
def chosen():
    return canary.choose(MODEL, params(), TOKENS, 3, 40)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def watched(chosen, **options):
    """A canary's watch over the small model, and what closes both."""
    scheduler = Scheduler(slots(), TOKENIZER.decode, SchedulerConfig(queue=4))
    watch = canary.Watch(chosen, scheduler, **{"every_seconds": 0.01, "tolerance": 1e-3} | options)

    def close():
        watch.close()
        assert scheduler.close(60)

    return watch, scheduler, close


def test_the_score_is_that_of_the_sequences(chosen, tmp_path):
    want = []
    for ids in chosen.sequences:
        want += log_probabilities(ids)[np.arange(39), ids[1:]].tolist()
    assert chosen.nats_per_token == pytest.approx(-np.mean(want), abs=1e-4)
    chosen.write(tmp_path)
    assert canary.read(tmp_path) == chosen
    (tmp_path / canary.FILE).write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        canary.read(tmp_path)
    assert canary.read(tmp_path / "none") is None


def test_a_server_that_is_as_it_was_says_nothing(chosen, caplog):
    metrics = Metrics("small")
    with caplog.at_level(logging.WARNING, "jaxcost.serving"):
        watch, _, close = watched(chosen)
        metrics.watch_canary(watch)
        until(lambda: watch.rounds >= 2)
        close()
    assert not watch.drifted and watch.nats_per_token == pytest.approx(chosen.nats_per_token, abs=1e-4)
    value = metrics.registry.get_sample_value("jaxcost:canary_nats_per_token", {"model_name": "small"})
    assert value == watch.nats_per_token and not caplog.records


def test_a_drift_is_logged_and_shown(chosen, caplog):
    other = canary.Canary(chosen.sequences, chosen.nats_per_token + 0.01)
    metrics = Metrics("small")
    with caplog.at_level(logging.WARNING, "jaxcost.serving"):
        watch, _, close = watched(other)
        metrics.watch_canary(watch)
        until(lambda: watch.rounds)
        close()
    assert watch.drifted
    assert metrics.registry.get_sample_value("jaxcost:canary_drifted", {"model_name": "small"}) == 1
    said = json.loads(caplog.records[0].getMessage())
    assert said["canary"] == "drifted" and said["reference_nats_per_token"] == other.nats_per_token


def test_a_full_queue_puts_it_off(chosen):
    watch, scheduler, close = watched(chosen, every_seconds=0.2)
    until(lambda: watch.rounds)
    scheduler.reserve(8)
    time.sleep(0.5)
    rounds = watch.rounds
    time.sleep(0.5)
    assert watch.rounds == rounds
    scheduler.release(8)
    until(lambda: watch.rounds > rounds)
    close()


def test_what_makes_no_sense_is_refused(chosen):
    with pytest.raises(ValueError, match="too few for 3 sequences of 1000"):
        canary.choose(MODEL, params(), TOKENS, 3, 1000)
    with pytest.raises(ValueError, match=f"takes {CONFIG.max_length} tokens, not 500"):
        canary.choose(MODEL, params(), TOKENS, 3, 500)
    scheduler = Scheduler(slots(), TOKENIZER.decode)
    with pytest.raises(ValueError, match="must be above 0"):
        canary.Watch(chosen, scheduler, every_seconds=0, tolerance=1)
    long = canary.Canary((tuple(range(97)),), 1.0)
    with pytest.raises(ValueError, match="sequences of 97 tokens, more than the 96"):
        canary.Watch(long, scheduler, every_seconds=1, tolerance=1)
    assert scheduler.close(60)
