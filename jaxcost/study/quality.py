"""What a study judges by, as `data.objective` says: the score, and what an answer of the served model is.

Whatever a study does, says or draws of a score or of serving asks here, so that models of text and of labels are
studied by one path. Words and names alone: what is computed of them is in `measure` and `baselines`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Served:
    """What those whom the model serves wait and pay for, and what its costs are called in a row of `study.json`."""

    answer: str
    """In a word."""
    flops: str
    per_second: str
    seconds: str
    usd: str
    kwh: str

    @property
    def costs(self) -> tuple[str, ...]:
        """Those that a budget can limit."""
        return (self.flops, self.seconds, self.usd, self.kwh)


TOKEN = Served(
    "decoded token",
    flops="inference_flops_per_token",
    per_second="decode_tokens_per_second",
    seconds="decode_seconds_per_token",
    usd="usd_per_million_tokens",
    kwh="kwh_per_million_tokens",
)
"""Behind those before it."""

REQUEST = Served(
    "request",
    flops="inference_flops_per_request",
    per_second="requests_per_second",
    seconds="seconds_per_request",
    usd="usd_per_million_requests",
    kwh="kwh_per_million_requests",
)
"""A text or an image that is given a label: one forward pass, and nothing decoded."""

SERVED_COSTS = frozenset(TOKEN.costs + REQUEST.costs)
"""The costs of any way to be served."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """What one objective is judged by."""

    score: str
    """The score among the figures of an evaluation; lower is better."""
    unit: str
    """Of the score, in words."""
    heading: str
    """The same in short, for tables."""
    better: str
    """Which scores are better, in words."""
    baseline: str
    """What the base's score is set beside, with a place for `base` and for each figure of `baselines.measured`."""
    beaten: str
    """Which of these it should beat."""
    served: Served
    least: float = 0.0
    """What shares of a score are taken of where the score is less: shares of almost nothing say little."""

    @property
    def writes(self) -> bool:
        """Whether the model writes text, which can be held against a list."""
        return self.served is TOKEN

    def share(self, score: float) -> float:
        """What a difference from this score is a share of."""
        return max(self.least, score)


_QUALITIES = {
    "next_token": Quality(
        score="bits_per_byte",
        unit="bits per byte",
        heading="bits/byte",
        better="fewer bits a byte are better",
        baseline="The base model needs {base:.3f} bits per byte of held-out text; byte n-grams need {unigram:.3f} "
        "(unigram), {trigram:.3f} (trigram) and {five_gram:.3f} (5-gram).",
        beaten="trigram",
        served=TOKEN,
    ),
    "labels": Quality(
        score="nats_per_label",
        unit="nats per label",
        heading="nats/label",
        better="fewer nats a label are better",
        baseline="The base model needs {base:.3f} nats per held-out label; the frequencies of the labels alone need "
        "{label_frequencies:.3f}.",
        beaten="label_frequencies",
        served=REQUEST,
        least=1.0,
    ),
}


def of(objective: str) -> Quality:
    """What an objective is judged by; ValueError, in one sentence, for one that is not studied."""
    if objective not in _QUALITIES:
        raise ValueError(
            f"data.objective is {objective!r}, of which a study has no score to judge by; set it to one of "
            f"{', '.join(map(repr, _QUALITIES))}."
        )
    return _QUALITIES[objective]


def of_row(row: Mapping[str, Any]) -> Quality:
    """What a row's score and costs are of."""
    return of(row.get("objective", "next_token"))


def of_study(study: Mapping[str, Any]) -> Quality:
    """What the scores of a `study.json` are of."""
    return of(study["experiment"]["data"].get("objective", "next_token"))
