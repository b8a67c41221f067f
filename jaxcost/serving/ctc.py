"""What a model of CTC heard: the labels of its best path, and the programs that find it in batches of recordings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxcost import weights
from jaxcost.data.spectrogram import SAMPLE_RATE
from jaxcost.models.audio import valid_frames
from jaxcost.models.transformer import Transformer, logits
from jaxcost.serving.batches import Batched, BatchesConfig, padded_lengths

_BATCHES = BatchesConfig()
_LONGEST_SECONDS = 30
_SHORTEST_FRAMES = 128
_VARIANCE = 1e-7
"""Added to the variance of a waveform, as in the training of the published models."""


def greedy_decode(
    logits_BTV: jax.Array, valid_BT: jax.Array | None = None, *, blank: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The labels of the most likely path through the frames: its repeats collapsed to one, then its blanks dropped.

    Source: Graves et al. 2006, Connectionist temporal classification, ICML, best path decoding.

    Args:
      logits_BTV: of each frame.
      valid_BT: frames of no padding; all if not given.
      blank: id of the blank.

    Returns:
      The labels, int32 (B, T), followed by blanks, and how many they are, int32 (B,).
    """
    best_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
    before_BT = jnp.pad(best_BT[:, :-1], ((0, 0), (1, 0)), constant_values=blank)
    kept_BT = (best_BT != blank) & (best_BT != before_BT)
    if valid_BT is not None:
        kept_BT &= valid_BT
    # What is not kept goes behind the end, where it is dropped.
    places_BT = jnp.where(kept_BT, jnp.cumsum(kept_BT, axis=1) - 1, best_BT.shape[1])
    rows_B1 = jnp.arange(len(best_BT))[:, None]
    labels_BT = jnp.full_like(best_BT, blank).at[rows_B1, places_BT].set(best_BT, mode="drop")
    return labels_BT, jnp.sum(kept_BT, axis=1, dtype=jnp.int32)


class Heard(Batched[np.ndarray]):
    """The programs of a model that gives characters of waveforms, float32 (samples,): labels and how many they are.

    A waveform is followed by zeros up to its length in frames, which the frames that are valid do not hear, but for a
    model whose first convolution is normed over time (see `audio.valid_frames`).
    """

    def __init__(
        self,
        model: Transformer,
        params: weights.Params,
        config: BatchesConfig = _BATCHES,
        *,
        blank: int = 0,
        normalized: bool = True,
    ):
        """Compiles everything.

        Args:
          model: gives logits of characters for each frame of a waveform.
          params: its weights.
          config: in what batches; lengths are in frames, up to half a minute if none are given.
          blank: id of the blank.
          normalized: it hears waveforms without their mean and at variance 1.

        Raises:
          ValueError: the model does anything else, or is shorter than asked for.
        """
        c = model.config
        if c.of_tokens or c.audio.channels != 1 or not c.head.outputs or c.head.pooling != "none":
            raise ValueError(
                "The model does not write what it hears; serve one of waveforms (model.audio.channels 1) with "
                "model.head.outputs and without pooling."
            )
        longest = min(c.max_length, c.audio.frames(_LONGEST_SECONDS * SAMPLE_RATE))
        taken = "frames that the model takes"
        lengths = padded_lengths(config.lengths, longest, taken, _SHORTEST_FRAMES, limit=c.max_length)
        self._blank, self._normalized = blank, normalized
        super().__init__(model, params, lengths, config)

    @property
    def longest(self) -> int:
        """Samples of the longest waveform."""
        return self._samples(self.max_length)

    def _samples(self, frames: int) -> int:
        """The most samples that make so many frames."""
        return self.model.config.audio.length(frames + 1) - 1

    def _run(self, params, audio_BS, lengths_B):
        valid_BT = valid_frames(self.model.config.audio, lengths_B, audio_BS.shape[1])
        hidden_BTD, _ = self.model.apply({"params": params}, audio_BS, valid_BT=valid_BT)
        return greedy_decode(logits(self.model.config, params, hidden_BTD), valid_BT, blank=self._blank)

    def _empty(self, rows: int, length: int) -> list[np.ndarray]:
        samples = self._samples(length)
        # A row of padding alone would divide by nothing.
        return [np.zeros((rows, samples), np.float32), np.full((rows,), samples, np.int32)]

    def _put(self, arrays: list[np.ndarray], row: int, audio: np.ndarray) -> None:
        if self._normalized:
            audio = (audio - audio.mean()) / np.sqrt(audio.var() + _VARIANCE)
        arrays[0][row, : len(audio)], arrays[1][row] = audio, len(audio)

    def size(self, audio: np.ndarray) -> int:
        return int(self.model.config.audio.frames(len(audio)))

    tokens = size

    def check(self, audio: np.ndarray) -> None:
        if self.size(audio) < 1:
            least = self.model.config.audio.length(1)
            raise ValueError(f"A recording has {len(audio)} samples, fewer than the {least} that make a frame.")
        if self.size(audio) > self.max_length:
            raise ValueError(
                f"A recording makes {self.size(audio)} frames, more than the {self.max_length} that the model takes; "
                "cut it."
            )
