"""What a plan may cost and how long it may take, and by which of them plans are ranked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

from jaxcost.planning.plan import Plan


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on all steps of a plan."""

    budget_usd: float | None = None
    """Money; None for any."""
    deadline_hours: float | None = None
    """Hours; None for any."""

    def __post_init__(self):
        for name in ("budget_usd", "deadline_hours"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value:g}; it must be positive.")

    def over(self, made: Plan) -> list[str]:
        """In what a plan is beyond the limits, each the end of a sentence."""
        cost = made.cost
        if cost is None:
            return []
        hours, said = cost.seconds / 3600, []
        if self.deadline_hours is not None and hours > self.deadline_hours:
            said.append(f"takes {hours:.4g} hours, over the deadline of {self.deadline_hours:g}.")
        if self.budget_usd is not None and cost.usd is None:
            said.append("its price is unknown; give it with --hardware.usd-per-chip-hour to hold it to the budget.")
        elif self.budget_usd is not None and cost.usd > self.budget_usd:
            said.append(f"costs {cost.usd:.4g} dollars, over the budget of {self.budget_usd:g}.")
        return said

    def rank(self, made: Plan) -> tuple:
        """What fits and is within the limits first; then by money for a token, or by time if the money is given."""
        cost = made.cost
        if cost is None or made.compiled.fits is False:
            return (1, bool(self.over(made)), math.inf, math.inf)
        usd = math.inf if cost.usd is None else cost.usd
        order = (cost.seconds, usd) if self.budget_usd is not None else (usd, cost.seconds)
        return (0, bool(self.over(made)), *order)


def figures_by_chip(flag: str, texts: Sequence[str], chips: Collection[str]) -> dict[str, float]:
    """The figures of a flag such as `--usd-per-chip-hour tpu7x=12 b200=5`.

    Raises:
        ValueError: a text is no chip and number, or its chip is not among `chips`.
    """
    figures = {}
    for text in texts:
        chip, _, value = text.partition("=")
        if chip not in chips:
            raise ValueError(f"{flag} names {chip!r}, and the topologies are of {', '.join(sorted(chips))}.")
        try:
            figures[chip] = float(value)
        except ValueError:
            raise ValueError(f"{flag} is {text!r}; write a chip and a number, such as {chip}=5.") from None
    return figures
