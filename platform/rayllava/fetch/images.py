"""A stranger's bytes, looked at before anybody decodes them.

    bytes --magic--> format --header--> width, height, frames     within Rules, or a ValueError

Reasons name sizes and limits, never what the bytes hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

from PIL import Image


@dataclass(frozen=True, slots=True)
class Rules:
    """What a stranger may send."""

    max_images: int = 8
    """Of one request."""
    max_bytes: int = 20 << 20
    """Of one encoded picture."""
    max_pixels: int = 64_000_000
    """Width times height; a small file can claim any size."""
    max_side: int = 10_000
    """Of the longer side: padding to a square turns a thin strip into a huge picture."""


def check_image(content: bytes, rules: Rules) -> None:
    """Raise ValueError unless `content` looks like one picture within the rules; its pixels stay undecoded."""
    if len(content) > rules.max_bytes:
        raise ValueError(f"the image has {len(content)} bytes, more than {rules.max_bytes}; send a smaller one")
    kind = _sniff(content)
    if kind is None:
        raise ValueError("the image is none of JPEG, PNG, WebP, GIF and BMP")
    try:
        with Image.open(BytesIO(content), formats=[kind]) as image:
            width, height = image.size
            # A JPEG of several pictures is a phone's photo with its depth or gain map, not an animation.
            animated = kind != "JPEG" and getattr(image, "is_animated", False)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image's header is not that of a {kind} file of bearable size") from error
    if width * height > rules.max_pixels or max(width, height) > rules.max_side:
        raise ValueError(
            f"the image claims {width} x {height} pixels; at most {rules.max_pixels} and "
            f"{rules.max_side} a side are read, so scale it down"
        )
    if animated:
        raise ValueError("the image is animated; send one frame of it")


def _sniff(content: bytes) -> str | None:
    """Return Pillow's name of the format that the first bytes belong to."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    magic = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"BM": "BMP"}
    return next((kind for start, kind in magic.items() if content.startswith(start)), None)
