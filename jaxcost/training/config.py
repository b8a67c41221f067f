"""The frozen descriptions of a training run: how long, with which optimizer, what is kept."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule and clipping."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "wsd"
    """After the warm-up: a cosine, warm-up–stable–decay (flat, then linear), or flat."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    decay_fraction: float = 0.4
    """wsd: share of all steps, at the end, in which the rate falls."""
    final_fraction: float = 0.05
    """The last learning rate as a share of the peak."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 never clips."""
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the first moment is kept; half the bytes in bfloat16."""
    split_over_data: bool = False
    """Split the moments over mesh.data too (ZeRO stage 1): each replica updates its part, and gathers the weights."""
    offload: bool = False
    """Keep the moments in host memory, from which each step fetches them."""

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate is {self.learning_rate}; it must be positive.")
        for field in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"optimizer.{field} is {getattr(self, field)}; it must lie between 0 and 1.")
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"optimizer.{field} is {getattr(self, field)}; it must be at least 0 and below 1.")
        for field in ("warmup_steps", "epsilon", "weight_decay", "clip_norm"):
            if getattr(self, field) < 0:
                raise ValueError(f"optimizer.{field} is {getattr(self, field)}; it cannot be negative.")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Length, accumulation and randomness of a run."""

    steps: int = 200
    """Optimizer steps."""
    accumulation: int = 1
    """Microbatches a step: each batch is cut into so many, and their gradients are summed."""
    evaluate_every: int = 0
    """Steps between evaluations on the validation split; 0 evaluates at the end only."""
    loss_chunks: int = 1
    """Pieces of the sequence whose logits are made one at a time; more take less memory."""
    load_balancing: float = 0.01
    """Weight of the loss that evens out the experts' loads; of no effect without experts."""
    router_z: float = 0.001
    """Weight of the loss that keeps the router's logits small; of no effect without experts."""
    seed: int = 0
    """Seed of the initial weights and of any randomness in a step."""
    skip_limit: int = 4
    """Steps in a row that may be skipped because their loss or gradient is not finite; one more ends the run."""

    def __post_init__(self):
        for field in ("steps", "accumulation", "loss_chunks"):
            if getattr(self, field) < 1:
                raise ValueError(f"training.{field} is {getattr(self, field)}; it must be at least 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"training.seed is {self.seed}; it must lie between 0 and 2**32 - 1.")
        for field in ("evaluate_every", "load_balancing", "router_z", "skip_limit"):
            if getattr(self, field) < 0:
                raise ValueError(f"training.{field} is {getattr(self, field)}; it cannot be negative.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_steps: int = 100
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Checkpoints kept, the newest ones."""

    def __post_init__(self):
        for field in ("every_steps", "keep"):
            if getattr(self, field) < 1:
                raise ValueError(f"checkpoint.{field} is {getattr(self, field)}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is written of a run for those who watch it, beside its ledger."""

    steps: bool = True
    """Write one JSON line a step, `steps.jsonl` in the run's folder."""
    records: bool = False
    """Write in each of those lines which windows of the split the step read."""
    tensorboard: bool = False
    """Write the same figures for TensorBoard, in the folder `tensorboard`; takes `jaxcost[watch]`."""
    wandb: str = ""
    """Project of Weights & Biases to send the same figures to; takes `jaxcost[watch]` and an account."""
    profile: str = ""
    """Steps to trace, as FIRST:LAST; the trace is written to the folder `profile`, for XProf or Perfetto."""

    def __post_init__(self):
        if self.profile:
            self.profiled  # noqa: B018

    @property
    def profiled(self) -> range:
        """The steps that are traced; ValueError if `profile` does not name any."""
        first, _, last = self.profile.partition(":")
        if not self.profile:
            return range(0)
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise ValueError(f"watch.profile is {self.profile!r}; give the first and the last step, as in 10:12.")
        return range(int(first), int(last) + 1)
