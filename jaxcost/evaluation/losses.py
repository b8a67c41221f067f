"""Losses and the sums that scores are made of."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxcost import weights
from jaxcost.models.heads import Output
from jaxcost.sharding import context_ways


def cross_entropy(
    hidden_BTD: jax.Array,
    output: Output,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    chunks: int = 1,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The summed negative log-likelihood in nats, and the number of targets that counted; both float32 scalars.

    Args:
      hidden_BTD: final hidden states in the compute dtype.
      output: what makes logits of them.
      targets_BT: int32 token ids.
      mask_BT: 1 where the target counts and 0 where it is padding.
      chunks: pieces that the time axis is cut into, at most; each piece's logits are made again in the backward pass,
        so the full (B, T, V) logits never exist. See `over_chunks`.
      key: random key for an output whose arithmetic is random.

    Raises:
      ValueError: there are not as many targets as hidden states, such as one for each token of a head that pools them.
    """
    if hidden_BTD.shape[:-1] != targets_BT.shape:
        raise ValueError(
            f"The model answers {hidden_BTD.shape[:-1]} times and the batch has {targets_BT.shape} targets; give one "
            "for each answer, or set model.head.pooling to 'none' for one a token."
        )

    def piece(hidden_BtD, targets_Bt, mask_Bt):
        logits_BtV = output(hidden_BtD, key)
        return (jnp.sum(negative_log_likelihood(logits_BtV, targets_Bt) * mask_Bt),)

    (total,) = over_chunks(piece, (hidden_BTD, targets_BT, mask_BT), chunks)
    return total, jnp.sum(mask_BT)


def shared_cross_entropy(
    hidden_BTD: jax.Array, output: Output, shares_BTC: jax.Array, mask_BT: jax.Array, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The summed cross-entropy in nats of answers that are several labels in shares, and how many answers counted.

    Both float32 scalars; of shares that are 1 for one label, those of `cross_entropy`.

    Args:
      hidden_BTD: final hidden states in the compute dtype; T is 1 of a head that pools them.
      output: what makes logits of them.
      shares_BTC: float32, shares of the labels (C), which add up to 1.
      mask_BT: 1 where the answer counts and 0 where it is padding.
      key: random key for an output whose arithmetic is random.
    """
    log_shares_BTC = jax.nn.log_softmax(output(hidden_BTD, key), axis=-1)
    return -jnp.sum(shares_BTC * log_shares_BTC * mask_BT[..., None]), jnp.sum(mask_BT)


def squared_error(
    hidden_BTD: jax.Array, output: Output, targets_BT: jax.Array, mask_BT: jax.Array, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The summed squared difference of numbers from the right ones, and how many counted; both float32 scalars.

    Args:
      hidden_BTD: final hidden states in the compute dtype; T is 1 of a head that pools them.
      output: what makes one number of each.
      targets_BT: float32, the right numbers.
      mask_BT: 1 where the target counts and 0 where it is padding.
      key: random key for an output whose arithmetic is random.

    Raises:
      ValueError: there are not as many targets as hidden states, or the output is of more numbers than one.
    """
    found_BT1 = output(hidden_BTD, key)
    if found_BT1.shape != (*targets_BT.shape, 1):
        raise ValueError(
            f"The model answers with numbers of the shape {found_BT1.shape} and the batch has {targets_BT.shape} "
            "targets; a regression takes one for each, so set model.head.outputs to 1 and model.head.pooling to say "
            "of what."
        )
    return jnp.sum((found_BT1[..., 0] - targets_BT) ** 2 * mask_BT), jnp.sum(mask_BT)


def negative_log_likelihood(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Nats of each target (B, T), from float32 logits."""
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def sampled_binary_cross_entropy(
    hidden_BTD: jax.Array,
    output: Output,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    key: jax.Array,
    negatives: int = 1,
    first: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """The summed nats of telling each target from items drawn at random, and the number of targets; float32 scalars.

    -log σ(r_target) - Σ log(1 - σ(r_negative)), where negatives are drawn uniformly from all items but the target: the
    logits of the whole catalogue never exist. Source: Kang and McAuley 2018 (SASRec), arXiv:1808.09781, section III-E,
    which draws one, and none of the user's other items either.

    Args:
      hidden_BTD: final hidden states in the compute dtype.
      output: what makes logits of them.
      targets_BT: int32 item ids.
      mask_BT: 1 where the target counts and 0 where it is padding.
      key: random key of the negatives.
      negatives: drawn for each target, at least 1.
      first: the first id that is drawn, such as 1 where 0 is no item but padding.

    Raises:
      ValueError: there is no item but the target to draw, or nothing is drawn.
    """
    items = jax.eval_shape(weights.materialize, output.matrix).shape[-1] - first
    if negatives < 1 or first < 0 or items < 2:
        raise ValueError(
            f"negatives is {negatives} and first is {first}, of {first + items} ids; draw at least 1 of at least 2."
        )
    drawn_BTn = first + jax.random.randint(key, (*targets_BT.shape, negatives), 0, items - 1)
    # Those from the target on move up by one, so that it is left out and all others stay equally likely.
    drawn_BTn += drawn_BTn >= targets_BT[..., None]
    scores_BTn = output.of(hidden_BTD, jnp.concatenate([targets_BT[..., None], drawn_BTn], axis=-1))
    nats_BT = jax.nn.softplus(-scores_BTn[..., 0]) + jnp.sum(jax.nn.softplus(scores_BTn[..., 1:]), axis=-1)
    return jnp.sum(nats_BT * mask_BT), jnp.sum(mask_BT)


def listwise_softmax(
    scores_QC: jax.Array, relevance_QC: jax.Array, mask_QC: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The summed softmax cross-entropy of each query's candidates, and the number of queries that have a relevant one.

    -Σ_i y_i log softmax(s)_i, in nats; both float32 scalars. Sources: Cao et al. 2007 (ListNet); in this form Zhuang et
    al. 2022 (RankT5), arXiv:2210.10634.

    Args:
      scores_QC: a cross-encoder's scores of the candidates (C) of each query (Q): the outputs of a head with one.
      relevance_QC: y, 0 of a candidate that is not relevant; 1, or a grade, of one that is.
      mask_QC: 0 of padding among the candidates; all count if it is not given.
    """
    mask_QC = jnp.ones(scores_QC.shape) if mask_QC is None else mask_QC
    relevance_QC = relevance_QC * mask_QC
    log_share_QC = jax.nn.log_softmax(jnp.where(mask_QC > 0, scores_QC.astype(jnp.float32), -jnp.inf), axis=-1)
    # A query without candidates has no shares, and padding none that is a number.
    total = -jnp.sum(relevance_QC * jnp.where(relevance_QC > 0, log_share_QC, 0.0))
    return total, jnp.sum(jnp.any(relevance_QC > 0, axis=-1), dtype=jnp.float32)


def pairwise_logistic(
    scores_QC: jax.Array, relevance_QC: jax.Array, mask_QC: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The summed log(1 + exp(s_j - s_i)) over pairs in which i is more relevant than j, and the number of pairs.

    Both float32 scalars. Sources: Burges et al. 2005 (RankNet); in this form Zhuang et al. 2022 (RankT5),
    arXiv:2210.10634. Arguments are those of `listwise_softmax`.
    """
    mask_QC = jnp.ones(scores_QC.shape) if mask_QC is None else mask_QC
    scores_QC = scores_QC.astype(jnp.float32)
    better_QCC = relevance_QC[:, :, None] > relevance_QC[:, None, :]
    pairs_QCC = better_QCC * mask_QC[:, :, None] * mask_QC[:, None, :]
    return jnp.sum(pairs_QCC * jax.nn.softplus(scores_QC[:, None, :] - scores_QC[:, :, None])), jnp.sum(pairs_QCC)


def ctc_loss(
    hidden_BTD: jax.Array,
    output: Output,
    labels_BN: jax.Array,
    mask_BN: jax.Array,
    valid_BT: jax.Array | None = None,
    *,
    blank: int = 0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The summed negative log-likelihood in nats of labels over all their alignments with the frames, and the number of
    labels that counted; both float32 scalars.

    Labels that do not fit into a row's frames, with a blank between two that are the same, have no alignment: they cost
    nothing and get no gradient, but count. Source: Graves et al. 2006, Connectionist temporal classification, ICML.

    Args:
      hidden_BTD: final hidden states of the frames in the compute dtype.
      output: what makes logits of them, the blank's among them.
      labels_BN: int32 labels, none of which is the blank.
      mask_BN: 1 where a label counts and 0 where it is padding, which stands behind the labels.
      valid_BT: frames of no padding; all if not given.
      blank: id of the blank.
      key: random key for an output whose arithmetic is random.

    Raises:
      ValueError: the blank is none of the outputs, or there is not a row of labels for each row of frames.
    """
    logits_BTV = output(hidden_BTD, key)
    if not 0 <= blank < logits_BTV.shape[-1]:
        raise ValueError(f"The blank is {blank}, which is none of the model's {logits_BTV.shape[-1]} outputs.")
    if len(labels_BN) != len(logits_BTV):
        raise ValueError(f"There are {len(labels_BN)} rows of labels for {len(logits_BTV)} rows of frames.")
    valid_BT = jnp.ones(logits_BTV.shape[:2], bool) if valid_BT is None else valid_BT
    repeated_BN = (labels_BN[:, 1:] == labels_BN[:, :-1]) * mask_BN[:, 1:]
    needed_B = jnp.sum(mask_BN, axis=1) + jnp.sum(repeated_BN, axis=1)
    fits_B = needed_B <= jnp.sum(valid_BT, axis=1)
    # It picks the labels' log-probabilities by a product, which TPUs round to bfloat16 unless told otherwise.
    with jax.default_matmul_precision("float32"):
        nats_B = optax.ctc_loss(logits_BTV, 1.0 - valid_BT, labels_BN, 1.0 - mask_BN, blank_id=blank)
    return jnp.sum(jnp.where(fits_B, nats_B, 0.0)), jnp.sum(mask_BN).astype(jnp.float32)


def over_chunks(
    piece: Callable[..., tuple[jax.Array, ...]], arrays: tuple[jax.Array, ...], chunks: int
) -> tuple[jax.Array, ...]:
    """The sums of piece(*arrays) over pieces of the time axis, each made again in the backward pass.

    Args:
      piece: arrays cut along axis 1 → float32 scalars to add up.
      arrays: (B, T, ...).
      chunks: pieces at most; a number that does not divide T is lowered to one that does. Where the mesh splits T, a
        piece takes tokens from every device's part.
    """
    length = arrays[0].shape[1]
    ways = context_ways(length)
    part = length // ways
    chunks = max(n for n in range(1, min(chunks, part) + 1) if part % n == 0)
    if chunks == 1:
        return piece(*arrays)

    def split(x):
        pieces = jnp.moveaxis(x.reshape(x.shape[0], ways, chunks, part // chunks, *x.shape[2:]), 2, 0)
        return pieces.reshape(chunks, x.shape[0], length // chunks, *x.shape[2:])

    def step(totals, chunk):
        return jax.tree.map(jnp.add, totals, jax.checkpoint(piece)(*chunk)), None

    cut = tuple(map(split, arrays))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(piece, *(x[0] for x in cut)))
    return jax.lax.scan(step, zeros, cut)[0]
