"""Audio as sequences: frames that convolutions over time make of a waveform or of a spectrogram."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxcost import weights
from jaxcost.models.config import AudioConfig, ModelConfig
from jaxcost.models.layers import Linear, Norm, activation, kernel, vector
from jaxcost.sharding import constrain

_EPSILON = 1e-5
"""Added to the variance in the norms of the convolutions, whatever that of the blocks is."""


def valid_frames(audio: AudioConfig, lengths_B: jax.Array, longest: int) -> jax.Array:
    """Which frames are of no padding, bool (B, T), for a batch of audio that is padded at its end.

    What they are does not depend on the padding, but where the first convolution's channels are normed over time, or
    where convolutions see half a kernel beyond the end: there padding is heard as what it is, such as silence.

    Args:
      audio: what makes frames of it.
      lengths_B: int32 lengths without padding, in samples of a waveform or frames of a spectrogram.
      longest: length of the batch, padding included.
    """
    return jnp.arange(audio.frames(longest)) < audio.frames(jnp.asarray(lengths_B))[:, None]


def frames_of(audio: AudioConfig, length: int) -> int:
    """Frames that a length of audio makes; ValueError where that is none."""
    if audio.frames(length) < 1:
        raise ValueError(
            f"Audio of length {length} is too short for a frame, which takes {audio.length(1)}; pad it with zeros."
        )
    return audio.frames(length)


class Audio(nn.Module):
    """A waveform (B, samples), or a spectrogram (B, frames, mels), to embeddings (B, T, D).

    A convolution's kernel is a matrix (times · channels, width) that meets what the convolution sees at once, in the
    order of time and channel. Frames that are not valid, if `valid_BT` is given, are zeros to the convolution of
    positions, as what stands before the first frame is.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, audio: jax.Array, key=None, valid_BT=None) -> jax.Array:
        a = self.config.audio
        x_BTC = audio[..., None] if a.channels == 1 and audio.ndim == 2 else audio
        if x_BTC.ndim != 3 or x_BTC.shape[-1] != a.channels:
            wanted = "(batch, samples)" if a.channels == 1 else f"(batch, frames, {a.channels})"
            raise ValueError(f"Audio is of the shape {audio.shape}, but model.audio takes {wanted}; change either.")
        *keys, last = weights.split_keys(key, len(a.widths) + 1)
        act = activation(a.activation)
        for i, (width, times, stride) in enumerate(zip(a.widths, a.kernels, a.strides, strict=True)):
            # The frontend is not split over the length: a convolution would need its neighbours' ends.
            x_BTC = constrain(x_BTC, "batch", None, None)
            seen_BTP = patches(x_BTC, times, stride, a.padding(times))
            x_BTC = Linear(width, (None, "embed"), a.bias, name=f"convolution_{i}")(seen_BTP, keys[i])
            if a.norm == "each" or (a.norm == "first" and i == 0):
                x_BTC = _Standardized(-1 if a.norm == "each" else 1, name=f"norm_{i}")(x_BTC)
            x_BTC = act(x_BTC)
        if a.projection == "normed":
            x_BTC = Norm(self.config, name="projection_norm")(x_BTC)
        if a.projection != "none":
            x_BTC = Linear(self.config.width, (None, "embed"), bias=True, name="projection")(x_BTC, last)
        if a.position_kernel:
            x_BTC = x_BTC if valid_BT is None else jnp.where(valid_BT[..., None], x_BTC, 0)
            x_BTC = x_BTC + act(_Positions(self.config, name="positions")(x_BTC))
        return x_BTC


def patches(x_BTC: jax.Array, times: int, stride: int, padding: int = 0) -> jax.Array:
    """What a convolution sees at once, (B, T', times · C): `times` of x's times, `stride` on from the ones before.

    Estimated by the compiler (libtpu 0.0.52), the gradient of wav2vec 2.0's frontend and two layers for 16 times ten
    seconds on v5e:2x2 takes 27% of the cycles, and 31% of the memory, that it does with convolutions for the products;
    in the order of channel and time it takes 1.8 times the cycles.
    """
    x_BTC = jnp.pad(x_BTC, ((0, 0), (padding, padding), (0, 0))) if padding else x_BTC
    end = x_BTC.shape[1] - times + 1
    return jnp.concatenate([x_BTC[:, i : end + i : stride] for i in range(times)], axis=-1)


class _Standardized(nn.Module):
    """x (B, T, C) without its mean and at variance 1 over an axis, times a scale and plus a bias of each channel.

    Over time it is GroupNorm with a group for each channel, over channels LayerNorm. Computed in float32. Sources: Wu
    and He 2018, arXiv:1803.08494; Ba et al. 2016, arXiv:1607.06450.
    """

    axis: int

    @nn.compact
    def __call__(self, x_BTC):
        y = x_BTC.astype(jnp.float32)
        y = y - jnp.mean(y, axis=self.axis, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=self.axis, keepdims=True) + _EPSILON)
        y = y * vector(self, "scale", nn.initializers.ones, x_BTC.shape[-1])
        return (y + vector(self, "bias", nn.initializers.zeros, x_BTC.shape[-1])).astype(x_BTC.dtype)


class _Positions(nn.Module):
    """A convolution over time of frames (B, T, D) in groups of channels, as many frames as before, centred.

    Its kernel is a matrix (times · D / groups, D), a column for each filter, and is of length 1 at each time before
    `scale` gives each its own (weight normalisation, arXiv:1602.07868). It is made dense, whatever kind it is of, and
    convolved: all that it sees at once would be as many times the frames as it has times, 128 in published models. So
    what it is multiplied with is not seen, and transforms that calibrate cannot pick it.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        groups, times, width = self.config.audio.position_groups, self.config.audio.position_kernel, x_BTD.shape[-1]
        matrix = weights.materialize(kernel(self, (times * width // groups, width), (None, "embed")))
        # Whole on every device: where a mesh splits the filters and not the groups, XLA (jaxlib 0.10.2) aborts.
        filters_kCD = constrain(matrix.reshape(times, width // groups, width).astype(jnp.float32), None, None, None)
        # Filters of the length that they have in the models' own first weights.
        init = nn.initializers.constant(2 * (width / (groups * times)) ** 0.5)
        scale_k = vector(self, "scale", init, times) * lax.rsqrt(jnp.sum(jnp.square(filters_kCD), axis=(1, 2)))
        bias_D = vector(self, "bias", nn.initializers.zeros, width, "embed")
        made_BTD = lax.conv_general_dilated(
            x_BTD,
            (filters_kCD * scale_k[:, None, None]).astype(x_BTD.dtype),
            window_strides=(1,),
            padding=[(times // 2, (times - 1) // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )
        return made_BTD + bias_D.astype(made_BTD.dtype)
