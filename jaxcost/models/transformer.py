"""A transformer in Flax Linen, a decoder, an encoder or both, put together from a frozen config.

Parameters (D width, V vocabulary, H and K query and key heads, h head size, F MLP width, E experts), blocks stacked
over L; what a config does not ask for is not there:

    embed/table                             (V, D), or, for images of patches of P numbers:
    images/patches/kernel                   (P, D), and `bias`; images/{class_tokens,detection_tokens}/table (tokens, D)
    or, for audio:
    audio/convolution_{i}/kernel            (times · channels, C), and `bias`; audio/norm_{i}/{scale,bias} (C,)
    audio/projection/kernel                 (C, D), and `bias`; audio/projection_norm/scale (C,)
    audio/positions/kernel                  (times · D / groups, D), and `bias`; audio/positions/scale (times,)
    positions/table                         (max_length + offset, D), learned positions only
    layer_positions/table                   (L - 1, max_length + offset, D)
    relative/table                          (buckets, H), relative positions only
    token_types/table                       (types, D)
    embedding_norm/scale                    (D,)
    layers/attention_norm/scale             (L, D), and `bias` with LayerNorm
    layers/attention/{query,key,value}/kernel    (L, D, H·h) or (L, D, K·h), and `bias`
    layers/attention/{query,key}_norm/scale (L, h), or (L, H·h) and (L, K·h)
    layers/attention/output/kernel          (L, H·h, D), and `bias`
    layers/attention_post_norm/scale        (L, D)
    layers/cross_attention/...              as layers/attention, with an encoder, and its norms like those of attention
    layers/mlp_norm/scale                   (L, D)
    layers/mlp/{gate,up,down}/kernel        (L, D, F), (L, D, F), (L, F, D), and `bias`; experts (L, E, D, F), ...
    layers/mlp/router/kernel                (L, D, E)
    layers/mlp/shared/{gate,up,down}/kernel (L, D, shared width), ...
    layers/mlp_post_norm/scale              (L, D)
    final_norm/scale                        (D,)
    head/hidden/kernel                      (D, D) or (D, hidden width), and `bias`, further ones as `hidden_2`, ...
    head/norm/scale                         (D,)
    head/output/kernel                      (D, outputs), and `bias`, where the head's outputs are no vocabulary
    head/boxes/{hidden,output}/kernel       (D, D), (D, 4), and `bias`, further ones as those of the head
    unembed/kernel                          (D, V), untied only, and `bias` (V,)
    encoder/...                             all of these again but for tables of tokens and heads: an encoder

A tree may also hold `frozen_layers`, a stack that runs before `layers` (the `freeze` transform makes it), and what
`optional` names. Any leaf may be a kind of weight. Shapes in names: B batch, T tokens, S cache slots, D H K h F V as
above.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxcost import weights
from jaxcost.models import attention, optional
from jaxcost.models import cache as caches
from jaxcost.models.audio import Audio
from jaxcost.models.block import HEADS, WATCHED, Block, CrossAttention, sow, split_heads
from jaxcost.models.cache import Cache, Source
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import ExecutionConfig
from jaxcost.models.heads import Head, Output, Unembedding, embeddings
from jaxcost.models.images import Images
from jaxcost.models.inputs import check_cache, check_segments, length_of, smallest_input
from jaxcost.models.layers import Norm, Table
from jaxcost.models.pipeline import over_layers
from jaxcost.models.positions import RelativePositions
from jaxcost.models.stacks import (
    grouped,
    initialize_stack,
    joined,
    part,
    resized,
    restacked,
    stacks_of,
    ungrouped,
    unstacked,
)
from jaxcost.sharding import constrain

FOUND, BOXES = "found", "boxes"
"""The collection, and the name in it, under which the boxes of a head that has them are sown."""


class Transformer(nn.Module):
    """Tokens (B, T) to hidden states (B, T, D), or (B, 1, D) of a head that pools them, or (B, N, D) of N detection
    tokens, of which `logits` makes logits.

    With experts, their router's losses are sown, for `mutable=["losses"]`: means over the layers, float32 scalars. For
    `mutable=[WATCHED]` so is a dict of the last layer's queries (B, T, H, h), keys and values (B, T, K, h), as they
    meet, from which `attention.log_probabilities` makes its attention; for `mutable=[FOUND]` the boxes (B, N, 4) of a
    head that has them. Who does not ask pays nothing.
    """

    config: ModelConfig
    execution: ExecutionConfig = ExecutionConfig()

    @nn.compact
    def __call__(
        self,
        tokens_BT,
        cache: Cache | None = None,
        key=None,
        valid_BT=None,
        types_BT=None,
        segments_BT=None,
        source_BS=None,
        source_valid_BS=None,
    ) -> tuple[jax.Array, Cache | None]:
        """Tokens may be embeddings (B, T, D) too, or images (B, height, width, channels), a waveform (B, samples) or a
        spectrogram (B, frames, mels). With a cache, row b's tokens start at cache.length[b].

        An encoder reads the source, which is all that tokens may be, and which of it is valid; with a cache it has read
        it already (see `start_cache`).

        Tokens that are not valid (bool, all are if not given; see `audio.valid_frames`) are padding behind a row's end:
        no other sees them, and heads that pool leave them out. Types (int32, all 0 if not given) say which kind each
        token is of. Segments (int32, in place of what is valid) are of several sequences in one row, each of neighbours
        with one number: a token sees its own alone, counts its position from its start, and is padding where the
        segment is 0. With an encoder, all sequences of a row answer to its source.

        Weights of other sizes than the config's, as `shrink` makes them, are met as they are; see `resized`.

        `key` feeds weights whose arithmetic is random. Raises ValueError where virtual tokens leave too little of
        `max_length`, or where the cache was started without them, or where a source is missing.
        """
        params = nn.meta.unbox(self.variables.get("params", {}))
        c = self.config if self.is_initializing() else resized(self.config, params)
        if segments_BT is not None:
            check_segments(c, params, valid_BT, cache)
            valid_BT = segments_BT = attention.runs(segments_BT)
        encodes = c.encoder.num_layers > 0
        length = length_of(c, tokens_BT)
        check_cache(c, params, length, cache)
        source = None if cache is None else cache.source
        if encodes and self.is_initializing():
            encoder = Transformer(c.source, self.execution, parent=None)
            self.param("encoder", lambda rng: _boxed(encoder, rng))
            source = Source(states=jnp.zeros((1, 1, c.width), self.execution.dtype))
        elif encodes and cache is None:
            key, source_key = weights.split_keys(key)
            source = encode(self, params, source_BS, source_valid_BS, source_key)
        x_BTD = self._embedded(c, tokens_BT, key, valid_BT).astype(self.execution.dtype)
        if cache is None:
            x_BTD = optional.with_prompt(params, x_BTD)
            valid_BT = optional.with_virtual(valid_BT, optional.prompt_tokens(params))
        if c.scale_embeddings:
            x_BTD = x_BTD * jnp.asarray(c.width**0.5, x_BTD.dtype)
        positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        if segments_BT is not None:
            positions_BT -= lax.cummax(jnp.where(attention.starts(segments_BT), positions_BT, 0), axis=1)
        positions_BT += optional.prefix_tokens(params) if cache is None else cache.length[:, None]
        further = None
        if c.position == "learned":
            shape = (c.max_length + c.position_offset, c.width, "position")
            x_BTD = _placed(c, x_BTD, Table(*shape, name="positions")(), positions_BT)
            if c.layer_positions:
                further = Table(*shape, (c.num_layers - 1,), name="layer_positions")()
        if c.token_types:
            table = Table(c.token_types, c.width, "position", name="token_types")()
            types_BT = jnp.zeros((1, 1), jnp.int32) if types_BT is None else types_BT
            if cache is None and types_BT.shape[1] > 1:
                types_BT = jnp.pad(types_BT, ((0, 0), (optional.prompt_tokens(params), 0)))
            x_BTD = x_BTD + jnp.take(table, types_BT, axis=0).astype(x_BTD.dtype)
        if c.embedding_norm:
            x_BTD = Norm(c, name="embedding_norm")(x_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "residual")
        bias = None
        if c.position == "relative":
            # Without a cache the sequence attends to itself, behind what a prefix adds.
            seen = x_BTD.shape[1] + optional.prefix_tokens(params) if cache is None else _slots(cache)
            queries_BT = jnp.arange(seen)[None] if cache is None else positions_BT
            bias = RelativePositions(c, name="relative")(queries_BT, jnp.arange(seen)[None])
        kv = None if cache is None else (cache.key, cache.value)
        x_BTD, kv, watched = self._blocks(c, x_BTD, positions_BT, kv, key, valid_BT, bias, source, further)
        if watched is not None:
            # What virtual tokens stand before the text is nobody else's.
            sow(self, WATCHED, HEADS, {name: heads_BTNh[:, -length:] for name, heads_BTNh in watched.items()})
        hidden_BTD = x_BTD[:, -length:]
        if c.norm_placement != "sum":
            hidden_BTD = Norm(c, name="final_norm")(hidden_BTD)
        if c.scale_outputs:
            hidden_BTD = hidden_BTD * jnp.asarray(c.width**-0.5, hidden_BTD.dtype)
        valid_BT = None if valid_BT is None else valid_BT[:, -length:] > 0
        hidden_BTD, boxes = Head(c, name="head")(hidden_BTD, valid_BT, key)
        if boxes is not None:
            sow(self, FOUND, BOXES, boxes)
        if c.head.of_vocabulary and self.is_initializing():
            Unembedding(c, name="unembed")()
        if cache is None:
            return hidden_BTD, None
        return hidden_BTD, cache.replace(key=kv[0], value=kv[1], length=cache.length + length)

    def _embedded(self, c: ModelConfig, tokens_BT, key, valid_BT):
        if not c.of_tokens:
            inputs = tokens_BT.astype(self.execution.dtype)
            if c.images.patch:
                return Images(c, name="images")(inputs, key)
            return Audio(c, name="audio")(inputs, key, valid_BT)
        table = Table(c.vocab_size, c.width, "vocab", name="embed")() if c.vocab_size else None
        if tokens_BT.ndim == 3 and tokens_BT.shape[-1] != c.width:
            raise ValueError(
                f"Embeddings are of {tokens_BT.shape[-1]} numbers, and model.width is {c.width}; give as many."
            )
        return tokens_BT if tokens_BT.ndim == 3 else jnp.take(table, tokens_BT, axis=0)

    def _blocks(self, c: ModelConfig, x_BTD, positions_BT, kv, key, valid_BT, bias, source: Source | None, further):
        if self.is_initializing():
            # The parameters of all kinds of layers have the same shapes. One token is enough to make them, and no
            # kernel takes so few.
            block = Block(c, c.pattern[0], "reference", parent=None)
            options = {"bias": bias, "source": source}
            self.param("layers", lambda rng: initialize_stack(block, rng, x_BTD, positions_BT, c.num_layers, **options))
            return x_BTD, kv, None
        e = self.execution
        blocks = {kind: Block(c, kind, e.attention, e.context, parent=None) for kind in set(c.pattern)}
        stacks = stacks_of(nn.meta.unbox(self.variables["params"]))

        def step(kinds, kept, beside, x, group):
            positions_BT, valid_BT, source = beside
            made = []
            for kind, (params, cache, held, index, table) in zip(kinds, unstacked(group, len(kinds)), strict=True):
                layer_key = None if key is None else jax.random.fold_in(key, index)
                met = source if held is None else held.replace(valid=source.valid)
                inputs = (x, positions_BT, cache, layer_key, valid_BT, index == 0, bias, met)
                (x, *rest), sown = blocks[kind].apply({"params": params}, *inputs, mutable=kept)
                x = x if table is None else _placed(c, x, table, positions_BT)
                made.append((*rest, sown))
            return x, restacked(made)

        # Behind the last layer there are none.
        further = None if further is None else jnp.pad(further, ((0, 1), (0, 0), (0, 0)))
        start, made, watched = 0, [], None
        beside = (positions_BT, valid_BT, source)
        for stack in stacks:
            depth, done = jax.tree.leaves(stack)[0].shape[0], 0
            # The source's keys and values are read, not written, so that a step makes no copy of them.
            held = None if source is None or source.key is None else Source(source.key, source.value)
            held, tables = (part(one, start, depth) for one in (held, further))
            cache = kv and tuple(part(one, start, depth) for one in kv)
            layers = (stack, cache, held, jnp.arange(start, start + depth), tables)
            runs = [(*run, ()) for run in c.groups(start, depth)]
            if stack is stacks[-1] and self.is_mutable_collection(WATCHED):
                # The last layer runs by itself, so that what is seen of it is kept of no other.
                runs = [(*run, ()) for run in c.groups(start, depth - 1)]
                runs += [(*run, (WATCHED,)) for run in c.groups(start + depth - 1, 1)]
            for groups, kinds, kept in runs:
                run = grouped(layers, done, groups, len(kinds))
                wrapped = e.rematerialize(functools.partial(step, kinds, kept), groups, len(kinds))
                how = {"unroll": e.unrolled(groups), "parts": e.microbatches, "rounds": e.rounds}
                whole = kv is not None or bool(kept)
                x_BTD, (*new, sown) = over_layers(wrapped, x_BTD, beside, run, whole=whole, **how)
                made.append(ungrouped(new, len(kinds)))
                done += groups * len(kinds)
                if kept:
                    watched = jax.tree.map(lambda a: a[0], sown[WATCHED]["attention"][HEADS])
            start += depth
        caches_of, losses = zip(*made, strict=True)
        losses = joined(losses, None)
        kv = kv and tuple(joined(parts, like) for parts, like in zip(zip(*caches_of, strict=True), kv, strict=True))
        for name, values_L in losses.items():
            sow(self, "losses", name, jnp.mean(values_L))
        return x_BTD, kv, watched


def initialize(model: Transformer, key: jax.Array) -> tuple[weights.Params, weights.Params]:
    """The parameters (in the execution's dtype of weights) and a tree of their logical axis names."""
    boxed = _boxed(model, key)
    params = jax.tree.map(lambda a: a.astype(model.execution.weights), nn.meta.unbox(boxed))
    return params, nn.get_partition_spec(boxed)


def _boxed(model: Transformer, key: jax.Array) -> weights.Params:
    """The parameters with the names of their axes."""
    return model.init(key, jnp.zeros(smallest_input(model.config), jnp.int32))["params"]


def encode(
    model: Transformer, params: weights.Params, source_BS: jax.Array, valid_BS=None, key: jax.Array | None = None
) -> Source:
    """What a model's encoder makes of a source: tokens, embeddings (B, S, D), images or audio, of which `valid_BS` are
    the frames; ValueError if it is None."""
    c = model.config.source
    if source_BS is None:
        raise ValueError("model.encoder is on, which reads a source; give one beside the tokens.")
    if source_BS.ndim == 2 and c.of_tokens:
        source_BS = jnp.take(weights.materialize(params["embed"]["table"]), source_BS, axis=0)
    encoder = Transformer(c, model.execution, parent=None)
    states_BSD, _ = encoder.apply({"params": params["encoder"]}, source_BS, key=key, valid_BT=valid_BS)
    return Source(states=states_BSD, valid=valid_BS)


def abstract(model: Transformer) -> tuple[weights.Params, weights.Params]:
    """`initialize` without computing anything: ShapeDtypeStructs, and the logical axis names."""
    axes = []

    def make():
        params, names = initialize(model, jax.random.key(0))
        axes.append(names)
        return params

    return jax.eval_shape(make), axes[0]


def axes_of(model: Transformer, params: weights.Params) -> weights.Params:
    """The logical axis names of the dense weight behind every weight of `params`, whatever transforms made it."""
    known = dict(optional.AXES)
    known |= {f"encoder/{path}": names for path, names in known.items()}
    weights.map_weights(lambda path, names: known.update({path: names}), abstract(model)[1])
    return weights.map_weights(lambda path, _: known[path.removeprefix("frozen_")], params)


def unembedding(params: weights.Params) -> Any:
    """The weight (D, V) that turns hidden states into outputs: a matrix of its own, or the embedding transposed."""
    matrix = output_matrix(params)
    return weights.materialize(params["embed"]["table"]).T if matrix is None else matrix


def output_matrix(params: weights.Params) -> Any | None:
    """The weight (D, V) of the head or of the unembedding; None where the embedding serves."""
    return params.get("head", {}).get("output", params.get("unembed", {})).get("kernel")


def output_of(config: ModelConfig, params: weights.Params) -> Output:
    """What makes a model's outputs of its hidden states."""
    bias = params.get("head", {}).get("output", params.get("unembed", {})).get("bias")
    return Output(unembedding(params), None if bias is None else weights.materialize(bias), config.logit_soft_cap)


def logits(config: ModelConfig, params: weights.Params, hidden: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Float32 logits (..., V) of hidden states (..., D), or what else the head puts out."""
    if config.head.embed:
        return embeddings(hidden, config.head.pooling)
    return output_of(config, params)(hidden, key)


def detections(
    model: Transformer, params: weights.Params, images_BHWC: jax.Array, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Logits (B, N, labels + 1), the last that of no object, and boxes (B, N, 4) of images; see `heads.Boxes`.

    ValueError if the model has no boxes.
    """
    if not model.config.head.boxes:
        raise ValueError("model.head.boxes is off, so that nothing is found in images; name a model of detection.")
    (hidden_BND, _), sown = model.apply({"params": params}, images_BHWC, key=key, mutable=[FOUND])
    return logits(model.config, params, hidden_BND, key), sown[FOUND][BOXES]


def init_cache(config: ModelConfig, batch_size: int, slots: int, dtype) -> Cache:
    """An empty cache for `slots` tokens a row; a dtype of int8 makes one of `Codes`."""
    shape = (config.num_layers, batch_size, slots, config.num_kv_heads, config.head_dim)
    return Cache(caches.empty(shape, dtype), caches.empty(shape, dtype), jnp.zeros((batch_size,), jnp.int32))


def start_cache(
    model: Transformer, params: weights.Params, batch_size: int, slots: int, source_BS=None, source_valid_BS=None
) -> Cache:
    """A cache for `slots` tokens a row that holds the virtual tokens of `params` already, in slots of their own, and
    what the encoder, if there is one, made of the source.

    Raises:
      ValueError: there is an encoder and no source.
    """
    prefix, prompt = optional.prefix_tokens(params), optional.prompt_tokens(params)
    c = resized(model.config, params)
    source = _read_source(model, params, source_BS, source_valid_BS) if c.encoder.num_layers else None
    # Virtual tokens are the same in all rows, unless they have seen a source.
    rows = 1 if prefix + prompt and source is None else batch_size
    cache = init_cache(c, rows, prefix + prompt + slots, model.execution.cache_dtype).replace(source=source)
    if prefix:
        stacks = [stack["attention"]["prefix"] for stack in stacks_of(params)]

        def filled(held, name):
            tables_LPN = jnp.concatenate([weights.materialize(stack[name]) for stack in stacks])
            new_L1PKh = split_heads(tables_LPN, c.head_dim)[:, None]
            new_LBPKh = jnp.broadcast_to(new_L1PKh, (c.num_layers, rows, *new_L1PKh.shape[2:]))
            return jax.vmap(caches.write, (0, 0, None))(held, new_LBPKh, jnp.zeros((rows, 1), jnp.int32))

        held = (filled(cache.key, "key"), filled(cache.value, "value"))
        cache = cache.replace(key=held[0], value=held[1], length=cache.length + prefix, virtual=prefix)
    if prompt:
        rest = {name: tree for name, tree in params.items() if name != "prompt"}
        table_PD = weights.materialize(params["prompt"]["table"])
        _, cache = model.apply({"params": rest}, jnp.broadcast_to(table_PD, (rows, *table_PD.shape)), cache)
    if rows == batch_size:
        return cache.replace(virtual=prefix + prompt)
    key, value = jax.tree.map(lambda a: jnp.repeat(a, batch_size, axis=1), (cache.key, cache.value))
    return Cache(key, value, jnp.repeat(cache.length, batch_size), virtual=prefix + prompt)


def _read_source(model: Transformer, params: weights.Params, source_BS, valid_BS) -> Source:
    """A source as the keys and values that every layer's attention to it would make."""
    source, c = encode(model, params, source_BS, valid_BS), model.config
    linear = dict(zip(("key", "value"), CrossAttention.of_source(c), strict=True))

    def of_layer(layer):
        made = {name: one.apply({"params": layer[name]}, source.states) for name, one in linear.items()}
        return {name: caches.held(split_heads(x, c.head_dim), model.execution.cache_dtype) for name, x in made.items()}

    parts = [lax.map(of_layer, stack["cross_attention"]) for stack in stacks_of(params)]
    return Source(**jax.tree.map(lambda *a: jnp.concatenate(a), *parts), valid=valid_BS)


def _placed(config: ModelConfig, x_BTD, table, positions_BT):
    """x with the vectors of its positions out of a table."""
    # What runs on behind the end is thrown away, but its values must not be NaN: 0 · NaN would reach the rest.
    rows_BT = jnp.minimum(positions_BT, config.max_length - 1) + config.position_offset
    return x_BTD + jnp.take(table, rows_BT, axis=0).astype(x_BTD.dtype)


def _slots(cache: Cache) -> int:
    return jax.tree.leaves(cache.key)[0].shape[2]
