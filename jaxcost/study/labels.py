"""Quality for money where labels are few: more labels, changed copies, a teacher's labels, a teacher's distributions.

Each way is an arm, trained alike and from new weights, for several seeds, each with labels of its own. What it cost is
what its labels cost and the machine's time, its teacher's included; so labels are traded against compute.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

from jaxcost.config import Experiment
from jaxcost.cost.purchases import PURCHASES
from jaxcost.data.augmentation import AugmentConfig
from jaxcost.data.tokenizers import Tokenizer
from jaxcost.labelling import write_labelled
from jaxcost.session import Session, load_run
from jaxcost.training.distill import DistillConfig

SCHEMA = "jaxcost-labels-2"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to spend money."""

    name: str
    """What it is called."""
    labels: int
    """Labels that are bought."""
    augment: bool = False
    """Texts are changed as the experiment's data config says."""
    taught: Literal["no", "labels", "distributions"] = "no"
    """The rest of the train split is learned too, from the likeliest labels of a teacher that is sure of them, or from
    all of what it says; the teacher is the arm with as many labels and changed texts."""
    steps: int = 0
    """Steps of its training; those of the experiment if 0."""


def arms(few: int, more: Sequence[int], everything: int, longer: Sequence[int] = ()) -> tuple[Arm, ...]:
    """The arms that are compared at `few` labels, some trained longer, those of more labels, and both ends of
    augmentation."""
    base = f"{few} labels"
    return (
        Arm(base, few),
        Arm(f"{base}, augmented", few, augment=True),
        Arm(f"{base}, pseudo-labels", few, augment=True, taught="labels"),
        Arm(f"{base}, distilled", few, augment=True, taught="distributions"),
        *(Arm(f"{base}, augmented, {steps} steps", few, augment=True, steps=steps) for steps in longer),
        *(Arm(f"{n} labels", n) for n in more),
        Arm(f"{everything} labels", everything),
        Arm(f"{everything} labels, augmented", everything, augment=True),
    )


def run_labels(
    experiment: Experiment,
    workdir: Path,
    compared: Sequence[Arm],
    seeds: Sequence[int],
    *,
    threshold: float = 0.95,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains every arm for every seed in a folder, or finds it trained there, and returns what they came to.

    Args:
      experiment: learns labels, of a dataset whose train split is not cut; its augmentation is that of the arms.
      workdir: for the trainings.
      compared: the arms; of those that are taught, the teacher must stand before them.
      seeds: each draws the weights, the order and, from the train split, the labels.
      threshold: of the pseudo-labels.
      quiet: show no progress.

    Raises:
      ValueError: the experiment learns no labels, has no augmentation, or an arm has no teacher.
    """
    if experiment.data.objective != "labels" or not experiment.data.augment.active:
        raise ValueError(
            "This compares ways to learn labels; give a config with data.objective 'labels' and a data.augment."
        )
    console = Console(stderr=True, quiet=quiet)
    rows, spent = [], {}
    for seed in seeds:
        for arm in compared:
            console.print(f"seed {seed}: {arm.name}")
            row = _run(experiment, Path(workdir) / f"seed_{seed}", arm, seed, threshold, quiet)
            if arm.taught != "no":
                row["compute_usd"] = _sum(row["compute_usd"], spent[seed, arm.labels])
            elif arm.augment and not arm.steps:
                spent[seed, arm.labels] = row["compute_usd"]
            row["beside_usd"] = _sum(row.pop("made_usd"), row["compute_usd"])
            rows.append(row | {"usd": _sum(row["data_usd"], row["compute_usd"])})
    found = [_summary(arm, rows) for arm in compared]
    return {
        "schema": SCHEMA,
        "data": experiment.data.name,
        "rows": rows,
        "arms": [row | {"front": _on_front(row, found)} for row in found],
    }


def gain(result: dict[str, Any], one: str, other: str, figure: str = "accuracy") -> dict[str, Any]:
    """How much more one arm has of a figure than another, for each seed: `gains`, `mean`, and `holds` if for every."""
    found = {(row["arm"], row["seed"]): row[figure] for row in result["rows"]}
    seeds = sorted({row["seed"] for row in result["rows"]})
    gains = [found[one, seed] - found[other, seed] for seed in seeds]
    mean = statistics.mean(gains)
    return {"text": f"{one} against {other}", "gains": gains, "mean": mean, "holds": min(gains) > 0}


def exchange(result: dict[str, Any]) -> list[dict[str, Any]]:
    """How many labels the other ways to spend money are worth, and from which price of a label on they pay.

    A way is worth as many labels as would be as accurate without it, by means over the seeds: between the arms of
    labels alone, accuracy is taken to grow evenly with the logarithm of their number.

    Args:
      result: what `run_labels` returns, with at least two arms of labels alone.

    Returns:
      For each arm of as few labels as any that is not of labels alone: `arm`; `worth_labels`, None where it is more
      than all that were tried, and the arm's own labels where it gains nothing; `worth_by_seed`, the same of each seed
      by itself, so that what is noise is seen; `extra_usd`, what the machine and its
      teacher cost beyond that of the labels alone; and `even_label_usd`, the price of a label above which the way is
      the cheaper one, None where it is worth no label or more than were tried, or a price is unknown.

    Raises:
      ValueError: fewer than two arms are of labels alone.
    """
    alone = sorted((row for row in result["arms"] if row["alone"]), key=lambda row: row["labels"])
    if len(alone) < 2:
        raise ValueError("What a way is worth is told from arms of labels alone; compare at least two.")
    base, names, found = alone[0], {row["arm"] for row in alone}, []
    curves: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(result["rows"], key=lambda row: row["labels"]):
        if row["arm"] in names:
            curves.setdefault(row["seed"], []).append(row)
    for row in result["arms"]:
        if row["alone"] or row["labels"] != base["labels"]:
            continue
        worth = _labels_for(row["accuracy"], alone)
        extra = None if None in (row["beside_usd"], base["beside_usd"]) else row["beside_usd"] - base["beside_usd"]
        gained = 0 if worth is None else worth - base["labels"]
        even = max(extra, 0.0) / gained if extra is not None and gained > 0 else None
        own = [one for one in result["rows"] if one["arm"] == row["arm"]]
        each = [_labels_for(one["accuracy"], curves[one["seed"]]) for one in own]
        found.append(
            {
                "arm": row["arm"],
                "worth_labels": worth,
                "worth_by_seed": each,
                "extra_usd": extra,
                "even_label_usd": even,
            }
        )
    return found


def _labels_for(accuracy: float, alone: Sequence[dict[str, Any]]) -> float | None:
    """The number of labels alone that are as accurate; that of the first arm if it is, None if none is."""
    if accuracy <= alone[0]["accuracy"]:
        return alone[0]["labels"]
    for one, other in zip(alone, alone[1:], strict=False):
        if one["accuracy"] < accuracy <= other["accuracy"]:
            share = (accuracy - one["accuracy"]) / (other["accuracy"] - one["accuracy"])
            return math.exp((1 - share) * math.log(one["labels"]) + share * math.log(other["labels"]))
    return None


def _on_front(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> bool | None:
    """Whether no other arm is as accurate for less money, or more accurate for as much; None if a cost is unknown."""
    if any(other["usd"] is None for other in others):
        return None
    return not any(
        other["usd"] <= row["usd"]
        and other["accuracy"] >= row["accuracy"]
        and (other["usd"], other["accuracy"]) != (row["usd"], row["accuracy"])
        for other in others
    )


def _run(experiment: Experiment, folder: Path, arm: Arm, seed: int, threshold: float, quiet: bool) -> dict[str, Any]:
    start = seed * arm.labels if (seed + 1) * arm.labels <= _size(experiment) else 0
    data = dataclasses.replace(
        experiment.data,
        train_split=f"train[{start}:{start + arm.labels}]",
        augment=experiment.data.augment if arm.augment else AugmentConfig(),
        shuffle_seed=seed,
    )
    training = dataclasses.replace(experiment.training, seed=seed, steps=arm.steps or experiment.training.steps)
    own = dataclasses.replace(experiment, data=data, training=training)
    tokenizer: Tokenizer | None = None
    if arm.taught != "no":
        teacher = folder / f"{arm.labels} labels, augmented"
        if not teacher.is_dir():
            raise ValueError(f"The arm {arm.name!r} has no teacher; put one with as many labels, augmented, before it.")
        own, tokenizer = _taught(own, teacher, folder / f"{arm.name}, data", arm, threshold)
    session = Session(own, tokenizer, quiet=quiet, devices=jax.devices()[:1])
    fitted = session.train(folder / arm.name, title=arm.name)
    bought = session.purchases
    return {
        "arm": arm.name,
        "seed": seed,
        **{name: fitted.metrics[name] for name in ("accuracy", "macro_f1", "nats_per_label")},
        **bought,
        "made_usd": experiment.prices.usd({name: bought[name] for name in PURCHASES if name != "labels"}),
        "seconds": fitted.totals["seconds"],
        "compute_usd": session.hardware.usd(fitted.totals["seconds"]),
    }


def _taught(own: Experiment, teacher: Path, labelled: Path, arm: Arm, threshold: float) -> tuple[Experiment, Tokenizer]:
    """The experiment of a student, whose data its teacher writes if they are not there, and the teacher's tokenizer."""
    session, params, step = load_run(teacher, jax.devices()[:1])
    whole = arm.taught == "distributions"
    if not labelled.is_dir():
        write_labelled(session, params, f"step {step}", labelled, split="train", threshold=0.0 if whole else threshold)
    data = dataclasses.replace(
        own.data,
        sources=(str(labelled),),
        train_split="train",
        validation_split="validation",
        labels=session.train_stream.labels,
    )
    distill = DistillConfig(teacher=str(teacher), logits=1.0, labels=0.0, temperature=1.0) if whole else own.distill
    return dataclasses.replace(own, data=data, distill=distill), session.tokenizer


def _size(experiment: Experiment) -> int:
    from jaxcost.data import open_source

    return len(open_source(dataclasses.replace(experiment.data, train_split="train"), "train"))


def _summary(arm: Arm, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and half of the range."""
    own = [row for row in rows if row["arm"] == arm.name]
    alone = not arm.augment and arm.taught == "no"
    found: dict[str, Any] = {"arm": arm.name, "labels": arm.labels, "alone": alone}
    for name in ("accuracy", "macro_f1", "data_usd", "compute_usd", "beside_usd", "usd"):
        values = [row[name] for row in own]
        known = all(value is not None for value in values)
        found[name] = statistics.mean(values) if known else None
        found[f"{name}_half_range"] = (max(values) - min(values)) / 2 if known else None
    return found


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
