"""Quantisation: weights as codes on a grid, or weights that are quantised each time they are used while training."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxcost.transforms.base import ALL_KERNELS, Rule, Stage, Transform, freeze_weight, matrix_shape
from jaxcost.transforms.rounding import awq_factor, gptq
from jaxcost.weights import (
    GRIDS,
    Dora,
    Frozen,
    Inputs,
    Lora,
    LowRank,
    Masked,
    QuantAware,
    Quantized,
    QuantSpec,
    Scaled,
    Weight,
    integer_limit,
    materialize,
    quantized,
)


@dataclasses.dataclass(frozen=True)
class quantize(Transform):
    """Stores weights as codes with a scale for each output channel or group of inputs, or trains them quantised.

    `weights` stores; zeros stay zeros. What was trained quantised is stored as it was trained, whatever the options
    say, and computes the same bits. `training` quantises weights and activations each time they meet, forward and
    backward.
    """

    rules: tuple[Rule, ...] = ALL_KERNELS
    """Which weights, and with which options: the first rule whose pattern is found in the path decides."""
    mode: Literal["weights", "training"] = "weights"
    """Store as codes, or train quantised."""
    bits: int = 8
    """Bits of a code, 8 or 4."""
    numbers: Literal["int", "nf", "fp"] = "int"
    """Integers (8 or 4 bits), the quantiles of a normal distribution (NF4), or floats (8 bits, e4m3)."""
    group: int | None = None
    """Neighbours along the contracted axis that share a scale, a divisor of that axis; None for one an output."""
    method: Literal["nearest", "gptq", "awq"] = "nearest"
    """Stored: rounding to nearest, by second-order statistics of the inputs, or after scaling by their size."""
    activations: Literal["none", "dynamic", "static"] | None = None
    """Activations too, by each token's largest value or the calibration's; integers without groups only.

    None leaves activations alone where weights are stored, and is `dynamic` where they train.
    """
    activation_bits: int = 8
    """Stored: bits of the activations that are quantised, 8 or 4; those trained have as many bits as the weights."""
    backward_bits: int | None = 8
    """Training: bits in the gradient with respect to the activation; None leaves it in floating point."""
    stochastic_rounding: bool = False
    """Training: round gradients at random (unbiased) instead of to nearest."""
    backend: Literal["aqt", "reference"] = "aqt"
    """Training: through AQT, or with gradients straight through in floats; the forward pass has the same bits."""

    stage: ClassVar[Stage] = "quantize"

    def __post_init__(self):
        if self.grid not in GRIDS:
            raise ValueError(
                f"quantize: there is no {self.grid}; numbers and bits must make one of {', '.join(GRIDS)}."
            )
        if self.backward_bits not in (None, 4, 8):
            raise ValueError(f"quantize: backward_bits is {self.backward_bits}; it must be 4, 8 or None.")
        if self.activation_bits not in (4, 8):
            raise ValueError(f"quantize: activation_bits is {self.activation_bits}; it must be 4 or 8.")
        if self.group is not None and self.group < 1:
            raise ValueError(f"quantize: group is {self.group}; it must be at least 1, or None for a whole channel.")
        if self.mode == "training" and (self.numbers != "int" or self.method != "nearest"):
            raise ValueError("quantize: mode='training' needs numbers='int' and method='nearest'.")
        if self.mode == "training" and self.activations == "static":
            raise ValueError("quantize: mode='training' has activations 'dynamic' or 'none', not 'static'.")
        if self._activations != "none" and (self.numbers != "int" or self.group is not None):
            raise ValueError(
                f"quantize: activations={self._activations!r} needs numbers='int' and group=None, one scale an output; "
                "choose activations='none', or leave the others out."
            )

    @property
    def grid(self) -> str:
        """The name of the grid: int8, int4, nf4 or fp8."""
        return f"{self.numbers}{self.bits}"

    @property
    def _activations(self) -> str:
        return self.activations or ("none" if self.mode == "weights" else "dynamic")

    def statistics(self):
        if self.method != "nearest":
            return "gram"
        return "norms" if self.activations == "static" else "none"

    def apply(self, path: str, w: Any, key: jax.Array, inputs: Inputs | None = None) -> Any:
        inward = matrix_shape(path, w)[-2]
        if isinstance(w.weight if isinstance(w, Masked) else w, Quantized):
            raise ValueError(f"quantize: {path} is quantised already.")
        if isinstance(w, Lora):
            return w.replace(base=self.apply(path, w.base, key, inputs))
        if isinstance(w, Dora):
            return w.replace(weight=self.apply(path, w.weight, key, inputs))
        if isinstance(w, LowRank):
            after = None if inputs is None else self._after(path, w.u, inputs)
            return w.replace(u=self.apply(f"{path}/u", w.u, key, inputs), v=self.apply(f"{path}/v", w.v, key, after))
        if isinstance(w, Scaled):
            before = inputs.scaled(w.scale) if inputs is not None and w.side == "in" else inputs
            return w.replace(weight=self.apply(path, w.weight, key, before))
        if self.group is not None and inward % self.group:
            raise ValueError(
                f"quantize: the contracted axis of {path} has size {inward}, which groups of {self.group} do not "
                "divide; choose another group, or skip it with a rule."
            )
        if self.mode == "training":
            if isinstance(w, Frozen | QuantAware):
                raise ValueError(f"quantize: {path} is {type(w).__name__} already and cannot be trained quantised.")
            return QuantAware(w, self._spec())
        if isinstance(w, Frozen):
            return freeze_weight(self.apply(path, w.weight, key, inputs))
        if isinstance(w, QuantAware):
            return w.spec.served(materialize(w.weight))
        if isinstance(w, Weight) and not isinstance(w, Masked):
            raise ValueError(f"quantize: {path} is {type(w).__name__}, which cannot be quantised.")
        return self._stored(materialize(w), w.mask if isinstance(w, Masked) else None, inputs)

    def _spec(self) -> QuantSpec:
        return QuantSpec(
            self.bits,
            self._activations == "dynamic",
            self.group,
            self.backward_bits,
            self.stochastic_rounding,
            self.backend,
        )

    def _stored(self, dense: jax.Array, mask: jax.Array | None, inputs: Inputs | None) -> Any:
        factor = awq_factor(dense, inputs, self.grid, self.group) if self.method == "awq" else None
        if factor is not None:
            dense, inputs = dense * factor[..., None], inputs.scaled(1.0 / factor)
        if self.method == "gptq":
            stored = gptq(dense, mask, inputs, self.grid, self.group)
        else:
            stored = quantized(dense, self.grid, self.group)
        if self._activations != "none":
            stored = stored.replace(activation_bits=self.activation_bits)
        if self._activations == "static":
            largest = jnp.max(inputs.largest, axis=-1)
            limit = integer_limit(self.activation_bits)
            stored = stored.replace(activation_scale=jnp.where(largest > 0, largest, 1.0) / limit)
        stored = stored if mask is None else Masked(stored, mask)
        return stored if factor is None else Scaled(stored, 1.0 / factor)

    def _after(self, path: str, u: Any, inputs: Inputs) -> Inputs:
        """What is known of x·u from what is known of x."""
        if inputs.gram is None or self._activations == "static":
            raise ValueError(
                f"quantize: the largest activation between the factors of {path} is not known; choose "
                "activations='dynamic' for low-rank weights."
            )
        u = materialize(u).astype(jnp.float32)
        gram = jnp.swapaxes(u, -2, -1) @ inputs.gram @ u
        squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
        return Inputs(inputs.count, squares, jnp.full_like(squares, jnp.inf), gram)

    def describe(self):
        if self.mode == "training":
            alone = "" if self._activations == "dynamic" else ", weights alone"
            return f"int{self.bits} training ({self.backend}{alone})"
        words = [f"{self.grid} weights"]
        if self._activations != "none":
            words.append(f"int{self.activation_bits} activations ({self._activations})")
        words += [f"groups of {self.group}"] if self.group else []
        return ", ".join([*words, self.method] if self.method != "nearest" else words)
