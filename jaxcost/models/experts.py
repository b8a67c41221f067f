"""A mixture of experts: a router sends each token to a few of many MLPs, and the token takes their weighted sum.

Where a layer has a capacity (`capacity_factor`), each expert takes at most that many rows of a sequence, in order of
first choices before second ones; what overflows skips the expert. Rows of all experts then have one shape, and each
expert's kernel, of any kind of weight, is contracted as it is (under a `vmap` over the experts). Without a capacity no
token is dropped: rows are sorted by expert and met by `jax.lax.ragged_dot`, which takes dense matrices only, so that
kernels of other kinds are materialised for it. Serving always takes the second path.

Sources: Shazeer et al. 2017, arXiv:1701.06538 (experts); Lepikhin et al. 2020, arXiv:2006.16668 (capacity); Gale et al.
2022, arXiv:2211.15841 (dropless). Shapes in names: B batch, T tokens, N tokens of several sequences, k choices of a
token, P = k·T pairs of a choice and a token, E experts, C rows of an expert, M rows of all experts, D and F widths.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec

from jaxcost import weights
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import named
from jaxcost.models.layers import Linear, kernel
from jaxcost.models.mlp import Mlp, activated
from jaxcost.sharding import RULES, constrain, mesh_spec

LOSSES = ("load_balancing", "router_z")
"""The router's losses, by name."""

KERNELS = re.compile(r"mlp/(up|gate|down)/kernel(/|$)")
"""Paths of the experts' kernels, in a model that has experts, and of the arrays that they are made of."""


class Experts(nn.Module):
    """The feed-forward block of `experts` MLPs, of which each token meets `experts_per_token`."""

    config: ModelConfig
    drops: bool
    """Whether experts drop what is beyond their capacity, where the config gives them one."""

    @nn.compact
    def __call__(self, x_BTD, key):
        """The block's output (B, T, D), and the router's losses, float32 scalars."""
        c = self.config
        key_router, key_experts, key_shared = weights.split_keys(key, 3)
        router_BTE = Linear(c.experts, ("embed", None), name="router")(x_BTD, key_router).astype(jnp.float32)
        experts_BkT, shares_BkT, losses = route(router_BTE, c.experts_per_token, c.normalize_experts)
        inward, outward = (c.experts, c.width, c.mlp_width), (c.experts, c.mlp_width, c.width)
        kernels = {
            "up": _Kernel(inward, ("expert", "embed", "mlp"), name="up")(),
            "gate": _Kernel(inward, ("expert", "embed", "mlp"), name="gate")() if c.gated else None,
            "down": _Kernel(outward, ("expert", "mlp", "embed"), name="down")(),
        }
        drops = bool(c.capacity_factor and self.drops)
        # What is observed must meet each expert's rows apart, which needs places for all of them.
        observed = any(isinstance(w, weights.Observed) for w in kernels.values())
        # Parameters are made with a single token, which no mesh divides, as a sort by each device would ask for.
        if self.is_initializing() or drops or observed:
            rows = capacity(c, x_BTD.shape[1]) if drops else x_BTD.shape[1]
            y_BTD = _with_capacity(c, x_BTD, experts_BkT, shares_BkT, kernels, rows, key_experts)
        else:
            y_BTD = _dropless(c, x_BTD, experts_BkT, shares_BkT, kernels)
        if c.shared_width:
            y_BTD = y_BTD + Mlp(c, c.shared_width, name="shared")(x_BTD, key_shared)
        return y_BTD, losses


def route(router_BTE: jax.Array, choices: int, normalize: bool) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Each token's experts (B, k, T), the shares with which it takes them (B, k, T), float32, and the losses.

    `load_balancing` is E times the sum over experts of their share of the choices times their mean probability: 1 where
    both are even, and at most E. Source: Fedus et al. 2021, arXiv:2101.03961, section 2.2. `router_z` is the mean
    square of the logarithm of the router's partition function. Source: Zoph et al. 2022, arXiv:2202.08906, section 3.2.
    """
    num_experts = router_BTE.shape[-1]
    probabilities_BTE = jax.nn.softmax(router_BTE, axis=-1)
    shares_BTk, experts_BTk = lax.top_k(probabilities_BTE, choices)
    if normalize:
        shares_BTk = shares_BTk / jnp.sum(shares_BTk, axis=-1, keepdims=True)
    chosen_E = jnp.mean(jax.nn.one_hot(experts_BTk, num_experts), axis=(0, 1, 2))
    losses = {
        "load_balancing": num_experts * jnp.sum(chosen_E * jnp.mean(probabilities_BTE, axis=(0, 1))),
        "router_z": jnp.mean(jnp.square(jax.nn.logsumexp(router_BTE, axis=-1))),
    }
    return jnp.swapaxes(experts_BTk, 1, 2), jnp.swapaxes(shares_BTk, 1, 2), losses


def capacity(config: ModelConfig, tokens: int) -> int:
    """Rows that each expert takes from a sequence of so many tokens; a token meets an expert once at most."""
    even = tokens * config.experts_per_token / config.experts
    return min(tokens, max(1, math.ceil(config.capacity_factor * even)))


def _with_capacity(c: ModelConfig, x_BTD, experts_BkT, shares_BkT, kernels, rows: int, key):
    batch = x_BTD.shape[0]
    places = functools.partial(_places, num_experts=c.experts, rows=rows)
    rows_BkT, pairs_BM = jax.vmap(places)(experts_BkT)
    taken_BMD = jax.vmap(_dispatch)(x_BTD, rows_BkT, pairs_BM)
    taken_EBCD = jnp.swapaxes(taken_BMD.reshape(batch, c.experts, rows, -1), 0, 1)
    taken_EBCD = _exchanged(taken_EBCD)
    keys = weights.split_keys(key, 3)

    def each(x_EBCd, name, key):
        keys = None if key is None else jax.random.split(key, c.experts)
        return jax.vmap(weights.contract, in_axes=(0, 0, None if key is None else 0))(x_EBCd, kernels[name], keys)

    up_EBCF = named(each(taken_EBCD, "up", keys[0]), "mlp_up")
    gate_EBCF = named(each(taken_EBCD, "gate", keys[1]), "mlp_gate") if c.gated else None
    hidden_EBCF = constrain(activated(c, up_EBCF, gate_EBCF), "expert", "batch", None, "mlp")
    made_EBCD = _exchanged(each(hidden_EBCF, "down", keys[2]), back=True)
    made_BMD = jnp.swapaxes(made_EBCD, 0, 1).reshape(batch, c.experts * rows, -1)
    return jax.vmap(_combine)(made_BMD, rows_BkT, pairs_BM, shares_BkT)


def _exchanged(x_EBCD: jax.Array, back: bool = False) -> jax.Array:
    """The rows of all experts of a device's own sequences as those of its own experts of its group's; or back.

    Told of both layouts alone, the partitioner gathers all rows on every device (257 GB for a layer of Mixtral 8x22B).
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else mesh.shape
    ways = math.prod(sizes.get(axis, 1) for axis in RULES["batch"])
    # Parameters are made with a single token, which no mesh divides.
    if sizes.get("expert", 1) == 1 or x_EBCD.shape[1] % ways:
        return constrain(x_EBCD, None if back else "expert", "batch", None, None)
    of_sequences, of_experts = (mesh_spec(PartitionSpec(axis, "batch"), sizes) for axis in (None, "expert"))
    before, after = (of_experts, of_sequences) if back else (of_sequences, of_experts)
    split, joined = (1, 0) if back else (0, 1)
    exchange = functools.partial(lax.all_to_all, axis_name="expert", split_axis=split, concat_axis=joined, tiled=True)
    return jax.shard_map(exchange, in_specs=before, out_specs=after, check_vma=False)(x_EBCD)


def _dropless(c: ModelConfig, x_BTD, experts_BkT, shares_BkT, kernels):
    dense = {name: weights.materialize(w).astype(x_BTD.dtype) for name, w in kernels.items() if w is not None}
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else mesh.shape
    split, tensor = sizes.get("expert", 1) > 1, sizes.get("tensor", 1) > 1

    def local(x_BTD, experts_BkT, shares_BkT, dense):
        if split:
            gather = functools.partial(lax.all_gather, axis_name="expert", axis=0, tiled=True)
            x_BTD, experts_BkT, shares_BkT = gather(x_BTD), gather(experts_BkT), gather(shares_BkT)
            # Experts of other devices come last, and have no rows here.
            held = dense["up"].shape[0]
            experts_BkT = experts_BkT - lax.axis_index("expert") * held
            experts_BkT = jnp.where((experts_BkT >= 0) & (experts_BkT < held), experts_BkT, held)
        y_BTD = _sorted_by_expert(c, x_BTD, experts_BkT, shares_BkT, dense)
        y_BTD = lax.psum(y_BTD, "tensor") if tensor else y_BTD
        return lax.psum_scatter(y_BTD, "expert", scatter_dimension=0, tiled=True) if split else y_BTD

    if mesh.empty or mesh.size == 1:
        return local(x_BTD, experts_BkT, shares_BkT, dense)
    # To the partitioner a sort is of all tokens at once; each device is told to sort its own.
    spec = lambda *axes: mesh_spec(PartitionSpec(*axes), sizes)  # noqa: E731
    axes = {"up": ("expert", None, "mlp"), "gate": ("expert", None, "mlp"), "down": ("expert", "mlp", None)}
    rows, choices = spec("batch", "length", None), spec("batch", None, "length")
    matrices = {name: spec(*axes[name]) for name in dense}
    specs = (rows, choices, choices, matrices)
    return jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)(x_BTD, experts_BkT, shares_BkT, dense)


def _sorted_by_expert(c: ModelConfig, x_BTD, experts_BkT, shares_BkT, dense):
    """Dropless experts; those from the number of kernels on belong to somebody else and add nothing."""
    flat = lambda x_BkT: jnp.swapaxes(x_BkT, 0, 1).reshape(x_BkT.shape[1], -1)  # noqa: E731
    x_ND, experts_kN, shares_kN = x_BTD.reshape(-1, x_BTD.shape[-1]), flat(experts_BkT), flat(shares_BkT)
    num_experts = dense["up"].shape[0]
    order_P, rank_P, counts_E = _sort(experts_kN.reshape(-1), num_experts)
    mine = jnp.arange(order_P.size) < jnp.sum(counts_E)
    pairs_M = jnp.where(mine, order_P, order_P.size)
    rows_kN = jnp.where(experts_kN < num_experts, rank_P.reshape(experts_kN.shape), order_P.size)
    taken_MD = _dispatch(x_ND, rows_kN, pairs_M)
    up_MF = lax.ragged_dot(taken_MD, dense["up"], counts_E)
    gate_MF = lax.ragged_dot(taken_MD, dense["gate"], counts_E) if c.gated else None
    made_MD = lax.ragged_dot(activated(c, up_MF, gate_MF), dense["down"], counts_E)
    return _combine(made_MD, rows_kN, pairs_M, shares_kN).reshape(x_BTD.shape)


def _sort(experts_P: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs in the order of their experts, the rank of each pair in it, and the pairs of each expert."""
    order_P = jnp.argsort(experts_P, stable=True)
    counts_E = jnp.sum(experts_P[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return order_P, jnp.argsort(order_P), counts_E


def _places(experts_kT: jax.Array, num_experts: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """The row (of all experts' rows, M = E·C) of each pair, M where it is dropped; the pair of each row, P if empty."""
    experts_P = experts_kT.reshape(-1)
    order_P, rank_P, counts_E = _sort(experts_P, num_experts)
    starts_E = jnp.cumsum(counts_E) - counts_E
    within_P = rank_P - starts_E[experts_P]
    rows_P = jnp.where(within_P < rows, experts_P * rows + within_P, num_experts * rows)
    within_C = jnp.arange(rows)
    pairs_EC = jnp.take(order_P, starts_E[:, None] + within_C, mode="clip")
    pairs_EC = jnp.where(within_C < counts_E[:, None], pairs_EC, experts_P.size)
    return rows_P.reshape(experts_kT.shape), pairs_EC.reshape(-1)


def _dispatch(x_TD, rows_kT, pairs_M):
    """The tokens of all rows (M, D), zeros in those that are empty."""
    length = x_TD.shape[0]
    return _take(x_TD, jnp.where(pairs_M < rows_kT.size, pairs_M % length, length), rows_kT)


def _combine(made_MD, rows_kT, pairs_M, shares_kT):
    """Each token's sum over its choices of share times row (T, D); a dropped one adds nothing."""
    chosen_kTD = _take(made_MD, rows_kT.reshape(-1), pairs_M[None]).reshape(*rows_kT.shape, -1)
    return jnp.sum(chosen_kTD * shares_kT[..., None], axis=0).astype(made_MD.dtype)


@jax.custom_vjp
def _take(x_ND: jax.Array, index_M: jax.Array, inverse_kN: jax.Array) -> jax.Array:
    """x[index] (M, D), zeros where the index is N. `inverse` holds where each row went, k times, M where nowhere.

    It makes the gradient a gather as well, where that of an index alone would be a scatter.
    """
    return jnp.take(x_ND, index_M, axis=0, mode="fill", fill_value=0)


def _take_forward(x_ND, index_M, inverse_kN):
    return _take(x_ND, index_M, inverse_kN), inverse_kN


def _take_backward(inverse_kN, g_MD):
    return sum(jnp.take(g_MD, rows, axis=0, mode="fill", fill_value=0) for rows in inverse_kN), None, None


_take.defvjp(_take_forward, _take_backward)


class _Kernel(nn.Module):
    """The stacked kernels (E, in, out) of one matrix of all experts."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]

    @nn.compact
    def __call__(self):
        return kernel(self, self.shape, self.axes)
