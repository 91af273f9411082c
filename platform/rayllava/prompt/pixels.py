"""Image bytes -> a square of uint8 at the model's resolution, the same to the bit as the reference processors'.

decode  bytes      -> (H, W, 3)   what a person sees: first frame, upright, transparency on white
square  (H, W, 3)  -> (3, S, S)   padded or cropped; rescaling and normalising happen on the model's device
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is recognised. Pillow would also start a PostScript interpreter if it were asked to."""

Image.init()  # Pillow loads most of its formats only when told to

MAX_PIXELS = 1 << 27
"""Default limit of `decode`."""


def decode(content: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return a picture as RGB (H, W, 3) uint8.

    `max_pixels` bounds the square around the picture, which is what padding makes of it; it is checked before
    anything is unpacked. Raises ValueError with the reason.
    """
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if max(width, height) ** 2 <= max_pixels:
                image.load()
                return np.asarray(_upright(_rgb(image), image))
    except MemoryError:
        raise
    except Exception as error:  # the fence around one sample: Pillow's plugins raise whatever they stumble over
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"not an image: {reason or type(error).__name__}") from error
    raise ValueError(f"{width} x {height} pixels; {math.isqrt(max_pixels)} a side is the most")


def square(image: np.ndarray, *, aspect: Literal["pad", "crop"], size: int, mean: Sequence[float]) -> np.ndarray:
    """Return an RGB picture (H, W, 3) as (3, size, size) uint8, before rescaling and normalising.

    pad: paste onto the middle of a square of the mean colour, resize; crop: resize the short side, cut the middle.
    """
    picture = Image.fromarray(image)
    if aspect == "pad":
        picture = _padded(picture, colour=(int(255 * mean[0]), int(255 * mean[1]), int(255 * mean[2])))
    width, height = picture.size
    short = min(width, height)
    resized = picture.resize((size * width // short, size * height // short), resample=Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    cut = resized.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(cut).transpose(2, 0, 1))  # (3, S, S)


def _padded(picture: Image.Image, *, colour: tuple[int, int, int]) -> Image.Image:
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
    return canvas


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(picture: Image.Image, source: Image.Image) -> Image.Image:
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, TypeError, struct.error, OSError):
        return picture  # a broken EXIF block does not make a picture unusable
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey instead of scaling it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")
