"""Image bytes -> a square of uint8 at the model's resolution; rescaling and normalising happen on the device.

check   bytes      -> None         a whole picture and nothing else, as shards want it
load    bytes      -> (3, S, S)    exact: Pillow, the same to the bit as the reference processors
                                   fast: libjpeg-turbo and an integer resampler, a grey level off here and there
decode  bytes      -> (H, W, 3)    what a person sees: first frame, upright, transparency on white
square  (H, W, 3)  -> (3, S, S)    padded or cropped, exact
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import PIL
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from rayllava.recipe import ProcessorSpec

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is recognised, by its first bytes. Pillow would also start a PostScript interpreter if it were asked to."""

Image.init()  # Pillow loads most of its formats only when told to
warnings.filterwarnings("ignore", module=r"PIL\.")  # `max_pixels` is the bound; odd metadata do no harm
_LIBTIFF = (Path(PIL.__file__).parents[1] / "pillow.libs").glob("libtiff*")  # a copy of its own, in Pillow's wheels
for _path in _LIBTIFF:  # it would write a line to stderr for every bad line of a picture
    ctypes.CDLL(str(_path)).TIFFSetErrorHandler(None)

MAX_PIXELS = 1 << 27
"""Default limit of `decode`."""

Aspect = Literal["pad", "crop"]
Colour = tuple[int, int, int]
T = TypeVar("T")


def load(content: bytes, *, spec: ProcessorSpec, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return a picture as the (3, S, S) uint8 that the model was trained on, by `spec.pixels`.

    Raises ValueError with the reason, in both ways for the same pictures.
    """
    if spec.pixels == "fast":
        image = _open(content, lambda picture: _array(picture, content), max_pixels=max_pixels)
        return _fast_square(image, aspect=spec.aspect, size=spec.image_size, mean=spec.image_mean)
    picture = _open(content, _picture, max_pixels=max_pixels)
    return _exact_square(picture, aspect=spec.aspect, size=spec.image_size, mean=spec.image_mean)


def decode(content: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return a picture as RGB (H, W, 3) uint8.

    `max_pixels` bounds the square around the picture, which is what padding makes of it; it is checked before
    anything is unpacked. Raises ValueError with the reason.
    """
    return np.asarray(_open(content, _picture, max_pixels=max_pixels))


def check(content: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ValueError, with the reason, unless the bytes are one whole picture that `decode` reads.

    Stricter than `decode`: a JPEG that ends properly, but before its last line, is no whole picture, and neither is
    one with an archive on its end.
    """
    _open(content, lambda image: _verify(image, content), max_pixels=max_pixels)
    if _is_archive(content):
        raise ValueError("a picture and a ZIP archive in one file")


def square(image: np.ndarray, *, aspect: Aspect, size: int, mean: Sequence[float]) -> np.ndarray:
    """Return an RGB picture (H, W, 3) as (3, size, size) uint8, before rescaling and normalising.

    pad: paste onto the middle of a square of the mean colour, resize; crop: resize the short side, cut the middle.
    """
    return _exact_square(Image.fromarray(image), aspect=aspect, size=size, mean=mean)


def _open(content: bytes, read: Callable[[Image.Image], T], *, max_pixels: int) -> T:
    """Return what `read` makes of a picture whose header promises no more than `max_pixels`."""
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if max(width, height) ** 2 <= max_pixels:
                return read(image)
    except MemoryError:
        raise
    except Exception as error:  # the fence around one sample: Pillow's plugins raise whatever they stumble over
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"not an image: {reason or type(error).__name__}") from error
    raise ValueError(f"{width} x {height} pixels; {math.isqrt(max_pixels)} a side is the most")


def _picture(image: Image.Image) -> Image.Image:
    image.load()
    return _upright(_rgb(image), image)


def _verify(image: Image.Image, content: bytes) -> None:
    if not _is_usual_jpeg(image):
        _picture(image)
        return
    try:
        _turbo(image, content)
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise
        _picture(image)


def _array(image: Image.Image, content: bytes) -> np.ndarray:
    """Return (H, W, 3); the usual JPEG is decoded without Pillow's copies, to the same values."""
    if _is_usual_jpeg(image) and _turn(image) is None:
        with contextlib.suppress(ValueError):
            return _turbo(image, content)
    return np.array(_picture(image))


def _is_usual_jpeg(image: Image.Image) -> bool:
    return image.format == "JPEG" and image.mode in ("RGB", "L")


def _turbo(image: Image.Image, content: bytes) -> np.ndarray:
    """Return what libjpeg-turbo makes of a JPEG, (H, W, 3); ValueError at any flaw, also those that Pillow knows to
    cost no pixels."""
    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    if (width, height) != image.size:  # nobody shall show Pillow a small picture and libjpeg-turbo a large one
        raise ValueError("two sizes")
    return simplejpeg.decode_jpeg(content)


def _exact_square(picture: Image.Image, *, aspect: Aspect, size: int, mean: Sequence[float]) -> np.ndarray:
    """Return the square by Pillow, which resizes rows first, then columns: so do we, and leave out in between what
    makes no difference."""
    width, height = picture.size
    if aspect == "pad":
        side, colour = max(width, height), _colour(mean)
        if width > height:  # rows of one colour stay what they are
            picture = _on_canvas(_resized(picture, size, height), (size, side), colour)
        elif width < height:
            picture = _on_canvas(picture, (side, side), colour)
        picture = _resized(picture, size, size)
    else:
        across, down = _around(width, height, size)
        left, top = (across - size) // 2, (down - size) // 2
        picture = _resized(picture, across, height).crop((left, 0, left + size, height))
        picture = _resized(picture, size, down).crop((0, top, size, top + size))
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))  # (3, S, S)


def _resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    return picture.resize((width, height), resample=Image.Resampling.BICUBIC)


def _on_canvas(picture: Image.Image, size: tuple[int, int], colour: Colour) -> Image.Image:
    canvas = Image.new("RGB", size, colour)
    canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return canvas


def _fast_square(image: np.ndarray, *, aspect: Aspect, size: int, mean: Sequence[float]) -> np.ndarray:
    """Return the square by torch's resampler for uint8: Pillow's filter with coefficients of 16 bits."""
    import torch  # exact needs none of it

    down, across = size, size
    if aspect == "pad":
        image = _padded(image, _colour(mean))
    else:
        across, down = _around(image.shape[1], image.shape[0], size)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last in memory
    resized = torch.nn.functional.interpolate(pixels, (down, across), mode="bicubic", antialias=True)[0]
    left, top = (across - size) // 2, (down - size) // 2
    return resized[:, top : top + size, left : left + size].contiguous().numpy()  # (3, S, S)


def _padded(image: np.ndarray, colour: Colour) -> np.ndarray:
    height, width, _ = image.shape
    if width == height:
        return image
    side = max(width, height)
    top, left = (side - height) // 2, (side - width) // 2
    line = np.tile(np.array(colour, dtype=np.uint8), (side, 1))
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:top], canvas[top + height :] = line, line
    band = canvas[top : top + height]
    band[:, :left], band[:, left + width :] = line[:left], line[left + width :]
    band[:, left : left + width] = image
    return canvas


def _colour(mean: Sequence[float]) -> Colour:
    return int(255 * mean[0]), int(255 * mean[1]), int(255 * mean[2])


def _around(width: int, height: int, size: int) -> tuple[int, int]:
    """Return width and height of the picture whose short side is `size`."""
    short = min(width, height)
    across, down = size * width // short, size * height // short
    if across * down > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too narrow to cut a square of {size} from their middle")
    return across, down


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
    turn = _turn(source)
    return picture if turn is None else picture.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, TypeError, struct.error, OSError):
        return None  # a broken EXIF block does not make a picture unusable
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _rgb(image: Image.Image) -> Image.Image:
    # Pillow would clip 16-bit grey instead of scaling it.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_archive(content: bytes) -> bool:
    """Say whether a program that looks for an archive from the end of the file would open one."""
    if not zipfile.is_zipfile(BytesIO(content)):
        return False
    try:
        zipfile.ZipFile(BytesIO(content)).close()
    except (zipfile.BadZipFile, struct.error, ValueError, OSError, NotImplementedError):  # pixels that look like one
        return False
    return True
