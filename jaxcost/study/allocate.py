"""One budget spread over many weights: how far each is pruned, thinned or rounded, by what that does to the loss.

    table = sensitivities(prune(), "sparsity", (0.0, 0.3, 0.6, 0.9), params, score)
    found = allocate(table, budget=uniform_cost(table, 0.6))
    params = found.transform(prune(), "sparsity")(params)

The increases of the loss are measured with one weight changed at a time and are taken to add up, as they do while they
are small; what the whole allocation does to the loss is measured in the end, beside the uniform one of the same cost.
A rule picks a path, so that the matrices of one stack share their level.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.cost.hardware import Chip
from jaxcost.cost.hlo import compiled_cost
from jaxcost.cost.roofline import lower_bound
from jaxcost.data import train_batches
from jaxcost.evaluation.score import Scorer
from jaxcost.session import Session
from jaxcost.transforms import Calibration, Rule, Transform

_STATES = 20_000
"""Partial choices kept after each weight; with more, those of nearly the same cost become one."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One weight at one level."""

    level: Any
    """Value of the transform's option; None leaves the weight as it is."""
    cost: float
    """What the weight then costs, in the unit of the budget."""
    loss: float
    """By how much the loss rises when this weight alone is changed."""


Table = Mapping[str, tuple[Choice, ...]]
"""Path of a weight → its choices."""

Score = Callable[[str, weights.Params], float]
"""(path of the one weight that was changed, the weights) → by how much the loss rises."""


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A level for each weight."""

    levels: tuple[tuple[str, Any], ...]
    """Path and level of every weight."""
    cost: float
    """Sum of their costs, within the budget."""
    loss: float
    """Sum of the increases of the loss."""
    gap: float
    """The best choice of all lowers that sum by at most this much."""

    def transform(self, transform: Transform, option: str) -> Transform:
        """The transform with a rule for each weight."""
        return with_levels(transform, option, dict(self.levels))


def with_levels(transform: Transform, option: str, levels: Mapping[str, Any]) -> Transform:
    """The transform with one rule a path, which sets the option to its level; None skips the path."""
    found = []
    for path, level in levels.items():
        said = next((dict(r.options) for r in transform.rules if re.search(r.pattern, path)), {})
        options = () if level is None else tuple(sorted((said | {option: level}).items()))
        found.append(Rule(f"^{re.escape(path)}$", level is None, options))
    return dataclasses.replace(transform, rules=tuple(found))


def sensitivities(
    transform: Transform,
    option: str,
    levels: Sequence[Any],
    params: weights.Params,
    score: Score,
    cost: Callable[[Any], float] | None = None,
    calibration: Calibration | None = None,
) -> Table:
    """What each level of each weight costs and does to the loss, every other weight left as it is.

    Args:
      transform: picks the weights; its own level does not count.
      option: the name of what is chosen, such as `sparsity`, `rank`, `parameters` or `bits`.
      levels: values of the option; None stands for the weight as it is.
      params: the weights.
      score: `loss_increase` or `layer_error`.
      cost: of a transformed weight; `stored_bytes` if it is not given.
      calibration: for a transform that needs statistics.

    Raises:
      ValueError: there is no level, or the transform picks no weight or has no such option.
    """
    cost = cost or stored_bytes
    if not levels:
        raise ValueError("An allocation needs levels to choose from; give some.")
    paths = list(transform.picked(params))
    if not paths:
        raise ValueError(f"{type(transform).__name__} picks no weight, so there is nothing to allocate.")
    table = {}
    for path in paths:
        choices = []
        for level in levels:
            changed = with_levels(transform, option, {path: level})(params, None, calibration)
            choices.append(Choice(level, cost(_at(changed, path)), score(path, changed)))
        table[path] = tuple(choices)
    return table


def loss_increase(loss: Callable[[weights.Params], float], params: weights.Params) -> Score:
    """Scores by the loss itself, on whatever data `loss` looks at."""
    base = loss(params)
    return lambda _, changed: loss(changed) - base


def layer_error(calibration: Calibration, params: weights.Params) -> Score:
    """Scores by the change of the weight's output, relative to its size, under inputs with independent features.

    Cheaper than the loss, and blind to what comes after the weight: Σ E[x²](W - W')² / Σ E[x²]W².
    """

    def score(path, changed):
        before, after = (weights.materialize(_at(p, path)).astype(jnp.float32) for p in (params, changed))
        squares = calibration[path].squares[..., None]
        return float(jnp.sum(squares * jnp.square(before - after)) / jnp.sum(squares * jnp.square(before)))

    return score


def stored_bytes(w: Any) -> float:
    """Bytes that a weight takes when it is stored: codes of 4 bits two a byte, and what a mask keeps with its bits."""
    if isinstance(w, weights.Masked):
        share = float(jnp.mean(w.mask.astype(jnp.float32)))
        return share * stored_bytes(w.weight) + w.mask.size / 8
    return float(sum(weights.storage_bytes(leaf) for leaf in jax.tree.leaves(w)))


def contraction_seconds(chip: Chip, rows: int, dtype: Any = jnp.bfloat16) -> Callable[[Any], float]:
    """A cost: least seconds that the compiled products of `rows` activations with a weight take on a chip.

    The roofline of the compiled program of one matrix times the matrices of its stack: a mask costs what it masks.
    """

    def seconds(w):
        shape = jax.eval_shape(weights.materialize, w).shape
        stack = len(shape) - 2
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[stack:], a.dtype), w)
        x = jax.ShapeDtypeStruct((rows, shape[-2]), dtype)
        cost = compiled_cost(jax.jit(weights.contract).lower(x, one).compile())
        moved = (cost.argument_bytes or 0) + (cost.output_bytes or 0)
        # What this machine's compiler widens, the chip multiplies as it stands.
        flops = {"bf16" if dtype == jnp.bfloat16 else "f32": cost.total_flops}
        bound = lower_bound(chip, flops, moved).seconds
        if bound is None:
            raise ValueError(f"The peak and the bandwidth of {chip.name} are unknown; choose another hardware.chip.")
        return bound * float(np.prod(shape[:stack]))

    return seconds


def uniform_cost(table: Table, level: Any) -> float:
    """What all weights cost at one level; ValueError if it is none of the table's."""
    return sum(_choice(choices, level).cost for choices in table.values())


def allocate(table: Table, budget: float) -> Allocation:
    """The levels with the smallest sum of losses whose costs fit the budget.

    Dynamic programming, weight by weight, over the partial choices that no other beats in both cost and loss. That is
    exact up to 20000 of them; beyond, costs are taken in steps of 1/20000 of the budget, and the Lagrangian dual
    bounds what was lost by that (`Allocation.gap`).

    Raises:
      ValueError: the budget is below the cheapest choice of all, or above the dearest.
    """
    if not table:
        raise ValueError("There is no weight to allocate to; let the transform pick some.")
    least = sum(min(c.cost for c in choices) for choices in table.values())
    most = sum(max(c.cost for c in choices) for choices in table.values())
    if not least <= budget <= most:
        side = "below the least" if budget < least else "above the most"
        raise ValueError(
            f"A budget of {budget:.6g} is {side} that these levels can cost; choose one from {least:.6g} to {most:.6g}."
        )
    chosen, exact = _best(table, budget)
    picked = [choices[i] for choices, i in zip(table.values(), chosen, strict=True)]
    loss = sum(choice.loss for choice in picked)
    levels = tuple((path, choice.level) for path, choice in zip(table, picked, strict=True))
    gap = 0.0 if exact else max(0.0, loss - _dual_bound(table, budget))
    return Allocation(levels, sum(choice.cost for choice in picked), loss, gap)


def _best(table: Table, budget: float) -> tuple[list[int], bool]:
    """The index of the choice for each weight, and whether it is the best of all."""
    reserve = [min(c.cost for c in choices) for choices in table.values()]
    # Sums are taken in one order here and in another elsewhere; what fits must not hang on the last digit.
    limit = budget * (1 + 1e-9)
    costs, losses, exact = np.zeros(1), np.zeros(1), True
    steps = []
    for index, choices in enumerate(table.values()):
        cost = (costs[:, None] + np.array([c.cost for c in choices])).ravel()
        loss = (losses[:, None] + np.array([c.loss for c in choices])).ravel()
        kept = np.flatnonzero(cost + sum(reserve[index + 1 :]) <= limit)
        kept = kept[np.lexsort((loss[kept], cost[kept]))]
        before = np.concatenate([[np.inf], np.minimum.accumulate(loss[kept])[:-1]])
        kept = kept[loss[kept] < before]
        if len(kept) > _STATES:
            exact = False
            kept = kept[np.unique((cost[kept] / limit * _STATES).astype(int), return_index=True)[1]]
        steps.append((kept // len(choices), kept % len(choices)))
        costs, losses = cost[kept], loss[kept]
    state, found = int(np.argmin(losses)), []
    for parents, picked in reversed(steps):
        found.append(int(picked[state]))
        state = int(parents[state])
    return found[::-1], exact


def _dual_bound(table: Table, budget: float) -> float:
    """A sum of losses that no choice within the budget goes below: the Lagrangian dual, by bisection of its price."""
    low, high = 0.0, 1.0
    groups = [np.array([(c.cost, c.loss) for c in choices]) for choices in table.values()]

    def at(price):
        best = [group[np.argmin(group[:, 1] + price * group[:, 0])] for group in groups]
        cost, loss = np.sum(best, axis=0)
        return cost, loss + price * (cost - budget)

    while at(high)[0] > budget:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[0] > budget else (low, middle)
    return max(at(low)[1], at(high)[1])


def compare_with_uniform(
    session: Session,
    params: weights.Params,
    transform: Transform,
    option: str,
    levels: Sequence[Any],
    uniform: Any,
    *,
    cost: Literal["bytes", "seconds"] = "bytes",
    batches: int = 8,
) -> dict[str, Any]:
    """Allocates what one level for all weights costs, and scores both on the held-out text.

    Args:
      session: the model, its data and its chip.
      params: the weights.
      transform, option, levels: as for `sensitivities`.
      uniform: the level that sets the budget; one of `levels`.
      cost: bytes stored, or least seconds of a training batch's products on the session's chip.
      batches: batches of the training split on which the loss is measured.

    Returns:
      `uniform` and `allocated`, each with `cost`, `bits_per_byte` and the `transform` as Python; `beats_uniform`;
      `levels` by path; the `table`; `predicted_loss` and `gap` in nats a token.

    Raises:
      ValueError: the model is no language model.
    """
    session.open()
    data = session.experiment.data
    seen = itertools.islice(train_batches(data, session.train_stream.tokens), batches)
    scorer = Scorer(session.model, seen, session.tokenizer.token_bytes, session.mesh)
    score = loss_increase(lambda p: scorer(p).nats_per_token, params)
    rows = data.batch_size * data.sequence_length
    measure = stored_bytes if cost == "bytes" else contraction_seconds(session.hardware.chip, rows)
    calibration = session.calibration(transform, params)
    table = sensitivities(transform, option, levels, params, score, measure, calibration)
    found = allocate(table, uniform_cost(table, uniform))
    sides = {
        "uniform": with_levels(transform, option, dict.fromkeys(table, uniform)),
        "allocated": found.transform(transform, option),
    }
    result: dict[str, Any] = {}
    for name, one in sides.items():
        changed = one(params, None, calibration)
        spent = sum(measure(_at(changed, path)) for path in table)
        bits = session.evaluate(changed)["bits_per_byte"]
        result[name] = {"cost": spent, "bits_per_byte": bits, "transform": repr(one)}
    return result | {
        "beats_uniform": result["allocated"]["bits_per_byte"] < result["uniform"]["bits_per_byte"],
        "untouched_bits_per_byte": session.evaluate(params)["bits_per_byte"],
        "levels": dict(found.levels),
        "predicted_loss": found.loss,
        "gap": found.gap,
        "table": {path: [dataclasses.asdict(choice) for choice in choices] for path, choices in table.items()},
    }


def _choice(choices: Sequence[Choice], level: Any) -> Choice:
    found = next((choice for choice in choices if choice.level == level), None)
    if found is None:
        raise ValueError(f"{level} is none of the levels {', '.join(str(c.level) for c in choices)}.")
    return found


def _at(params: weights.Params, path: str) -> Any:
    for name in path.split("/"):
        params = params[name]
    return params
