"""Losses of a student against its teacher: logits at a temperature, stored or made on the spot, states and attention.

Shapes in names: B batch, T tokens, D width, E the teacher's width, V vocabulary, k stored entries, N and M heads, h
their size.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from jaxcost import weights
from jaxcost.evaluation.losses import negative_log_likelihood, over_chunks
from jaxcost.models.attention import Scores, log_probabilities, runs, together
from jaxcost.models.heads import Output

Direction = Literal["forward", "reverse"]
"""KL(teacher ‖ student), which covers all that the teacher does, or KL(student ‖ teacher), which seeks its modes."""


@struct.dataclass
class HiddenTeacher:
    """A teacher whose logits are made a piece at a time."""

    hidden_BTE: jax.Array
    """Its final hidden states."""
    output: Output
    """What makes its logits of them."""


@struct.dataclass
class StoredTeacher:
    """The likeliest tokens of a teacher, at one temperature, and what is left to all others together."""

    log_probs_BTk: jax.Array
    """float32 (B, T, k + 1): log-probabilities, that of all other tokens together last; -inf where there are none."""
    indices_BTk: jax.Array
    """int32 (B, T, k): the tokens, the likeliest first."""


@struct.dataclass
class Relation:
    """How much each token of a layer has to do with those that it sees: softmax(left · right) over them, head by head.

    Of queries and keys these are the attention's own probabilities; of values and values, what the layer hands on.
    """

    left_BTNh: jax.Array
    """Vectors of the tokens that look."""
    right_BTMh: jax.Array
    """Vectors of those that are looked at; N is a multiple of M."""
    scores: Scores = struct.field(pytree_node=False, default=Scores())
    """How products become scores."""


def kl_divergence(
    teacher: jax.Array, student: jax.Array, temperature: float = 1.0, direction: Direction = "forward"
) -> jax.Array:
    """T² times the divergence between softmax(teacher / T) and softmax(student / T), in nats; float32 (...).

    T² keeps the gradient's size when the temperature changes. Sources: Hinton, Vinyals and Dean 2015,
    arXiv:1503.02531 (forward); Gu et al. 2023, arXiv:2306.08543 (reverse).

    Args:
      teacher: logits (..., V).
      student: logits (..., V).
      temperature: T, above 0.
      direction: which of the two the expectation is taken over.
    """
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return temperature**2 * _divergence(log_p, log_q, direction)


def top_k_log_probs(logits: jax.Array, k: int, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """What `StoredTeacher` holds, of logits (..., V): float32 (..., k + 1) and int32 (..., k)."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    values, indices = jax.lax.top_k(log_p, k)
    return jnp.concatenate([values, _rest(log_p, indices)], axis=-1), indices


def stored_divergence(
    log_probs: jax.Array,
    indices: jax.Array,
    student: jax.Array,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> jax.Array:
    """`kl_divergence` where only the teacher's k likeliest tokens are known one by one; float32 (...).

    All other tokens count as one, for the teacher and for the student: what the teacher left to them is neither lost
    nor handed to the k, so that a student is not taught to be surer than its teacher. Merging outcomes can only lower
    a divergence: this is a lower bound of the full one, and equals it at k = V.

    Args:
      log_probs: (..., k + 1), see `StoredTeacher`; of the same temperature.
      indices: int32 (..., k).
      student: logits (..., V).
      temperature: T.
      direction: as of `kl_divergence`.
    """
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    chosen = jnp.take_along_axis(log_q, indices, axis=-1)
    if indices.shape[-1] == student.shape[-1]:
        return temperature**2 * _divergence(log_probs[..., :-1], chosen, direction)
    together = jnp.concatenate([chosen, _rest(log_q, indices)], axis=-1)
    return temperature**2 * _divergence(log_probs, together, direction)


def distillation_loss(
    hidden_BTD: jax.Array,
    output: Output,
    teacher: HiddenTeacher | StoredTeacher,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    temperature: float,
    direction: Direction = "forward",
    chunks: int = 1,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The summed negative log-likelihood of the targets and the summed divergence from the teacher; float32 scalars.

    The student's logits are made once for both. No gradient reaches the teacher.

    Args:
      hidden_BTD: the student's final hidden states.
      output: what makes its logits of them.
      teacher: what it is taught by.
      targets_BT: int32 token ids.
      mask_BT: 1 where the token counts.
      temperature: of the divergence alone; the likelihood is at 1.
      direction: as of `kl_divergence`.
      chunks: as of `cross_entropy`; neither's (B, T, V) logits exist whole if there are more than one.
      key: random key for an output of the student whose arithmetic is random.
    """
    teacher = jax.lax.stop_gradient(teacher)

    def piece(hidden_BtD, targets_Bt, mask_Bt, *taught):
        logits_BtV = output(hidden_BtD, key)
        if isinstance(teacher, HiddenTeacher):
            teacher_BtV = teacher.output(taught[0])
            divergence_Bt = kl_divergence(teacher_BtV, logits_BtV, temperature, direction)
        else:
            divergence_Bt = stored_divergence(*taught, logits_BtV, temperature, direction)
        likelihood_Bt = negative_log_likelihood(logits_BtV, targets_Bt)
        return jnp.sum(likelihood_Bt * mask_Bt), jnp.sum(divergence_Bt * mask_Bt)

    online = isinstance(teacher, HiddenTeacher)
    taught = (teacher.hidden_BTE,) if online else (teacher.log_probs_BTk, teacher.indices_BTk)
    return over_chunks(piece, (hidden_BTD, targets_BT, mask_BT, *taught), chunks)


def hidden_loss(
    hidden_BTD: jax.Array, teacher_BTE: jax.Array, projection_DE: jax.Array | None, mask_BT: jax.Array
) -> jax.Array:
    """The mean squared difference of the projected states from the teacher's, summed over tokens; a float32 scalar.

    Source: Romero et al. 2014 (FitNets), arXiv:1412.6550, with a linear regressor.

    Args:
      hidden_BTD: the student's hidden states.
      teacher_BTE: the teacher's, to which no gradient flows.
      projection_DE: from the one width to the other; None where they are the same and compared as they are.
      mask_BT: 1 where the token counts.
    """
    projected = hidden_BTD if projection_DE is None else weights.contract(hidden_BTD, projection_DE)
    difference = projected.astype(jnp.float32) - jax.lax.stop_gradient(teacher_BTE).astype(jnp.float32)
    return jnp.sum(jnp.mean(jnp.square(difference), axis=-1) * mask_BT)


def relation_loss(
    student: Relation,
    teacher: Relation,
    mask_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    chunks: int = 1,
) -> jax.Array:
    """The divergence of the student's relation from the teacher's, the mean over heads, summed over tokens; float32.

    Heads may have any size, but must be as many. No gradient reaches the teacher. Source: Wang et al. 2020 (MiniLM),
    arXiv:2002.10957, equations 6 and 8, with causal relations in the place of bidirectional ones.

    Args:
      student: its relation.
      teacher: the teacher's, of the same tokens.
      mask_BT: 1 where the token that looks counts.
      segments_BT: of several sequences in one row, or what is valid, as the models met them; each sees its own alone.
      chunks: as of `cross_entropy`; no (B, N, T, T) array exists whole if there are more than one.

    Raises:
      ValueError: the heads are not as many, or see other tokens.
    """
    ours, theirs = (relation.left_BTNh.shape[2] for relation in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"Attention is compared head by head, and the teacher's last layer has {theirs} where the student's has "
            f"{ours}; give both as many, or leave that loss out."
        )
    windows = [relation.scores.window for relation in (student, teacher)]
    if windows[0] != windows[1]:
        said = " and ".join(str(window) if window else "all" for window in windows)
        raise ValueError(
            f"Attention is compared token by token, and the last layers of student and teacher see {said} of them; "
            "give both the same window, or leave that loss out."
        )
    teacher = jax.lax.stop_gradient(teacher)
    positions_BT = jnp.broadcast_to(jnp.arange(mask_BT.shape[1]), mask_BT.shape)

    segments_BT = None if segments_BT is None else runs(segments_BT.astype(jnp.int32))

    def piece(mask_Bt, positions_Bt, theirs_BtNh, ours_BtNh, segments_Bt=None):
        seen_BtT = None if segments_Bt is None else together(segments_Bt, segments_BT)
        found = [
            log_probabilities(left, relation.right_BTMh, positions_Bt, relation.scores, seen_BtT)
            for left, relation in ((theirs_BtNh, teacher), (ours_BtNh, student))
        ]
        divergence_BNt = _divergence(*found, "forward")
        return (jnp.sum(jnp.mean(divergence_BNt, axis=1) * mask_Bt),)

    arrays = (mask_BT, positions_BT, teacher.left_BTNh, student.left_BTNh)
    (total,) = over_chunks(piece, arrays if segments_BT is None else (*arrays, segments_BT), chunks)
    return total


def _divergence(log_p: jax.Array, log_q: jax.Array, direction: Direction) -> jax.Array:
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    return jnp.sum(jnp.exp(first) * (first - second), axis=-1)


def _rest(log_p: jax.Array, indices: jax.Array) -> jax.Array:
    """The log-probability (..., 1) of everything but the indices (..., k); -inf where that is nothing."""
    others = jnp.put_along_axis(log_p, indices, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1, keepdims=True)
