"""A stranger's address -> the bytes of a picture.

    data:image/png;base64,iVBORw0...  -> bytes, checked against Rules
    anything else                     -> ValueError: nothing here opens a file or a connection

Reasons never repeat the address: it may be a secret, or a whole picture.
"""

from __future__ import annotations

import binascii

from rayllava.fetch.images import Rules, check_image

MEDIA_TYPES = frozenset(f"image/{name}" for name in ("jpeg", "jpg", "png", "webp", "gif", "bmp"))
"""What a data: URL may call itself; what it is, its first bytes decide."""


def read_image(url: str, rules: Rules) -> bytes:
    """Return the picture that an address holds; ValueError with the reason when it is none we take."""
    if url[:5].lower() != "data:":
        raise ValueError("remote images are off; send a data: URL")
    header, comma, _ = url[5:64].partition(",")
    media_type, _, encoding = header.partition(";")
    if not comma or encoding.lower() != "base64" or media_type.lower() not in MEDIA_TYPES:
        raise ValueError("the data: URL must begin data:image/png;base64, or the same with jpeg, webp, gif or bmp")
    text = url[5 + len(header) + 1 :]
    if len(text) > 4 * -(-rules.max_bytes // 3):  # before anything is decoded
        raise ValueError(f"the image has more than {rules.max_bytes} bytes; send a smaller one")
    try:
        content = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise ValueError("the data: URL does not hold base64: no blanks, no line breaks, padded with =") from error
    check_image(content, rules)
    return content
