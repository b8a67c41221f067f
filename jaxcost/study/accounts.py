"""What a study has paid, part by part; the parts add up to its total."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxcost.cost.hardware import Hardware
from jaxcost.cost.ledger import Ledger
from jaxcost.study.recipes import TRAINING_METRICS

PARTS = ("data", "base", "control", "search", "finalists", "verification")
"""What a study pays for, in order; see `result.LedgerStage`."""


@dataclasses.dataclass(frozen=True)
class Price:
    """Seconds on the study's chips, and FLOPs of training steps."""

    seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Price) -> Price:
        return Price(self.seconds + other.seconds, self.flops + other.flops)

    def __mul__(self, times: float) -> Price:
        return Price(self.seconds * times, self.flops * times)

    def of(self, metric: str, hardware: Hardware) -> float | None:
        """In the unit of one of `TRAINING_METRICS`; None where the chip's price or power is unknown."""
        found = {
            "usd": hardware.usd(self.seconds),
            "hours": self.seconds / 3600,
            "kwh": hardware.kwh(self.seconds),
            "flops": self.flops,
        }
        return found[metric]


class Accounts:
    """Charges the study's ledger, each charge to a part of the study."""

    def __init__(self, ledger: Ledger, hardware: Hardware, data_usd: float | None = 0.0):
        """`data_usd` is what the examples were bought for; None if it is unknown."""
        self._ledger, self._hardware, self._data_usd = ledger, hardware, data_usd
        self._parts = {part: {"seconds": 0.0, "tokens": 0, "flops": 0.0} for part in PARTS}
        self._paid: dict[str, Mapping[str, float]] = {}

    @property
    def spent(self) -> Price:
        """So far, all parts together."""
        return Price(*(sum(part[name] for part in self._parts.values()) for name in ("seconds", "flops")))

    def pay(self, part: str, *, seconds: float = 0.0, tokens: int = 0, flops: float = 0.0, bytes: int = 0) -> Price:
        """Charges a part, and says what it was."""
        own = self._parts[part]
        for name, amount in (("seconds", seconds), ("tokens", tokens), ("flops", flops)):
            own[name] += amount
        self._ledger.charge(seconds=seconds, tokens=tokens, flops=flops, bytes=bytes)
        return Price(seconds, flops)

    def pay_training(self, part: str, training: str, totals: Mapping[str, float]) -> Price:
        """Charges what a training took since it was last paid for; it is told by its name, and paid for once."""
        before = self._paid.get(training, {})
        new = {name: max(0, amount - before.get(name, 0)) for name, amount in totals.items()}
        if new["tokens"] or not before:
            self._paid[training] = dict(totals)
            return self.pay(part, **new)
        return Price()

    def record(self, step: int, **metrics: Any) -> None:
        """Writes a line of the ledger with the totals so far."""
        self._ledger.record(step, **metrics)

    def parts(self, estimated: Mapping[str, Price] | None = None) -> list[dict[str, Any]]:
        """A `result.LedgerStage` for each part, beside what was estimated for it."""
        return [self._part(name, (estimated or {}).get(name)) for name in PARTS]

    def totals(self, estimated: Mapping[str, Price] | None = None) -> dict[str, Any]:
        """The `result.Totals`: sums of the parts."""
        parts = self.parts(estimated)

        def total(name):
            values = [part[name] for part in parts]
            return None if any(value is None for value in values) else sum(values)

        whole = None if estimated is None else sum(estimated.values(), Price())
        known = {f"estimated_{name}": None if whole is None else total(f"estimated_{name}") for name in ("usd",)}
        return (
            self._ledger.totals
            | {name: total(name) for name in ("seconds", "tokens", "flops", "usd", "kwh")}
            | known
            | {f"estimated_{name}": whole and getattr(whole, name) for name in ("seconds", "flops")}
        )

    def _part(self, name: str, estimated: Price | None) -> dict[str, Any]:
        own, data = self._parts[name], name == "data"
        return {
            "stage": name,
            **own,
            "usd": self._data_usd if data else self._hardware.usd(own["seconds"]),
            "kwh": self._hardware.kwh(own["seconds"]),
            "estimated_seconds": None if estimated is None else estimated.seconds,
            "estimated_usd": None
            if estimated is None
            else (self._data_usd if data else self._hardware.usd(estimated.seconds)),
            "estimated_kwh": None if estimated is None else self._hardware.kwh(estimated.seconds),
        }


def costs(price: Price, hardware: Hardware) -> dict[str, float | None]:
    """All of `TRAINING_METRICS` of a price."""
    return {metric: price.of(metric, hardware) for metric in TRAINING_METRICS}
