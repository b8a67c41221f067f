"""Speculative decoding: a smaller model proposes tokens, and the model itself checks them all in one pass.

What comes out has exactly the distribution of the model alone, whatever the draft: a proposal d is kept with
probability min(1, p(d) / q(d)), and the first that is not is drawn anew from what p has more than q. Where tokens are
not drawn, the same rule keeps a proposal if it is the likeliest. Sources: Leviathan et al. 2022, arXiv:2211.17192; Chen
et al. 2023, arXiv:2302.01318. Shapes in names: B batch, V vocabulary, k proposals.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcost import weights
from jaxcost.models.transformer import Cache, Transformer, logits
from jaxcost.serving.engine import Engine, padded_prompts, rows_for
from jaxcost.serving.sampling import GREEDY, Rows, Sampling, choose, probabilities
from jaxcost.serving.stopping import NEVER, Stop


class SpeculativeEngine:
    """A model and a draft of the same vocabulary, with `proposals` tokens a round."""

    def __init__(self, model: Transformer, draft: Transformer, proposals: int = 4):
        """ValueError if the vocabularies differ, or nothing is proposed."""
        if model.config.vocab_size != draft.config.vocab_size:
            raise ValueError(
                f"The draft has a vocabulary of {draft.config.vocab_size}, the model one of {model.config.vocab_size}; "
                "take a draft with the model's own tokenizer."
            )
        if proposals < 1:
            raise ValueError(f"{proposals} proposals were asked for; ask for at least 1.")
        self.model, self.draft, self.proposals = Engine(model), Engine(draft), proposals
        self.choose = jax.jit(choose)
        self.round = jax.jit(self._round, donate_argnames=("cache", "draft_cache"))

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
        for engine, own in ((self.draft, draft_params), (self.model, params)):
            padded, lengths = padded_prompts(engine.model, own, prompts, max_new_tokens)
        rows = rows_for(sampling, prompts, self.model.model.config.vocab_size)
        # The last round may go on past the last token asked for.
        slots = padded.shape[1] + max_new_tokens + self.proposals
        caches = []
        for engine, own in ((self.draft, draft_params), (self.model, params)):
            cache = engine.start(own, batch_size=len(prompts), slots=slots)
            logits_BV, cache = engine.prefill(own, padded, lengths, cache)
            caches.append(cache)
        draft_cache, cache = caches
        next_B, rows = self.choose(rows, logits_BV)
        new = [[int(token)] for token in next_B]
        kept = proposed = 0
        while True:
            ends = [stop.length(np.array(row, np.int32)) for row in new]
            active = np.array([end is None and len(row) < max_new_tokens for end, row in zip(ends, new, strict=True)])
            if not active.any():
                break
            tokens, next_B, cache, draft_cache, rows = self.round(
                params, draft_params, cache, draft_cache, next_B, rows, active
            )
            for row, more, goes_on in zip(new, np.asarray(tokens), active, strict=True):
                if goes_on:
                    row += more[more >= 0].tolist()
                    kept += int(np.sum(more >= 0)) - 1
                    proposed += self.proposals
        made = [np.array(row, np.int32)[:max_new_tokens][:end] for row, end in zip(new, ends, strict=True)]
        return made, kept / proposed if proposed else 0.0

    def _round(self, params, draft_params, cache: Cache, draft_cache: Cache, next_B, rows: Rows, active_B):
        """New tokens (B, k + 1), -1 where there is none, of which the last of each row is in no cache yet.

        `next_B` is that last token of the round before; rows that are not active stay as they are.
        """
        k = self.proposals
        keys_Bn = _keys(rows, k + 3)

        def propose(carry, step):
            token_B, cache, rows = carry
            hidden_B1D, cache = self.draft.model.apply({"params": draft_params}, token_B[:, None], cache)
            shares_BV = probabilities(rows, logits(self.draft.model.config, draft_params, hidden_B1D[:, 0]))
            token_B = _drawn(keys_Bn, step, shares_BV)
            return (token_B, cache, rows.saw(token_B)), (token_B, shares_BV)

        # The last proposal is thrown away: its step is there for the cache, which must hold the one before it.
        (_, new_draft_cache, _), (proposed, q) = lax.scan(propose, (next_B, draft_cache, rows), jnp.arange(k + 1))
        proposed_Bk, q_BkV = proposed[:k].T, jnp.swapaxes(q[:k], 0, 1)

        tokens_BT = jnp.concatenate([next_B[:, None], proposed_Bk], axis=1)
        hidden_BTD, new_cache = self.model.model.apply({"params": params}, tokens_BT, cache)
        logits_BTV = logits(self.model.model.config, params, hidden_BTD)
        p, seen = [], rows
        for step in range(k + 1):
            p.append(probabilities(seen, logits_BTV[:, step]))
            seen = seen.saw(proposed_Bk[:, step]) if step < k else seen
        p_BTV = jnp.stack(p, axis=1)

        of_proposed = functools.partial(jnp.take_along_axis, indices=proposed_Bk[..., None], axis=-1)
        p_Bk, q_Bk = of_proposed(p_BTV[:, :k])[..., 0], of_proposed(q_BkV)[..., 0]
        uniform_Bk = 0.5 if keys_Bn is None else jax.vmap(lambda keys: jax.random.uniform(keys[k + 1], (k,)))(keys_Bn)
        kept_B = jnp.sum(jnp.cumprod(uniform_Bk * q_Bk < p_Bk, axis=1), axis=1)

        # What the model has more than the draft at the first proposal that was not kept; all of it after the last.
        at = functools.partial(jnp.take_along_axis, indices=kept_B[:, None, None], axis=1)
        p_BV, q_BV = at(p_BTV)[:, 0], at(jnp.pad(q_BkV, ((0, 0), (0, 1), (0, 0))))[:, 0]
        rest_BV = jnp.maximum(p_BV - q_BV, 0)
        rest_BV = jnp.where(jnp.sum(rest_BV, axis=-1, keepdims=True) > 0, rest_BV, p_BV)
        last_B = _drawn(keys_Bn, k + 2, rest_BV)

        place_T = jnp.arange(k + 1)
        made_BT = jnp.where(place_T < kept_B[:, None], jnp.pad(proposed_Bk, ((0, 0), (0, 1))), -1)
        made_BT = jnp.where(place_T == kept_B[:, None], last_B[:, None], made_BT)
        for step in range(k + 1):
            rows = rows.saw(made_BT[:, step], active_B & (step <= kept_B))
        grown_B = jnp.where(active_B, kept_B + 1, 0)
        return (
            made_BT,
            jnp.where(active_B, last_B, next_B),
            new_cache.replace(length=cache.length + grown_B),
            new_draft_cache.replace(length=draft_cache.length + grown_B),
            rows,
        )


def _keys(rows: Rows, n: int) -> jax.Array | None:
    """n random keys a row, (B, n); None where no row draws."""
    return None if rows.temperature_B is None else jax.vmap(lambda key: jax.random.split(key, n))(rows.keys())


def _drawn(keys_Bn: jax.Array | None, step: jax.Array | int, shares_BV: jax.Array) -> jax.Array:
    """A token of each row, int32 (B,), drawn from unnormalised probabilities."""
    if keys_Bn is None:
        return jnp.argmax(shares_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_Bn[:, step], jnp.log(shares_BV)).astype(jnp.int32)
