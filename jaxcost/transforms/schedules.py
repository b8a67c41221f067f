"""When masks move while a model trains: sparser by a cubic or in rounds, or at one sparsity with connections moved."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Gradual:
    """A cubic rise of the sparsity while training. Source: Zhu and Gupta 2017, arXiv:1710.01878, equation 1."""

    end_step: int
    """The step at which the final sparsity is reached."""
    begin_step: int = 0
    """The step at which pruning begins."""
    every_steps: int = 10
    """Steps between two updates of the mask."""
    initial_sparsity: float = 0.0
    """Share pruned at `begin_step`."""

    def __post_init__(self):
        if not 0 <= self.begin_step < self.end_step:
            raise ValueError(f"prune: end_step ({self.end_step}) must come after begin_step ({self.begin_step}).")
        check_interval(self.every_steps)
        check_sparsity("initial_sparsity", self.initial_sparsity)

    def sparsity(self, step: jax.Array, final: float) -> jax.Array:
        """The share that is pruned after `step`: s_f + (s_i - s_f)(1 - progress)^3."""
        progress = jnp.clip((step - self.begin_step) / (self.end_step - self.begin_step), 0.0, 1.0)
        return final + (self.initial_sparsity - final) * (1.0 - progress) ** 3

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether the mask moves after `step`."""
        inside = (step >= self.begin_step) & (step <= self.end_step)
        return inside & (((step - self.begin_step) % self.every_steps == 0) | (step == self.end_step))


@dataclasses.dataclass(frozen=True)
class Iterative:
    """Rounds of pruning, each taking the same share of what is left, with training between them.

    Source: Han et al. 2015, arXiv:1506.02626, with the equal shares of Renda et al. 2020, arXiv:2003.02389.
    """

    rounds: int
    """How many times the mask is made sparser."""
    every_steps: int
    """Steps between two rounds."""
    begin_step: int = 0
    """The step after which the first round comes."""

    initial_sparsity: ClassVar[float] = 0.0

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"prune: rounds is {self.rounds}; it must be at least 1.")
        if self.begin_step < 0:
            raise ValueError(f"prune: begin_step is {self.begin_step}; it must be at least 0.")
        check_interval(self.every_steps)

    @property
    def end_step(self) -> int:
        """The step at which the final sparsity is reached."""
        return self.begin_step + (self.rounds - 1) * self.every_steps

    def sparsity(self, step: jax.Array, final: float) -> jax.Array:
        """The share that is pruned after `step`: 1 - (1 - s_f)^(rounds done / rounds)."""
        done = jnp.clip((step - self.begin_step) // self.every_steps + 1, 0, self.rounds)
        return 1.0 - (1.0 - final) ** (done / self.rounds)

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether the mask moves after `step`."""
        inside = (step >= self.begin_step) & (step <= self.end_step)
        return inside & ((step - self.begin_step) % self.every_steps == 0)


@dataclasses.dataclass(frozen=True)
class SET:
    """Sparse evolutionary training: at times the smallest weights go and as many grow anew at random, from zero.

    Which grow depends on the seed, the step and the weight's path alone. Source: Mocanu et al. 2018,
    arXiv:1707.04780, with the cosine decay of RigL so that both can be compared.
    """

    end_step: int
    """The step at which connections stop moving; the share that moves decays to zero until then."""
    every_steps: int = 100
    """Steps between two moves."""
    share: float = 0.3
    """Share of the connections that move at first."""
    seed: int = 0
    """Seeds what grows."""

    def __post_init__(self):
        check_interval(self.every_steps)
        if self.end_step < self.every_steps:
            raise ValueError(
                f"prune: end_step ({self.end_step}) comes before connections move at all (every {self.every_steps} "
                "steps); let it end later or move them more often."
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"prune: share is {self.share}; it must be above 0 and at most 1.")

    def moved(self, step: jax.Array) -> jax.Array:
        """The share of connections that moves after `step`: share / 2 · (1 + cos(π·step / end_step))."""
        return self.share / 2 * (1.0 + jnp.cos(jnp.pi * step / self.end_step))

    def is_due(self, step: jax.Array) -> jax.Array:
        """Whether connections move after `step`."""
        return (step > 0) & (step % self.every_steps == 0) & (step < self.end_step)


@dataclasses.dataclass(frozen=True)
class RigL(SET):
    """As `SET`, but the connections with the largest gradients grow, `seed` unused.

    The gradient is that of the step just taken, of which the optimizer sees the kept entries alone; in the paper such
    a step moves connections and no weights. Source: Evci et al. 2020, arXiv:1911.11134.
    """


def check_interval(every_steps: int) -> None:
    """ValueError unless there is at least one step between two moves."""
    if every_steps < 1:
        raise ValueError(f"prune: every_steps is {every_steps}; it must be at least 1.")


def check_sparsity(name: str, value: float) -> None:
    """ValueError unless the value is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"prune: {name} is {value}; it must be at least 0 and less than 1.")
