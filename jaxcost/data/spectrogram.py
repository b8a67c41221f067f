"""From a waveform to the log-mel spectrogram that Whisper's encoder hears, on any device.

Source: Radford et al. 2022 (Whisper), arXiv:2212.04356, section 2.2, with the constants of the published models.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

SAMPLE_RATE = 16_000
"""Samples a second of what is heard."""
WINDOW, HOP = 400, 160
"""Samples of a window, 25 ms, and from one to the next, 10 ms."""
_LINEAR_HZ, _HZ_A_MEL, _MELS_AN_OCTAVE = 1000.0, 200 / 3, 27 / np.log2(6.4)
_FLOOR, _RANGE = 1e-10, 8.0


@functools.cache
def mel_filters(mels: int) -> np.ndarray:
    """Shares (201, mels), float32, of each frequency of a window in each band of the mel scale, up to 8 kHz.

    Bands are triangles that reach from the middle of the one before to that of the one behind, of one area. The scale
    is linear below 1 kHz and logarithmic above. Source: Slaney 1998, Auditory Toolbox, Interval Research 1998-010.
    """
    top = _mel(np.array(SAMPLE_RATE / 2))
    corners = _hertz(np.linspace(0.0, top, mels + 2))
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    hertz = np.linspace(0.0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None]
    rising, falling = (hertz - low) / (middle - low), (high - hertz) / (high - middle)
    return (np.maximum(0.0, np.minimum(rising, falling)) * 2 / (high - low)).astype(np.float32)


def _mel(hertz: np.ndarray) -> np.ndarray:
    octaves = np.log2(np.maximum(hertz, _LINEAR_HZ) / _LINEAR_HZ)
    return np.minimum(hertz, _LINEAR_HZ) / _HZ_A_MEL + octaves * _MELS_AN_OCTAVE


def _hertz(mel: np.ndarray) -> np.ndarray:
    knee = _LINEAR_HZ / _HZ_A_MEL
    return np.minimum(mel, knee) * _HZ_A_MEL * 2 ** (np.maximum(mel - knee, 0.0) / _MELS_AN_OCTAVE)


@functools.partial(jax.jit, static_argnames="mels")
def log_mel(audio_BS: jax.Array, mels: int = 80) -> jax.Array:
    """The spectrogram (B, frames, mels), float32, of waveforms (B, samples) of 16 kHz, between -1 and 1.

    There is a frame for every 160 samples. The power of each band is a logarithm to base 10, not below the loudest of
    the recording less 8, plus 4 and over 4. The published models hear 30 seconds: what is shorter is followed by zeros.

    Raises:
      ValueError: the audio is no batch of waveforms, or too short for a window.
    """
    if audio_BS.ndim != 2 or audio_BS.shape[1] <= WINDOW // 2:
        raise ValueError(
            f"Audio is of the shape {audio_BS.shape}; give (batch, samples), of at least {WINDOW // 2 + 1} samples."
        )
    frames = audio_BS.shape[1] // HOP
    x_BS = jnp.pad(audio_BS.astype(jnp.float32), ((0, 0), (WINDOW // 2, WINDOW // 2)), mode="reflect")
    seen_BTW = x_BS[:, np.arange(frames)[:, None] * HOP + np.arange(WINDOW)]
    hann_W = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    power_BTF = jnp.square(jnp.abs(jnp.fft.rfft(seen_BTW * hann_W)))
    # TPUs round the operands of a product to bfloat16 unless told otherwise.
    bands_BTM = jnp.matmul(power_BTF, mel_filters(mels), precision=jax.lax.Precision.HIGHEST)
    log_BTM = jnp.log10(jnp.maximum(bands_BTM, _FLOOR))
    loudest_B11 = jnp.max(log_BTM, axis=(1, 2), keepdims=True)
    return (jnp.maximum(log_BTM, loudest_B11 - _RANGE) + 4) / 4


@dataclasses.dataclass(frozen=True)
class Spectrogram(grain.transforms.Map):
    """Makes the `spectrogram` (frames, mels) of `audio`, a waveform (samples,) of 16 kHz, at a fixed length."""

    mels: int = 80
    """Bands of frequencies, as `model.audio.channels` has them."""
    seconds: float = 30.0
    """What is longer loses its end, and zeros stand behind what is shorter."""

    def __post_init__(self):
        if self.mels < 1 or not self.seconds * SAMPLE_RATE >= WINDOW:
            raise ValueError(
                f"A spectrogram of {self.mels} mels and {self.seconds} seconds is none; give at least 1 and 0.025."
            )

    def map(self, example: dict[str, Any]) -> dict[str, Any]:
        samples = round(self.seconds * SAMPLE_RATE)
        audio = np.asarray(example["audio"], np.float32)[:samples]
        heard = np.pad(audio, (0, samples - len(audio)))
        return example | {"spectrogram": np.asarray(log_mel(heard[None], self.mels))[0]}
