"""Recordings in files of sound: their samples, at the rate that a model hears."""

from __future__ import annotations

import io
import math

import numpy as np

from jaxcost.data.records import BadRecord

_RATES = (4_000, 48_000)
"""Samples a second that files of speech have: others take filters longer than any recording, or memory for nothing."""
_LOUDEST = 2.0**32
"""What a sample may be: that of any integer file, unscaled, whose squares can still be summed in float32."""
_BLOCK = 1 << 16


def read_sound(content: bytes, rate: int, max_seconds: float) -> np.ndarray:
    """What a recording sounds like, float32 (samples,), mostly between -1 and 1, the mean of its channels.

    Args:
      content: a file that libsndfile reads, such as WAV, FLAC, Ogg or MP3.
      rate: samples a second that are wanted; those of another rate are filtered (`scipy.signal.resample_poly`).
      max_seconds: that it may last, which is found out before it is decoded.

    Raises:
      BadRecord: it is no recording, is damaged, has no sound, or lasts longer.
    """
    import soundfile
    from scipy.signal import resample_poly

    if not content:
        raise BadRecord("is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            own = file.samplerate
            if not _RATES[0] <= own <= _RATES[1]:
                raise BadRecord(f"has {own} samples a second; {_RATES[0]} to {_RATES[1]} can be read")
            if file.frames > max_seconds * own:
                raise BadRecord(f"lasts {file.frames / own:.0f} s, more than {max_seconds:g} s")
            # In blocks, so that many channels need no more memory than one; of a number of frames, without which those
            # of formats that cannot be searched, such as GSM 06.10, are not read.
            samples, count = np.zeros(file.frames, np.float32), 0
            for block in file.blocks(_BLOCK, frames=file.frames, dtype="float32", always_2d=True):
                samples[count : count + len(block)] = block.mean(axis=1)
                count += len(block)
    except soundfile.LibsndfileError as error:
        raise BadRecord(f"cannot be read as sound ({error.error_string.rstrip('.')})") from error
    samples = samples[:count]
    if not count:
        raise BadRecord("has no sound in it")
    # One that is no number would go on as none into what a model keeps.
    if not np.all(np.abs(samples) <= _LOUDEST):
        raise BadRecord(f"has samples that are no numbers, or beyond {_LOUDEST:g}")
    if own == rate:
        return samples
    shared = math.gcd(own, rate)
    return resample_poly(samples, rate // shared, own // shared).astype(np.float32)


def windows(samples: np.ndarray, longest: int, rate: int) -> list[np.ndarray]:
    """A recording, float32 (samples,), in pieces of at most `longest` samples, cut where it is quietest.

    Each ends in the last fifth of what it may hold, in the middle of the tenth of a second with the least energy.
    """
    found, near = [], max(1, min(rate // 10, longest // 20))
    while len(samples) > longest:
        first = longest - longest // 5
        loudness = np.cumsum(np.square(samples[first:longest], dtype=np.float64))
        quietest = int(np.argmin(loudness[near:] - loudness[:-near])) if near < len(loudness) else 0
        end = first + quietest + near // 2
        found.append(samples[:end])
        samples = samples[end:]
    return [*found, samples]
