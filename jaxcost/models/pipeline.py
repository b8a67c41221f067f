"""Layers run one after another: by a scan, or spread over the mesh's stages as a pipeline of microbatches.

The pipeline is one program on all devices: a buffer with one microbatch a stage, a vmapped step that every stage takes
on its own layers and its own microbatch, and a turn of the buffer by one. Each microbatch passes round the stages
`rounds` times, through other layers each time, so that the devices of a stage hold several short runs of layers; the
stages idle for stages - 1 of all microbatches · rounds + stages - 1 turns. Sources: Huang et al. 2019, GPipe; Narayanan
et al. 2021, Efficient large-scale language model training on GPU clusters, section 2.2 (interleaved stages).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcost import sharding
from jaxcost.sharding import constrain

_PARTS = (4, 2, 1)
"""Microbatches for each stage that are tried, where nothing says how many there are."""


def microbatches(asked: int, stages: int, rows: int, ways: int) -> int:
    """Parts that a batch of so many rows is cut into for the pipeline.

    Args:
      asked: how many the config names; 0 takes the most of 4, 2 or 1 for each stage that divide the rows.
      stages: stages of the pipeline.
      rows: rows of the batch that one pass reads.
      ways: parts that the mesh splits these rows into.

    Raises:
      ValueError: they do not divide the rows, or are fewer than the stages.
    """
    tried = [asked] if asked else [parts * stages for parts in _PARTS]
    found = next((parts for parts in tried if parts >= stages and rows % (parts * ways) == 0), None)
    if found is None:
        said = f"execution.microbatches ({asked})" if asked else f"as many microbatches as stages ({stages})"
        raise ValueError(
            f"The pipeline over mesh.stage = {stages} cannot cut {rows} sequences, split {ways} ways, into {said}: it "
            f"takes at least {stages} equal parts; make data.batch_size / training.accumulation a multiple of "
            f"{max(asked, stages) * ways}."
        )
    return found


def bubble(stages: int, parts: int, rounds: int = 1) -> float:
    """The share of the stages' time that is idle."""
    return (stages - 1) / (parts * rounds + stages - 1)


def over_layers(
    step: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    x_BTD: jax.Array,
    beside: Any,
    layers: Any,
    *,
    unroll: int,
    parts: int = 0,
    rounds: int = 1,
    whole: bool = False,
) -> tuple[jax.Array, Any]:
    """x after all layers, and what the step made of each, stacked (L, ...); over microbatches, its mean.

    Args:
      step: (beside, x, layer) → (x, made) for the rows that it is given.
      x_BTD: all rows.
      beside: arrays (B, ...) that the step reads of the same rows.
      layers: a tree of arrays (L, ...).
      unroll: layers in one iteration of a scan.
      parts: microbatches of the pipeline; see `microbatches`.
      rounds: passes of the pipeline; they must divide the layers of a stage.
      whole: scan, even where the mesh has stages: of those that read caches, or keep what they see of every row.
    """
    stages, depth = sharding.stages(), jax.tree.leaves(layers)[0].shape[0]
    if stages == 1 or whole or depth % (stages * rounds):
        return lax.scan(lambda x, layer: step(beside, x, layer), x_BTD, layers, unroll=unroll)
    rows = x_BTD.shape[0]
    parts = microbatches(parts, stages, rows, sharding.ways("batch"))
    turns, length = parts * rounds + stages - 1, depth // (stages * rounds)
    stage_S = jnp.arange(stages)

    def cut(a):
        return sharding.microbatches(a, parts)

    def joined(a):
        return jnp.moveaxis(a, 0, 1).reshape(rows, *a.shape[2:])

    def run(beside, x, run_of_layers):
        return lax.scan(lambda x, layer: step(beside, x, layer), x, run_of_layers, unroll=min(unroll, length))

    layers_RSl = jax.tree.map(lambda a: a.reshape(rounds, stages, length, *a.shape[1:]), layers)
    beside_Mb = jax.tree.map(cut, beside)
    waiting_MbTD = constrain(cut(x_BTD), None, "batch", "length", "residual")

    def turn(carry, t):
        waiting_MbTD, held_SbTD, sums_RSl = carry
        due_S = t - stage_S
        part_S, round_S = due_S % parts, jnp.clip(due_S // parts, 0, rounds - 1)
        busy_S = (due_S >= 0) & (due_S < parts * rounds)
        held_SbTD = held_SbTD.at[0].set(waiting_MbTD[t % parts])
        held_SbTD = constrain(held_SbTD, "stage", "batch", "length", "residual")
        seen_Sb = jax.tree.map(lambda a: jnp.take(a, part_S, axis=0), beside_Mb)
        if rounds == 1:
            own_Sl = jax.tree.map(lambda a: a[0], layers_RSl)
        else:
            own_Sl = jax.tree.map(lambda a: jax.vmap(lambda a_R, r: a_R[r], (1, 0))(a, round_S), layers_RSl)
        out_SbTD, made_Sl = jax.vmap(run, spmd_axis_name="stage")(seen_Sb, held_SbTD, own_Sl)
        out_SbTD = constrain(out_SbTD, "stage", "batch", "length", "residual")

        def add(sums, made):
            made = jnp.where(busy_S.reshape(-1, *[1] * (made.ndim - 1)), made, 0)
            return sums.at[round_S, stage_S].add(made)

        # Where the pipeline is still filling, nothing comes out of it.
        last = part_S[-1]
        kept = jnp.where(due_S[-1] >= 0, out_SbTD[-1], waiting_MbTD[last])
        waiting_MbTD = waiting_MbTD.at[last].set(kept)
        held_SbTD = jnp.roll(out_SbTD, 1, axis=0)
        return (waiting_MbTD, held_SbTD, jax.tree.map(add, sums_RSl, made_Sl)), None

    held_SbTD = jnp.zeros((stages, *waiting_MbTD.shape[1:]), x_BTD.dtype)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (beside_Mb, waiting_MbTD))
    layer = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype), layers_RSl)
    made = jax.eval_shape(run, *one, layer)[1]
    sums_RSl = jax.tree.map(lambda a: jnp.zeros((rounds, stages, *a.shape), a.dtype), made)
    (waiting_MbTD, _, sums_RSl), _ = lax.scan(turn, (waiting_MbTD, held_SbTD, sums_RSl), jnp.arange(turns))
    made = jax.tree.map(lambda a: a.reshape(depth, *a.shape[3:]) / parts, sums_RSl)
    return joined(waiting_MbTD), made
