"""Images, in folders that are their labels or in records: what they show, and the arrays that a model reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcost.data.records import BadRecord, check_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Those of the suffixes, whatever a file is called: of Pillow's others, EPS has a program of the machine run what it is
given."""


class ImageFiles:
    """Image files, each a record of where it lies and which label it has: the name of the folder that holds it.

    What an image shows is read by `read_image`, so that labels are known without it.
    """

    def __init__(self, paths: Sequence[Path], base: Path, fields: tuple[str, str]):
        """`base` is the folder of all, and `fields` names that of the place and that of the label."""
        self._paths, self._base, self._fields = list(paths), base, fields

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        return dict(zip(self._fields, (str(path), path.parent.name), strict=True))

    def name(self, index: int) -> str:
        return self._paths[index].relative_to(self._base).as_posix()


def read_image(file: str | Path | bytes, max_bytes: int, max_pixels: int | None = None) -> np.ndarray:
    """What an image shows, uint8 (height, width, 3); of several in a file, the first.

    Args:
      file: where it lies, or what it holds.
      max_bytes: that it may hold.
      max_pixels: that it may have, which is found out before any of them is; Pillow's own limit if not given.

    Raises:
      BadRecord: it is no image, is damaged, or holds more.
    """
    from PIL import Image

    try:
        check_size(len(file) if isinstance(file, bytes) else Path(file).stat().st_size, max_bytes)
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise BadRecord(f"has {image.width} x {image.height} pixels, more than {max_pixels}")
            return np.asarray(image.convert("RGB"))
    except BadRecord:
        raise
    # On damaged files, Pillow's formats raise whatever comes of them: TIFF's even TypeError.
    except Exception as error:
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = f"it is none of {', '.join(_FORMATS)}" if unknown else str(error)
        raise BadRecord(f"cannot be read ({reason.rstrip('.') or type(error).__name__})") from error


def resized(size: tuple[int, int, int], example: dict[str, Any]) -> dict[str, Any]:
    """An example whose `image`, uint8 (height, width, 3), has the height, width and channels, 1 or 3, of `size`."""
    from PIL import Image

    height, width, channels = size
    if example["image"].shape == size:
        return example
    picture = Image.fromarray(example["image"]).convert("L" if channels == 1 else "RGB")
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return example | {"image": np.asarray(picture).reshape(size)}


def image_row(size: tuple[int, int, int], example: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a model that gives one answer for an image reads, and the label that it is to give.

    Args:
      size: height, width and channels, 1 or 3, that the model takes.
      example: with `image`, uint8 of any height and width (height, width, 3), which is resized, or of that size
        already, and `label`.

    Returns:
      `inputs`, float32 of that size, from -1 to 1, `targets`, int32 (1,), and `mask`, float32 (1,).
    """
    return {
        "inputs": pixels(size, example["image"]),
        "targets": np.array([example["label"]], np.int32),
        "mask": np.ones(1, np.float32),
    }


def pixels(size: tuple[int, int, int], image: np.ndarray) -> np.ndarray:
    """What a model reads of an image, uint8: float32 of the height, width and channels of `size`, from -1 to 1."""
    return resized(size, {"image": image})["image"].astype(np.float32) / 127.5 - 1
