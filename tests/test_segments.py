"""Several sequences in one row: each gives what it gives alone, in the model, in batches of data and in a training."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from sweep import sweep

from jaxcost import sharding
from jaxcost.config import Experiment
from jaxcost.data.config import DataConfig
from jaxcost.data.packing import Rows
from jaxcost.data.pipeline import train_batches, validation_batches
from jaxcost.evaluation.batch import beside_inputs
from jaxcost.evaluation.losses import cross_entropy
from jaxcost.models import attention
from jaxcost.models.attention import Scores
from jaxcost.models.config import HeadConfig
from jaxcost.models.transformer import WATCHED, Transformer, init_cache, initialize, logits, output_of
from jaxcost.training.distill import DistillConfig, Distiller
from jaxcost.transforms import prefix_tuning

LENGTHS = (5, 1, 8, 3)
"""Tokens of the sequences in a row; what is left of its 20 is padding."""
SEGMENTS = np.repeat([3, 1, 2, 7, 0], (*LENGTHS, 20 - sum(LENGTHS)))[None]
CONFIGS = {
    "rotary": small.CONFIG,
    "learned": small.GPT2,
    "relative": dataclasses.replace(small.CONFIG, position="relative", relative_buckets=8, relative_distance=16),
    "windows": dataclasses.replace(small.CONFIG, pattern=("local", "global"), window=3),
    "soft cap": dataclasses.replace(small.CONFIG, attention_soft_cap=2.0),
    "encoder": dataclasses.replace(small.CONFIG, causal=False),
    "encoder, windows": dataclasses.replace(small.CONFIG, causal=False, pattern=("local",), window=3),
    "experts": dataclasses.replace(small.CONFIG, experts=4),
}


@functools.cache
def params_of(name):
    model = Transformer(CONFIGS[name])
    return jax.jit(lambda key: initialize(model, key)[0])(jax.random.key(0))


def outputs(name, params, tokens, **options):
    hidden, _ = Transformer(CONFIGS[name]).apply({"params": params}, jnp.asarray(tokens), **options)
    return logits(CONFIGS[name], params, hidden)


@sweep("name", CONFIGS, quick=1)
def test_each_sequence_of_a_row_gives_what_it_gives_alone(name):
    params, tokens = params_of(name), np.random.default_rng(0).integers(0, 32, (1, 20))
    together = jax.jit(functools.partial(outputs, name))(params, tokens, segments_BT=jnp.asarray(SEGMENTS))
    start = 0
    for length in LENGTHS:
        alone = outputs(name, params, tokens[:, start : start + length])
        np.testing.assert_allclose(together[:, start : start + length], alone, atol=1e-5)
        start += length
    assert np.max(np.abs(together[:, 5:14] - outputs(name, params, tokens)[:, 5:14])) > 1e-3


@sweep("window", [0, 40], quick=0)
def test_splash_attention_keeps_segments_apart_as_the_reference_does(window, monkeypatch):
    monkeypatch.setattr(attention, "_splash_kernel", functools.partial(attention._splash_kernel, interpret=True))
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=(2, 256, heads, 128)), jnp.float32) for heads in (2, 1, 1)]
    segments = jnp.asarray(np.repeat([[1, 2, 3], [4, 0, 1]], [100, 30, 126], axis=1))

    def total(implementation, *inputs):
        out = attention.self_attention(*inputs, implementation, Scores(window), segments_BT=segments)
        return jnp.sum(jnp.sin(out))

    got, want = (
        jax.grad(functools.partial(total, name), argnums=(0, 1, 2))(*inputs) for name in ("splash", "reference")
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_a_number_that_comes_back_is_another_sequence():
    params, tokens = params_of("rotary"), np.random.default_rng(0).integers(0, 32, (1, 20))
    again = np.repeat([5, 5, 2, 0, 5, -1], (5, 1, 8, 2, 3, 1))[None]
    once = np.repeat([1, 2, 0, 4, 0], (6, 8, 2, 3, 1))[None]
    np.testing.assert_array_equal(attention.runs(jnp.asarray(again)), np.where(once == 4, 4, once))
    run = jax.jit(functools.partial(outputs, "rotary"))
    got, want = (run(params, tokens, segments_BT=jnp.asarray(segments)) for segments in (again, once))
    np.testing.assert_array_equal(got, want)
    assert np.all(np.isfinite(run(params, tokens, segments_BT=jnp.zeros((1, 20), jnp.int32))))


@pytest.mark.long
def test_students_are_compared_with_teachers_one_document_at_a_time():
    student, teacher = (params_of("rotary"), jax.tree.map(lambda a: 1.5 * a, params_of("rotary")))
    config = DistillConfig(teacher="t", attention=1.0, values=2.0, hidden=1.0, logits=0.5, projection="fixed")
    distiller, tokens = Distiller(config, small.MODEL), np.random.default_rng(0).integers(0, 32, (1, 20))

    @jax.jit
    def gradient(batch):
        def total(params):
            (hidden, _), sown = small.MODEL.apply(
                {"params": params}, batch["inputs"], **beside_inputs(batch), mutable=[WATCHED]
            )
            given = (small.MODEL, hidden, sown, params, batch, {}, teacher)
            return distiller.loss_sum(*given, chunks=4, key=None)[0]

        return jax.value_and_grad(total)(student)

    def batch(start, end):
        found = {"inputs": tokens[:, start:end], "targets": tokens[:, start:end]}
        return found | {"mask": np.ones((1, end - start), np.float32)}

    ends = np.cumsum((0, *LENGTHS))  # what is left is padding
    apart = [gradient(batch(start, end)) for start, end in zip(ends, ends[1:], strict=False)]
    row = batch(0, 20) | {"segments": SEGMENTS}
    got = gradient(row | {"mask": (SEGMENTS > 0).astype(np.float32)})
    want = functools.reduce(lambda one, other: jax.tree.map(jnp.add, one, other), apart)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-3), got, want)


DATA = DataConfig(sequence_length=8, batch_size=2, separate_documents=True)
STREAM = np.array([9, 1, 2, 3, 9, 4, 9, 5, 6, 7, 1, 2, 3, 4, 5, 9, 9, 1, 2], np.uint16)
"""Documents behind separators, one of which is empty."""


def test_batches_say_which_document_each_token_is_of():
    (batch,) = validation_batches(DATA, STREAM[:17])
    np.testing.assert_array_equal(batch["inputs"], [[9, 1, 2, 3, 9, 4, 9, 5], [6, 7, 1, 2, 3, 4, 5, 9]])
    np.testing.assert_array_equal(batch["segments"], [[2, 2, 2, 2, 3, 3, 4, 4], [1, 1, 1, 1, 1, 1, 1, 2]])
    assert batch["segments"].dtype == np.int32
    *_, last = validation_batches(DATA, STREAM)
    np.testing.assert_array_equal(last["segments"][0][:2], [2, 2])
    assert next(iter(train_batches(DATA, STREAM)))["segments"].shape == (2, 8)
    assert "segments" not in next(iter(train_batches(dataclasses.replace(DATA, separate_documents=False), STREAM)))


def stream_of(sizes, seed=0):
    """Documents of so many tokens behind the separator 31."""
    rng = np.random.default_rng(seed)
    return np.concatenate([np.concatenate([[31], rng.integers(0, 31, size)]) for size in sizes]).astype(np.uint16)


@pytest.mark.parametrize("sizes", [(3, 0, 20, 7, 7, 1, 14, 15, 16, 2), (31,), (32,), (33,), (0,), (100, 1), ()])
def test_first_fit_loses_no_token_and_keeps_documents_apart(sizes):
    tokens = stream_of(sizes) if sizes else np.zeros(0, np.uint16)
    packed = Rows(tokens, 16)
    rows = [packed[i] for i in range(len(packed))]
    pairs = [pair for row in rows for pair in np.stack([row["inputs"], row["targets"]], 1)[row["mask"] > 0].tolist()]
    assert sorted(pairs) == sorted(np.stack([tokens[:-1], tokens[1:]], 1).tolist())
    assert sum(int(np.sum(row["segments"] > 0)) for row in rows) == len(tokens)
    for row in rows:
        segments = row["segments"][row["segments"] > 0]
        assert np.all(np.isin(np.diff(segments), (0, 1))) and not np.any(row["segments"][len(segments) :])
        # A separator stands at the start of a segment alone.
        inside = np.flatnonzero(row["inputs"] * (row["segments"] > 0) == 31)
        assert all(i == 0 or row["segments"][i - 1] != row["segments"][i] for i in inside)


def test_first_fit_fills_rows_of_a_skewed_length_distribution():
    sizes = np.random.default_rng(0).lognormal(4.5, 1.2, 20_000).astype(int)
    rows = Rows(stream_of(sizes), 512)
    assert rows.fill > 0.98
    lengths = np.minimum(sizes + 1, 512)
    assert rows.fill > 2 * len(rows._tokens) / (512 * len(lengths))


def test_packed_batches_are_shuffled_scored_once_and_go_on():
    data = dataclasses.replace(DATA, packing="first_fit", sequence_length=16)
    tokens = stream_of(np.random.default_rng(1).integers(0, 30, 60))
    batches = list(validation_batches(data, tokens))
    assert sum(batch["mask"].sum() for batch in batches) == len(tokens) - 1
    iterator = train_batches(data, tokens)
    first = [next(iterator) for _ in range(3)]
    again = train_batches(data, tokens, start_step=2)
    jax.tree.map(np.testing.assert_array_equal, next(again), first[2])


@pytest.mark.slow
def test_the_loss_of_packed_rows_is_that_of_documents_one_at_a_time():
    tokens = stream_of((3, 11, 0, 7, 5, 15, 4))
    packed, params = Rows(tokens, 16), params_of("rotary")

    def total(batch):
        hidden, _ = small.MODEL.apply({"params": params}, batch["inputs"], segments_BT=batch.get("segments"))
        return float(cross_entropy(hidden, output_of(small.CONFIG, params), batch["targets"], batch["mask"])[0])

    together = {name: np.stack([packed[i][name] for i in range(len(packed))]) for name in packed[0]}
    starts = [*np.flatnonzero(tokens == 31), len(tokens)]
    alone = 0.0
    for start, end in itertools.pairwise(starts):
        document = tokens[None, start:end].astype(np.int32)
        targets = np.append(tokens[start + 1 : end + 1], [0])[None, : end - start].astype(np.int32)
        mask = (np.arange(start, end) < len(tokens) - 1)[None].astype(np.float32)
        alone += total({"inputs": document, "targets": targets, "mask": mask})
    assert total(together) == pytest.approx(alone, rel=1e-5)


@pytest.mark.long
def test_a_step_on_a_mesh_and_in_microbatches_learns_from_documents_apart():
    batch = {"inputs": np.random.default_rng(0).integers(0, 32, (8, 20))}
    batch |= {"targets": batch["inputs"], "mask": np.ones((8, 20), np.float32)}
    apart = batch | {"segments": np.repeat(SEGMENTS, 8, axis=0)}
    params = params_of("rotary")

    def loss(batch, *devices, **options):
        mesh = sharding.make_mesh(sharding.MeshConfig(*devices), jax.devices()[: int(np.prod(devices or 1))])
        (metrics,), _ = small.trained(small.MODEL, params, [batch], mesh, **options)
        return metrics["loss"]

    hidden, _ = small.MODEL.apply({"params": params}, apart["inputs"], segments_BT=jnp.asarray(apart["segments"]))
    total, count = cross_entropy(hidden, output_of(small.CONFIG, params), apart["targets"], apart["mask"])
    want = float(total / count)
    assert loss(apart, 1, 4, 2) == pytest.approx(want, rel=1e-5)
    assert loss(apart, accumulation=2) == pytest.approx(want, rel=1e-5)
    assert abs(loss(batch) - want) > 1e-4


def test_what_cannot_be_apart_is_said():
    params, tokens, segments = params_of("rotary"), jnp.zeros((1, 20), jnp.int32), jnp.asarray(SEGMENTS)
    run = functools.partial(small.MODEL.apply, {"params": params}, tokens, segments_BT=segments)
    with pytest.raises(ValueError, match="leave out valid_BT and the cache"):
        run(valid_BT=segments > 0)
    with pytest.raises(ValueError, match="leave out valid_BT and the cache"):
        run(init_cache(small.CONFIG, 1, 20, jnp.float32))
    with pytest.raises(ValueError, match="Virtual tokens stand before a row"):
        small.MODEL.apply({"params": prefix_tuning(tokens=2)(params)}, tokens, segments_BT=segments)
    pooled = dataclasses.replace(small.CONFIG, head=HeadConfig(outputs=2, pooling="mean"))
    with pytest.raises(ValueError, match="gives one answer for a row"):
        Transformer(pooled).apply({"params": params}, tokens, segments_BT=segments)
    experiment = Experiment(data=dataclasses.replace(DATA, batch_size=2), mesh=sharding.MeshConfig(context=2))
    with pytest.raises(ValueError, match="documents that are kept apart; set it to 1"):
        experiment.check_devices(2)
