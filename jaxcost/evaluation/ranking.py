"""Where a recommender ranks the item that came next, among the whole catalogue: hit rate, NDCG and reciprocal rank.

A metric over sampled candidates orders models otherwise than one over all items (Krichene and Rendle 2020, KDD), so
there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcost import sharding, weights
from jaxcost.models.transformer import Transformer, logits

Batch = Mapping[str, np.ndarray]
"""`inputs`, int32 (B, T), histories padded on the right; `valid`, bool (B, T); `targets`, int32 (B, 1): what came next;
`mask`, float32 (B, 1), 0 of rows that fill a batch up."""


@dataclasses.dataclass(frozen=True)
class RankingScore:
    """Means over the users whose next item was ranked."""

    hit_rate: float
    """Share of items among the first k: of one item each, the recall too."""
    ndcg: float
    """1 / log2(1 + rank) of items among the first k, and 0 of others: with one item each, the ideal gain is 1."""
    mrr: float
    """1 / rank, over all ranks."""
    k: int
    """Places that hit rate and NDCG look at."""
    ranked_items: int
    """Items that were ranked."""


def ranks_of(
    scores_BV: jax.Array,
    targets_B: jax.Array,
    excluded_BT: jax.Array | None = None,
    valid_BT: jax.Array | None = None,
    first: int = 0,
) -> jax.Array:
    """The place of each target in the order of all scores, int32 (B,), 1 for the best.

    Items that score as high as the target stand before it, so that a model that scores all alike finds nothing.

    Args:
      scores_BV: of every item.
      targets_B: int32 item ids.
      excluded_BT: int32 items that are not ranked, such as those of the history; a target among them is ranked.
      valid_BT: which of the excluded are items; all if it is not given.
      first: the first id that is ranked, such as 1 where 0 is no item but padding.
    """
    rows, items = jnp.arange(len(scores_BV))[:, None], scores_BV.shape[-1]
    ranked_BV = jnp.broadcast_to(jnp.arange(items) >= first, scores_BV.shape)
    if excluded_BT is not None:
        excluded_BT = excluded_BT if valid_BT is None else jnp.where(valid_BT, excluded_BT, items)
        ranked_BV = ranked_BV.at[rows, excluded_BT].set(False, mode="drop")
    ranked_BV = ranked_BV.at[rows, targets_B[:, None]].set(True)
    target_B1 = jnp.take_along_axis(scores_BV, targets_B[:, None], axis=-1)
    # NaN is no score: what a broken model ranks comes last.
    before_BV = ranked_BV & ~(scores_BV < target_B1)
    return jnp.sum(before_BV, axis=-1, dtype=jnp.int32)


def ranking_score(ranks: np.ndarray, k: int = 10) -> RankingScore:
    """The means over ranks (N,), from 1; ValueError if there are none or k is below 1."""
    ranks = np.asarray(ranks, np.float64)
    if k < 1 or not ranks.size:
        raise ValueError(f"There are {ranks.size} ranks and k is {k}; rank at least one item among the first 1.")
    hit = ranks <= k
    return RankingScore(
        hit_rate=float(np.mean(hit)),
        ndcg=float(np.mean(np.where(hit, 1 / np.log2(1 + ranks), 0.0))),
        mrr=float(np.mean(1 / ranks)),
        k=k,
        ranked_items=ranks.size,
    )


class Ranker:
    """Ranks what came next after fixed histories, for weights of any kinds; compiles once for each structure."""

    def __init__(
        self,
        model: Transformer,
        batches: Iterable[Batch],
        mesh: Mesh,
        *,
        k: int = 10,
        exclude_history: bool = False,
        first: int = 0,
    ):
        """ValueError if the model gives anything but the next item; `first` is that of `ranks_of`."""
        if not model.config.language_model:
            raise ValueError(
                "Ranking takes a causal model with logits of all items; set model.causal, and leave model.head as it "
                "is by default."
            )
        self._batches, self._mesh, self._k = list(batches), mesh, k

        def ranks(params, batch):
            hidden_BTD, _ = model.apply({"params": params}, batch["inputs"], valid_BT=batch["valid"])
            last_B = jnp.maximum(jnp.sum(batch["valid"], axis=1) - 1, 0)
            last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
            seen = (batch["inputs"], batch["valid"]) if exclude_history else (None, None)
            return ranks_of(logits(model.config, params, last_BD), batch["targets"][:, 0], *seen, first)

        self._ranks = jax.jit(ranks)

    def __call__(self, params: weights.Params) -> RankingScore:
        """The score of one set of weights."""
        with jax.set_mesh(self._mesh):
            found = [self._ranks(params, sharding.place_batch(batch, self._mesh)) for batch in self._batches]
        kept = [np.asarray(ranks)[batch["mask"][:, 0] > 0] for ranks, batch in zip(found, self._batches, strict=True)]
        return ranking_score(np.concatenate(kept), self._k)
