"""Claims put to the test: their verdicts, going on after a kill, the single layers, and one small training."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcost.study import sides
from jaxcost.study.bench import LAYER, Bench, BenchConfig, layer
from jaxcost.study.claims import CLAIMS, measure_at_once
from jaxcost.study.relations import NotRun, Relation, chosen, reproduce, said
from jaxcost.training.distill import DistillConfig
from jaxcost.transforms import factorize, prune, quantize, smooth

SMALL = BenchConfig(width=32, num_layers=2, batch_size=4, sequence_length=32, base_steps=20, recovery_steps=10)
QUICK = (
    "pruned_layer",
    "whitened_over_plain",
    "gptq_over_nearest",
    "smoothing_with_outliers",
    "smoothing_is_exact",
    "nf4_over_int4",
    "unmerging_changes_weights",
    "merging_into_nf4_loses_the_update",
    "merging_ends_sparsity",
    "gptq_keeps_masks",
    "bisection_over_sorting",
)
"""Claims that need no training; that they hold is a test of the transforms."""


def relation(figures, tolerance=0.0, order=("a", "b"), calls=None):
    def measure(bench, seed):
        if calls is not None:
            calls.append(seed)
        return dict(zip(order, figures[seed], strict=True))

    return Relation("toy", "a beats b", "nobody", order, "points", measure, tolerance)


@pytest.mark.parametrize(
    ("figures", "tolerance", "verdict"),
    [
        ([(1.0, 2.0), (1.0, 1.5)], 0.0, "holds"),
        ([(1.0, 2.0), (1.6, 1.5)], 0.0, "unclear"),
        ([(2.0, 1.0), (1.6, 1.5)], 0.0, "does not hold"),
        ([(1.05, 1.0), (1.0, 1.0)], 0.06, "holds"),
    ],
)
def test_a_claim_holds_if_every_seed_has_its_order(tmp_path, figures, tolerance, verdict):
    (row,) = reproduce(Bench(tmp_path), [relation(figures, tolerance)], range(len(figures)), lambda _: None)
    assert row["verdict"] == verdict and row["sides"]["a"] == [a for a, _ in figures]
    assert said(row).startswith(f"a {np.mean([a for a, _ in figures]):.4g}±")
    assert json.loads(json.dumps(row)) == row


def test_all_sides_of_an_order_count():
    three = relation([(1.0, 3.0, 2.0)], order=("a", "b", "c"))
    assert three.verdict([{"a": 1.0, "b": 2.0, "c": 3.0}]) == "holds"
    assert three.verdict([{"a": 1.0, "b": 3.0, "c": 2.0}]) == "does not hold"


def test_what_is_measured_is_not_measured_again_nor_mixed_with_another_setting(tmp_path):
    calls = []
    toy = relation([(1.0, 2.0)] * 3, calls=calls)
    first = reproduce(Bench(tmp_path), [toy], (0, 1), lambda _: None)
    again = reproduce(Bench(tmp_path), [toy], (0, 1, 2), lambda _: None)
    assert calls == [0, 1, 2] and again[0]["sides"]["a"][:2] == first[0]["sides"]["a"]
    with pytest.raises(ValueError, match="was measured in another setting"):
        reproduce(Bench(tmp_path, SMALL), [toy], (0,), lambda _: None)


def test_what_is_not_run_is_shown_with_its_reason(tmp_path):
    (row,) = reproduce(Bench(tmp_path), [NotRun("x", "claim", "source", "needs a cluster")], (0,))
    assert row["verdict"] == "not run" and said(row) == "needs a cluster"


def test_nothing_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to reproduce"):
        reproduce(Bench(tmp_path), [], (0,))
    with pytest.raises(ValueError, match="no relation 'nope'; choose from magnitude_over_random"):
        list(chosen(CLAIMS, ["nope"]))
    assert [r.name for r in chosen(CLAIMS, ["nf4_over_int4"])] == ["nf4_over_int4"]
    assert len({r.name for r in CLAIMS}) == len(CLAIMS) and len(list(chosen(CLAIMS, ()))) == len(CLAIMS)


def test_layers_are_what_they_are_called():
    iid, outliers, correlated = (layer(3, kind) for kind in ("iid", "outliers", "correlated"))
    sizes = np.std(outliers.seen, axis=0)
    assert np.sum(sizes > 5) == 128 // 16 and np.all(np.std(iid.seen, axis=0) < 1.5)
    neighbours = [np.corrcoef(x.seen[:, 4], x.seen[:, 5])[0, 1] for x in (iid, correlated)]
    assert abs(neighbours[0]) < 0.15 and neighbours[1] > 0.8
    assert not np.any(iid.seen[:4] == iid.unseen[:4])
    np.testing.assert_array_equal(iid.kernel, layer(3, "iid").kernel)


def test_the_error_of_a_layer_is_that_of_its_outputs():
    found = layer(0, "iid")
    assert found.error() == 0
    pruned = jnp.where(found.changed(prune(rules=LAYER)).mask, found.kernel, 0)
    exact = np.linalg.norm(found.unseen @ (found.kernel - pruned)) / np.linalg.norm(found.unseen @ found.kernel)
    assert found.error(prune(rules=LAYER)) == pytest.approx(exact, rel=1e-4)
    assert found.error(factorize(rules=LAYER, rank=4)) > found.error(factorize(rules=LAYER, rank=40))
    # Quantised activations are part of the error.
    w8a8 = quantize(rules=LAYER, activations="dynamic")
    assert found.error(w8a8) > 1.1 * found.error(quantize(rules=LAYER)) and found.error(smooth(rules=LAYER)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_claims_about_layers_hold(tmp_path, name):
    (row,) = reproduce(Bench(tmp_path), list(chosen(CLAIMS, [name])), (0, 1), lambda _: None)
    assert row["verdict"] == "holds", said(row)


@pytest.mark.slow
def test_both_sides_of_a_training_get_the_same(tmp_path):
    config = BenchConfig(**{**vars(SMALL), "data_dir": str(tmp_path / "data"), "evaluation_tokens": 512})
    bench = Bench(tmp_path, config)
    base = bench.base(0)
    assert base.fitted.steps == 20 and bench.score(base.params, 0) == base.score
    taught = DistillConfig(logits=1.0)
    sides = [
        bench.train("taught", 0, num_layers=1, distill=taught, teacher=base.params),
        bench.train("alone", 0, num_layers=1),
    ]
    assert sides[0].fitted.losses[0] == pytest.approx(sides[1].fitted.losses[0], rel=1e-5)
    assert {side.fitted.steps for side in sides} == {20} and sides[0].score != sides[1].score
    thin = bench.train("rounded", 0, start=base.params, finish=(quantize(),))
    assert thin.fitted.steps == 10 and thin.score != thin.fitted.metrics["bits_per_byte"]
    assert Bench(tmp_path, config).base(0).score == base.score


@pytest.mark.slow
def test_claims_measured_at_once_are_those_measured_one_after_the_other(tmp_path):
    names = ("nf4_over_int4", "gptq_keeps_masks")
    measure_at_once(Bench(tmp_path / "at once"), names, (0, 1), 2)
    claims, none = list(chosen(CLAIMS, names)), []
    first, second = (reproduce(Bench(tmp_path / name), claims, (0, 1), none.append) for name in ("at once", "alone"))
    assert len(none) == 4  # all of them by the second
    assert [row["sides"] for row in first] == [row["sides"] for row in second]


@pytest.mark.slow
def test_labels_with_and_without_changed_copies_are_told_wrong_some_of_the_time(tmp_path):
    config = BenchConfig(**{**vars(SMALL), "data_dir": str(tmp_path / "data"), "base_steps": 60, "batch_size": 16})
    found = sides.augmentation(Bench(tmp_path, config), 0, labels=200)
    assert set(found) == {"augmented", "as they are"} and len(set(found.values())) == 2
    assert all(0 < wrong < 0.9 for wrong in found.values())
