"""How a model's arithmetic is carried out: dtype, rematerialisation, unrolling. None of it changes the maths."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from jaxcost.models import context
from jaxcost.models.attention import Implementation
from jaxcost.sharding import platform

TENSORS = (
    "layer_input",
    "query",
    "key",
    "value",
    "attention_output",
    "attention_projection",
    "mlp_up",
    "mlp_gate",
    "mlp_down",
)
"""The named activations of a block, in the order in which they are computed."""

PRESETS = {
    "full": (),
    "attention": ("attention_output",),
    "projections": (
        "query",
        "key",
        "value",
        "attention_output",
        "attention_projection",
        "mlp_up",
        "mlp_gate",
        "mlp_down",
    ),
}
"""What each preset saves; `none` rematerialises nothing and has no list."""


def named(x: jax.Array, name: str) -> jax.Array:
    """Marks an activation as one of `TENSORS`, so that a policy may keep, offload or recompute it.

    On TPUs its layout is pinned to row-major: where the forward and the backward pass choose different ones, their
    compiler brings an offloaded stack back to the device whole to turn it (148 against 96 GiB for Llama-3.1-405B on
    v5p:8x8x8). Elsewhere the partitioner would gather the whole activation on every device to pin it.
    """
    if platform() == "tpu":
        x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return checkpoint_name(x, name)


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """Precision, rematerialisation and unrolling of the block stack."""

    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matmul operands; accumulators, norms and the loss stay float32."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which weights, and with them their moments, are kept."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which a matmul's weight gradient is made and summed over the devices; half the bytes in bfloat16."""
    remat: Literal["none", "full", "attention", "projections"] = "none"
    """Activations kept for the backward pass: all, only block inputs, plus attention outputs, or plus all matmuls."""
    save: tuple[str, ...] = ()
    """Further activations to keep, by name; with remat=none, naming any means that only the named ones are kept."""
    offload: tuple[str, ...] = ()
    """Activations to move to host memory until the backward pass, by name."""
    attention: Implementation = "auto"
    """Attention without a cache: the reference, TPU splash or cuDNN; auto takes the platform's kernel where it can."""
    context: context.Method = "auto"
    """Attention where mesh.context splits the sequence: all_to_all trades tokens for heads, which must divide, and runs
    the kernel of `attention`; a ring passes keys and values round; auto trades where it can."""
    cache: Literal["compute", "int8"] = "compute"
    """Keys and values of the tokens seen, when serving: in the compute dtype, or int8 with a scale a token and head."""
    microbatches: int = 0
    """Parts that a batch is cut into to pass through the stages of mesh.stage; 0 takes 4 for each stage, or as many as
    divide it. More shorten the time in which stages wait, and make smaller matmuls."""
    rounds: int = 1
    """Times that each microbatch passes through all stages, which hold so many runs of layers each. More shorten the
    wait as well; every step then moves the weights to the stages that run them."""
    unroll: Literal["auto", "never", "always"] = "auto"
    """Unroll the layer scan; auto unrolls on CPU, where a loop costs 1.2 to 1.5 times, and scans elsewhere.

    What is rematerialised is scanned on CPU too: without a loop around it, that compiler finds the same values again
    and keeps them.
    """

    def __post_init__(self):
        if self.microbatches < 0 or self.rounds < 1:
            raise ValueError(
                f"execution.microbatches is {self.microbatches} and execution.rounds {self.rounds}; the first cannot "
                "be negative (0 chooses), the second is at least 1."
            )
        for name in (*self.save, *self.offload):
            if name not in TENSORS:
                raise ValueError(f"execution: there is no activation {name!r}; choose from {', '.join(TENSORS)}.")
        both = set(self.save) & set(self.offload)
        if both:
            raise ValueError(f"execution: {', '.join(sorted(both))} cannot be both saved and offloaded; choose one.")

    @property
    def dtype(self):
        """The compute dtype as JAX's."""
        return jnp.dtype(self.compute)

    @property
    def cache_dtype(self):
        """The dtype in which keys and values are held."""
        return jnp.dtype(jnp.int8) if self.cache == "int8" else self.dtype

    @property
    def cache_scale_bytes(self) -> int:
        """Bytes beside each cached key and value of a head: its float32 scale, where there is one."""
        return 4 if self.cache == "int8" else 0

    @property
    def rematerializes(self) -> bool:
        """Whether the backward pass makes anything again or fetches it from the host."""
        return self.remat != "none" or bool(self.save) or bool(self.offload)

    def rematerialize(self, step, length: int, layers: int = 1):
        """Wraps a scan's step, of which there are `length`, so that its backward pass keeps, offloads or recomputes.

        A step of several layers keeps each one's input, as a scan over single layers would, and never a second copy
        of their weights, which it cuts out of the scanned arrays.
        """
        if not self.rematerializes:
            return jax.checkpoint(step, policy=_all_but_cuts, prevent_cse=False) if layers > 1 else step
        saved = set(PRESETS.get(self.remat, ())) | set(self.save) | ({"layer_input"} if layers > 1 else set())
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=sorted(saved - set(self.offload)),
            names_which_can_be_offloaded=sorted(self.offload),
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(step, policy=policy, prevent_cse=self.unrolled(length) == length)

    def unrolled(self, length: int) -> int:
        """How many steps one iteration of the scan holds."""
        on_cpu = self.unroll == "auto" and platform() == "cpu" and not self.rematerializes
        return length if on_cpu or self.unroll == "always" else 1


def _all_but_cuts(primitive, *_, **__) -> bool:
    return primitive.name not in ("split", "squeeze", "reshape")
