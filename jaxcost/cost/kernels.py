"""What opaque kernels cost (Pallas, cuDNN): a compiler sees only their shapes, so each has a cost function here.

A kernel's shapes are in the compiled program; what its shapes do not tell (that attention is causal) stands in the
`jax.named_scope` around the call, which the program carries as the call's path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxcost.cost import contractions, hlo_work


class KernelCost(NamedTuple):
    """One call of a kernel."""

    flops: int
    """FLOPs of the tiles that the kernel runs, multiply-add = 2."""
    operand_type: str
    hbm_bytes: int
    """Bytes of operands and results, each moved once."""


# Matmuls of each splash kernel over the (T, S) scores: the forward pass makes scores and output; the gradient of the
# queries and that of keys and values each make the scores again. Source: Dao 2023, arXiv:2307.08691, algorithms 1, 2.
_SPLASH_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_SCOPE = re.compile(r"[/(](causal|full)(?:_window_(\d+))?[/)]")


def _splash(kernel: hlo_work.Kernel) -> KernelCost:
    """Cost of a splash attention kernel, masked tiles skipped.

    The first floating operands are the queries (B, H, T, h) and the keys (B, K, S, h), without B where it is 1; before
    them stand the mask's tables (1, T/q, S/k).
    """
    part = _SPLASH.search(kernel.name)[1]
    queries, keys = [shape for shape in kernel.operands if len(shape.sizes) >= 3 and shape.dtype[0] != "s"][:2]
    tables = [shape.sizes for shape in kernel.operands if shape.dtype in ("s8", "s16", "s32") and len(shape.sizes) == 3]
    *batch, heads, length, head_dim = queries.sizes
    tiles = max(tables[0][-2:]) if tables else 1
    scores = math.prod(batch) * heads * length * keys.sizes[-2] * _run(kernel, tiles, length)
    return KernelCost(
        flops=round(2 * _SPLASH_MATMULS[part] * scores * head_dim),
        operand_type=contractions.contraction_type(queries.dtype, keys.dtype),
        hbm_bytes=sum(shape.num_bytes for shape in (*kernel.operands, *kernel.results)),
    )


# Matmuls of cuDNN's attention, whose gradient is one call: scores, and a matmul for each of the four gradients.
_CUDNN_MATMULS = {"": 2, "Backward": 5}
_CUDNN = re.compile(r"__cudnn\$fmhaSoftmax(Backward)?$")


def _cudnn(kernel: hlo_work.Kernel) -> KernelCost:
    """Cost of a call of cuDNN's attention on queries (B, T, H, h) and keys (B, S, K, h); half the scores if causal."""
    (batch, length, heads, head_dim), keys = kernel.operands[0].sizes, kernel.operands[1]
    scores = batch * heads * length * keys.sizes[1] * (0.5 if _in_scope(kernel, "causal") else 1.0)
    return KernelCost(
        flops=round(2 * _CUDNN_MATMULS[_CUDNN.search(kernel.name)[1] or ""] * scores * head_dim),
        operand_type=contractions.contraction_type(kernel.operands[0].dtype, keys.dtype),
        hbm_bytes=sum(shape.num_bytes for shape in (*kernel.operands, *kernel.results)),
    )


def _in_scope(kernel: hlo_work.Kernel, scope: str) -> bool:
    return re.search(rf"[/(]{scope}[/)]", kernel.name) is not None


def _run(kernel: hlo_work.Kernel, tiles: int, length: int) -> float:
    """Share of the tiles x tiles scores that the mask's scope leaves to run."""
    scope = _SCOPE.search(kernel.name)
    if scope is None:
        return 1.0
    # A row of tiles sees itself and, up to the window, those on a side that hold any token that one of its own sees.
    side = tiles if scope[2] is None else -(-(int(scope[2]) - 1) * tiles // length)
    behind = 0 if scope[1] == "causal" else side
    return sum(min(row, side) + 1 + min(tiles - 1 - row, behind) for row in range(tiles)) / tiles**2


COST_FUNCTIONS: tuple[tuple[re.Pattern[str], Callable[[hlo_work.Kernel], KernelCost]], ...] = (
    (_SPLASH, _splash),
    (_CUDNN, _cudnn),
)
"""Pattern of a kernel's path → the function that prices a call of it."""


def kernel_cost(kernel: hlo_work.Kernel) -> KernelCost | None:
    """The cost of one call, or None if the kernel declares none."""
    for pattern, function in COST_FUNCTIONS:
        if pattern.search(kernel.name):
            return function(kernel)
    return None
