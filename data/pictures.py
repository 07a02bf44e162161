"""One picture as people have it (photographs, drawings, scans), to pixels as a model takes them.

As torchvision's ImageFolder with Resize and CenterCrop would give it, but for what that gets wrong: the rotation in a
photograph's EXIF is followed, what is transparent is laid on white, and 16 bits are scaled to 8 instead of cut off.
"""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from storage.files import describe_content, one_line, open_regular

# What torchvision's ImageFolder takes, and GIF.
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
# Pictures all the same, which Pillow alone does not read: to leave them out without a word would be a loss.
UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".svg", ".psd", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raw"}
# Whatever a file is called; others, EPS say, are handed to other programs by Pillow.
FORMATS = ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"]
WHITE = (255, 255, 255, 255)


class Picture(NamedTuple):
    """Pixels (H,W,3) uint8, and the (height, width) that the picture had before it was resized and cropped."""

    pixels: np.ndarray
    size: tuple[int, int]


@contextmanager
def without_warnings() -> Iterator[None]:
    """Pillow warns of large pictures and of damaged tags beside the pixels; what counts is whether it reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_picture(path: str | os.PathLike, size: int | None) -> Picture:
    """The picture in a file, of an animation the first one.

    size: as for `fitted`; None leaves it as it is. Raises ValueError, with the reason alone, for what is no picture or
    not a whole one, and OSError.
    """
    with open_regular(path) as file:
        content = io.BytesIO(file.read())
    try:
        with Image.open(content, formats=FORMATS) as image:
            image.load()
            kind = image.format
            image = to_rgb(_upright(image), kind)
    except UnidentifiedImageError:
        raise ValueError(_what_else(path, content.getvalue()[:12])) from None
    except Exception as error:  # Of damaged pictures Pillow makes errors of any type.
        raise ValueError(one_line(error, 100)) from error
    return to_picture(image, size)


def to_picture(image: Image.Image, size: int | None) -> Picture:
    """An RGB picture as it is, or as `fitted` makes it."""
    return Picture(np.asarray(image if size is None else fitted(image, size)), (image.height, image.width))


def to_rgb(image: Image.Image, kind: str | None = None) -> Image.Image:
    """A picture of any mode in RGB: gray thrice, what is transparent on white, 16 bits scaled to 8.

    kind: the format that it was read from. Raises ValueError for 32-bit pixels, whose white is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose white is not known: save it with 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


def fitted(image: Image.Image, size: int) -> Image.Image:
    """A picture whose shorter side is resized to `size`, centre-cropped to `size` x `size`.

    To the last pixel what torchvision's Resize and CenterCrop make of it.
    """
    shorter, longer = sorted(image.size)
    if shorter != size:
        longer = int(size * longer / shorter)
        shape = (size, longer) if image.width <= image.height else (longer, size)
        image = image.resize(shape, Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Damaged tags; the pixels have been read.
        return image


def _what_else(path: str | os.PathLike, head: bytes) -> str:
    """What a file is that Pillow does not know."""
    if head[4:8] == b"ftyp":
        return "a HEIC or AVIF picture, whatever its name: convert it to JPEG"
    what = describe_content(path)
    return "not a picture" + (f" but {what}" if what else "")
