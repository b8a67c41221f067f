"""Claims of papers about transforms, each put to the test with equal budgets on both sides and several seeds.

    rows = reproduce(Bench(workdir), seeds=(0, 1, 2))

A relation names its sides in the order in which the paper has them, the better first; a function measures all of them
for one seed. It holds if the order is right for every seed, is unclear if only on average, and does not hold otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxcost import serialization
from jaxcost.data.files import atomic_write
from jaxcost.study.bench import Bench

Sides = dict[str, float]
"""A figure for each side of a claim; lower is better."""


@dataclasses.dataclass(frozen=True)
class Relation:
    """A claim and how it is measured."""

    name: str
    """Short name, for files and the command line."""
    claim: str
    """What is said to hold."""
    source: str
    """Who says so."""
    order: tuple[str, ...]
    """The sides, the better before the worse."""
    figure: str
    """What is compared, and its unit."""
    measure: Callable[[Bench, int], Sides]
    """(bench, seed) → the figure of each side."""
    tolerance: float = 0.0
    """How much worse the better side may be, as a share of the other, where the claim is that both are alike."""
    null: bool = False
    """Whether the claim is that something does not help."""

    def verdict(self, seeds: Sequence[Sides]) -> str:
        """`holds`, `unclear` or `does not hold`."""

        def ordered(sides):
            pairs = zip(self.order, self.order[1:], strict=False)
            return all(sides[one] <= sides[other] * (1 + self.tolerance) for one, other in pairs)

        if all(ordered(sides) for sides in seeds):
            return "holds"
        mean = {side: statistics.mean(sides[side] for sides in seeds) for side in self.order}
        return "unclear" if ordered(mean) else "does not hold"


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A claim that is not tried here, and why."""

    name: str
    claim: str
    source: str
    why: str


def reproduce(
    bench: Bench, relations: Sequence[Relation | NotRun], seeds: Sequence[int], shown: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """A row for each relation; what the bench's folder has measured already is read and not measured again.

    Raises:
      ValueError: there is no relation or no seed.
    """
    if not relations or not seeds:
        raise ValueError("There is nothing to reproduce; give at least one relation and one seed.")
    rows = []
    for relation in relations:
        if isinstance(relation, NotRun):
            rows.append(dataclasses.asdict(relation) | {"verdict": "not run"})
            continue
        measured = [_measured(bench, relation, seed, shown) for seed in seeds]
        sides = [each["sides"] for each in measured]
        rows.append(
            {
                "name": relation.name,
                "claim": relation.claim,
                "source": relation.source,
                "figure": relation.figure,
                "null": relation.null,
                "order": list(relation.order),
                "seeds": list(seeds),
                "sides": {side: [one[side] for one in sides] for side in relation.order},
                "mean": {side: statistics.mean(one[side] for one in sides) for side in relation.order},
                "verdict": relation.verdict(sides),
                "seconds": sum(each["seconds"] for each in measured),
            }
        )
    return rows


def said(row: dict[str, Any]) -> str:
    """What was found, in a line: the mean of each side and, behind it, half of the range over the seeds."""
    if row["verdict"] == "not run":
        return row["why"]
    half = {side: (max(values) - min(values)) / 2 for side, values in row["sides"].items()}
    return ", ".join(f"{side} {row['mean'][side]:.4g}±{half[side]:.1g}" for side in row["order"])


def chosen(relations: Sequence[Relation | NotRun], names: Sequence[str]) -> Iterator[Relation | NotRun]:
    """The relations of those names, all if none are given; ValueError for a name that there is not."""
    known = [relation.name for relation in relations]
    for name in names:
        if name not in known:
            raise ValueError(f"There is no relation {name!r}; choose from {', '.join(known)}.")
    return (relation for relation in relations if not names or relation.name in names)


def _measured(bench: Bench, relation: Relation, seed: int, shown: Callable[[str], None]) -> dict[str, Any]:
    path = Path(bench.workdir) / "measured" / f"{relation.name}-{seed}.json"
    setting = {"bench": serialization.to_json(dataclasses.replace(bench.config, data_dir=None))}
    if path.is_file():
        found = json.loads(path.read_text())
        if found.get("setting") == setting:
            return found
        raise ValueError(f"{path} was measured in another setting; choose another --workdir, or remove it.")
    shown(f"{relation.name}, seed {seed}")
    started = time.perf_counter()
    sides = relation.measure(bench, seed)
    found = {"setting": setting, "sides": sides, "seconds": time.perf_counter() - started}
    with atomic_write(path) as file:
        file.write(json.dumps(found, indent=1).encode())
    return found
