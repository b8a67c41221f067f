"""Causal attention, computed by the reference or by the kernel that a platform's users would choose.

`reference` is `jax.nn.dot_product_attention` and runs everywhere; `splash` is JAX's Pallas kernel for TPUs and `cudnn`
NVIDIA's; both never store the (T, T) scores. All give the same numbers to the arithmetic's tolerance. Where the mesh
splits the sequence, `context.py` says how they are used. Shapes: B batch, T tokens, H and K query and key heads, h head
size.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxcost.models import context
from jaxcost.sharding import context_ways, mesh_spec, platform

Implementation = Literal["auto", "reference", "splash", "cudnn"]

SPLASH_BLOCK = 1024
"""Tokens of a tile of queries and of keys; larger ones exceed the vector memory that the compiler grants a kernel."""
_SPLASH_MULTIPLE = 128
_CUDNN_LARGEST_HEAD = 128


def resolve(implementation: Implementation, platform: str, length: int, head_dim: int, bits: int) -> Implementation:
    """The implementation that `auto` means on a platform: its kernel where that takes the shape, else the reference."""
    if implementation != "auto":
        return implementation
    if platform == "tpu" and length % _SPLASH_MULTIPLE == 0 and head_dim % _SPLASH_MULTIPLE == 0:
        return "splash"
    if platform in ("gpu", "cuda") and bits == 16 and head_dim <= _CUDNN_LARGEST_HEAD and head_dim % 8 == 0:
        return "cudnn"
    return "reference"


def causal_attention(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    implementation: Implementation = "auto",
    method: context.Method = "auto",
) -> jax.Array:
    """Each token attends to itself and to what came before it: (B, T, H, h) in the queries' dtype.

    `method` says how, where the mesh splits the sequence; a sequence that is shorter than the axis, such as the one
    token that parameters are made with, is not split.

    Raises:
        ValueError: the kernel that was asked for does not take these shapes.
    """
    mesh, ways = jax.sharding.get_abstract_mesh(), context_ways(q_BTHh.shape[1])
    if ways > 1:
        tensor = mesh.shape.get("tensor", 1)
        method = context.resolve(method, q_BTHh.shape[2] // tensor, k_BTKh.shape[2] // tensor, ways)
        whole = functools.partial(_on_one_device, implementation)
        return context.attend(method, whole, q_BTHh, k_BTKh, v_BTKh)
    if _implementation(implementation, q_BTHh) != "splash" or mesh.empty or mesh.size == 1:
        return _on_one_device(implementation, q_BTHh, k_BTKh, v_BTKh)
    # A Pallas kernel is opaque to the partitioner, so each device is told to run it on its own rows and heads.
    queries = mesh_spec(PartitionSpec("batch", None, "heads", None), mesh.shape)
    keys = mesh_spec(PartitionSpec("batch", None, "kv_heads", None), mesh.shape)
    mapped = jax.shard_map(_splash, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)
    return mapped(q_BTHh, k_BTKh, v_BTKh)


def _implementation(asked: Implementation, q_BTHh: jax.Array) -> Implementation:
    return resolve(asked, platform(), q_BTHh.shape[1], q_BTHh.shape[3], q_BTHh.dtype.itemsize * 8)


def _on_one_device(
    implementation: Implementation, q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array
) -> jax.Array:
    """Attention over whole sequences, on what a device holds or where the partitioner splits rows and heads."""
    implementation = _implementation(implementation, q_BTHh)
    if implementation == "splash":
        return _splash(q_BTHh, k_BTKh, v_BTKh)
    backend = "cudnn" if implementation == "cudnn" else None
    return jax.nn.dot_product_attention(q_BTHh, k_BTKh, v_BTKh, is_causal=True, implementation=backend)


def _splash(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> jax.Array:
    length, head_dim = q_BTHh.shape[1], q_BTHh.shape[3]
    if length % _SPLASH_MULTIPLE:
        raise ValueError(
            f"execution.attention is 'splash', which takes sequences of a multiple of {_SPLASH_MULTIPLE} tokens, not "
            f"{length}; change data.sequence_length or use 'reference'."
        )
    kernel = _splash_kernel(q_BTHh.shape[2], length)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHh, k_BTKh, v_BTKh))
    scale = jnp.asarray(head_dim**-0.5, q.dtype)
    # The planner's cost functions read from the scope what the kernel's shapes do not tell.
    with jax.named_scope("causal"):
        return jnp.swapaxes(jax.vmap(kernel)(q * scale, k, v), 1, 2)


@functools.lru_cache(maxsize=32)
def _splash_masks(num_heads: int, length: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    return masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(num_heads)])


def _splash_kernel(num_heads: int, length: int, interpret: bool = False):
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
        _splash_masks(num_heads, length),
        block_sizes=splash_attention.BlockSizes(**sizes),
        interpret=interpret,
    )
