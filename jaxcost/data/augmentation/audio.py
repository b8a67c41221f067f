"""Changed recordings: `audio`, a waveform (samples,), or `spectrogram` (frames, mels); both float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np


@dataclasses.dataclass(frozen=True)
class SpecAugment(grain.transforms.RandomMap):
    """Hides bands of frequencies and stretches of time of a spectrogram behind its mean.

    Source: Park et al. 2019, arXiv:1904.08779, without the warping of time, which it finds to matter least.
    """

    frequency_bands: int = 2
    """Bands that are hidden."""
    frequency_width: int = 27
    """Mels of a band at most."""
    time_bands: int = 2
    """Stretches that are hidden."""
    time_width: int = 100
    """Frames of a stretch at most."""
    time_fraction: float = 1.0
    """Share of all frames that a stretch is at most."""

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        shown = example["spectrogram"].copy()
        frames, mels = shown.shape
        mean = shown.mean()
        for _ in range(self.frequency_bands):
            first, behind = _stretch(mels, min(self.frequency_width, mels), rng)
            shown[:, first:behind] = mean
        for _ in range(self.time_bands):
            first, behind = _stretch(frames, min(self.time_width, int(frames * self.time_fraction)), rng)
            shown[first:behind] = mean
        return example | {"spectrogram": shown}


@dataclasses.dataclass(frozen=True)
class AddNoise(grain.transforms.RandomMap):
    """Adds white noise to a waveform at a ratio of their powers; silence stays silent."""

    lowest_decibels: float = 10.0
    """Signal over noise, at least."""
    highest_decibels: float = 30.0
    """Signal over noise, at most."""

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        audio = example["audio"]
        decibels = rng.uniform(self.lowest_decibels, self.highest_decibels)
        noise = rng.standard_normal(audio.shape)
        size = np.sqrt(np.mean(audio.astype(np.float64) ** 2) / np.mean(noise**2) / 10 ** (decibels / 10))
        return example | {"audio": (audio + size * noise).astype(audio.dtype)}


@dataclasses.dataclass(frozen=True)
class ChangeSpeed(grain.transforms.RandomMap):
    """Plays a waveform faster or slower, by interpolation, so that its pitch changes too.

    Source: Ko et al. 2015, Audio augmentation for speech recognition, Interspeech.
    """

    slowest: float = 0.9
    """Speed, at least, of 1."""
    fastest: float = 1.1
    """Speed, at most."""

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        audio = example["audio"]
        speed = rng.uniform(self.slowest, self.fastest)
        places = np.arange(max(1, round(len(audio) / speed))) * speed
        return example | {"audio": np.interp(places, np.arange(len(audio)), audio).astype(audio.dtype)}


def _stretch(length: int, most: int, rng: np.random.Generator) -> tuple[int, int]:
    """A stretch of a random width from 0 to `most`, at a random place."""
    width = int(rng.integers(0, most + 1))
    first = int(rng.integers(0, length - width + 1))
    return first, first + width
