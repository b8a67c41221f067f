"""Models that answer once for an image: labels. Shapes in names: B rows, H W C height, width and channels."""

from __future__ import annotations

import numpy as np

from jaxcost import weights
from jaxcost.models.transformer import Transformer, logits
from jaxcost.serving.batches import Batched, BatchesConfig

_BATCHES = BatchesConfig()


class Pictures(Batched[np.ndarray]):
    """The programs of a model that labels images: float32 (H, W, C) of its own size, as `data.images.pixels` makes."""

    def __init__(self, model: Transformer, params: weights.Params, config: BatchesConfig = _BATCHES):
        """Compiles everything; ValueError if the model gives anything but labels of images."""
        head, images = model.config.head, model.config.images
        if model.config.of_tokens or not images.patch or not head.outputs or head.pooling == "none" or head.boxes:
            raise ValueError(
                "The model gives no labels of whole images; serve one of model.images with model.head.outputs and "
                "model.head.pooling."
            )
        if config.lengths:
            raise ValueError("batches.lengths is for texts and recordings, and images have one size; leave it out.")
        self.shape = (images.height, images.width, images.channels)
        super().__init__(model, params, (images.tokens,), config)

    def _run(self, params, images_BHWC):
        hidden_B1D, _ = self.model.apply({"params": params}, images_BHWC)
        return logits(self.model.config, params, hidden_B1D[:, 0])

    def _empty(self, rows: int, length: int) -> list[np.ndarray]:
        return [np.zeros((rows, *self.shape), np.float32)]

    def _put(self, arrays: list[np.ndarray], row: int, image: np.ndarray) -> None:
        arrays[0][row] = image

    def size(self, image: np.ndarray) -> int:
        return self.max_length

    tokens = size

    def check(self, image: np.ndarray) -> None:
        if image.shape != self.shape:
            raise ValueError(f"An image is of the shape {image.shape}, and the model takes {self.shape}; resize it.")
