"""The log-mel spectrogram: that of transformers (oracles), and what its definition says of tones and of silence."""

import jax
import numpy as np
import pytest

from jaxcost.data.augmentation.audio import SpecAugment
from jaxcost.data.spectrogram import HOP, SAMPLE_RATE, Spectrogram, log_mel, mel_filters


def recordings(seconds=1.0):
    """A rising tone, noise, and a click in silence; float32 (3, samples)."""
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(times))
    click = np.where(np.abs(times - seconds / 2) < 0.001, 0.9, 0.0)
    return np.stack([0.5 * np.sin(2 * np.pi * (200 + 3000 * times) * times), noise, click]).astype(np.float32)


@pytest.mark.oracles
@pytest.mark.parametrize("mels", [80, 128])
def test_spectrograms_are_those_of_transformers(mels):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=3)
    np.testing.assert_allclose(mel_filters(mels), theirs.mel_filters, atol=1e-7)
    # Two that end early, one that is cut and one as long as it should be.
    audio = [row[:length] for row, length in zip(recordings(4.0), (20_000, 47_999, 64_000), strict=True)]
    audio.append(recordings(3.0)[1])
    want = theirs(audio, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features.swapaxes(1, 2)
    got = np.stack([Spectrogram(mels, 3.0).map({"audio": one})["spectrogram"] for one in audio])
    assert got.shape == want.shape == (4, 300, mels) and np.ptp(want) > 1.5
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_tone_is_loudest_in_its_band():
    times = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    tones = np.stack([np.sin(2 * np.pi * hertz * times) for hertz in (500, 4000)]).astype(np.float32)
    made = np.asarray(log_mel(tones))
    assert made.shape == (2, SAMPLE_RATE // HOP, 80) and made.dtype == np.float32
    # The frequencies of a window are 40 Hz apart.
    middles = mel_filters(80).argmax(axis=0) * 40
    found = middles[made.mean(axis=1).argmax(axis=1)]
    np.testing.assert_allclose(found, [500, 4000], atol=60)


def test_the_quietest_is_eight_below_the_loudest_of_its_own_recording():
    made = np.asarray(log_mel(recordings()))
    click = made[2]
    assert click.max() - click.min() == pytest.approx(2.0, abs=1e-5)
    np.testing.assert_allclose(made, [np.asarray(log_mel(row[None]))[0] for row in recordings()], atol=1e-6)
    # Silence is the floor, 1e-10, throughout.
    np.testing.assert_allclose(log_mel(np.zeros((1, 800), np.float32)), np.full((1, 5, 80), -1.5), atol=1e-6)
    # Ten times as loud is a hundred times the power.
    np.testing.assert_allclose(log_mel(0.1 * recordings()[1:2])[0], made[1] - 0.5, atol=1e-3)


def test_bands_have_one_area_and_cover_all_frequencies():
    filters = mel_filters(128)
    assert filters.shape == (201, 128) and (filters >= 0).all()
    wide = filters[:, np.count_nonzero(filters, axis=0) > 6]
    np.testing.assert_allclose(wide.sum(axis=0) * 40, 1.0, atol=0.02)
    assert (mel_filters(40)[1:-1].sum(axis=1) > 0).all()


def test_recordings_go_through_grain_at_a_fixed_length():
    example = Spectrogram(mels=12, seconds=0.5).map({"audio": recordings()[0], "text": "a"})
    assert example["spectrogram"].shape == (50, 12) and example["text"] == "a"
    short = Spectrogram(mels=12, seconds=0.5).map({"audio": recordings()[0, :4000]})["spectrogram"]
    np.testing.assert_allclose(short[:20], example["spectrogram"][:20], atol=1e-5)
    assert np.ptp(short[30:]) == 0
    hidden = SpecAugment(frequency_width=4, time_width=9).random_map(example, np.random.default_rng(0))
    assert hidden["spectrogram"].shape == (50, 12)


def test_what_is_no_recording_is_refused():
    for shape in ((400,), (1, 200), (1, 4000, 2)):
        with pytest.raises(ValueError, match=r"give \(batch, samples\), of at least 201 samples"):
            log_mel(jax.numpy.zeros(shape))
    with pytest.raises(ValueError, match="give at least 1 and 0.025"):
        Spectrogram(mels=0)
    with pytest.raises(ValueError, match="0.001 seconds is none"):
        Spectrogram(seconds=0.001)
