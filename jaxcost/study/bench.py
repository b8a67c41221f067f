"""Small problems on which claims about transforms are put to the test: trainings of a tiny model, and single layers.

Both sides of a claim get the same steps, the same batches in the same order and the same held-out text; a seed draws
the weights, the order of the batches and the layers. Whatever has been trained in the folder is not trained again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.config import Experiment
from jaxcost.data import DataConfig
from jaxcost.data.augmentation import AugmentConfig
from jaxcost.evaluation.score import EvaluationConfig
from jaxcost.models.config import HeadConfig, ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.session import Session
from jaxcost.sharding import MeshConfig
from jaxcost.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from jaxcost.training.distill import DistillConfig, Teacher
from jaxcost.training.loop import Fitted
from jaxcost.transforms import Transform, calibrated, chain, rule

Features = Literal["iid", "outliers", "correlated", "anisotropic"]


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Sizes of the problems; the defaults take about a quarter of an hour on two CPU cores for all claims."""

    width: int = 64
    """Width of the model; its MLP is four times as wide."""
    num_layers: int = 2
    """Blocks of the base, which is also the teacher."""
    batch_size: int = 16
    """Sequences of a batch."""
    sequence_length: int = 128
    """Tokens of a sequence."""
    base_steps: int = 400
    """Steps of the base model, and of whatever is trained from new weights."""
    recovery_steps: int = 100
    """Steps after a transform, and of a fine-tune."""
    evaluation_tokens: int = 32_768
    """Held-out tokens."""
    data_dir: str | None = None
    """Where TFDS keeps its datasets."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training."""

    score: float
    """Bits per byte of held-out text, after what was done to the weights in the end."""
    fitted: Fitted
    params: weights.Params


class Bench:
    """Trainings of a tiny model on Python's own text, in a folder."""

    def __init__(self, workdir: Path, config: BenchConfig = BenchConfig()):
        self.workdir = Path(workdir)
        self.config = config
        self._sessions: dict[Any, Session] = {}

    def experiment(self, seed: int, shifted: bool = False) -> Experiment:
        """What every training starts from."""
        c = self.config
        model = ModelConfig(0, c.width, c.num_layers, 2, 2, c.width // 2, 4 * c.width, max_length=c.sequence_length)
        data = DataConfig(
            "python_text/reference" if shifted else "python_text/library",
            tokenizer="bpe",
            bpe_vocab_size=512,
            sequence_length=c.sequence_length,
            batch_size=c.batch_size,
            shuffle_seed=seed,
            data_dir=c.data_dir,
        )
        return Experiment(
            model=model,
            data=data,
            mesh=MeshConfig(),
            execution=ExecutionConfig(compute="bfloat16"),
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20),
            training=TrainingConfig(steps=c.base_steps, seed=seed),
            evaluation=EvaluationConfig(max_tokens=c.evaluation_tokens),
            checkpoint=CheckpointConfig(every_steps=10**6, keep=1),
        )

    def labels(self) -> Experiment:
        """A small encoder that tells ten labels of texts of a synthetic grammar, with changed copies of them."""
        c = self.config
        head = HeadConfig(outputs=10, pooling="mean", bias=True)
        model = ModelConfig(
            0, c.width, c.num_layers, 4, 4, c.width // 4, 2 * c.width, max_length=64, causal=False, head=head
        )
        return Experiment(
            model=model,
            data=DataConfig(
                "synthetic_customer_service",
                objective="labels",
                augment=AugmentConfig(synonyms=0.3, keyboard=0.02),
                tokenizer="bpe",
                bpe_vocab_size=512,
                sequence_length=48,
                batch_size=2 * c.batch_size,
                data_dir=c.data_dir,
            ),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=min(20, c.base_steps // 5)),
            training=TrainingConfig(steps=c.base_steps),
            checkpoint=CheckpointConfig(every_steps=10**6, keep=1),
        )

    def base(self, seed: int) -> Trained:
        """The base model of a seed."""
        return self.train("base", seed)

    def train(
        self,
        name: str,
        seed: int,
        *,
        start: weights.Params | None = None,
        transforms: Sequence[Transform] = (),
        finish: Sequence[Transform] = (),
        steps: int | None = None,
        learning_rate: float | None = None,
        shifted: bool = False,
        num_layers: int | None = None,
        distill: DistillConfig | None = None,
        teacher: weights.Params | None = None,
    ) -> Trained:
        """Transforms, trains and transforms again.

        Args:
          name: of the folder; the seed is added.
          seed: see the file's head.
          start: weights to begin with; new ones if none are given.
          transforms: before the training.
          finish: after it.
          steps: the base's from new weights and the recovery's from others, if not given.
          learning_rate: peak; the base's from new weights and a quarter of it from others, if not given.
          shifted: train and score on the language reference instead of the library.
          num_layers: blocks of the model, if not the base's.
          distill: what is learned from `teacher`, a base's weights.
        """
        c, value = self.config, self.experiment(seed, shifted)
        steps = steps or (c.base_steps if start is None else c.recovery_steps)
        rate = learning_rate or value.optimizer.learning_rate * (1.0 if start is None else 0.25)
        value = dataclasses.replace(
            value,
            model=dataclasses.replace(value.model, num_layers=num_layers or c.num_layers),
            training=dataclasses.replace(value.training, steps=steps),
            optimizer=dataclasses.replace(value.optimizer, learning_rate=rate, warmup_steps=min(20, steps // 5)),
            transforms=tuple(transforms),
            distill=distill or DistillConfig(),
        )
        session = self._session(value)
        key = jax.random.key(seed)
        make = None if start is None else lambda: session.transformed(session.transform, start, key)
        taught = None if teacher is None else Teacher(self._session(self.experiment(seed)).model, teacher)
        fitted = session.train(self.workdir / "runs" / f"{name}-{seed}", make, f"{name}, seed {seed}", taught)
        params = session.transformed(chain(*finish), fitted.params, key)
        score = session.evaluate(params)["bits_per_byte"] if finish else fitted.metrics["bits_per_byte"]
        return Trained(score, fitted, params)

    def score(self, params: weights.Params, seed: int) -> float:
        """Bits per byte of the base's held-out text."""
        return self._session(self.experiment(seed)).evaluate(params)["bits_per_byte"]

    def _session(self, value: Experiment) -> Session:
        # Sessions of one model on one text share the tokens and the compiled scorer.
        key = (value.model, value.data.name)
        if key not in self._sessions:
            tokenizer = next((s.tokenizer for s in self._sessions.values()), None)
            self._sessions[key] = Session(value, tokenizer, quiet=True, devices=jax.devices()[:1])
            self._sessions[key].open()
        return self._sessions[key].derive(value)


# ---- Single layers ----


@dataclasses.dataclass(frozen=True)
class Layer:
    """One matrix and what it is multiplied with."""

    kernel: jax.Array
    """(in, out)."""
    seen: jax.Array
    """(rows, in): for calibration."""
    unseen: jax.Array
    """(rows, in): on which errors are measured."""

    def changed(self, *transforms: Transform) -> Any:
        """What the transforms make of the matrix, calibrated on the seen inputs."""
        params = {"layer": {"kernel": self.kernel}}
        done = calibrated(chain(*transforms), params, jax.random.key(0), _product, lambda: [self.seen])
        return done["layer"]["kernel"]

    def error(self, *transforms: Transform) -> float:
        """‖x·W - x·W'‖ / ‖x·W‖ over the unseen inputs, where W' is what the transforms make of W."""
        kernels = (self.kernel, self.changed(*transforms))
        before, after = (_product({"layer": {"kernel": w}}, self.unseen) for w in kernels)
        return float(jnp.linalg.norm(before - after) / jnp.linalg.norm(before))


LAYER = (rule("kernel"),)
"""The rule that picks a `Layer`'s matrix."""


def layer(seed: int, features: Features, inward: int = 128, outward: int = 96, correlation: float = 0.9) -> Layer:
    """A Gaussian matrix, and inputs that are independent, or have a few large channels, or correlate along the axis.

    Args:
      seed: draws it.
      features: `iid` is Gaussian; of `outliers`, one channel in 16 is 10 times as large; `correlated` neighbours have
        the given correlation; `anisotropic` has both.
      inward, outward: the matrix's shape.
      correlation: of neighbours.
    """
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(inward, outward)) / inward**0.5
    x = rng.normal(size=(2, 8 * inward, inward))
    if features in ("correlated", "anisotropic"):
        distance = np.abs(np.subtract.outer(np.arange(inward), np.arange(inward)))
        x = x @ np.linalg.cholesky(correlation**distance).T
    if features in ("outliers", "anisotropic"):
        x[..., rng.permutation(inward)[: inward // 16]] *= 10
    return Layer(*(jnp.asarray(a, jnp.float32) for a in (kernel, *x)))


@jax.jit
def _product(params: weights.Params, x: jax.Array) -> jax.Array:
    return weights.contract(x, params["layer"]["kernel"])
