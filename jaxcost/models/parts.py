"""The frozen descriptions of what a transformer may have besides its blocks: other inputs, heads, an encoder.

Each is a field of `config.ModelConfig`, and stands for nothing by default.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal


def check_kinds(config: Any, path: str) -> None:
    """ValueError if a field is of another kind than its default, as a JSON file may fill it."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        if kind is float:
            good, wanted = type(value) in (int, float) and math.isfinite(value), "a finite number"
        else:
            good, wanted = isinstance(value, kind), {bool: "true or false", int: "a whole number"}.get(kind)
            good = good and (kind is bool or not isinstance(value, bool))
        if not good:
            raise ValueError(f"{path}.{field.name} is {value!r}; it must be {wanted or f'a {kind.__name__}'}.")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for sequences longer than those of the first training."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """`linear` divides every frequency by `factor`; `llama3` only the slow ones, with a ramp between."""
    factor: float = 1.0
    """What frequencies are divided by."""
    low_frequency_factor: float = 1.0
    """llama3: waves longer than original_length / this are divided by the whole factor."""
    high_frequency_factor: float = 4.0
    """llama3: waves shorter than original_length / this stay as they are."""
    original_length: int = 8192
    """llama3: tokens of a sequence in the first training."""

    def __post_init__(self):
        check_kinds(self, "model.rope_scaling")
        if self.factor < 1:
            raise ValueError(f"model.rope_scaling.factor is {self.factor}; it must be at least 1.")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"model.rope_scaling.high_frequency_factor ({self.high_frequency_factor}) must be above "
                f"low_frequency_factor ({self.low_frequency_factor})."
            )


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What is made of the hidden states: logits of the next token unless it says otherwise."""

    outputs: int = 0
    """Numbers that the head gives, such as labels, or 1 for a regression or a rank; 0 is one for each token of the
    vocabulary."""
    pooling: Literal["none", "first", "last", "mean"] = "none"
    """What is answered for: every token, or the sequence by its first or last token or by the mean of all."""
    hidden: Literal["none", "linear", "tanh", "silu", "gelu", "gelu_exact", "relu"] = "none"
    """A further layer with this activation, or a linear one, before the output."""
    hidden_layers: int = 1
    """Further layers of this kind, one behind the other."""
    hidden_width: int = 0
    """Numbers that the further layer makes; 0 is as many as the model is wide (D)."""
    hidden_bias: bool = True
    """The further layer has a bias."""
    hidden_norm: bool = False
    """The further layer is followed by a norm."""
    bias: bool = False
    """The output has a bias."""
    embed: bool = False
    """The hidden states are the output, without a matrix, and at unit length where they are pooled: embeddings."""
    boxes: bool = False
    """Answers are for an image's detection tokens: labels, the last of them that of no object, and, by further layers
    of their own, the box that each is about."""

    def __post_init__(self):
        check_kinds(self, "model.head")
        if self.hidden_layers < 1:
            raise ValueError(f"model.head.hidden_layers is {self.hidden_layers}; it must be at least 1.")
        if self.boxes and (self.outputs < 2 or self.pooling != "none" or self.hidden_norm):
            raise ValueError(
                "model.head.boxes is on, which needs model.head.outputs of at least 2, one of them for no object, and "
                "neither pooling nor hidden_norm."
            )
        if self.embed and (self.outputs or self.bias):
            raise ValueError("model.head.embed is on, which has no outputs and no bias; turn it off or leave them out.")
        if self.outputs < 0:
            raise ValueError(f"model.head.outputs is {self.outputs}; it cannot be negative.")
        if (self.hidden_norm or self.hidden_width) and self.hidden == "none":
            name = "hidden_norm is on" if self.hidden_norm else f"hidden_width is {self.hidden_width}"
            raise ValueError(f"model.head.{name} without a further layer; set model.head.hidden.")
        if self.hidden_width < 0 or (self.hidden_width and self.of_vocabulary):
            raise ValueError(
                f"model.head.hidden_width is {self.hidden_width}; it cannot be negative, and must be 0 where the "
                "outputs are those of the vocabulary."
            )
        if self.pooling != "none" and self.of_vocabulary:
            raise ValueError(
                f"model.head.pooling is {self.pooling!r}, which answers for a sequence; set model.head.outputs to the "
                "number of labels, or model.head.embed."
            )

    @property
    def of_vocabulary(self) -> bool:
        """Whether the outputs are logits of tokens."""
        return not (self.outputs or self.embed)

    @property
    def labels(self) -> int:
        """Outputs that are labels: all but that of no object, where there are boxes."""
        return self.outputs - self.boxes


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Images in the place of tokens, cut into square patches. Source: Dosovitskiy et al. 2020, arXiv:2010.11929."""

    patch: int = 0
    """Pixels on a side of a patch; 0 is a model of tokens."""
    height: int = 224
    """Pixels of an image from top to bottom."""
    width: int = 224
    """Pixels from left to right."""
    channels: int = 3
    """Numbers of a pixel."""
    class_tokens: int = 0
    """Learned vectors before the patches, the first of which a head may answer by."""
    detection_tokens: int = 0
    """Learned vectors behind the patches, each of which may find an object. Source: Fang et al. 2021 (YOLOS),
    arXiv:2106.00666."""

    def __post_init__(self):
        check_kinds(self, "model.images")
        counts, sizes = (self.patch, self.class_tokens, self.detection_tokens), (self.height, self.width, self.channels)
        if min(counts) < 0 or min(sizes) < 1:
            raise ValueError("model.images has a size below 1; give sizes of pixels, or 0 as patch for no images.")
        if self.patch and (self.height % self.patch or self.width % self.patch):
            raise ValueError(
                f"model.images is {self.height} x {self.width} pixels, which patches of {self.patch} do not fill; "
                "change either."
            )

    @property
    def tokens(self) -> int:
        """Patches, class and detection tokens of an image; 0 of a model of tokens."""
        return self.class_tokens + self.patches + self.detection_tokens if self.patch else 0

    @property
    def patches(self) -> int:
        """Patches of an image; 0 of a model of tokens."""
        return (self.height // self.patch) * (self.width // self.patch) if self.patch else 0


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """Audio in the place of tokens: a waveform, or frames of a spectrogram, through convolutions over time.

    Sources: Baevski et al. 2020 (wav2vec 2.0, arXiv:2006.11477); Radford et al. 2022 (Whisper, arXiv:2212.04356).
    """

    channels: int = 0
    """Numbers at each time: 1 of a waveform, or the mels of a spectrogram; 0 is a model of tokens."""
    widths: tuple[int, ...] = ()
    """Numbers that each convolution makes of what it sees, from the first on."""
    kernels: tuple[int, ...] = ()
    """Times that each convolution sees at once."""
    strides: tuple[int, ...] = ()
    """Times that each convolution goes on by."""
    padded: bool = False
    """Zeros stand before the first and behind the last time, half a kernel of them on each side; off, a convolution
    sees what is there alone."""
    bias: bool = True
    """The convolutions have biases."""
    activation: Literal["silu", "gelu", "gelu_exact", "relu"] = "gelu_exact"
    """Non-linearity behind each convolution, that of positions too."""
    norm: Literal["none", "first", "each"] = "none"
    """Norms between a convolution and its non-linearity: of the first one's channels over time, padding included
    (GroupNorm of one channel a group), or of each one's frames (LayerNorm)."""
    projection: Literal["none", "linear", "normed"] = "none"
    """What takes frames to the model's width: the last convolution, a linear layer, or a norm and a linear layer."""
    position_kernel: int = 0
    """Frames that a further convolution sees to tell positions by, whose output is added to the frames; 0 is none."""
    position_groups: int = 1
    """Groups of channels that the convolution of positions keeps apart."""

    def __post_init__(self):
        check_kinds(self, "model.audio")
        layers = (self.widths, self.kernels, self.strides)
        if any(type(size) is not int or size < 1 for sizes in layers for size in sizes):
            raise ValueError("model.audio.widths, kernels and strides must be whole numbers of at least 1.")
        if len({len(sizes) for sizes in layers}) > 1:
            raise ValueError(
                f"model.audio has {len(self.widths)} widths, {len(self.kernels)} kernels and {len(self.strides)} "
                "strides; give one of each for every convolution."
            )
        if self.channels < 0 or self.position_kernel < 0 or self.position_groups < 1:
            raise ValueError("model.audio has a size that is negative, or no position_groups; change it.")
        if bool(self.channels) != bool(self.widths):
            raise ValueError(
                f"model.audio.channels is {self.channels} and there are {len(self.widths)} convolutions; set both, or "
                "neither for a model of tokens."
            )
        if self.padded and any(kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError("model.audio.padded is on, which needs odd kernels; change model.audio.kernels.")

    def frames(self, length):
        """Frames that the convolutions make of a length of audio, a number or an array; below 1 if it is too short.

        Of a waveform's samples, or a spectrogram's frames, that are followed by padding, as many frames are valid.
        """
        for made in self.layer_frames(length):
            length = made
        return length

    def layer_frames(self, length) -> list:
        """What each convolution makes of a length of audio, in frames."""
        found = []
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            length = (length + 2 * self.padding(kernel) - kernel) // stride + 1
            found.append(length)
        return found

    def length(self, frames: int) -> int:
        """The shortest audio that makes so many frames, in samples of a waveform or frames of a spectrogram."""
        for kernel, stride in zip(self.kernels[::-1], self.strides[::-1], strict=True):
            frames = (frames - 1) * stride + kernel - 2 * self.padding(kernel)
        return frames

    def padding(self, kernel: int) -> int:
        """Zeros on each side of what a convolution with this kernel sees."""
        return kernel // 2 if self.padded else 0


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder that reads a source, whose states every block of the decoder attends to. What is not said here is as
    in the decoder. Sources: Vaswani et al. 2017, arXiv:1706.03762; Raffel et al. 2019 (T5), arXiv:1910.10683."""

    num_layers: int = 0
    """Blocks of the encoder; 0 is a model without one."""
    num_heads: int = 0
    """Query heads; 0 is as many as in the decoder."""
    num_kv_heads: int = 0
    """Key and value heads; 0 is as many as query heads, or as in the decoder where those are."""
    mlp_width: int = 0
    """Hidden size of the feed-forward block; 0 is the decoder's."""
    max_length: int = 0
    """Longest source in tokens; 0 is the decoder's bound."""
    start: int = 0
    """The token that begins every answer."""

    def __post_init__(self):
        check_kinds(self, "model.encoder")
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"model.encoder.{field.name} is {getattr(self, field.name)}; it cannot be negative.")
