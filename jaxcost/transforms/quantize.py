"""Quantisation: weights as integer codes, or weights that are quantised each time they are used while training."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxcost.transforms.base import ALL_KERNELS, Rule, Stage, Transform, freeze_weight, matrix_shape
from jaxcost.weights import (
    Frozen,
    Inputs,
    Lora,
    LowRank,
    Masked,
    QuantAware,
    Quantized,
    QuantSpec,
    integer_limit,
    materialize,
    quantization_scale,
)


@dataclasses.dataclass(frozen=True)
class quantize(Transform):
    """Stores weights as int8 with a scale for each output channel, or trains them quantised.

    `weights` rounds to nearest, weight only: activations stay in floating point, and zeros stay zeros. `training`
    quantises weights and activations each time they meet, forward and backward, with gradients straight through.
    """

    rules: tuple[Rule, ...] = ALL_KERNELS
    """Which weights, and with which options: the first rule whose pattern is found in the path decides."""
    mode: Literal["weights", "training"] = "weights"
    """Store as integers, or train quantised."""
    bits: int = 8
    """Bits of a code; training also takes 4."""
    backward_bits: int | None = 8
    """Training: bits in the gradient with respect to the activation; None leaves it in floating point."""
    stochastic_rounding: bool = False
    """Training: round gradients at random (unbiased) instead of to nearest."""
    backend: Literal["aqt", "reference"] = "aqt"
    """Training: integers through AQT, or faked in floats."""

    stage: ClassVar[Stage] = "quantize"

    def __post_init__(self):
        allowed = (8,) if self.mode == "weights" else (4, 8)
        if self.bits not in allowed:
            raise ValueError(
                f"quantize: bits is {self.bits}; with mode={self.mode!r} it must be {' or '.join(map(str, allowed))}."
            )
        if self.backward_bits not in (None, 4, 8):
            raise ValueError(f"quantize: backward_bits is {self.backward_bits}; it must be 4, 8 or None.")

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        matrix_shape(path, w)
        if isinstance(w.weight if isinstance(w, Masked) else w, Quantized):
            raise ValueError(f"quantize: {path} is quantised already.")
        if isinstance(w, Lora):
            return w.replace(base=self.apply(path, w.base, key, inputs))
        if isinstance(w, LowRank):
            return w.replace(u=self.apply(path, w.u, key), v=self.apply(path, w.v, key))
        if self.mode == "training":
            if isinstance(w, Frozen | QuantAware):
                raise ValueError(f"quantize: {path} is {type(w).__name__} already and cannot be trained quantised.")
            return QuantAware(w, QuantSpec(self.bits, self.backward_bits, self.stochastic_rounding, self.backend))
        if isinstance(w, Frozen):
            return freeze_weight(self.apply(path, w.weight, key, inputs))
        if isinstance(w, Masked):
            return Masked(quantized(materialize(w), self.bits), w.mask)
        return quantized(materialize(w.weight if isinstance(w, QuantAware) else w), self.bits)

    def describe(self):
        return f"int{self.bits} {'weights' if self.mode == 'weights' else f'training ({self.backend})'}"


def quantized(dense: jax.Array, bits: int) -> Quantized:
    """The dense array (..., in, out) rounded to nearest with one symmetric scale for each output channel."""
    scale = quantization_scale(dense, bits, axis=-2)
    limit = integer_limit(bits)
    codes = jnp.clip(jnp.round(dense.astype(jnp.float32) / scale), -limit, limit).astype(jnp.int8)
    return Quantized(codes, scale)
