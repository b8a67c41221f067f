"""What comparing a recipe with its control on held-out data finds out, field by field: a part of `result`'s schema."""

from __future__ import annotations

from typing import Literal, TypedDict


class PairedTest(TypedDict):
    """The finalist against the control on the same held-out examples."""

    examples: int
    unit: str
    """What an example is, in words: a window of text, or a text with its label."""
    control_loss: float
    """Nats a token, or a label."""
    loss: float
    difference: float
    """The mean of loss - control_loss over the examples: above 0 the finalist is worse."""
    low: float
    high: float
    """95 % bootstrap interval of the difference."""
    p_value: float
    """Two-sided, of a sign-flip permutation test that the difference is 0."""
    verdict: Literal["worse", "better", "no difference found"]


class Slice(TypedDict):
    """The finalist against the control on a part of the held-out data."""

    by: str
    """What the data were cut by: `label`, `length`, `token frequency`, or the group attribute's name."""
    name: str
    """Which part, such as a label, or `rarest fifth`."""
    count: int
    """Tokens, or texts."""
    examples: int
    """Windows or texts that have any of them."""
    control_loss: float
    loss: float
    difference: float
    low: float
    high: float
    control_accuracy: float
    accuracy: float
    p_value: float
    """Of the same permutation test on this part; corrected for the number of slices by Holm's method."""
    harmed: bool
    """Whether it is much worse: `Flag` says by how much."""


class Exemplar(TypedDict):
    """An example on which the two disagree most (compression-identified)."""

    index: int
    text: str
    """Shortened."""
    group: str | None
    label: str | None
    control_loss: float
    loss: float
    difference: float
    control_said: str
    """The control's likeliest label, or the token that it found likeliest where the two differ most."""
    said: str
    expected: str


class Calibration(TypedDict):
    """Expected calibration error of the likeliest answer's probability."""

    control_ece: float
    ece: float
    bins: list[dict[str, float]]
    """`low`, `high`, and for each of the two `control_` and plain: `count`, `confidence`, `accuracy`; empty bins have
    count 0 and the other two 0."""


class FairnessRow(TypedDict):
    """How unevenly an attribute's groups are served, before and after."""

    by: str
    """The group attribute, or `label`."""
    control_worst_group: str
    control_worst_accuracy: float
    worst_group: str
    worst_accuracy: float
    control_gap: float
    """Best minus worst group's accuracy."""
    gap: float
    control_loss_gap: float
    """Worst minus best group's loss, nats."""
    loss_gap: float


class SafetyCheck(TypedDict):
    """Generated text against a list that the user can replace; no more than a smoke test."""

    name: str
    kind: Literal["lexicon", "refusal"]
    prompts: int
    control_hits: int
    """Continuations with a word of the lexicon; or answers that refuse."""
    hits: int
    worse: bool
    """More words of the lexicon, or fewer refusals."""
    examples: list[dict[str, str]]
    """`prompt`, `control`, `text` of those that differ, shortened."""


class Flag(TypedDict):
    """Harm that must be read first."""

    kind: Literal["slice", "fairness", "safety", "calibration"]
    by: str
    name: str
    text: str
    """In a sentence."""


class Verification(TypedDict):
    """The finalist against the control, in detail."""

    recipe: str
    control: str
    test: PairedTest
    slices: list[Slice]
    exemplars: list[Exemplar]
    calibration: Calibration
    fairness: list[FairnessRow]
    safety: list[SafetyCheck]
    safety_why_not: str | None
    """Why there is none, in a sentence."""
    seconds: float
    why_not: str | None
    """Why parts are empty, such as data without a group attribute, in a sentence."""
