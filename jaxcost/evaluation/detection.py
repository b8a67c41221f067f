"""Objects in images: how what was found is matched with what is there, the loss of that, and average precision.

Boxes are (centre x, centre y, width, height), shares of the image's from 0 to 1. Shapes in names: B images, N places
where a model may find an object, M objects at most, C labels with that of no object, which is the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec

from jaxcost.evaluation.losses import negative_log_likelihood
from jaxcost.sharding import mesh_spec

_TINY = 1e-12
_HOPELESS = 1e6
"""Cost of a pair whose cost is no number: the search for the best matching would not end."""


@dataclasses.dataclass(frozen=True)
class SetWeights:
    """How much each part counts, in the matching and in the loss."""

    labels: float = 1.0
    """Of the label: its probability in the matching, its cross-entropy in the loss."""
    distance: float = 5.0
    """Of the sum of the differences between two boxes' four numbers."""
    overlap: float = 2.0
    """Of the generalised intersection over union."""
    no_object: float = 0.1
    """Of the places where no object is, beside 1 of those where one is."""


DETR = SetWeights()
"""Those of DETR and of YOLOS."""


@struct.dataclass
class SetLosses:
    """The parts of the loss, float32 scalars."""

    labels: jax.Array
    """Cross-entropy, a mean over all places with their weights, in nats."""
    distance: jax.Array
    """Sum of the differences between boxes, a mean over objects."""
    overlap: jax.Array
    """1 - generalised intersection over union, a mean over objects."""
    objects: jax.Array
    """The number of objects, at least 1."""

    def total(self, weights: SetWeights = DETR) -> jax.Array:
        """What is minimised."""
        return weights.labels * self.labels + weights.distance * self.distance + weights.overlap * self.overlap


def generalized_iou(left: jax.Array, right: jax.Array) -> jax.Array:
    """Generalised intersection over union of boxes (..., 4) and (..., 4), which broadcast: (...), from -1 to 1.

    The intersection over the union, less the share of the smallest box around both that neither fills. Source:
    Rezatofighi et al. 2019, arXiv:1902.09630.
    """
    (low, high), (other_low, other_high) = _corners(left), _corners(right)
    shared = _area(jnp.maximum(low, other_low), jnp.minimum(high, other_high))
    union = _area(low, high) + _area(other_low, other_high) - shared
    around = _area(jnp.minimum(low, other_low), jnp.maximum(high, other_high))
    return shared / jnp.maximum(union, _TINY) - (around - union) / jnp.maximum(around, _TINY)


def match(
    logits_BNC: jax.Array,
    boxes_BN4: jax.Array,
    labels_BM: jax.Array,
    objects_BM4: jax.Array,
    mask_BM: jax.Array,
    weights: SetWeights = DETR,
) -> jax.Array:
    """The place that finds each object, int32 (B, M): no two of an image the same, and together the cheapest.

    A pair costs distance · Σ|box - object| - labels · p(label) - overlap · gIoU. The objects of the padding take places
    that are left. Source: Carion et al. 2020 (DETR), arXiv:2005.12872, section 3.1, by the Hungarian algorithm.

    Raises:
      ValueError: there may be more objects than places.
    """
    places, objects = logits_BNC.shape[1], labels_BM.shape[1]
    if objects > places:
        raise ValueError(
            f"Images may have {objects} objects and the model finds {places}; cut the padding of the objects, or raise "
            "model.images.detection_tokens."
        )
    shares_BNC = jax.nn.softmax(logits_BNC)
    likely_BNM = jnp.take_along_axis(shares_BNC, labels_BM[:, None], axis=-1, mode="clip")
    pair = (boxes_BN4[:, :, None], objects_BM4[:, None])
    distance_BNM = jnp.sum(jnp.abs(pair[0] - pair[1]), axis=-1)
    cost_BNM = weights.distance * distance_BNM - weights.labels * likely_BNM - weights.overlap * generalized_iou(*pair)
    cost_BNM = jnp.where(mask_BM[:, None] > 0, cost_BNM, 0.0)
    cost_BNM = jax.lax.stop_gradient(jnp.where(jnp.isfinite(cost_BNM), cost_BNM, _HOPELESS))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _cheapest(cost_BNM)
    # Loops over the images of all devices would ask all of them, turn by turn, whether to go on.
    images = mesh_spec(PartitionSpec("batch"), mesh.shape)
    return jax.shard_map(_cheapest, in_specs=images, out_specs=images, check_vma=False)(cost_BNM)


@jax.vmap
def _cheapest(cost_NM: jax.Array) -> jax.Array:
    """The place of each object, int32 (M,), at the least cost of all together."""
    rows, columns = optax.assignment.hungarian_algorithm(cost_NM)
    return jnp.zeros(cost_NM.shape[1], jnp.int32).at[columns].set(rows.astype(jnp.int32))


def set_losses(
    logits_BNC: jax.Array,
    boxes_BN4: jax.Array,
    labels_BM: jax.Array,
    objects_BM4: jax.Array,
    mask_BM: jax.Array,
    weights: SetWeights = DETR,
) -> SetLosses:
    """The parts of the loss of a set of boxes, after the cheapest matching.

    Source: Carion et al. 2020 (DETR), arXiv:2005.12872, section 3.1 and appendix A.2, as its code and YOLOS have it:
    the cross-entropy is a mean by weights and not one over objects.

    Args:
      logits_BNC: float32, of all labels and, last, of no object.
      boxes_BN4: where the model sees them.
      labels_BM: int32, of the objects that are there.
      objects_BM4: where they are.
      mask_BM: 1 of an object and 0 of padding.
      weights: of the matching, and of places without an object.

    Raises:
      ValueError: there may be more objects than places.
    """
    places, nothing = logits_BNC.shape[1], logits_BNC.shape[-1] - 1
    matched_BM = match(logits_BNC, boxes_BN4, labels_BM, objects_BM4, mask_BM, weights)
    there_BM = jnp.where(mask_BM > 0, matched_BM, places)
    rows = jnp.arange(len(labels_BM))[:, None]
    classes_BN = jnp.full(logits_BNC.shape[:2], nothing).at[rows, there_BM].set(labels_BM, mode="drop")
    weight_BN = jnp.where(classes_BN == nothing, weights.no_object, 1.0)
    nats_BN = negative_log_likelihood(logits_BNC, classes_BN)
    found_BM4 = jnp.take_along_axis(boxes_BN4, matched_BM[..., None], axis=1)
    count = jnp.maximum(jnp.sum(mask_BM, dtype=jnp.float32), 1.0)
    return SetLosses(
        labels=jnp.sum(weight_BN * nats_BN) / jnp.sum(weight_BN),
        distance=jnp.sum(mask_BM[..., None] * jnp.abs(found_BM4 - objects_BM4)) / count,
        overlap=jnp.sum(mask_BM * (1 - generalized_iou(found_BM4, objects_BM4))) / count,
        objects=count,
    )


def detection_loss(
    logits_BNC: jax.Array,
    boxes_BN4: jax.Array,
    labels_BM: jax.Array,
    objects_BM4: jax.Array,
    mask_BM: jax.Array,
    weights: SetWeights = DETR,
) -> tuple[jax.Array, jax.Array]:
    """The loss times the number of objects (at least 1), and that number, as the other losses give it; float32 scalars.

    Arguments and errors are those of `set_losses`.
    """
    parts = set_losses(logits_BNC, boxes_BN4, labels_BM, objects_BM4, mask_BM, weights)
    return parts.total(weights) * parts.objects, parts.objects


def _corners(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The corners (..., 2) of boxes (..., 4) with the smallest and the largest coordinates."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return centre - half, centre + half


def _area(low: jax.Array, high: jax.Array) -> jax.Array:
    """Of boxes by their corners; 0 where they are on the wrong sides of each other."""
    sides = (high - low).clip(0)
    return sides[..., 0] * sides[..., 1]


# ---- Average precision ----

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""Intersections over union from which on an object counts as found, as in COCO."""
_RECALLS = np.linspace(0, 1, 101)


@dataclasses.dataclass(frozen=True)
class Objects:
    """What is on an image, or what a model says of it."""

    boxes: np.ndarray
    """(n, 4)."""
    labels: np.ndarray
    """int (n,)."""
    scores: np.ndarray | None = None
    """(n,), how sure the model is; None of what is there."""


@dataclasses.dataclass(frozen=True)
class DetectionScore:
    """Average precision, a mean over the labels of which there are objects."""

    ap: float
    """A mean over the thresholds from 0.5 to 0.95."""
    ap_50: float
    """Of those that are found with an intersection over union of at least 0.5."""
    labels: int
    """Labels of which there are objects."""


def found_objects(logits_BNC: np.ndarray, boxes_BN4: np.ndarray) -> list[Objects]:
    """What a model says of each image: for every place the likeliest label but that of no object, and its probability.

    Source: Carion et al. 2020 (DETR), arXiv:2005.12872, section 4, which optimises AP so.
    """
    shares_BNC = np.asarray(jax.nn.softmax(logits_BNC))[..., :-1]
    best = zip(np.asarray(boxes_BN4), shares_BNC.argmax(axis=-1), shares_BNC.max(axis=-1), strict=True)
    return [Objects(boxes, labels, scores) for boxes, labels, scores in best]


def average_precision(found: Sequence[Objects], there: Sequence[Objects], most: int = 100) -> DetectionScore:
    """COCO's average precision of objects of all sizes, on the host.

    Of each label, what was found is taken from the surest on, and each finds the object that it overlaps most of those
    that were not found yet, if by the threshold at least. The precision at a recall is the largest at that recall or a
    higher one, and is averaged over 101 recalls. Source: Lin et al. 2014 (COCO), arXiv:1405.0312, and its evaluation's
    code.

    Args:
      found: of each image, with scores.
      there: of the same images.
      most: that count of an image and label, the surest ones.

    Raises:
      ValueError: there are not as many images in both, no object, or objects without scores are to be what was found.
    """
    if len(found) != len(there) or not sum(len(image.labels) for image in there):
        raise ValueError(
            f"There are {len(found)} images with what was found and {len(there)} with what is there; give both of the "
            "same images, with at least one object."
        )
    if any(image.scores is None for image in found):
        raise ValueError("What was found has no scores, by which it is ordered; give them.")
    labels = np.unique(np.concatenate([image.labels for image in there]))
    precisions_LT = np.array([_label_precision(label, found, there, most) for label in labels])
    return DetectionScore(float(precisions_LT.mean()), float(precisions_LT[:, 0].mean()), len(labels))


def _label_precision(label: int, found: Sequence[Objects], there: Sequence[Objects], most: int) -> np.ndarray:
    """The average precision (T,) of one label at each threshold."""
    scores, right, objects = [], [], 0
    for guess, truth in zip(found, there, strict=True):
        truth_boxes = truth.boxes[truth.labels == label]
        mine = guess.labels == label
        order = np.argsort(-guess.scores[mine], kind="stable")[:most]
        scores.append(guess.scores[mine][order])
        right.append(_hits(guess.boxes[mine][order], truth_boxes))
        objects += len(truth_boxes)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits_Tn = np.cumsum(np.concatenate(right, axis=1)[:, order], axis=1)
    recall_Tn, precision_Tn = hits_Tn / objects, hits_Tn / np.arange(1, len(order) + 1)
    # The largest precision at a recall or behind it, and 0 behind the last.
    best_Tn = np.maximum.accumulate(precision_Tn[:, ::-1], axis=1)[:, ::-1]
    best_Tn = np.pad(best_Tn, ((0, 0), (0, 1)))
    each = zip(recall_Tn, best_Tn, strict=True)
    return np.array([best[np.searchsorted(recall, _RECALLS)].mean() for recall, best in each])


def _hits(guesses: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Whether each guess (n, 4), the surest first, finds an object of (m, 4) that none before it has: bool (T, n)."""
    hits = np.zeros((len(THRESHOLDS), len(guesses)), bool)
    overlaps = _iou(guesses[:, None], truths[None]) if len(truths) else np.zeros((len(guesses), 0))
    for row, threshold in zip(hits, THRESHOLDS, strict=True):
        free = np.ones(len(truths), bool)
        for i, overlap in enumerate(overlaps):
            open_to_it = np.where(free, overlap, -1.0)
            best = int(np.argmax(open_to_it)) if len(truths) else -1
            if best >= 0 and open_to_it[best] >= threshold:
                row[i], free[best] = True, False
    return hits


def _iou(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (..., 4) and (..., 4), which broadcast; 0 of two that are empty."""
    (low, high), (other_low, other_high) = _corners(left), _corners(right)
    shared = _area(np.maximum(low, other_low), np.minimum(high, other_high))
    union = _area(low, high) + _area(other_low, other_high) - shared
    return shared / np.maximum(union, _TINY)
