"""Attention of a sequence to itself, causal or not, global or in a window, by the kernel that a platform would choose,
and to another sequence.

`reference` is `jax.nn.dot_product_attention` and runs everywhere; `splash` is JAX's Pallas kernel for TPUs and `cudnn`
NVIDIA's; both never store the (T, T) scores. All give the same numbers to the arithmetic's tolerance. Where the mesh
splits the sequence, `context.py` says how they are used. Shapes: B batch, T tokens, S keys or cache slots, H and K
query and key heads, G = H / K, h head size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxcost.models import context
from jaxcost.models.layers import soft_capped
from jaxcost.sharding import context_ways, mesh_spec, platform

Implementation = Literal["auto", "reference", "splash", "cudnn"]

SPLASH_BLOCK = 1024
"""Tokens of a tile of queries and of keys; larger ones exceed the vector memory that the compiler grants a kernel."""
_SPLASH_MULTIPLE = 128
_CUDNN_LARGEST_HEAD = 128
_HIDDEN = -1e30
"""Score of a key that is not seen."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How the scores of queries and keys are made."""

    window: int = 0
    """Tokens that a token sees, itself included, and as many on the other side if it is not causal; 0 is all."""
    scale: float = 0.0
    """Factor of the products; 0 is h**-0.5."""
    soft_cap: float = 0.0
    """Bound on the scores, by `soft_capped`; 0 is none."""
    causal: bool = True
    """A token sees itself and what came before it alone."""

    def factor(self, head_dim: int) -> float:
        """The factor of the products for heads of this size."""
        return self.scale or head_dim**-0.5


def resolve(
    implementation: Implementation, platform: str, length: int, head_dim: int, bits: int, soft_cap: float = 0.0
) -> Implementation:
    """The implementation that `auto` means on a platform: its kernel where that takes the shape, else the reference."""
    if implementation != "auto":
        return implementation
    if platform == "tpu" and length % _SPLASH_MULTIPLE == 0 and head_dim % _SPLASH_MULTIPLE == 0:
        return "splash"
    fits_cudnn = bits == 16 and head_dim <= _CUDNN_LARGEST_HEAD and head_dim % 8 == 0 and not soft_cap
    return "cudnn" if platform in ("gpu", "cuda") and fits_cudnn else "reference"


def self_attention(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    implementation: Implementation = "auto",
    scores: Scores = Scores(),
    method: context.Method = "auto",
    segments_BT: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Each token attends to those that it sees: (B, T, H, h) in the queries' dtype.

    Segments, int32 or bool (B, T), are of sequences in one row: a token sees those of its own alone. `method` says how,
    where the mesh splits the sequence; one that is shorter than the axis, such as the one token that parameters are
    made with, is not split. A bias (1, H, T, T), which only the reference takes, is added to the scores.

    Raises:
        ValueError: the kernel that was asked for does not take these shapes or scores.
    """
    mesh, length = jax.sharding.get_abstract_mesh(), q_BTHh.shape[1]
    if scores.window >= length:
        scores = dataclasses.replace(scores, window=0)
    if bias is not None:
        _check_biased(implementation, length)
        return _reference(q_BTHh, k_BTKh, v_BTKh, scores, segments_BT, bias)
    whole = functools.partial(_on_one_device, implementation, scores)
    ways = context_ways(length)
    if ways > 1:
        if not scores.causal or segments_BT is not None:
            raise ValueError("mesh.context splits causal sequences without padding or segments alone; set it to 1.")
        tensor = mesh.shape.get("tensor", 1)
        method = context.resolve(method, q_BTHh.shape[2] // tensor, k_BTKh.shape[2] // tensor, ways)
        if method == "ring" and scores != Scores():
            raise ValueError(
                "the ring of mesh.context knows no windows, soft caps or scales of scores; use execution.context "
                "'all_to_all', with heads that divide over mesh.context."
            )
        return context.attend(method, whole, q_BTHh, k_BTKh, v_BTKh)
    if _implementation(implementation, scores, q_BTHh) != "splash" or mesh.empty or mesh.size == 1:
        return whole(q_BTHh, k_BTKh, v_BTKh, segments_BT)
    # A Pallas kernel is opaque to the partitioner, so each device is told to run it on its own rows and heads.
    queries = mesh_spec(PartitionSpec("batch", None, "heads", None), mesh.shape)
    keys = mesh_spec(PartitionSpec("batch", None, "kv_heads", None), mesh.shape)
    rows = None if segments_BT is None else mesh_spec(PartitionSpec("batch", None), mesh.shape)
    mapped = jax.shard_map(whole, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False)
    return mapped(q_BTHh, k_BTKh, v_BTKh, segments_BT)


def _implementation(asked: Implementation, scores: Scores, q_BTHh: jax.Array) -> Implementation:
    _, length, _, head_dim = q_BTHh.shape
    return resolve(asked, platform(), length, head_dim, q_BTHh.dtype.itemsize * 8, scores.soft_cap)


def _on_one_device(
    implementation: Implementation, scores: Scores, q_BTHh, k_BTKh, v_BTKh, segments_BT=None
) -> jax.Array:
    """Attention over whole sequences, on what a device holds or where the partitioner splits rows and heads."""
    length, head_dim = q_BTHh.shape[1], q_BTHh.shape[3]
    implementation = _implementation(implementation, scores, q_BTHh)
    if implementation == "splash":
        return _splash(q_BTHh, k_BTKh, v_BTKh, scores, segments_BT)
    if implementation == "cudnn":
        if scores.soft_cap:
            raise ValueError("execution.attention is 'cudnn', which has no soft cap on scores; use 'reference'.")
        behind = scores.window - 1
        mask = None if segments_BT is None else together(segments_BT, segments_BT)[:, None]
        return jax.nn.dot_product_attention(
            q_BTHh, k_BTKh, v_BTKh, mask=mask, is_causal=scores.causal, scale=scores.factor(head_dim),
            local_window_size=(behind, 0 if scores.causal else behind) if scores.window else None,
            implementation="cudnn",
        )  # fmt: skip
    if 0 < (2 if scores.causal else 3) * scores.window < length:
        return _in_blocks(q_BTHh, k_BTKh, v_BTKh, scores, segments_BT)
    return _reference(q_BTHh, k_BTKh, v_BTKh, scores, segments_BT)


def _check_biased(implementation: Implementation, length: int) -> None:
    if implementation not in ("auto", "reference"):
        raise ValueError(
            f"execution.attention is {implementation!r}, which adds no relative positions to scores; use 'auto' or "
            "'reference'."
        )
    if context_ways(length) > 1:
        raise ValueError("mesh.context splits sequences without relative positions alone; set it to 1.")


def _reference(q_BTHh, k_BTKh, v_BTKh, scores: Scores, segments_BT, bias=None) -> jax.Array:
    positions_1T = jnp.arange(q_BTHh.shape[1])[None]
    seen_BTS = _seen(positions_1T, positions_1T, scores)
    seen_BTS = seen_BTS if segments_BT is None else seen_BTS & together(segments_BT, segments_BT)
    return _attend(q_BTHh, k_BTKh, v_BTKh, seen_BTS, scores, bias)


def together(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Which keys (..., S) are of the segments of the queries (..., T): (..., T, S) bool."""
    return queries[..., :, None] == keys[..., None, :]


def cross_attention(
    q_BTHh: jax.Array,
    k_BSKh: jax.Array,
    v_BSKh: jax.Array,
    implementation: Implementation = "auto",
    scores: Scores = Scores(causal=False),
    valid_BS: jax.Array | None = None,
) -> jax.Array:
    """Each token attends to all valid tokens of another sequence: (B, T, H, h) in the queries' dtype.

    Queries may have several rows, one behind the other, for each row of keys, values and what is valid. `splash` is for
    attention within a sequence; where it is asked for, the reference takes its place here.
    """
    shape, mask = q_BTHh.shape, None if valid_BS is None else valid_BS[:, None, None]
    # Rows that attend to one source are to it as tokens of one row.
    q_BTHh = q_BTHh.reshape(k_BSKh.shape[0], -1, *shape[2:])
    kernel = "cudnn" if _implementation(implementation, scores, q_BTHh) == "cudnn" else "xla"
    factor = scores.factor(q_BTHh.shape[-1])
    out = jax.nn.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, mask=mask, scale=factor, implementation=kernel)
    return out.reshape(shape)


def cached_attention(
    q_BTHh: jax.Array,
    k_BSKh: jax.Array,
    v_BSKh: jax.Array,
    positions_BT: jax.Array,
    scores: Scores = Scores(),
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention of T neighbouring tokens at `positions_BT` to a cache that holds them and what came before them.

    A local layer reads no more of the cache than its tokens see. A bias (B, H, T, S) is added to the scores.
    """
    length, slots = q_BTHh.shape[1], k_BSKh.shape[1]
    slots_BS = jnp.arange(slots)[None]
    span = length + scores.window - 1
    if scores.window > 0 and span < slots:
        start_B = jnp.clip(positions_BT[:, 0] - scores.window + 1, 0, slots - span)
        cut = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, span))
        k_BSKh, v_BSKh = cut(k_BSKh, start_B), cut(v_BSKh, start_B)
        slots_BS = start_B[:, None] + jnp.arange(span)
    return _attend(q_BTHh, k_BSKh, v_BSKh, _seen(positions_BT, slots_BS, scores), scores, bias)


def runs(segments_BT: jax.Array) -> jax.Array:
    """Segments (B, T) by numbers of their own, int32: a number that comes back later in its row is another sequence.

    What is no segment, 0 or below, is 0.
    """
    return jnp.where(segments_BT > 0, 1 + jnp.cumsum(starts(segments_BT), axis=1, dtype=jnp.int32), 0)


def starts(segments_BT: jax.Array) -> jax.Array:
    """Which tokens begin another segment than the token before them is of, bool (B, T); never the first of a row."""
    return jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0


def log_probabilities(
    q_BTHh: jax.Array,
    k_BSKh: jax.Array,
    positions_BT: jax.Array,
    scores: Scores = Scores(),
    together_BTS: jax.Array | None = None,
) -> jax.Array:
    """The logarithm of what queries at `positions_BT` give to each of the keys 0 .. S - 1: float32 (B, H, T, S).

    This is what attention averages values by, for those who want to look at it; keys that a query does not see, or that
    are not together with it (bool), have -1e30. No attention of this file makes it whole where it need not.
    """
    seen_BTS = _seen(positions_BT, jnp.arange(k_BSKh.shape[1])[None], scores)
    seen_BTS = seen_BTS if together_BTS is None else seen_BTS & together_BTS
    products_BKGTS = _products(q_BTHh, k_BSKh, scores)
    hidden = jnp.where(seen_BTS[:, None, None], products_BKGTS, _HIDDEN)
    return jax.nn.log_softmax(hidden, axis=-1).reshape(q_BTHh.shape[0], -1, *hidden.shape[-2:])


def _seen(queries_BT: jax.Array, keys_BS: jax.Array, scores: Scores) -> jax.Array:
    """Which keys each query sees, by their positions: (B, T, S) bool."""
    distance = queries_BT[:, :, None] - keys_BS[:, None, :]
    seen = distance >= 0 if scores.causal else jnp.ones_like(distance, bool)
    return seen & (jnp.abs(distance) < scores.window) if scores.window else seen


def _attend(q_BTHh, k_BSKh, v_BSKh, seen_BTS, scores: Scores, bias=None) -> jax.Array:
    if not scores.soft_cap:
        factor = scores.factor(q_BTHh.shape[-1])
        return jax.nn.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, bias, mask=seen_BTS[:, None], scale=factor)
    products = _products(q_BTHh, k_BSKh, scores)
    weights = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], products, _HIDDEN), axis=-1).astype(v_BSKh.dtype)
    return jnp.einsum("BKGTS,BSKh->BTKGh", weights, v_BSKh).reshape(q_BTHh.shape)


def _products(q_BTHh, k_BSKh, scores: Scores) -> jax.Array:
    """The scores of all keys, whether they are seen or not: float32 (B, K, G, T, S)."""
    q_BTKGh = q_BTHh.reshape(*q_BTHh.shape[:2], k_BSKh.shape[2], -1, q_BTHh.shape[3])
    products = jnp.einsum("BTKGh,BSKh->BKGTS", q_BTKGh, k_BSKh, preferred_element_type=jnp.float32)
    return soft_capped(products * scores.factor(q_BTHh.shape[-1]), scores.soft_cap)


def _in_blocks(q_BTHh, k_BTKh, v_BTKh, scores: Scores, segments_BT) -> jax.Array:
    """Local attention in blocks of a window, which see themselves and the block before, and the one behind if it is not
    causal: 2·window scores a token, or 3, not T.

    Source: the sliding chunks of Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
    """
    length, window = q_BTHh.shape[1], scores.window
    blocks = -(-length // window)
    ends = 1 if scores.causal else 2

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, blocks * window - length), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], blocks, window, *x.shape[2:])

    def with_neighbours(x):
        around = jnp.pad(cut(x), ((0, 0), (1, ends - 1), *((0, 0),) * (x.ndim - 1)))
        return jnp.concatenate([around[:, i : i + blocks] for i in range(ends + 1)], axis=2)

    positions_NW = jnp.arange(blocks * window).reshape(blocks, window)
    keys_NS = jnp.concatenate([positions_NW + i * window for i in range(-1, ends)], axis=1)
    seen_NWS = _seen(positions_NW, keys_NS, scores) & ((keys_NS >= 0) & (keys_NS < length))[:, None]
    seen_BNWS = seen_NWS[None]
    if segments_BT is not None:
        seen_BNWS = seen_BNWS & together(cut(segments_BT), with_neighbours(segments_BT))
    attend = jax.vmap(functools.partial(_attend, scores=scores), in_axes=1, out_axes=1)
    out = attend(cut(q_BTHh), with_neighbours(k_BTKh), with_neighbours(v_BTKh), seen_BNWS)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def _splash(q_BTHh, k_BTKh, v_BTKh, scores: Scores, segments_BT) -> jax.Array:
    length, head_dim = q_BTHh.shape[1], q_BTHh.shape[3]
    if length % _SPLASH_MULTIPLE:
        raise ValueError(
            f"execution.attention is 'splash', which takes sequences of a multiple of {_SPLASH_MULTIPLE} tokens, not "
            f"{length}; change data.sequence_length or use 'reference'."
        )
    kernel = _splash_kernel(q_BTHh.shape[2], length, scores)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHh, k_BTKh, v_BTKh))
    scale = jnp.asarray(scores.factor(head_dim), q.dtype)
    # The planner's cost functions read from the scope what the kernel's shapes do not tell.
    shape = "causal" if scores.causal else "full"
    with jax.named_scope(f"{shape}_window_{scores.window}" if scores.window else shape):
        if segments_BT is None:
            return jnp.swapaxes(jax.vmap(kernel)(q * scale, k, v), 1, 2)
        return jnp.swapaxes(jax.vmap(kernel)(q * scale, k, v, _segments(segments_BT.astype(jnp.int32))), 1, 2)


def _segments(segments_BT: jax.Array):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(q=segments_BT, kv=segments_BT)


@functools.lru_cache(maxsize=32)
def _splash_masks(num_heads: int, length: int, window: int, causal: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    if window:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    return masks.MultiHeadMask([mask] * num_heads)


def _splash_kernel(num_heads: int, length: int, scores: Scores, interpret: bool = False):
    from jax.experimental.pallas.ops.tpu import splash_attention

    block = next(size for size in (SPLASH_BLOCK, 512, 256, _SPLASH_MULTIPLE) if length % size == 0)
    sizes = {
        name: block
        for name in (
            "block_q",
            "block_kv",
            "block_kv_compute",
            "block_q_dkv",
            "block_kv_dkv",
            "block_kv_dkv_compute",
            "block_q_dq",
            "block_kv_dq",
        )
    }
    return splash_attention.make_splash_mha_single_device(
        _splash_masks(num_heads, length, scores.window, scores.causal),
        block_sizes=splash_attention.BlockSizes(**sizes),
        attn_logits_soft_cap=scores.soft_cap or None,
        interpret=interpret,
    )
