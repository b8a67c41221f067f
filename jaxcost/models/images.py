"""Images as sequences: patches, projected, behind learned class tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxcost.models.config import ModelConfig
from jaxcost.models.layers import Linear, Table


class Images(nn.Module):
    """Images (B, height, width, channels) to embeddings (B, T, D), class tokens first, then patches row by row.

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
        if not c.class_tokens:
            return x_BND
        table_ND = Table(c.class_tokens, self.config.width, "position", name="class_tokens")().astype(x_BND.dtype)
        return jnp.concatenate([jnp.broadcast_to(table_ND, (len(x_BND), *table_ND.shape)), x_BND], axis=1)
