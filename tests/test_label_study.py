"""The comparison of what labels, changed copies and teachers buy: what each arm is trained on, and what it cost."""

import dataclasses

import pytest
from labels import LABELS, experiment, write_folder

from jaxcost.cost.purchases import PriceConfig
from jaxcost.data.augmentation import AugmentConfig
from jaxcost.study.labels import Arm, arms, exchange, gain, run_labels
from jaxcost.training.config import TrainingConfig


@pytest.mark.long
def test_every_arm_is_trained_once_and_priced_with_its_teacher(tmp_path):
    changes = {"data": {"augment": AugmentConfig(synonyms=0.2, swap=0.2)}, "training": TrainingConfig(steps=20)}
    value = experiment(write_folder(tmp_path), LABELS, "labels", prices=PriceConfig(0.5, 0.001), **changes)
    compared = arms(32, (48,), 120, (30,))
    found = run_labels(value, tmp_path / "runs", compared, (0, 1), threshold=0.0, quiet=True)
    rows = {(row["arm"], row["seed"]): row for row in found["rows"]}
    assert len(rows) == 2 * len(compared) == 16
    plain, changed, pseudo = (rows[f"32 labels{way}", 0] for way in ("", ", augmented", ", pseudo-labels"))
    assert plain["labels"] == changed["labels"] == pseudo["labels"] == 32 and rows["120 labels", 0]["labels"] == 120
    assert plain["data_usd"] == 16 and pseudo["data_usd"] == 16 + 0.001 * pseudo["read_tokens"] > 16.5
    assert pseudo["compute_usd"] > changed["compute_usd"]
    longer = rows["32 labels, augmented, 30 steps", 0]
    assert longer["labels"] == 32 and longer["nats_per_label"] != changed["nats_per_label"]
    assert pseudo["beside_usd"] == pytest.approx(0.001 * pseudo["read_tokens"] + pseudo["compute_usd"])
    assert [row["arm"] for row in found["arms"] if row["alone"]] == ["32 labels", "48 labels", "120 labels"]
    assert any(row["front"] for row in found["arms"]) and not all(row["front"] for row in found["arms"])
    assert len(exchange(found)) == 4
    assert plain["nats_per_label"] != changed["nats_per_label"] != pseudo["nats_per_label"]
    again = run_labels(value, tmp_path / "runs", compared, (0, 1), threshold=0.0, quiet=True)
    assert [row["accuracy"] for row in again["rows"]] == [row["accuracy"] for row in found["rows"]]
    with pytest.raises(ValueError, match="has no teacher; put one with as many labels"):
        run_labels(value, tmp_path / "alone", (Arm("taught", 32, True, "labels"),), (0,), quiet=True)


def test_a_way_is_worth_the_labels_that_would_be_as_accurate_and_pays_from_a_price_of_them_on():
    def row(arm, labels, accuracy, beside_usd, alone=False):
        return {"arm": arm, "labels": labels, "accuracy": accuracy, "beside_usd": beside_usd, "alone": alone}

    rows = [row("all", 400, 0.9, 1.0, True), row("few", 100, 0.5, 1.0, True), row("more", 200, 0.7, 1.0, True)]
    rows += [row("a", 100, 0.7, 6.0), row("b", 100, 0.8, 2.0), row("c", 100, 0.4, 2.0), row("d", 100, 0.95, 2.0)]
    rows += [row("e", 100, 0.6, 0.5), row("f", 100, 0.7, None), row("other", 400, 0.9, 2.0)]
    seeds = [one | {"seed": seed} for seed in (0, 1) for one in rows]
    seeds[-len(rows) + 3]["accuracy"] = 0.5  # the second seed of "a"
    found = {one["arm"]: one for one in exchange({"arms": rows, "rows": seeds})}
    assert found["a"]["worth_by_seed"] == pytest.approx([200, 100]) and found["d"]["worth_by_seed"] == [None, None]
    assert [*found] == ["a", "b", "c", "d", "e", "f"]
    assert found["a"]["worth_labels"] == pytest.approx(200) and found["a"]["even_label_usd"] == pytest.approx(0.05)
    assert found["b"]["worth_labels"] == pytest.approx(200 * 2**0.5)
    assert found["c"]["worth_labels"] == 100 and found["c"]["even_label_usd"] is None
    assert found["d"]["worth_labels"] is None and found["d"]["even_label_usd"] is None
    assert found["e"]["extra_usd"] == -0.5 and found["e"]["even_label_usd"] == 0
    assert found["f"]["extra_usd"] is None and found["f"]["even_label_usd"] is None
    with pytest.raises(ValueError, match="compare at least two"):
        exchange({"arms": rows[:1], "rows": []})


def test_a_gain_holds_if_it_does_for_every_seed():
    rows = [{"arm": arm, "seed": seed, "accuracy": a} for arm, seed, a in (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.4))]
    rows.append({"arm": "b", "seed": 1, "accuracy": 0.8})
    found = gain({"rows": rows}, "a", "b")
    assert found["gains"] == pytest.approx([0.1, -0.1]) and found["mean"] == pytest.approx(0) and not found["holds"]
    rows[-1]["accuracy"] = 0.6
    assert gain({"rows": rows}, "a", "b")["holds"]


def test_a_config_without_labels_or_augmentation_is_refused(tmp_path):
    value = experiment(tmp_path, LABELS, "labels")
    with pytest.raises(ValueError, match="give a config with data.objective 'labels' and a data.augment"):
        run_labels(value, tmp_path, arms(1, (), 2), (0,))
    assert dataclasses.astuple(arms(1, (), 2)[1]) == ("1 labels, augmented", 1, True, "no", 0)
