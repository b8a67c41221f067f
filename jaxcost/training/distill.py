"""Distillation: a student that also learns from a teacher, which runs beside it or has written down what it says.

Online, the teacher's weights are one more argument of the train step: sharded like the student's, without gradient,
moments or a place in the checkpoint, and its FLOPs and memory are in the step's compiled cost. Offline, its likeliest
tokens are read from disk by step (`StoredLogits`) and come with the batch.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcost import sharding, weights
from jaxcost.data.files import atomic_write
from jaxcost.evaluation.batch import Batch, beside_inputs
from jaxcost.evaluation.distillation import (
    Direction,
    HiddenTeacher,
    Relation,
    StoredTeacher,
    distillation_loss,
    hidden_loss,
    relation_loss,
    top_k_log_probs,
)
from jaxcost.evaluation.losses import cross_entropy
from jaxcost.models.attention import Scores
from jaxcost.models.block import attention_scores
from jaxcost.models.config import ModelConfig
from jaxcost.models.stacks import STACKS, resized
from jaxcost.models.transformer import (
    HEADS,
    WATCHED,
    Transformer,
    logits,
    output_of,
)

PROJECTION = "distillation/projection"
"""Name of the learned projection among the arrays that train."""

_INSIDE = ("hidden", "attention", "values")
"""The losses that need more of the teacher than its logits, and so the teacher itself beside the student."""

_LOG_PROBS, _INDICES = "teacher_log_probs", "teacher_indices"


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """What a student learns from its teacher; with all weights of losses at 0 there is none."""

    teacher: str = ""
    """Folder of a finished training whose newest weights teach; a study's recipes are taught by its base instead."""
    logits: float = 0.0
    """Weight of the divergence between the teacher's and the student's next-token distributions."""
    hidden: float = 0.0
    """Weight of the mean squared difference between the final hidden states; needs the teacher beside the student."""
    attention: float = 0.0
    """Weight of the divergence between the attention probabilities of the last layers; needs as many heads."""
    values: float = 0.0
    """Weight of that between the relations of their values, softmax(v · v / √h); needs as many key-value heads."""
    labels: float = 1.0
    """Weight of the text's own next tokens (the cross-entropy)."""
    temperature: float = 2.0
    """Both distributions are softened by it."""
    direction: Direction = "forward"
    """KL(teacher ‖ student), or its reverse."""
    projection: Literal["learned", "fixed"] = "learned"
    """How hidden states are brought to the teacher's width; fixed is the identity where the widths are the same."""
    top_k: int = 0
    """Tokens of the teacher stored for each place and read back; 0 runs the teacher inside of the step."""
    store: str = ""
    """Folder of what is stored, made with the teacher if it is missing; inside of the run's folder if not given."""
    from_layers: bool = False
    """Start as every n-th block of the teacher, with its embeddings and norms, instead of from new weights."""

    def __post_init__(self):
        for field in (*_INSIDE, "logits", "labels"):
            if getattr(self, field) < 0:
                raise ValueError(f"distill.{field} is {getattr(self, field)}; it cannot be negative.")
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature is {self.temperature}; it must be positive.")
        if self.top_k < 0:
            raise ValueError(f"distill.top_k is {self.top_k}; use 0 to run the teacher, or a number to store.")
        inside = [name for name in _INSIDE if getattr(self, name)]
        if self.top_k and (inside or not self.logits):
            raise ValueError(
                "distill.top_k stores logits alone; set distill.logits above 0 and "
                f"{', '.join(f'distill.{name}' for name in inside or _INSIDE)} to 0."
            )

    @property
    def active(self) -> bool:
        """Whether anything is learned from a teacher."""
        return any(getattr(self, name) for name in ("logits", *_INSIDE))

    @property
    def online(self) -> bool:
        """Whether the teacher runs inside of the step."""
        return self.active and not self.top_k


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model and its weights, of any kinds."""

    model: Transformer
    params: weights.Params

    def logits(self, batch: Batch) -> jax.Array:
        """Its float32 logits (B, S, V)."""
        hidden_BSD, _ = self.model.apply({"params": self.params}, batch["inputs"], **beside_inputs(batch))
        return logits(self.model.config, self.params, hidden_BSD)


@dataclasses.dataclass(frozen=True)
class Distiller:
    """What a train step must know to learn from a teacher, its weights apart."""

    config: DistillConfig
    model: Transformer | None = None
    """The teacher that runs inside of the step; None where its logits come with the batch."""

    @property
    def watched(self) -> tuple[str, ...]:
        """The collections that the models, teacher and student, must sow."""
        return (WATCHED,) if self.config.attention or self.config.values else ()

    def stored(self, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What comes with a batch of a teacher that has written down what it says, and nothing of one that runs."""
        if self.config.online:
            return {}
        shape, k = (batch_size, length), self.config.top_k
        log_probs = jax.ShapeDtypeStruct((*shape, k + 1), jnp.float32)
        return {_LOG_PROBS: log_probs, _INDICES: jax.ShapeDtypeStruct((*shape, k), jnp.int32)}

    def beside(self, width: int, seed: int) -> dict[str, jax.Array]:
        """What trains beside a student of this width and ends with the run: the learned projection (D, E)."""
        if not self.config.hidden or self.config.projection == "fixed":
            return {}
        return {PROJECTION: _projection(width, self.model.config.width, seed)}

    def loss_sum(
        self,
        student: Transformer,
        hidden_BSD: jax.Array,
        sown: Mapping[str, Any],
        params: weights.Params,
        batch: dict[str, jax.Array],
        beside: dict[str, jax.Array],
        teacher: weights.Params | None,
        *,
        chunks: int,
        key: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """What is minimised, and the negative log-likelihood in it, summed over the batch's tokens; float32 scalars.

        Raises:
          ValueError: attention is compared, and the last layers of the two cannot be.
        """
        c, mask = self.config, batch["mask"]
        if teacher is None:
            source = StoredTeacher(batch[_LOG_PROBS], batch[_INDICES])
        else:
            (hidden_BSE, _), taught = self.model.apply(
                {"params": teacher}, batch["inputs"], **beside_inputs(batch), mutable=self.watched
            )
            hidden_BSE = jax.lax.stop_gradient(hidden_BSE)
            source = HiddenTeacher(hidden_BSE, output_of(self.model.config, teacher))
        head = (hidden_BSD, output_of(student.config, params))
        how = {"chunks": chunks, "key": key}
        if c.logits:
            how |= {"temperature": c.temperature, "direction": c.direction}
            likelihood, divergence = distillation_loss(*head, source, batch["targets"], mask, **how)
            total = c.labels * likelihood + c.logits * divergence
        else:
            likelihood, _ = cross_entropy(*head, batch["targets"], mask, **how)
            total = c.labels * likelihood
        if c.hidden:
            total += c.hidden * hidden_loss(hidden_BSD, hidden_BSE, self._projected(hidden_BSD, beside), mask)
        if self.watched:
            pairs = zip(_relations(student, params, sown), _relations(self.model, teacher, taught), strict=True)
            segments = batch.get("segments", batch.get("valid"))
            for weight, pair in zip((c.attention, c.values), pairs, strict=True):
                if weight:
                    total += weight * relation_loss(*pair, mask, segments, chunks=chunks)
        return total, likelihood

    def _projected(self, hidden_BSD: jax.Array, beside: dict[str, jax.Array]) -> jax.Array | None:
        width, teacher_width = hidden_BSD.shape[-1], self.model.config.width
        if self.config.projection == "learned":
            return beside[PROJECTION]
        return None if width == teacher_width else _projection(width, teacher_width, seed=0)


def _relations(model: Transformer, params: weights.Params, sown: Mapping[str, Any]) -> tuple[Relation, Relation]:
    """That of the last layer's queries to its keys, and that of its values to one another."""
    config, heads = resized(model.config, params), sown[WATCHED][HEADS]
    scores = attention_scores(config, config.layer_kinds[-1])
    maps = Relation(heads["query"], heads["key"], scores)
    return maps, Relation(heads["value"], heads["value"], Scores(scores.window, causal=scores.causal))


def _projection(width: int, teacher_width: int, seed: int) -> jax.Array:
    """Random (D, E), scaled so that a state keeps its size; the identity where the widths are the same."""
    if width == teacher_width:
        return jnp.eye(width)
    return jax.random.normal(jax.random.key(seed), (width, teacher_width)) * width**-0.5


def check_pair(student: Transformer, teacher: Transformer, config: DistillConfig) -> None:
    """ValueError, in one sentence, if one model cannot teach the other so."""
    ours, theirs = student.config, teacher.config
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"The teacher's vocabulary has {theirs.vocab_size} tokens and the student's {ours.vocab_size}; "
            "distillation needs one tokeniser for both: give the teacher's data.tokenizer and model.vocab_size."
        )
    if bool(ours.encoder.num_layers) != bool(theirs.encoder.num_layers):
        raise ValueError("Only one of teacher and student has an encoder; give both one, or neither.")
    if _seen_by(ours) != _seen_by(theirs):
        raise ValueError(
            "Teacher and student read sources of different kinds; give both tokens, images of one size, or audio of as "
            "many channels."
        )
    if config.attention and "relative" in (ours.position, theirs.position):
        raise ValueError(
            "distill.attention compares products of queries and keys, to which relative positions are added; set it to "
            "0 and use distill.values."
        )
    if config.from_layers:
        alike = dataclasses.replace(theirs, num_layers=ours.num_layers, max_length=ours.max_length)
        if alike != ours or ours.num_layers > theirs.num_layers:
            raise ValueError(
                "distill.from_layers takes blocks of the teacher, so the student must be the same model with at most "
                f"{theirs.num_layers} layers; change model.* or leave distill.from_layers out."
            )


def _seen_by(config: ModelConfig) -> tuple[int, ...]:
    """What fixes the shape of images or audio that a model, or its encoder, reads; zeros of tokens."""
    images = config.images
    return (config.audio.channels, *((images.height, images.width, images.channels) if images.patch else (0, 0, 0)))


def student_params(teacher: weights.Params, num_layers: int) -> weights.Params:
    """The teacher's weights with n = `num_layers` of its L blocks, spread evenly: those at i·L // n.

    Source: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 3, for every second block.

    Raises:
      ValueError: the teacher's blocks are two stacks (it was frozen), or fewer than asked for.
    """
    if STACKS[0] in teacher:
        raise ValueError("distill.from_layers needs a teacher whose blocks are one stack; this one was partly frozen.")
    depth = jax.tree.leaves(teacher["layers"])[0].shape[0]
    if not 1 <= num_layers <= depth:
        raise ValueError(f"The teacher has {depth} layers; a student of {num_layers} cannot be made of them.")
    chosen = np.arange(num_layers) * depth // num_layers
    return teacher | {"layers": jax.tree.map(lambda a: a[chosen], teacher["layers"])}


class StoredLogits:
    """A teacher's likeliest tokens on the batches of one run, a file a step.

    Step n's file holds what the teacher says of the n-th training batch, as float32 log-probabilities and integer
    tokens (`evaluation.distillation.StoredTeacher`): 4 (k + 1) + 2 k bytes a token of a vocabulary below 65536. Each
    knows a checksum of its batch's inputs, so that what was stored for other data is never learned from.
    """

    SCHEMA = "jaxcost-teacher-1"

    def __init__(self, directory: Path, description: dict[str, Any], steps: int):
        """Opens a folder for a run.

        Args:
          directory: holds, or will hold, the store.
          description: what must be the same where it is written and read: data, vocabulary, temperature, k, teacher.
          steps: of the run.

        Raises:
          ValueError: the folder holds what was stored for another run; the message says what differs.
        """
        self._directory = Path(directory)
        self._description = {"schema": self.SCHEMA} | description
        self._steps = steps
        path = self._directory / "store.json"
        if path.is_file():
            found = json.loads(path.read_text())
            differing = [name for name in self._description if found.get(name) != self._description[name]]
            if differing:
                raise ValueError(
                    f"{directory} holds a teacher's logits of a run with another {', '.join(differing)}; "
                    "choose another distill.store, or give the settings that it was made with."
                )

    def missing(self) -> int:
        """Steps that are not stored yet."""
        return sum(not self._path(step).is_file() for step in range(1, self._steps + 1))

    def write(self, teacher: Teacher, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh) -> None:
        """Stores what the teacher says of the first `steps` batches; what is there already is not made again."""
        k, temperature = self._description["top_k"], self._description["temperature"]

        def said(params, batch):
            return top_k_log_probs(Teacher(teacher.model, params).logits(batch), k, temperature)

        said = jax.jit(said)
        self._directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._directory / "store.json") as file:
            file.write(json.dumps(self._description, indent=1).encode())
        narrow = np.uint16 if teacher.model.config.vocab_size <= 2**16 else np.uint32
        with jax.set_mesh(mesh):
            for step, batch in zip(range(1, self._steps + 1), batches, strict=False):
                if self._path(step).is_file():
                    continue
                log_probs, indices = jax.device_get(said(teacher.params, sharding.place_batch(batch, mesh)))
                with atomic_write(self._path(step)) as file:
                    np.savez(file, log_probs=log_probs, indices=indices.astype(narrow), inputs=_checksum(batch))

    def read(self, step: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch of step `step` (from 1) with the teacher's part.

        Raises:
          ValueError: nothing is stored for the step, or it was stored for another batch.
        """
        if not self._path(step).is_file():
            raise ValueError(
                f"{self._directory} holds no teacher's logits for step {step}; give distill.teacher to store them."
            )
        with np.load(self._path(step)) as stored:
            if int(stored["inputs"]) != _checksum(batch):
                raise ValueError(
                    f"{self._path(step)} was stored for another batch than the one of step {step}; "
                    "choose another distill.store, or the data that it was made from."
                )
            return batch | {_LOG_PROBS: stored["log_probs"], _INDICES: stored["indices"].astype(np.int32)}

    def _path(self, step: int) -> Path:
        return self._directory / f"{step:08}.npz"


def _checksum(batch: dict[str, np.ndarray]) -> int:
    return zlib.crc32(np.ascontiguousarray(batch["inputs"], np.int32).tobytes())
