"""Pictures of every kind, and the reference processors to the bit."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from rayllava.prompt.pixels import decode, square
from tests.prompt.dialogues import png

CLIP = (0.48145466, 0.4578275, 0.40821073)
IMAGENET = (0.485, 0.456, 0.406)
STD = (0.26862954, 0.26130258, 0.27577711)


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("mean", [CLIP, IMAGENET])
@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize(
    "size", [(37, 53), (53, 37), (64, 64), (1, 1), (300, 7), (7, 300), (336, 336), (500, 333), (101, 100)]
)
def test_squares_equal_the_reference_processors(size: tuple[int, int], aspect: str, mean: tuple) -> None:
    side = 56
    options = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    kind = LlavaImageProcessorPil if aspect == "pad" else CLIPImageProcessorPil
    more = {"do_pad": True} if aspect == "pad" else {}
    image = noise(*size)
    made = square(image, aspect=aspect, size=side, mean=mean)  # type: ignore[arg-type]
    assert made.dtype == np.uint8 and made.shape == (3, side, side) and made.flags.c_contiguous
    picture = Image.fromarray(image)
    bare = kind(**options, **more, image_mean=mean, do_normalize=False, do_rescale=False)
    assert np.array_equal(made, np.asarray(bare(picture)["pixel_values"][0]))
    full = kind(**options, **more, image_mean=mean, image_std=STD)(picture)["pixel_values"][0]
    ours = (made / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(ours, full, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_every_mode_without_transparency_is_what_pillow_makes_of_it(mode: str) -> None:
    image = Image.fromarray(noise(21, 34)).convert(mode)
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(decode(content), np.asarray(image.convert("RGB")))


def test_transparency_shows_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    assert decode(encoded(image)).tolist() == [[[255, 255, 255], [255, 127, 127]]]
    indexed = Image.new("P", (1, 1), 0)
    assert decode(encoded(indexed, transparency=0)).tolist() == [[[255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (9, 0))
    assert decode(encoded(grey)).tolist() == [[[255, 255, 255]]]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16))
    assert decode(encoded(deep))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(noise(9, 6)), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    assert np.array_equal(decode(content), np.asarray(upright.convert("RGB")))


def test_a_broken_exif_block_does_not_matter() -> None:
    image = Image.fromarray(noise(9, 6))
    content = encoded(image, "JPEG", exif=b"Exif\x00\x00garbage", quality=95)
    assert decode(content).shape == (6, 9, 3)


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(content)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_usual_formats_are_read_and_their_truncations_are_errors(kind: str) -> None:
    content = encoded(Image.fromarray(noise(64, 48)), kind)
    assert decode(content).shape == (48, 64, 3)
    with pytest.raises(ValueError, match="not an image: "):
        decode(content[: len(content) // 2])


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not an image: "):
        decode(content)


def test_size_is_checked_before_anything_is_unpacked() -> None:
    with pytest.raises(ValueError, match="101 x 2 pixels; 100 a side is the most"):
        decode(png(101, 2), max_pixels=10_000)
    assert decode(png(100, 2), max_pixels=10_000).shape == (2, 100, 3)
