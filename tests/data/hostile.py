"""Files that nobody should train on, and some that nobody should open: made here, byte by byte.

pictures  name -> bytes     what lies in an image folder under the name of a picture
oddities  name -> bytes     pictures that can be shown although something about them is strange
place     folder -> names   what lies there that is no file at all, or must not be read
tars      name -> bytes     what calls itself a WebDataset tar
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

SIDE = 60_000
"""Of a picture that would take ten gigabytes in memory."""


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def healthy(kind: str = "JPEG", side: int = 64) -> bytes:
    """Return a picture with nothing wrong."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, kind)
    return file.getvalue()


def pictures(marker: Path) -> dict[str, bytes]:
    """Return what must not become a sample, by file name; `marker` is made by whoever unpickles."""
    jpeg, png, gif, webp = (healthy(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP"))
    bmp, tiff, ppm, avif = (healthy(kind) for kind in ("BMP", "TIFF", "PPM", "AVIF"))
    return {
        "zero_bytes.jpg": b"",
        "one_byte.jpg": b"\xff",
        "zeros.png": bytes(1 << 16),
        "html.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "json.jpg": b'{"error": "not found"}',
        "lfs_pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "truncated.gif": gif[: len(gif) // 2],
        "truncated.webp": webp[: len(webp) // 2],
        "truncated.bmp": bmp[: len(bmp) // 2],
        "truncated.tif": tiff[: len(tiff) // 2],
        "truncated.ppm": ppm[: len(ppm) // 2],
        "truncated.avif": avif[: len(avif) // 2],
        "cut_idat.png": png_of(24, 24, zlib.compress(bytes(range(24)) * 25)[:20]),
        "huge_header.png": png_of(50_000, 50_000, zlib.compress(bytes(100))),
        "huge_full.png": png_of(SIDE, SIDE, _zeros_deflated(64 << 20)),
        "no_width.png": png_of(0, 10, zlib.compress(b"")),
        "bad_crc.png": png[:29] + bytes([png[29] ^ 1]) + png[30:],
        "icc_bomb.png": png_of(8, 8, extra=chunk(b"iCCP", b"x\0\0" + _zeros_deflated(256 << 20))),
        "text_bomb.png": png_of(8, 8, extra=chunk(b"zTXt", b"x\0\0" + _zeros_deflated(256 << 20))),
        "huge_header.gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x44\x01\0;",
        "script.gif": b"GIF89a/*" + bytes(20) + b"*/=1;alert(1);//",
        "lying.jpg": _with_size(jpeg, SIDE, SIDE),
        "no_size.jpg": _with_size(jpeg, 0, 0),
        "lying.bmp": bmp[:18] + struct.pack("<ii", SIDE, SIDE) + bmp[26:],
        "negative.bmp": bmp[:18] + struct.pack("<ii", -5, 7) + bmp[26:],
        "rle_bomb.bmp": _rle_bmp(SIDE, SIDE),
        "rle_bomb.tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 65535, 65535, 24, 0)
        + b"\xff\0\0\0" * 99,
        "cyclic.tif": b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 256, 3, 1, 8, 8),
        "huge.tif": _tiff(SIDE, SIDE, strip=100),
        "strip_outside.tif": _tiff(24, 24, strip=1 << 30),
        "huge.ppm": b"P6 %d %d 255\n" % (SIDE, SIDE) + bytes(100),
        "huge.webp": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff\xff\xff" * 2 + b"VP8 \0\0\0\0",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "entities.svg": b'<!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><svg>&b;</svg>',
        "document.pdf": b"%PDF-1.7\n1 0 obj<</OpenAction 2 0 R>>endobj\n%%EOF",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\nshowpage\n",
        "movie.mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2\0\0\0\x08mdat",
        "movie.avif": b"\0\0\0\x18ftypavif\0\0\0\0avifmif1\0\0\0\x08mdat",
        "icon.ico": _ico(png),
        "layers.psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + bytes(64),
        "pdf_then_jpeg.jpg": b"%PDF-1.4\n%" + jpeg,
        "jpeg_then_zip.jpg": jpeg + _zip("run.sh", b"echo"),
        "png_then_zip.png": png + _zip("run.sh", b"echo"),
        "program.jpg": b"MZ\x90\0" + bytes(60) + b"PE\0\0" + bytes(200),
        "elf.png": b"\x7fELF\2\1\1" + bytes(200),
        "shell.jpg": b"#!/bin/sh\ntouch /tmp/owned\n",
        "pickle.jpg": pickle.dumps(Bomb(marker)),
        "gzip_bomb.png": gzip.compress(bytes(64 << 20)),
        "zip.jpg": _zip("0.jpg", jpeg),
        "tar.jpg": tar(("0.jpg", jpeg)),
    }


def oddities() -> dict[str, bytes]:
    """Return pictures that may become samples or not, and must do no harm either way."""
    jpeg, png = healthy(), healthy("PNG")
    frames = io.BytesIO()
    first, *others = [Image.new("P", (64, 64), n) for n in range(200)]
    first.save(frames, "GIF", save_all=True, append_images=others)
    return {
        "no_end.png": png[:-12],
        "few_rows.png": png_of(24, 24, zlib.compress(bytes(100))),
        "chunk_of_4_gb.png": png[:33] + b"\xff\xff\xff\xffIDAT" + png[41:],
        "large.png": png_of(5_000, 5_000, _zeros_deflated(5_001 * 5_000)),
        "frames.gif": frames.getvalue(),
        "cyclic.tif": _tiff(8, 8, strip=64),
        "trailing.jpg": jpeg + bytes(8 << 20),
        "two.jpg": jpeg + jpeg,
    }


def place(folder: Path) -> list[str]:
    """Put what is no picture file into an image folder; return the names that records give it."""
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    with (folder / "sparse.jpg").open("wb") as file:
        file.truncate(8 << 30)
    (folder.parent / "outside.jpg").write_bytes(healthy())
    names = ["folder.jpg", "dangling.jpg", "circle.jpg", "endless.jpg", "pipe.jpg", "sparse.jpg", "absent.jpg"]
    return [
        *names,
        "../outside.jpg",
        f"x/../../{folder.parent.name}/outside.jpg",
        str(folder.parent / "outside.jpg"),
        "with\0zero.jpg",
        "a" * 300 + ".jpg",
        "half\ud800.jpg",
        "https://127.0.0.1/a.jpg",
    ]


def tars(marker: Path) -> dict[str, bytes]:
    """Return tars whose every record is bad but for those with an id that begins with `good`, by file name."""
    jpeg = healthy()
    bomb = pickle.dumps(Bomb(marker))
    good = [("good_first.jpg", jpeg), ("good_first.txt", "A picture.")]
    last = [("good_last.jpg", jpeg), ("good_last.txt", "A picture.")]
    members: dict[str, list[tuple[str, Any]]] = {
        "parent": [("../up.jpg", jpeg), ("../up.txt", "A")],
        "deep_parent": [("a/b/../../../up.jpg", jpeg)],
        "absolute": [("/tmp/rayllava-gauntlet.jpg", jpeg), ("/tmp/rayllava-gauntlet.txt", "A")],
        "symlink": [("0.jpg", link(tarfile.SYMTYPE, "/etc/passwd")), ("0.txt", "A")],
        "symlink_folder": [("x", link(tarfile.SYMTYPE, "/tmp")), ("x/0.jpg", jpeg)],
        "hardlink": [("0.jpg", link(tarfile.LNKTYPE, "good_first.jpg")), ("0.txt", "A")],
        "device": [("0.jpg", link(tarfile.CHRTYPE)), ("0.txt", "A")],
        "disk": [("0.jpg", link(tarfile.BLKTYPE)), ("0.txt", "A")],
        "pipe": [("0.jpg", link(tarfile.FIFOTYPE)), ("0.txt", "A")],
        "sparse": [("0.jpg", link(tarfile.GNUTYPE_SPARSE)), ("0.txt", "A")],
        "twice": [("0.jpg", jpeg), ("0.jpg", jpeg), ("0.txt", "A")],
        "returning": [("0.exe", b"MZ"), ("good_first.png", jpeg)],
        "pickle": [("0.pkl", bomb), ("0.jpg", jpeg), ("0.txt", "A")],
        "weights": [("0.pth", bomb), ("0.jpg", jpeg), ("0.txt", "A")],
        "array": [("0.npy", bomb), ("0.jpg", jpeg), ("0.txt", "A")],
        "pickled_picture": [("0.jpg", bomb), ("0.txt", "A")],
        "program": [("0.jpg", b"MZ" + bytes(100)), ("0.txt", "A")],
        "no_text": [("0.jpg", jpeg)],
        "deep_json": [("0.jpg", jpeg), ("0.json", "[" * 200_000)],
        "wrong_count": [("0.0.jpg", jpeg), ("0.1.jpg", jpeg), ("0.json", {"conversations": talk()})],
        "outside": [("0.json", {"conversations": talk(), "image": "/etc/passwd"})],
    }
    made = {f"{name}.tar": tar(*good, *bad, *last) for name, bad in members.items()}
    noise = random.Random(0).randbytes(1 << 16)
    cut = tar(*good, ("cut.jpg", noise), ("cut.txt", "A"))
    return made | {
        "truncated.tar": cut[: 1 << 15],
        "truncated.tar.gz": gzip.compress(cut)[: 1 << 15],
        "no_end.tar": cut[: cut.index(b"cut.txt") + 1024],
        "oversized.tar.gz": gzip.compress(
            link(tarfile.REGTYPE, name="0.jpg", size=128 << 20).tobuf() + bytes(128 << 20) + tar(*good)
        ),
        "claims_a_terabyte.tar": _unended(*good)
        + link(tarfile.REGTYPE, name="0.jpg", size=1 << 40).tobuf(tarfile.GNU_FORMAT)
        + bytes(4096),
        "header_of_8_gb.tar": _unended(*good)
        + link(tarfile.XHDTYPE, name="0", size=1 << 33).tobuf(tarfile.GNU_FORMAT),
        "negative.tar": _unended(*good) + _negative() + bytes(1024),
        "empty.tar": tar(),
    }


def talk() -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A picture."}]


def tar(*members: tuple[str, Any]) -> bytes:
    """Return a tar of (name, bytes, text or JSON) and (name, header)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as made:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                made.addfile(content)
                continue
            text = content if isinstance(content, bytes | str) else json.dumps(content)
            info, data = tarfile.TarInfo(name), text.encode() if isinstance(text, str) else text
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _unended(*members: tuple[str, Any]) -> bytes:
    """Return a tar without its last, empty blocks."""
    content = tar(*members).rstrip(b"\0")
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def link(type_: bytes, linkname: str = "", *, name: str = "", size: int = 0) -> tarfile.TarInfo:
    """Return the header of a member that is not only a file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = type_, linkname, size
    return info


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, pixels: bytes | None = None, *, extra: bytes = b"") -> bytes:
    """Return a PNG of grey; `pixels` are its deflated rows, `extra` chunks before them."""
    rows = zlib.compress(bytes((width + 1) * height)) if pixels is None else pixels
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _zeros_deflated(size: int) -> bytes:
    made = zlib.compressobj(1)
    whole = b"".join(made.compress(bytes(1 << 20)) for _ in range(size >> 20))
    return whole + made.compress(bytes(size % (1 << 20))) + made.flush()


def _with_size(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _rle_bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + head + bytes(1024) + b"\xff\0" * 1000


def _tiff(width: int, height: int, *, strip: int) -> bytes:
    fields = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1)]
    fields += [(278, 4, height), (279, 4, strip)]
    body = b"".join(struct.pack("<HHII", tag, type_, 1, value) for tag, type_, value in fields)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + body + struct.pack("<I", 8) + bytes(100)


def _ico(png: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 24, 24, 0, 0, 1, 32, len(png), 22) + png


def _zip(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(name, content)
    return file.getvalue()


def _negative() -> bytes:
    """Return a header whose size is -512, as base-256 numbers can say it."""
    block = bytearray(link(tarfile.REGTYPE, name="0.jpg").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfe\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)
