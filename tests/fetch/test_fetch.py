from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from rayllava.fetch.address import read_image
from rayllava.fetch.images import Rules, check_image

RULES = Rules()


def picture(kind: str = "PNG", size: tuple[int, int] = (6, 4), **options: object) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, kind, **options)
    return file.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_data_url_gives_the_bytes_it_holds(kind: str) -> None:
    content = picture(kind)
    assert read_image(data_url(content, f"image/{kind.lower()}"), RULES) == content


def test_the_first_bytes_decide_and_not_the_media_type() -> None:
    assert read_image(data_url(picture("JPEG"), "image/png"), RULES)
    assert read_image(data_url(picture()).replace("data:image", "DATA:IMAGE"), RULES)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/secret.png",
        "http://169.254.169.254/secret",
        "file:///etc/secret",
        "ftp://example.org/secret",
        "/etc/secret",
        " data:image/png;base64,secret",
        "datas:image/png;base64,secret",
        "",
    ],
)
def test_only_data_urls_are_read_and_the_address_is_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="remote images are off; send a data: URL") as error:
        read_image(url, RULES)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "data:,hello",
        "data:image/png,hello",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "data:text/html;base64,PGI+",
        "data:image/png;charset=x;base64,AAAA",
        "data:image/png;base64",
    ],
)
def test_a_data_url_must_be_a_base64_picture(url: str) -> None:
    with pytest.raises(ValueError, match="must begin data:image/png;base64,"):
        read_image(url, RULES)


@pytest.mark.parametrize("text", ["AAA", "AA\nAA", "AAA=AAAA", "AA%2B", "ÄÄÄÄ", "AA-_"])
def test_base64_is_strict(text: str) -> None:
    with pytest.raises(ValueError, match="does not hold base64"):
        read_image(f"data:image/png;base64,{text}", RULES)


def test_a_long_url_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("binascii.a2b_base64", lambda *a, **k: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="more than 30 bytes"):
        read_image("data:image/png;base64," + "A" * 44, replace(RULES, max_bytes=30))


def test_bytes_that_are_no_picture_are_refused_without_repeating_them() -> None:
    with pytest.raises(ValueError, match="none of JPEG, PNG, WebP, GIF and BMP") as error:
        check_image(b"<svg>secret</svg>", RULES)
    assert "secret" not in str(error.value)
    for start in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF1234WEBP"):
        with pytest.raises(ValueError, match="header"):
            check_image(start + b"secret", RULES)


def test_a_header_that_claims_too_many_pixels_is_refused() -> None:
    for size in [(9000, 9000), (20_000, 2), (2, 20_000), (60_000, 60_000)]:
        with pytest.raises(ValueError, match=r"pixels|bearable"):
            check_image(png_header(*size), RULES)
    check_image(png_header(8000, 8000), RULES)


def test_a_file_that_is_too_big_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 50; send a smaller one"):
        check_image(picture(), replace(RULES, max_bytes=50))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_refused(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (shade, 0, 255 - shade)) for shade in (0, 100, 200)]
    file = BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="animated"):
        check_image(file.getvalue(), RULES)


def test_a_phone_photo_with_a_second_picture_inside_is_no_animation() -> None:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    check_image(file.getvalue(), RULES)
