"""What the figures of a recipe are called, how they are printed, and which are costs: for every form of the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcost.study import quality

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    """A figure of a row of `study.json`, as people read it."""

    key: str
    heading: str
    """With the unit."""
    form: str = "{:.3g}"
    """How the scaled value is printed."""
    scale: float = 1.0
    """Times the value is the printed number: 1e-6 for bytes that are printed as MB."""
    axis: str = ""
    """The name of this cost on an axis of the picture, the unit included; empty for what is no cost."""
    timed: bool = False
    """Whether it rests on a clock, so that a second run gives another figure."""

    def text(self, row: Row) -> str:
        """The printed figure; `unknown` where it is None."""
        value = row.get(self.key)
        if value is None:
            return "unknown"
        value *= self.scale
        # One decimal tells small models apart no more.
        return significant(value) if self.form == "{:,.1f}" and abs(value) < 0.5 else self.form.format(value)

    def kind(self, rows: Sequence[Row]) -> str:
        """What the figure is: measured, compiled, estimated, or an exact count."""
        return rows[0]["figures"].get(self.key, "counted") if rows else ""


COLUMNS = (
    Column("score", "score", "{:.3f}"),
    Column("score_before_recovery", "before recovery", "{:.3f}"),
    Column("control_score", "control", "{:.3f}"),
    Column("accuracy", "right", "{:.1%}"),
    Column("checkpoint_bytes", "on disk, MB", "{:,.1f}", 1e-6, "bytes on disk, MB"),
    Column("weight_bytes", "in memory, MB", "{:,.1f}", 1e-6, "weights in memory, MB"),
    Column("trainable_parameters", "trains", "{:,.0f}"),
    Column("step_flops", "step, GFLOP", "{:,.1f}", 1e-9, "FLOPs of a training step, GFLOP"),
    Column("step_seconds", "step, ms", "{:,.1f}", 1e3, "time of a training step, ms", timed=True),
    Column("inference_flops_per_token", "decode, MFLOP/token", "{:,.1f}", 1e-6, "FLOPs of a decoded token, MFLOP"),
    Column("decode_tokens_per_second", "decode, tokens/s", "{:,.0f}", timed=True),
    Column("decode_seconds_per_token", "latency, ms/token", "{:,.3f}", 1e3, "latency of a token, ms", timed=True),
    Column("usd", "recovery, USD", "{:.2g}", axis="money of the recovery, USD", timed=True),
    Column("kwh", "recovery, kWh", "{:.2g}", axis="energy of the recovery, kWh", timed=True),
    Column(
        "usd_per_million_tokens",
        "serving, USD/M tokens",
        "{:.2g}",
        axis="money of a million tokens, USD",
        timed=True,
    ),
    Column(
        "kwh_per_million_tokens",
        "serving, kWh/M tokens",
        "{:.2g}",
        axis="energy of a million tokens, kWh",
        timed=True,
    ),
    Column("inference_flops_per_request", "request, MFLOP", "{:,.1f}", 1e-6, "FLOPs of a request, MFLOP"),
    Column("requests_per_second", "requests a second", "{:,.0f}", timed=True),
    Column("seconds_per_request", "latency, ms/request", "{:,.3f}", 1e3, "latency of a request, ms", timed=True),
    Column(
        "usd_per_million_requests",
        "serving, USD/M requests",
        "{:.2g}",
        axis="money of a million requests, USD",
        timed=True,
    ),
    Column(
        "kwh_per_million_requests",
        "serving, kWh/M requests",
        "{:.2g}",
        axis="energy of a million requests, kWh",
        timed=True,
    ),
)
"""In the order that they are shown; a row has the costs of tokens or those of requests. What a score is, `columns_of`
says of its rows."""


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns that any of the rows has, the score's the first; those written by an earlier version lack some."""
    score, *others = COLUMNS
    heading = quality.of_row(rows[0]).heading if rows else score.heading
    return [dataclasses.replace(score, heading=heading), *(c for c in others if any(c.key in row for row in rows))]


def amount(metric: str, value: float | None, of_study: bool = False) -> str:
    """A cost with its name, such as `bytes on disk, MB: 9.5`; what a whole study pays is no figure of a recipe."""
    column = next((column for column in COLUMNS if column.key == metric and not of_study), None)
    return f"{metric}: {significant(value)}" if column is None else f"{column.axis}: {column.text({metric: value})}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number with so many telling digits, without an exponent where it reads well; `unknown` for None."""
    if value is None:
        return "unknown"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if power < -7 or power > 8:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - power)}f}"


def addends(values: Sequence[float | None]) -> list[str]:
    """Amounts that are added up, with as many decimals each: two, or three digits of the largest where it is small."""
    largest = max((abs(value) for value in values if value), default=1.0)
    decimals = max(2, 2 - math.floor(math.log10(largest)))
    return ["unknown" if value is None else f"{value:,.{decimals}f}" for value in values]
