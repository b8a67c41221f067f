"""Speculative decoding: a smaller model proposes tokens, and the model itself checks them all in one pass.

What comes out has exactly the distribution of the model alone, whatever the draft: a proposal d is kept with
probability min(1, p(d) / q(d)), and the first that is not is drawn anew from what p has more than q. Where tokens are
not drawn, the same rule keeps a proposal if it is the likeliest. Sources: Leviathan et al. 2022, arXiv:2211.17192; Chen
et al. 2023, arXiv:2302.01318. Shapes in names: B batch, V vocabulary, k proposals, T = k + 1 tokens of a round.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxcost import weights
from jaxcost.models.transformer import Cache, Transformer, logits
from jaxcost.serving.engine import Engine, padded_prompts, rows_for
from jaxcost.serving.sampling import GREEDY, Rows, Sampling, by_need, choose, probabilities
from jaxcost.serving.stopping import NEVER, Stop


@dataclasses.dataclass(frozen=True)
class Draft:
    """A smaller model that proposes tokens to another one."""

    model: Transformer
    params: weights.Params
    """Its weights, of any kinds."""
    tokens: int = 4
    """That it proposes in a round."""


def check_draft(model: Transformer, draft: Transformer, tokens: int) -> None:
    """ValueError if the vocabularies differ, the draft does not continue texts alone, or nothing is proposed."""
    if model.config.vocab_size != draft.config.vocab_size:
        raise ValueError(
            f"The draft has a vocabulary of {draft.config.vocab_size}, the model one of {model.config.vocab_size}; "
            "take a draft with the model's own tokenizer."
        )
    if not draft.config.language_model:
        raise ValueError("The draft does not continue texts by itself; take a causal model without an encoder.")
    if tokens < 1:
        raise ValueError(f"{tokens} proposals were asked for; ask for at least 1.")


@struct.dataclass
class Round:
    """What a round came to."""

    tokens_BT: jax.Array
    """int32: the new tokens, which are the proposals that were kept and one of the model's own; -1 behind them."""
    logits_BTV: jax.Array
    """float32: the model's, of each of them."""
    last_B: jax.Array
    """int32: the last new token, which is in no cache yet."""
    caches: tuple[Cache, Cache]
    """The model's and the draft's."""
    rows: Rows


def play_round(
    models: tuple[Transformer, Transformer],
    params: tuple[weights.Params, weights.Params],
    caches: tuple[Cache, Cache],
    last_B: jax.Array,
    rows: Rows,
    active_B: jax.Array,
    proposals: int,
) -> Round:
    """A round: the draft proposes tokens, and the model keeps a beginning of them and adds one.

    Args:
      models: the model and its draft.
      params: the weights of each.
      caches: what each has read, with room for `proposals + 1` further tokens.
      last_B: the last token of each row, int32, which is in no cache yet.
      rows: how tokens are chosen.
      active_B: bool, the rows that go on. Others keep their settings and the lengths of their caches; what is written
        behind these, and what the round says of them, means nothing.
      proposals: k, at least 1.
    """
    (model, draft), (own, draft_params), (cache, draft_cache), k = models, params, caches, proposals
    keys_Bn = _keys(rows, k + 3)

    def propose(carry, step):
        token_B, cache, rows = carry
        hidden_B1D, cache = draft.apply({"params": draft_params}, token_B[:, None], cache)
        logits_BV = logits(draft.config, draft_params, hidden_B1D[:, 0])

        def drawn(way: Rows):
            shares_BV = probabilities(way, logits_BV)
            return _drawn(way, keys_Bn, step, shares_BV), shares_BV

        token_B, shares_BV = by_need(rows, active_B, drawn)
        return (token_B, cache, rows.saw(token_B)), (token_B, shares_BV)

    # The last proposal is thrown away: its step is there for the cache, which must hold the one before it.
    (_, new_draft_cache, _), (proposed, q) = lax.scan(propose, (last_B, draft_cache, rows), jnp.arange(k + 1))
    proposed_Bk, q_BkV = proposed[:k].T, jnp.swapaxes(q[:k], 0, 1)

    tokens_BT = jnp.concatenate([last_B[:, None], proposed_Bk], axis=1)
    hidden_BTD, new_cache = model.apply({"params": own}, tokens_BT, cache)
    logits_BTV = logits(model.config, own, hidden_BTD)
    p_BTV = _probabilities(rows, proposed_Bk, logits_BTV, active_B)

    of_proposed = functools.partial(jnp.take_along_axis, indices=proposed_Bk[..., None], axis=-1)
    p_Bk, q_Bk = of_proposed(p_BTV[:, :k])[..., 0], of_proposed(q_BkV)[..., 0]
    uniform_Bk = 0.5 if keys_Bn is None else jax.vmap(lambda keys: jax.random.uniform(keys[k + 1], (k,)))(keys_Bn)
    kept_B = jnp.sum(jnp.cumprod(uniform_Bk * q_Bk < p_Bk, axis=1), axis=1)

    # What the model has more than the draft at the first proposal that was not kept; all of it after the last.
    at = functools.partial(jnp.take_along_axis, indices=kept_B[:, None, None], axis=1)
    p_BV, q_BV = at(p_BTV)[:, 0], at(jnp.pad(q_BkV, ((0, 0), (0, 1), (0, 0))))[:, 0]
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    rest_BV = jnp.where(jnp.sum(rest_BV, axis=-1, keepdims=True) > 0, rest_BV, p_BV)
    new_last_B = by_need(rows, active_B, lambda way: _drawn(way, keys_Bn, k + 2, rest_BV))

    place_T = jnp.arange(k + 1)
    made_BT = jnp.where(place_T < kept_B[:, None], jnp.pad(proposed_Bk, ((0, 0), (0, 1))), -1)
    made_BT = jnp.where(place_T == kept_B[:, None], new_last_B[:, None], made_BT)
    for step in range(k + 1):
        rows = rows.saw(made_BT[:, step], active_B & (step <= kept_B))
    grown_B = jnp.where(active_B, kept_B + 1, 0)
    # What was written of proposals that were not kept is masked, and overwritten as the row grows.
    new_cache = new_cache.replace(length=cache.length + grown_B)
    new_draft_cache = new_draft_cache.replace(length=draft_cache.length + grown_B)
    return Round(made_BT, logits_BTV, jnp.where(active_B, new_last_B, last_B), (new_cache, new_draft_cache), rows)


def _probabilities(rows: Rows, proposed_Bk: jax.Array, logits_BTV: jax.Array, active_B: jax.Array) -> jax.Array:
    """What the model would draw from after each of the proposals, and before the first, float32 (B, T, V)."""
    each = [rows]
    for step in range(proposed_Bk.shape[1]):
        each.append(each[-1].saw(proposed_Bk[:, step]))
    # As rows of one batch.
    flat = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
    rows = jax.tree.map(lambda *parts: flat(jnp.stack(parts, axis=1)), *each)
    active = jnp.repeat(active_B, len(each))
    return by_need(rows, active, lambda way: probabilities(way, flat(logits_BTV))).reshape(logits_BTV.shape)


def _keys(rows: Rows, n: int) -> jax.Array | None:
    """n random keys a row, (B, n); None where no row draws."""
    return None if rows.temperature_B is None else jax.vmap(lambda key: jax.random.split(key, n))(rows.keys())


def _drawn(rows: Rows, keys_Bn: jax.Array | None, step: jax.Array | int, shares_BV: jax.Array) -> jax.Array:
    """A token of each row, int32 (B,), drawn from unnormalised probabilities."""
    if rows.temperature_B is None:
        return jnp.argmax(shares_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_Bn[:, step], jnp.log(shares_BV)).astype(jnp.int32)


class SpeculativeEngine:
    """A model and a draft of the same vocabulary, with `proposals` tokens a round."""

    def __init__(self, model: Transformer, draft: Transformer, proposals: int = 4):
        """ValueError as `check_draft`, or if the model does not continue texts."""
        check_draft(model, draft, proposals)
        self.model, self.draft, self.proposals = Engine(model), Engine(draft), proposals
        self.choose = jax.jit(choose)
        self.round = jax.jit(
            functools.partial(play_round, (model, draft), proposals=proposals), donate_argnames="caches"
        )

    def generate(
        self,
        params: weights.Params,
        draft_params: weights.Params,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Stop = NEVER,
    ) -> tuple[list[np.ndarray], float]:
        """Continues each prompt, as `Engine.generate` does.

        Returns:
          The new tokens of each prompt, int32, and the share of the proposals that were kept.

        Raises:
          ValueError: as `Engine.generate`; the draft's `max_length` binds too.
        """
        both = ((self.model, params), (self.draft, draft_params))
        for engine, own in reversed(both):
            padded, lengths = padded_prompts(engine.model, own, prompts, max_new_tokens)
        rows = rows_for(sampling, prompts, self.model.model.config.vocab_size)
        # The last round may go on past the last token asked for.
        slots = padded.shape[1] + max_new_tokens + self.proposals
        starts = [engine.start(own, batch_size=len(prompts), slots=slots) for engine, own in both]
        (logits_BV, cache), (_, draft_cache) = (
            engine.prefill(own, padded, lengths, start) for (engine, own), start in zip(both, starts, strict=True)
        )
        caches = (cache, draft_cache)
        last_B, rows = self.choose(rows, logits_BV)
        new = [[int(token)] for token in last_B]
        kept = proposed = 0
        while True:
            ends = [stop.length(np.array(row, np.int32)) for row in new]
            active = np.array([end is None and len(row) < max_new_tokens for end, row in zip(ends, new, strict=True)])
            if not active.any():
                break
            made = self.round((params, draft_params), caches, last_B, rows, active)
            last_B, caches, rows = made.last_B, made.caches, made.rows
            for row, more, goes_on in zip(new, np.asarray(made.tokens_BT), active, strict=True):
                if goes_on:
                    row += more[more >= 0].tolist()
                    kept += int(np.sum(more >= 0)) - 1
                    proposed += self.proposals
        made = [np.array(row, np.int32)[:max_new_tokens][:end] for row, end in zip(new, ends, strict=True)]
        return made, kept / proposed if proposed else 0.0
