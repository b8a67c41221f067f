"""Batches of like lengths: every text once an epoch and whole, for any number of hosts, resumed, learned end to end."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from labels import LABELS, experiment, session_of

from jaxcost.data import DataConfig
from jaxcost.data.augmentation import AugmentConfig
from jaxcost.data.buckets import Buckets, token_counts
from jaxcost.data.examples import label_row, open_examples
from jaxcost.data.tokenizers import ByteTokenizer
from jaxcost.evaluation.labels import Labeller
from jaxcost.models.config import ModelConfig
from jaxcost.objectives import learned_batches
from jaxcost.training.config import CheckpointConfig, TrainingConfig
from jaxcost.training.distill import DistillConfig

COUNT, BATCH, LENGTH, BUCKETS = 200, 8, 48, (8, 16, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts whose first word tells the label, most of them short."""
    root, draw = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for split, count in (("train", COUNT), ("validation", 30)):
        with open(root / f"{split}.jsonl", "w") as file:
            for i in range(count):
                word = ("red", "green", "blue")[i % 3]
                text = f"{word} {i} " + "x" * int(draw.exponential(8))
                file.write(json.dumps({"text": text, "label": word, "number": i / 2}) + "\n")
    return root


def config(folder, **changes):
    settings = {"sequence_length": LENGTH, "batch_size": BATCH, "buckets": BUCKETS} | changes
    cache = str(folder / "cache")
    return DataConfig(**{"sources": (str(folder),), "objective": "labels", "cache_dir": cache} | settings)


def batches(asked, count, **part):
    split = open_examples(asked, "train")
    return list(itertools.islice(learned_batches(asked, split, ByteTokenizer(), ModelConfig(), **part), count))


def test_every_text_is_read_once_an_epoch_whole_and_beside_those_of_its_length(folder):
    asked = config(folder)
    split = open_examples(asked, "train")
    found = batches(asked, 50, numbered=True)  # two pools, each an epoch
    for epoch in (found[:25], found[25:]):
        assert sorted(np.concatenate([batch["records"] for batch in epoch])) == list(range(COUNT))
    for batch in found:
        longest = int(batch["valid"].sum(axis=1).max())
        assert batch["inputs"].shape[1] == next(size for size in (*BUCKETS, LENGTH) if size >= longest)
        for i, record in enumerate(batch["records"]):
            row = label_row(ByteTokenizer(), LENGTH, None, split[int(record)])
            whole = np.pad(batch["inputs"][i], (0, LENGTH - batch["inputs"].shape[1]))
            np.testing.assert_array_equal(whole, row["inputs"])
            assert batch["valid"][i].sum() == row["valid"].sum() and batch["targets"][i] == row["targets"]
    assert {batch["inputs"].shape[1] for batch in found} == {*BUCKETS, LENGTH}
    plain = batches(config(folder, buckets=()), 50)
    read, padded = (sum(batch["inputs"].size for batch in some) for some in (found, plain))
    assert read < 0.6 * padded and sum(batch["valid"].sum() for batch in found) > 0.6 * read
    sizes = token_counts(split, ByteTokenizer())
    assert sizes.tolist() == [len(split[i]["text"].encode()) for i in range(COUNT)]
    np.testing.assert_array_equal(token_counts(split, ByteTokenizer()), sizes)


def test_numbers_are_learned_of_batches_of_like_lengths_too(folder):
    asked = config(folder, objective="regression", label_field="number")
    found = batches(asked, 25)
    assert sorted(np.concatenate([batch["targets"][:, 0] for batch in found])) == [i / 2 for i in range(COUNT)]
    assert len({batch["inputs"].shape[1] for batch in found}) == len(BUCKETS) + 1


def test_pools_that_span_epochs_lose_and_repeat_nothing():
    lengths = np.random.default_rng(0).integers(1, 50, 100)
    order = np.concatenate([np.random.default_rng(epoch).permutation(100) for epoch in range(16)])
    buckets = Buckets(order, lengths, 2, seed=0)  # pools of 64 places
    places = np.array([buckets.places(step) for step in range(800)])
    assert sorted(places.ravel()) == list(range(1600))
    assert not np.array_equal(order[places[:32]], order[places[32:64]])
    spread = np.abs(np.diff(lengths[order[places]], axis=1))
    assert spread.mean() < 2 and np.abs(np.diff(lengths[order.reshape(800, 2)], axis=1)).mean() > 10
    again = Buckets(order, lengths, 2, seed=0)
    for step in (777, 3, 32, 31):  # any step by itself
        np.testing.assert_array_equal(again.places(step), places[step])


def test_batches_cannot_be_pooled_where_an_epoch_is_one():
    buckets = Buckets(np.arange(100) % 10, np.arange(10), 8, seed=0)
    assert sorted(buckets.places(3)) == list(range(24, 32))


@pytest.mark.parametrize("buckets", [(8,), (2, 3)])
def test_texts_that_no_bucket_holds_fill_batches_of_full_length(folder, buckets):
    found = batches(config(folder, buckets=buckets), 25)
    for batch in found:
        longest = int(batch["valid"].sum(axis=1).max())
        assert batch["inputs"].shape[1] == next(size for size in (*buckets, LENGTH) if size >= longest)
    # Some texts have eight tokens, and none has three.
    assert (buckets == (2, 3)) == all(batch["inputs"].shape[1] == LENGTH for batch in found)


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(insert=0.5, synonyms=0.5, swap=0.5)])
def test_batches_are_the_same_for_any_number_of_hosts_and_from_any_step(folder, augment):
    asked = config(folder, augment=augment)
    whole = batches(asked, 40, numbered=True)
    halves = [batches(asked, 40, numbered=True, rows=rows) for rows in (range(4), range(4, 8))]
    for batch, *parts in zip(whole, *halves, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
    for batch, other in zip(whole[35:], batches(asked, 5, start_step=35), strict=True):
        np.testing.assert_array_equal(batch["inputs"], other["inputs"])
    again = batches(dataclasses.replace(asked, shuffle_seed=1), 40, numbered=True)
    assert any(not np.array_equal(one["records"], other["records"]) for one, other in zip(whole, again, strict=True))


def test_a_training_on_buckets_learns_costs_less_and_goes_on_after_a_kill(folder, tmp_path):
    data = {"sequence_length": LENGTH, "batch_size": BATCH, "buckets": (24,)}
    model = dataclasses.replace(LABELS, max_length=LENGTH)
    value = experiment(folder, model, "labels", data=data, training=TrainingConfig(steps=40, evaluate_every=20))
    fitted = session_of(value).train(tmp_path / "whole")
    assert fitted.metrics["accuracy"] >= 0.9
    sizes = [batch["inputs"].size for batch in batches(value.data, 40)]
    assert fitted.totals["tokens"] == sum(sizes) < 0.8 * 40 * BATCH * LENGTH
    assert fitted.totals["flops"] < 0.9 * 40 * fitted.cost.total_flops

    # What stands behind the texts changes no answer.
    session = session_of(value)
    short = next(batch for batch in batches(value.data, 40) if batch["inputs"].shape[1] < LENGTH)
    behind = ((0, 0), (0, LENGTH - short["inputs"].shape[1]))
    padded = short | {name: np.pad(short[name], behind) for name in ("inputs", "valid")}
    one, other = (Labeller(session.model, [batch], session.mesh) for batch in (short, padded))
    np.testing.assert_allclose(
        one.probabilities(fitted.params), other.probabilities(fitted.params), rtol=1e-4, atol=1e-6
    )

    value = dataclasses.replace(value, checkpoint=CheckpointConfig(every_steps=13))
    session_of(value).train(tmp_path / "broken", until=13)
    again = session_of(value).train(tmp_path / "broken")
    assert again.metrics == fitted.metrics and again.losses == fitted.losses[13:]


def test_lengths_that_cannot_work_say_what_to_change(folder):
    for buckets in ((16, 8), (1, 8), (8, 48)):
        with pytest.raises(
            ValueError, match="give lengths of 2 tokens and more, ascending, below data.sequence_length"
        ):
            config(folder, buckets=buckets)
    with pytest.raises(ValueError, match="data.buckets is for texts with one answer each"):
        DataConfig(buckets=(8,))
    with pytest.raises(ValueError, match=r"distill.top_k stores .* data.buckets makes several; leave out one"):
        data = {"sequence_length": LENGTH, "buckets": BUCKETS}
        model = dataclasses.replace(LABELS, max_length=LENGTH)
        distill = DistillConfig(teacher="x", logits=1.0, top_k=2)
        experiment(folder, model, "labels", data=data, distill=distill)
