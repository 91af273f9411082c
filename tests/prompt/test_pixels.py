"""Pictures of every kind, and the reference processors to the bit."""

from __future__ import annotations

import random
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from rayllava.model.normalise import normalise
from rayllava.prompt.pixels import check, decode, load, square
from tests.prompt.dialogues import png
from tests.tiny import processor_spec

CLIP = (0.48145466, 0.4578275, 0.40821073)
IMAGENET = (0.485, 0.456, 0.406)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_STD = (0.229, 0.224, 0.225)


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@cache
def pictures(kind: str) -> list[tuple[str, bytes, bool]]:
    """Return (name, bytes, whether `decode` gives what a bare convert("RGB") does) of photos or of noise."""
    made = []
    photos = load_sample_images().images
    for number, size in enumerate([(1, 1), (1, 37), (53, 1), (37, 53), (101, 100), (300, 7), (333, 250)]):
        width, height = size
        image = Image.fromarray(photos[number % 2][: 2 * height, : 2 * width]).resize(size)
        if kind == "noise":
            image = Image.fromarray(noise(*size))
        for mode, form, options in VARIANTS:
            bare = not (mode in ("LA", "RGBA", "I;16") or "transparency" in options)
            made.append((f"{mode} {form} {options} {size}", encoded(in_mode(image, mode), form, **options), bare))
        for subsampling in ("411", "440"):  # Pillow cannot write them
            content = simplejpeg.encode_jpeg(np.ascontiguousarray(image), colorsubsampling=subsampling)
            made.append((f"{subsampling} {size}", content, True))
    return made


VARIANTS: list[tuple[str, str, dict]] = [
    *((mode, "PNG", {}) for mode in ("1", "L", "P", "RGB", "LA", "RGBA", "I;16")),
    ("P", "PNG", {"transparency": 3}),
    *((mode, "TIFF", {"compression": "tiff_lzw"}) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16")),
    ("YCbCr", "TIFF", {"compression": "jpeg"}),
    *(("RGB", "JPEG", {"subsampling": subsampling}) for subsampling in ("4:4:4", "4:2:2", "4:2:0")),
    *((mode, "JPEG", {"progressive": True}) for mode in ("RGB", "L", "CMYK")),
    *((mode, "JPEG", {}) for mode in ("L", "CMYK")),
    ("RGB", "JPEG", {"keep_rgb": True}),
    ("RGB", "WEBP", {}),
    ("RGBA", "WEBP", {"lossless": True}),
    ("P", "GIF", {}),
    ("P", "GIF", {"transparency": 3}),
    *((mode, "BMP", {}) for mode in ("1", "L", "P", "RGB")),
    *((mode, "PPM", {}) for mode in ("1", "L", "RGB")),
]


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode in ("LA", "RGBA"):
        image = image.copy()
        image.putalpha(image.convert("L").point(lambda value: 255 - value))
    return image.convert(mode)


@pytest.mark.parametrize(("mean", "std"), [(CLIP, CLIP_STD), (IMAGENET, IMAGENET_STD)])
@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("kind", ["photos", "noise"])
def test_pictures_equal_the_reference_processors_to_the_bit(kind: str, aspect: str, mean: tuple, std: tuple) -> None:
    """What `decode` shows on purpose as no bare convert("RGB") does (transparency, 16 bits) is shown to them too."""
    side = 56
    spec = processor_spec(image_size=side, aspect=aspect, image_mean=mean, image_std=std)
    options: dict = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    options |= {"image_mean": mean, "image_std": std} | ({"do_pad": True} if aspect == "pad" else {})
    reference = LlavaImageProcessorPil if aspect == "pad" else CLIPImageProcessorPil
    full, bare = reference(**options), reference(**options, do_normalize=False, do_rescale=False)
    assert len(pictures("photos") + pictures("noise")) > 400
    for name, content, as_converted in pictures(kind):
        picture = Image.open(BytesIO(content)) if as_converted else Image.fromarray(decode(content))
        made = load(content, spec=spec)
        assert made.dtype == np.uint8 and made.shape == (3, side, side) and made.flags.c_contiguous
        assert np.array_equal(made, np.asarray(bare(picture)["pixel_values"][0])), name
        theirs = np.asarray(full(picture)["pixel_values"][0])
        ours = normalise(torch.from_numpy(made)[None], spec, dtype=torch.float32)[0].numpy()
        assert (np.abs(ours - theirs) <= np.spacing(np.abs(theirs))).all(), name


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("kind", ["photos", "noise"])
def test_fast_is_hardly_off(kind: str, aspect: str) -> None:
    exact, fast = (processor_spec(image_size=56, aspect=aspect, pixels=pixels) for pixels in ("exact", "fast"))
    off = np.stack(
        [
            load(content, spec=fast).astype(int) - load(content, spec=exact).astype(int)
            for _, content, _ in pictures(kind)
        ]
    )
    assert np.abs(off).mean() < 0.01
    assert np.percentile(np.abs(off), 99) == 0
    assert np.abs(off).max() <= 2


@pytest.mark.parametrize("size", [(300, 7), (7, 300), (336, 336), (500, 333)])
def test_squares_are_made_of_arrays_too(size: tuple[int, int]) -> None:
    image = noise(*size)
    spec = processor_spec(image_size=56, image_mean=IMAGENET)
    made = square(image, aspect="pad", size=56, mean=IMAGENET)
    assert np.array_equal(made, load(encoded(Image.fromarray(image)), spec=spec))


@pytest.mark.parametrize("pixels", ["exact", "fast"])
def test_a_square_is_not_cut_from_a_thread(pixels: str) -> None:
    with pytest.raises(ValueError, match="1 x 9000 pixels are too narrow to cut a square of 336"):
        load(encoded(Image.new("L", (1, 9000))), spec=processor_spec(image_size=336, aspect="crop", pixels=pixels))


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
    assert decode(b"P5 3 1 65535\n\x00\x00\x80\x00\xff\xff")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(noise(9, 6)), kind, exif=exif)
    with Image.open(BytesIO(content)) as image:
        image.load()  # a TIFF turns itself
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(decode(content), upright)
    exact, fast = (load(content, spec=processor_spec(pixels=pixels)).astype(int) for pixels in ("exact", "fast"))
    assert np.abs(exact - fast).max() <= 1


def test_a_broken_exif_block_does_not_matter() -> None:
    image = Image.fromarray(noise(9, 6))
    content = encoded(image, "JPEG", exif=b"Exif\x00\x00garbage", quality=95)
    assert decode(content).shape == (6, 9, 3)


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(content)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_usual_formats_are_read_and_their_truncations_are_errors(kind: str) -> None:
    content = encoded(Image.fromarray(noise(64, 48)), kind)
    assert decode(content).shape == (48, 64, 3)
    check(content)
    for read in readers():
        with pytest.raises(ValueError, match="not an image: "):
            read(content[: len(content) // 2])


def readers() -> list[Callable[[bytes], object]]:
    return [decode, check, *(partial(load, spec=processor_spec(pixels=pixels)) for pixels in ("exact", "fast"))]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_fast_and_exact_refuse_the_same_jpegs(mode: str, options: dict) -> None:
    content = encoded(Image.fromarray(noise(40, 24)).convert(mode), "JPEG", **options)
    dice = random.Random(0)
    broken = [content[:length] for length in range(0, len(content), 7)]
    for _ in range(100):
        flipped = bytearray(content)
        flipped[dice.randrange(len(flipped))] = dice.randrange(256)
        broken.append(bytes(flipped))
    for each in broken:
        outcomes = [outcome(read, each) for read in readers()[2:]]
        assert outcomes[0] == outcomes[1]


def outcome(read: Callable[[bytes], object], content: bytes) -> str:
    try:
        read(content)
    except ValueError as error:
        return str(error)
    return "read"


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


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bombs() -> dict[str, bytes]:
    """Return small files that promise, or hide, much more than they are."""
    whole = png(8, 8)
    end = len(whole) - 12
    zeros = zlib.compress(bytes(1 << 28), 9)
    gif = encoded(Image.new("L", (8, 8)), "GIF")
    frame = gif.index(b",\0\0\0\0\x08\0\x08\0")
    vast = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return {
        "header": whole[:8] + chunk(b"IHDR", vast) + whole[33:],
        "text": whole[:33] + chunk(b"zTXt", b"k\0\0" + zeros) + whole[33:],
        "text at the end": whole[:end] + chunk(b"zTXt", b"k\0\0" + zeros) + whole[end:],
        "profile": whole[:33] + chunk(b"iCCP", b"k\0\0" + zeros) + whole[33:],
        "frame": gif[: frame + 5] + b"\xff\xff\xff\xff" + gif[frame + 9 :],
        "bitmap": encoded(Image.new("1", (8, 8)), "BMP")[:18] + struct.pack("<ii", 50_000, 50_000) + bytes(100),
        "lines": b"P6 50000 50000 255\n",
    }


def test_bombs_are_refused_in_little_memory() -> None:
    made = bombs()
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 27), before[1]))
    try:
        outcomes = {name: {outcome(read, content) for read in readers()} for name, content in made.items()}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not [name for name, told in outcomes.items() if "read" in told], outcomes


def test_of_many_frames_one_is_opened() -> None:
    frames = [Image.fromarray(noise(8, 8 + number % 2, 1)[:8, :, 0]) for number in range(400)]
    for kind in ("GIF", "TIFF", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        check(content[:-30] if kind == "GIF" else content)  # what is cut off belongs to the last frame
        assert decode(content).shape == (8, 8, 3)


def test_a_jpeg_that_ends_before_its_last_line_is_no_whole_picture() -> None:
    content = encoded(Image.fromarray(noise(64, 48)), "JPEG")
    frame = content.index(b"\xff\xc0")
    taller = content[: frame + 5] + struct.pack(">H", 480) + content[frame + 7 :]
    with pytest.raises(ValueError, match="premature end"):
        check(taller)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_a_picture_with_an_archive_on_its_end_is_refused(kind: str) -> None:
    content = encoded(Image.fromarray(noise(64, 48)), kind)
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("evil.sh", "rm -rf /")
    for tail in (archive.getvalue(), archive.getvalue() + b"\n"):
        with pytest.raises(ValueError, match="ZIP"):
            check(content + tail)
    check(content + b"PK\x05\x06" + bytes(range(1, 40)))  # as pixels may look


@pytest.mark.parametrize("front", [b"%PDF-1.4\n", b"<script>", b"MZ", b"\n"])
def test_only_the_first_bytes_say_what_a_file_is(front: bytes) -> None:
    for kind in ("JPEG", "PNG", "GIF"):
        with pytest.raises(ValueError, match="unknown format"):
            check(front + encoded(Image.fromarray(noise(8, 8)), kind))


def test_broken_pictures_write_nothing_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    content = encoded(Image.fromarray(noise(64, 48)), "TIFF", compression="tiff_lzw")
    broken = content[:100] + bytes(200) + content[300:]
    with pytest.raises(ValueError, match="decoder error"):
        decode(broken)
    assert capfd.readouterr().err == ""
