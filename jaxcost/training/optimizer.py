"""The optimizer and its schedule, over a flat dict of the arrays that train."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxcost.training.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step, from 0; warm-up is at most half of the run."""
    warmup = min(config.warmup_steps, steps // 2)
    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(1, steps - warmup), config.final_fraction)
        return _after_warmup(peak, warmup, rest)
    if config.schedule == "constant":
        return _after_warmup(peak, warmup, optax.constant_schedule(peak))
    decay = max(1, min(round(config.decay_fraction * steps), steps - warmup))
    return _after_warmup(peak, warmup, optax.linear_schedule(peak, last, decay, steps - warmup - decay))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping. Its state has moments for the arrays that it is given, and for nothing else."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        config.beta1,
        config.beta2,
        config.epsilon,
        mu_dtype=jnp.bfloat16 if config.first_moment == "bfloat16" else None,
        weight_decay=config.weight_decay,
        mask=lambda arrays: {path: not path.endswith(("/scale", "/bias", "/scores")) for path in arrays},
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def _after_warmup(peak: float, warmup: int, rest: optax.Schedule) -> optax.Schedule:
    def schedule(step):
        # From step + 1, so that the first step already moves.
        return jnp.where(step < warmup, peak * (step + 1) / max(1, warmup), rest(step - warmup))

    return schedule
