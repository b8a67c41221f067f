"""Images as sequences: patches, projected, between learned class tokens and learned detection tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxcost.models.config import ModelConfig
from jaxcost.models.layers import Linear, Table


class Images(nn.Module):
    """Images (B, height, width, channels) to embeddings (B, T, D): class tokens, patches row by row, detection tokens.

    A patch's numbers are in the order of channel, row, column, as a convolution's kernel has them, whose matrix
    `patches/kernel` is.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, key=None) -> jax.Array:
        c = self.config.images
        if images_BHWC.shape[1:] != (c.height, c.width, c.channels):
            raise ValueError(
                f"Images are of the shape {images_BHWC.shape[1:]}, but model.images says "
                f"{(c.height, c.width, c.channels)}; resize them."
            )
        rows, columns = c.height // c.patch, c.width // c.patch
        cut = images_BHWC.reshape(-1, rows, c.patch, columns, c.patch, c.channels)
        patches_BNP = jnp.transpose(cut, (0, 1, 3, 5, 2, 4)).reshape(len(images_BHWC), rows * columns, -1)
        x_BND = Linear(self.config.width, (None, "embed"), bias=True, name="patches")(patches_BNP, key)
        before, behind = (self._learned(name, x_BND) for name in ("class_tokens", "detection_tokens"))
        return jnp.concatenate([*before, x_BND, *behind], axis=1)

    def _learned(self, name: str, x_BND: jax.Array) -> list[jax.Array]:
        """The vectors of that name for each image, (B, N, D), if there are any."""
        rows = getattr(self.config.images, name)
        if not rows:
            return []
        table_ND = Table(rows, self.config.width, "position", name=name)().astype(x_BND.dtype)
        return [jnp.broadcast_to(table_ND, (len(x_BND), *table_ND.shape))]
