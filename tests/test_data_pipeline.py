"""Batches: what each holds, that every token is predicted once, and that a resumed stream is the uninterrupted one."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from jaxcost.data import DataConfig, train_batches, validation_batches

CONFIG = DataConfig(sequence_length=8, batch_size=4)
NUM_WINDOWS = 10
# Every token is its own position, so a batch tells where it was cut; the last 3 don't fill a window.
TOKENS = np.arange(NUM_WINDOWS * 8 + 1 + 3, dtype=np.uint16)


def _assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def _starts(batches):
    return [int(start) for batch in batches for start in batch["inputs"][:, 0]]


def test_train_batch_is_a_shifted_pair_of_static_shape():
    batch = next(train_batches(CONFIG, TOKENS))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "inputs": ((4, 8), np.int32),
        "targets": ((4, 8), np.int32),
        "mask": ((4, 8), np.float32),
    }
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
    assert (batch["mask"] == 1).all()


def test_an_epoch_holds_every_full_window_once_and_the_next_is_shuffled_anew():
    starts = _starts(itertools.islice(train_batches(CONFIG, TOKENS), 5))  # 20 sequences, two epochs of 10
    windows = [8 * i for i in range(NUM_WINDOWS)]
    assert sorted(starts[:10]) == windows
    assert sorted(starts[10:]) == windows
    assert windows != starts[:10] != starts[10:]


def test_the_seed_fixes_the_order():
    def first(seed):
        return _starts(itertools.islice(train_batches(dataclasses.replace(CONFIG, shuffle_seed=seed), TOKENS), 5))

    assert first(1) == first(1)
    # Grain draws epoch e of seed s from s + e; the seeds of two runs must not overlap that way.
    assert first(1)[:10] != first(0)[10:]


@pytest.mark.parametrize("num_before", [0, 1, 4, 7])
def test_a_resumed_stream_equals_the_uninterrupted_one(num_before):
    whole = train_batches(CONFIG, TOKENS)
    for _ in range(num_before):
        next(whole)
    time.sleep(0.05)  # the thread runs ahead, and the state must not
    state = json.loads(json.dumps(whole.get_state()))
    rest = list(itertools.islice(whole, 9))

    resumed = train_batches(CONFIG, TOKENS)
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    _assert_equal(rest, itertools.islice(resumed, 9))
    _assert_equal(rest, itertools.islice(train_batches(CONFIG, TOKENS, start_step=num_before), 9))
    assert train_batches(CONFIG, TOKENS, start_step=num_before).get_state() == state


def test_start_step_far_into_training_costs_nothing():
    iterator = train_batches(CONFIG, TOKENS, start_step=10**9)
    assert next(iterator)["inputs"].shape == (4, 8)


def test_too_few_tokens_for_a_batch_says_what_to_change():
    with pytest.raises(ValueError, match="make 3 sequences of 8, fewer than one batch of 4; lower data.batch_size"):
        train_batches(CONFIG, TOKENS[:32])
    assert next(train_batches(CONFIG, TOKENS[:33]))["inputs"].shape == (4, 8)
    with pytest.raises(ValueError, match="start_step is -1"):
        train_batches(CONFIG, TOKENS, start_step=-1)


@pytest.mark.parametrize("max_tokens", [None, 1, 8, 32, 33, 79, 10_000])
def test_validation_scores_the_first_targets_once_each_in_static_shapes(max_tokens):
    batches = list(validation_batches(CONFIG, TOKENS, max_tokens))
    count = min(max_tokens or len(TOKENS), len(TOKENS) - 1)
    assert len(batches) == -(-count // 32)
    for batch in batches:
        assert {array.shape for array in batch.values()} == {(4, 8)}
        assert [batch[name].dtype for name in ("inputs", "targets", "mask")] == [np.int32, np.int32, np.float32]
    mask = np.concatenate([batch["mask"].ravel() for batch in batches]) == 1
    targets = np.concatenate([batch["targets"].ravel() for batch in batches])[mask]
    inputs = np.concatenate([batch["inputs"].ravel() for batch in batches])[mask]
    np.testing.assert_array_equal(targets, np.arange(1, count + 1))
    np.testing.assert_array_equal(inputs, np.arange(count))
    _assert_equal(batches, validation_batches(CONFIG, TOKENS, max_tokens))


def test_nothing_to_validate_on_says_what_to_change():
    with pytest.raises(ValueError, match="none to predict; use a larger one"):
        validation_batches(CONFIG, TOKENS[:1])
    with pytest.raises(ValueError, match="max_tokens is 0"):
        validation_batches(CONFIG, TOKENS, max_tokens=0)
