"""What a step is given: the arrays of a batch, and which of them the model takes."""

from __future__ import annotations

from typing import Any

import jax

Batch = dict[str, jax.Array]
"""`inputs` and `targets`, int32 (B, T), and `mask`, float32 (B, T); targets that are float32 are numbers to tell, the
others tokens or labels. Further, where a model takes them: `valid`, bool
(B, T), the inputs that are no padding; `segments`, int32 (B, T), which of several sequences in a row each is of;
`source`, int32 (B, S) or what stands in the place of tokens, which an encoder reads; `source_valid`, bool (B, S). Of
detection, `inputs` are images, `targets` the labels (B, M) of what is on them, `boxes` (B, M, 4) where it is, and
`mask` (B, M) 0 where there are fewer than M. Of mixed images, `shares`, float32 (B, 1, C), says how much of each label
they are, and is learned in the place of `targets`."""

_BESIDE = {"valid": "valid_BT", "segments": "segments_BT", "source": "source_BS", "source_valid": "source_valid_BS"}


def beside_inputs(batch: Batch) -> dict[str, Any]:
    """The arguments of a model besides its inputs."""
    return {argument: batch[name] for name, argument in _BESIDE.items() if name in batch}
