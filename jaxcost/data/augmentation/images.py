"""Changed images (height, width, channels), uint8, and mixtures of the images of a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np

from jaxcost.data.augmentation.config import OPERATIONS, AugmentImagesConfig, check_protected


@dataclasses.dataclass(frozen=True)
class AugmentImage(grain.transforms.RandomMap):
    """Changes the `image` of an example as its config says, which mixes none yet; whatever else it holds stays."""

    config: AugmentImagesConfig

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        c = self.config
        changes = [RandomCrop(c.crop)] if c.crop else []
        changes += [RandomFlip(c.flip)] if c.flip else []
        changes += [RandAugment(c.operations, c.magnitude, c.protected)] if c.operations else []
        for change in changes:
            example = change.random_map(example, rng)
        return example


@dataclasses.dataclass(frozen=True)
class MixRows(grain.transforms.RandomMap):
    """Mixes the rows of a batch by mixup or cutmix, as a config that mixes says.

    Of `inputs`, float32 (B, height, width, channels), and `targets`, int32 (B, 1), come the mixed `inputs`, and beside
    what the batch holds `shares`, float32 (B, 1, C), how much of each label a row is.
    """

    config: AugmentImagesConfig
    classes: int
    """Outputs of the model (C)."""

    def random_map(self, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        alphas = ((MixUp, self.config.mixup), (CutMix, self.config.cutmix))
        ways = [way(self.classes, alpha) for way, alpha in alphas if alpha]
        way = ways[int(rng.integers(len(ways)))]
        mixed = way.random_map({"image": batch["inputs"], "label": batch["targets"][:, 0]}, rng)
        return batch | {"inputs": mixed["image"], "shares": mixed["shares"][:, None]}


@dataclasses.dataclass(frozen=True)
class RandomFlip(grain.transforms.RandomMap):
    """Turns left and right of `image` round; leave it out where the label tells them apart."""

    probability: float = 0.5
    """How often."""

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        flipped = rng.random() < self.probability
        return example | {"image": example["image"][:, ::-1].copy()} if flipped else example


@dataclasses.dataclass(frozen=True)
class RandomCrop(grain.transforms.RandomMap):
    """Moves `image` by up to `padding` pixels to each side; what comes in is 0, and the size stays."""

    padding: int
    """Pixels, at least 0."""

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, p = example["image"], self.padding
        height, width = image.shape[:2]
        padded = np.pad(image, ((p, p), (p, p), (0, 0)))
        top, left = rng.integers(0, 2 * p + 1, 2)
        return example | {"image": padded[top : top + height, left : left + width]}


@dataclasses.dataclass(frozen=True)
class RandAugment(grain.transforms.RandomMap):
    """`operations` changes of `image`, uint8 of 1 or 3 channels, drawn from thirteen, all of one strength.

    Source: Cubuk et al. 2019, arXiv:1909.13719.
    """

    operations: int = 2
    """Changes, one behind the other."""
    magnitude: float = 0.3
    """From 0, at which an operation that has a strength does nothing, to 1."""
    protected: tuple[str, ...] = ()
    """Operations that are left out, such as `rotate` where the label hangs on it."""

    def __post_init__(self):
        if not 0 <= self.magnitude <= 1 or self.operations < 0:
            raise ValueError(
                f"RandAugment: magnitude is {self.magnitude} and operations is {self.operations}; give a magnitude "
                "from 0 to 1, and at least 0 operations."
            )
        check_protected("RandAugment.protected", self.protected)

    def random_map(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        from PIL import Image

        image = example["image"]
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        allowed = [name for name in OPERATIONS if name not in self.protected]
        for _ in range(self.operations):
            name = allowed[int(rng.integers(len(allowed)))]
            sign = 1 if rng.random() < 0.5 else -1
            picture = _changed(picture, name, self.magnitude, sign)
        return example | {"image": np.asarray(picture, np.uint8).reshape(image.shape)}


def _changed(picture: Any, name: str, magnitude: float, sign: int) -> Any:
    """A picture of Pillow's after one operation; the ranges are the paper's."""
    from PIL import Image, ImageEnhance, ImageOps

    enhancers = {"color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast}
    enhancers |= {"brightness": ImageEnhance.Brightness, "sharpness": ImageEnhance.Sharpness}
    if name in enhancers:
        return enhancers[name](picture).enhance(1 + sign * 0.9 * magnitude)
    if name == "autocontrast":
        return ImageOps.autocontrast(picture)
    if name == "equalize":
        return ImageOps.equalize(picture)
    if name == "solarize":
        return ImageOps.solarize(picture, round(256 * (1 - magnitude)))
    if name == "posterize":
        return ImageOps.posterize(picture, 8 - round(4 * magnitude))
    if name == "rotate":
        return picture.rotate(sign * 30 * magnitude)
    by = sign * magnitude
    moves = {
        "shear_x": (1, 0.3 * by, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * by, 1, 0),
        "translate_x": (1, 0, 0.45 * by * picture.width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 0.45 * by * picture.height),
    }
    return picture.transform(picture.size, Image.Transform.AFFINE, moves[name])


@dataclasses.dataclass(frozen=True)
class MixUp(grain.transforms.RandomMap):
    """Each image of a batch mixed with another, and their labels' shares alike: `image` float32, `shares` (B, C).

    Source: Zhang et al. 2017, arXiv:1710.09412.
    """

    classes: int
    """Labels (C)."""
    alpha: float = 0.2
    """Both parameters of the beta distribution that the share of the first image is drawn from."""

    def random_map(self, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, other = batch["image"].astype(np.float32), rng.permutation(len(batch["label"]))
        share = rng.beta(self.alpha, self.alpha)
        mixed = share * image + (1 - share) * image[other]
        return batch | {"image": mixed, "shares": _shares(batch["label"], other, share, self.classes)}


@dataclasses.dataclass(frozen=True)
class CutMix(grain.transforms.RandomMap):
    """A rectangle of each image of a batch replaced by another's: `image` as it was, `shares` (B, C) by the area.

    Source: Yun et al. 2019, arXiv:1905.04899.
    """

    classes: int
    """Labels (C)."""
    alpha: float = 1.0
    """Both parameters of the beta distribution that the share of the first image is drawn from."""

    def random_map(self, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, other = batch["image"].copy(), rng.permutation(len(batch["label"]))
        height, width = image.shape[1:3]
        side = np.sqrt(1 - rng.beta(self.alpha, self.alpha))
        rows, columns = round(height * side), round(width * side)
        top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
        place = (slice(None), slice(top, top + rows), slice(left, left + columns))
        image[place] = batch["image"][other][place]
        share = 1 - rows * columns / (height * width)
        return batch | {"image": image, "shares": _shares(batch["label"], other, share, self.classes)}


def _shares(labels: np.ndarray, other: np.ndarray, share: float, classes: int) -> np.ndarray:
    one_hot = np.eye(classes, dtype=np.float32)[labels]
    return share * one_hot + (1 - share) * one_hot[other]
