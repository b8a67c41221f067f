"""Quantised weights in the compressed-tensors layout, which vLLM and transformers read.

A module whose weight is `Quantized` is written as codes, its kind of codes as a scheme of `quantization_config`:

    int8 or int4, weights alone    pack-quantized    weight_packed, int32 (out, words), the codes less the smallest of
                                                     two's complement, the first in the lowest bits; weight_scale
                                                     (out, groups); weight_shape (2,)
    int8, activations too          int-quantized     weight, int8 (out, in); weight_scale (out, 1); input_scale (1,)
                                                     where activations have a calibrated scale
    fp8                            float-quantized   weight, e4m3 (out, in); weight_scale (out, 1)

Everything else is written as numbers. Source: github.com/vllm-project/compressed-tensors, the compressors' modules.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcost.models.families import UnsupportedModel
from jaxcost.models.huggingface.layout import Place
from jaxcost.models.huggingface.safetensors import Tensor
from jaxcost.weights import Frozen, Masked, Quantized

if TYPE_CHECKING:
    from jaxcost.models.huggingface.writing import Source

_WORD_BITS = 32


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a module's weight is quantised."""

    grid: str
    group: int | None
    """Inputs that share a scale; None for all of them."""
    activation_bits: int | None
    calibrated: bool
    """Whether activations have a fixed scale."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.grid == "int4" else 8

    @property
    def format(self) -> str:
        """The name of the layout."""
        if self.grid == "fp8":
            return "float-quantized"
        return "int-quantized" if self.activation_bits else "pack-quantized"

    def group_of_config(self, targets: Sequence[str]) -> dict[str, Any]:
        """Its entry of `config_groups`."""
        kind = {"type": "float" if self.grid == "fp8" else "int", "symmetric": True}
        strategy = {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        activations = None
        if self.activation_bits:
            how = (
                {"strategy": "tensor", "dynamic": False} if self.calibrated else {"strategy": "token", "dynamic": True}
            )
            activations = {"num_bits": self.activation_bits, **kind, **how}
        return {
            "targets": list(targets),
            "weights": {"num_bits": self.bits, **kind, **strategy, "dynamic": False},
            "input_activations": activations,
            "output_activations": None,
            "format": self.format,
        }


def tensors(source: Source, dtype: np.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors of a checkpoint whose quantised weights stay codes, and its `quantization_config`.

    Args:
      source: the weights and their places.
      dtype: of what is not quantised.

    Raises:
      UnsupportedModel: nothing is quantised, or a weight in a way that the layout, or vLLM, does not have.
    """
    written: list[Tensor] = []
    modules: dict[Scheme, list[str]] = {}
    ignored = [name.rpartition(".")[0] for name in source.head.tied if name not in source.places]
    for place in source.places.values():
        schemes = {_scheme(path, w) for path in place.paths for _, w in source.parts[path]}
        if len(schemes) > 1:
            raise UnsupportedModel(f"{' and '.join(place.paths)} are one matrix in {place.name}; quantise them alike.")
        [scheme] = schemes
        if scheme is None:
            written.append(source.dense(place, dtype))
            ignored += [place.module] if place.transposed else []
        elif not place.transposed or place.folded:
            raise UnsupportedModel(f"{place.name} is no linear layer of torch, which is all that the layout quantises.")
        else:
            written += _coded(source, place, scheme)
            modules.setdefault(scheme, []).append(place.module)
    if not modules:
        raise UnsupportedModel("No weight is quantised; apply quantize() first, or write the layout 'dense'.")
    targets = [["Linear"]] if len(modules) == 1 else list(modules.values())
    groups = [scheme.group_of_config(found) for scheme, found in zip(modules, targets, strict=True)]
    formats = {scheme.format for scheme in modules}
    return written, {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ignored,
    }


def _scheme(path: str, w: Any) -> Scheme | None:
    """How a weight is quantised, None if it is not; UnsupportedModel for a way that the layout does not have."""
    inner = [type(n).__name__ for n in jax.tree.leaves(w, is_leaf=_is_quantized) if _is_quantized(n)]
    if not inner:
        return None
    q = _codes_of(w)
    if q is None:
        raise UnsupportedModel(
            f"{path} is {type(w).__name__} over quantised weights, which compressed-tensors has no place for; merge "
            "it and quantise then, or write its adapter by itself."
        )
    inward, groups = q.codes.shape[-2], q.scale.shape[-2]
    group = inward // groups if groups > 1 else None
    if (
        q.grid == "nf4"
        or (q.grid == "fp8" and group)
        or (q.activation_bits and (q.grid, q.activation_bits) != ("int8", 8))
    ):
        said = f"{q.grid}{f' in groups of {group}' if group else ''}"
        said += f" with {q.activation_bits}-bit activations" if q.activation_bits else ""
        raise UnsupportedModel(f"{path} is {said}, which vLLM does not read; use int8, int4, int8 for both, or fp8.")
    return Scheme(q.grid, group, q.activation_bits, q.activation_scale is not None)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def _codes_of(w: Any) -> Quantized | None:
    """The codes that a weight is, zeros where it is masked; None if something else stands before them."""
    if isinstance(w, Masked) and _is_quantized(w.weight):
        return w.weight.masked(w.mask)
    inner = w.weight if isinstance(w, Frozen) else w
    return inner if _is_quantized(inner) else None


def _coded(source: Source, place: Place, scheme: Scheme) -> list[Tensor]:
    outward, inward = place.shape
    groups = inward // scheme.group if scheme.group else 1

    def parts():
        return [_codes_of(source.weight(path, place.index)) for path in place.paths]

    def codes():
        return np.asarray(_turned([q.codes for q in parts()]))

    def packed():
        return np.asarray(_packed([q.codes for q in parts()], scheme.bits))

    def scales():
        return np.asarray(_turned([q.scale for q in parts()]))

    def input_scale():
        found = {float(q.activation_scale) for q in parts()}
        if len(found) > 1:
            raise UnsupportedModel(f"The parts of {place.name} have activation scales of their own; use dynamic ones.")
        return np.array(list(found), np.float32)

    def tensor(name, dtype, shape, make):
        return Tensor(f"{place.module}.{name}", np.dtype(dtype), shape, make)

    scale = tensor("weight_scale", np.float32, (outward, groups), scales)
    if scheme.format == "pack-quantized":
        words = -(-inward * scheme.bits // _WORD_BITS)
        shape = np.array(place.shape, np.int64)
        return [
            tensor("weight_packed", np.int32, (outward, words), packed),
            scale,
            tensor("weight_shape", np.int64, (2,), lambda: shape),
        ]
    dtype = jnp.float8_e4m3fn if scheme.grid == "fp8" else np.int8
    static = [tensor("input_scale", np.float32, (1,), input_scale)] if scheme.calibrated else []
    return [tensor("weight", dtype, place.shape, codes), scale, *static]


@jax.jit
def _turned(parts: Sequence[jax.Array]) -> jax.Array:
    """Parts (in, out), side by side, as (all outs, in)."""
    return jnp.concatenate(parts, axis=-1).T


@functools.partial(jax.jit, static_argnames="bits")
def _packed(parts: Sequence[jax.Array], bits: int) -> jax.Array:
    """Codes (in, out) as words, int32 (out, words): unsigned, several a word, what is left over zero."""
    codes = jnp.concatenate([part.astype(jnp.int32) for part in parts], axis=-1).T + 2 ** (bits - 1)
    each = _WORD_BITS // bits
    codes = jnp.pad(codes, ((0, 0), (0, -codes.shape[-1] % each))).astype(jnp.uint32)
    shifted = codes.reshape(codes.shape[0], -1, each) << (bits * jnp.arange(each, dtype=jnp.uint32))
    return lax.bitcast_convert_type(jnp.sum(shifted, axis=-1, dtype=jnp.uint32), jnp.int32)
