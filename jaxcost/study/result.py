"""What a study finds out, field by field: the schema of `study.json`, for those who write it and those who read it.

Every figure is a plain number of JSON, None where it is unknown (a price that nobody gave, say). Seconds, bytes, USD,
kWh and FLOPs are in the names. A score is bits per byte of held-out text, or nats per held-out label: lower is better.
Which figures are measured, compiled or estimated, `Row.figures` says; what was estimated before a trial stands in
fields that begin `estimated_`.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from jaxcost.study.verified import Flag, Verification

SCHEMA = "jaxcost-study-2"
"""Version 1 with what a search adds; the fields of version 1 mean what they meant."""

Kind = Literal["grid", "search"]
"""Every recipe of a list was tried, or a space was searched."""


class Interval(TypedDict):
    """A mean with a 95 % interval."""

    mean: float
    low: float
    high: float
    values: list[float]
    """What it is the mean of, one a seed; with a single value `low` and `high` equal it."""


class TokenCosts(TypedDict, total=False):
    """What serving costs where text is written, by the token."""

    inference_flops_per_token: float
    decode_tokens_per_second: float
    """Over all rows of a batch of `study.decode_batch_size`."""
    decode_seconds_per_token: float
    """Between two tokens of one reader, in that batch."""
    usd_per_million_tokens: float | None
    """Of decoded tokens, in that batch."""
    kwh_per_million_tokens: float | None


class Share(TypedDict):
    """The ends of a 95 % interval of a share."""

    low: float
    high: float


class LabelCosts(TypedDict, total=False):
    """What serving costs where labels are given, by the request, which is one forward pass; and how many are right."""

    accuracy: float
    """Share of the held-out labels that are right."""
    accuracy_interval: Share
    """By Wilson's method, over the held-out examples."""
    inference_flops_per_request: float
    """Of a request as long as `data.sequence_length`, or of an image."""
    requests_per_second: float
    """In batches of `study.decode_batch_size`."""
    seconds_per_request: float
    """Until such a batch is answered."""
    usd_per_million_requests: float | None
    kwh_per_million_requests: float | None


class Row(TokenCosts, LabelCosts):
    """A recipe after its whole recovery, with the costs of tokens or of labels. Rows of one study have had equal
    recovery budgets."""

    name: str
    description: str
    transforms: list[str]
    """Transforms and finish, as Python."""
    task: str
    """`base` or `shifted`."""
    control: bool
    distill: Any
    objective: str
    """`next_token` or `labels`; the former where it is missing, in studies of an earlier version."""
    metric: str
    """What the score is, in words."""
    score: float
    """Of the study's own seed, which all recipes have had."""
    score_before_recovery: float
    control_score: float
    """The score of its task's control."""
    score_interval: Interval | None
    """Over the seeds, of those rows that had several (`Finalist`)."""
    trainable_parameters: int
    checkpoint_bytes: int
    weight_bytes: int
    step_flops: float
    step_peak_bytes: int
    step_seconds: float
    recovery_steps: int
    recovery_learning_rate: float
    usd: float | None
    """Of the recovery's steps, without compilation; the same for the next four."""
    hours: float
    flops: float
    kwh: float | None
    kg_co2: float | None
    figures: dict[str, str]
    """Name of a figure → `measured`, `compiled` or `estimated`."""
    recovery: str
    """Name of the training under `recoveries/`; recipes that differ in their finish alone share it."""
    recovery_totals: dict[str, float]
    """Seconds, tokens, FLOPs and bytes that the training took in all, compilation included."""
    scoring_seconds: float
    """Of scoring before the recovery and after the finish, serving, and writing the weights."""
    pareto: bool
    pareto_on: list[str]


class Winner(TypedDict):
    """The best recipe for one budget alone."""

    budget: str
    metric: str
    limit: float | None
    recipe: str | None
    score: float | None
    why: str
    """Only where there is no recipe: what the cheapest costs, or what is unknown."""


class Finding(TypedDict):
    """A claim that the study put to the test."""

    claim: str
    holds: bool
    text: str


class Limit(TypedDict):
    """One limit of the study's budget, all of which hold together."""

    name: str
    of: Literal["recipe", "study"]
    """Limits what each recipe costs, or what the whole study may spend."""
    metric: str
    limit: float | None
    """In the metric's unit; None where the cost is unknown, which `why` then says."""
    used: float | None
    """What the answer, or the study, comes to."""
    why: str | None


class Answer(TypedDict):
    """What is recommended: the best score within all limits of the budget."""

    recipe: str | None
    score: float | None
    score_interval: Interval | None
    control_score: float | None
    cost_shares: dict[str, float]
    """Cost → the recipe's as a share of the control's, of `checkpoint_bytes`, `weight_bytes`, and the FLOPs, seconds
    and USD of what is served, where both are known."""
    text: str
    """The answer in a sentence; where nothing meets the budget, what the cheapest would cost."""
    flagged: bool
    """Whether a group is harmed, so that `flags` must be read first."""


class Stage(TypedDict):
    """One training or scoring of a trial up to a number of steps: a rung, or a further seed."""

    steps: int
    """Steps of recovery done when it was scored."""
    seed: int
    """0 is the study's own; the others belong to finalists."""
    score: float
    estimated_usd: float | None
    """Before it was started."""
    usd: float | None
    """What it took, compilation and scoring included; nothing where another recipe had paid for the same training."""
    estimated_seconds: float
    seconds: float
    estimated_flops: float
    flops: float


class Trial(TypedDict):
    """A recipe of the space and how far it came."""

    name: str
    description: str
    transforms: list[str]
    control: bool
    status: Literal["finalist", "finished", "stopped", "over_budget", "unaffordable", "failed"]
    """`finished`: all steps, and not among the best. `stopped`: worse than others on a rung. `over_budget`: exceeds a
    limit of recipes. `unaffordable`: what it was estimated to take was no longer there. `failed`: see `why`."""
    why: str | None
    """In a sentence, for the last three."""
    predicted_score: float | None
    """Of the surrogate, just before the trial was started; None where it knew nothing yet."""
    predicted_error: float | None
    """The surrogate's standard deviation of that."""
    stages: list[Stage]
    estimated_usd: float | None
    """Of its whole recovery, known before anything was trained."""
    estimated_seconds: float
    estimated_flops: float
    weight_bytes: int | None
    """Counted before anything was trained."""


class Finalist(TypedDict):
    """A row that was trained again with further seeds."""

    name: str
    control: bool
    seeds: list[int]
    score: Interval


class LedgerStage(TypedDict):
    """What a part of the study took; the parts add up to `totals`."""

    stage: Literal["data", "base", "control", "search", "finalists", "verification"]
    """`data` is what examples were bought for; `search` all recipes but the control, the winner's recovery among them;
    `finalists` their further seeds."""
    seconds: float
    tokens: int
    flops: float
    usd: float | None
    kwh: float | None
    estimated_seconds: float | None
    """Before the study; None where it was not searched."""
    estimated_usd: float | None
    estimated_kwh: float | None


class ServingCosts(TypedDict, total=False):
    """Of tokens, or of requests, as the row has them."""

    usd_per_million_tokens: float | None
    kwh_per_million_tokens: float | None
    usd_per_million_requests: float | None
    kwh_per_million_requests: float | None


class Serving(ServingCosts):
    """What a million decoded tokens, or requests, cost with the answer's weights, and with the control's: not part of
    the totals."""

    recipe: str


class Totals(TypedDict):
    """What the whole study took."""

    seconds: float
    tokens: int
    flops: float
    bytes: int
    usd: float | None
    kwh: float | None
    estimated_usd: float | None
    """Before the study was started, the most that its plan would take; None for a grid."""
    estimated_seconds: float | None
    estimated_flops: float | None


class Study(TypedDict):
    """The whole of `study.json`. Of a grid, `trials` and `finalists` are empty and `surrogate` is None."""

    schema: str
    kind: Kind
    experiment: Any
    machine: dict[str, Any]
    data: dict[str, Any]
    base: dict[str, Any]
    baselines: dict[str, float]
    estimates: dict[str, Any]
    plan: dict[str, Any]
    prices: dict[str, Any]
    answer: Answer
    flags: list[Flag]
    budget: list[Limit]
    rows: list[Row]
    winners: list[Winner]
    """Empty for a search, whose limits hold together: see `answer`."""
    findings: list[Finding]
    trials: list[Trial]
    finalists: list[Finalist]
    surrogate: dict[str, Any] | None
    """`trials` that it was compared on, `rank_correlation` of its predictions with what they came to (None below 3)."""
    verification: Verification | None
    """None where the answer is the control itself, or there is none."""
    ledger: list[LedgerStage]
    serving: list[Serving]
    totals: Totals
