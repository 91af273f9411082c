"""Nothing that a pickle names is run, whatever it does to be run, and no pickle keeps the reader busy for long."""

from __future__ import annotations

import io
import pickle
import pickletools
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from rayllava.checkpoint import inert
from rayllava.checkpoint.inert import Inert, Name
from rayllava.checkpoint.torchfile import read, tensors
from tests.checkpoint.attacks import NAMES, attacks, text, zipped


class Loose(pickle.Unpickler):
    """Python's own, to see that an attack is one."""

    def persistent_load(self, pid: Any) -> Any:
        return pid


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_runs_anything(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    body = attacks(f"open({str(mark)!r}, 'w').close()")[name]
    with suppress(Exception):
        Loose(io.BytesIO(b"\x80\x04" + body + b".")).load()
    assert mark.exists(), "the attack does nothing even when it is run"
    mark.unlink()
    front = b"".join(
        pickle.dumps(value, 2)
        for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    )
    inside = b"\x80\x04}" + text("state_dict") + b"}" + text("weight") + body + b"ss."
    for pickled in (b"\x80\x04" + body + b".", inside):
        zipped(tmp_path / "file.pth", pickled)
        (tmp_path / "legacy.pth").write_bytes(front + pickled + pickle.dumps([], 2))
        (tmp_path / "plain.pth").write_bytes(pickled)
        for path in (tmp_path / "file.pth", tmp_path / "legacy.pth", tmp_path / "plain.pth"):
            for reader in (read, tensors):
                with suppress(ValueError):
                    reader(path)
    assert not mark.exists()


def test_what_would_have_been_called_is_told(tmp_path: Path) -> None:
    path = zipped(tmp_path / "file.pth", b"\x80\x02cposix\nsystem\n" + text("true") + b"\x85R}K\x01K\x02sb.")
    value = read(path)
    assert isinstance(value, Inert)
    assert (value.of, value.args, value.state) == (Name("posix", "system"), ("true",), {1: 2})
    path = zipped(tmp_path / "file.pth", b"\x80\x02ccollections\ndefaultdict\ncbuiltins\nlist\n\x85RK\x01K\x02s.")
    value = read(path)
    assert value.of == Name("collections", "defaultdict") and value.items == [(1, 2)]


BOMBS = {
    "itself": (b"]q\x00h\x00a", "contains itself"),
    "itself deeper": (b"]q\x00}K\x01h\x00sa", "contains itself"),
    "deep": (b")" + b"\x85" * 100_000, "nested more than 200 deep"),
    "laughs": (b"]" + b"".join(b"q\x00](" + b"h\x00" * 10 + b"e" for _ in range(40)), "too many values"),
    "laughs in a key": (b"}(" + b")" + b"2\x86" * 60 + b"K\x01u", "has a tuple for a key"),
    "no stack": (b"0000", "is damaged"),
    "no mark": (b"e", "is damaged"),
    "half a pair": (b"}(K\x01u", "is damaged"),
    "no memo": (b"h\x07", "is damaged"),
    "unhashable": (b"}]K\x01s", "has a list for a key"),
    "append to a number": (b"K\x01K\x02a", "appends to a int"),
    "an extension": (b"\x82\x01", "has the opcode EXT1, which no checkpoint needs"),
    "a long text": (b"X\xff\xff\xff\x7fabc", "cannot be read"),
    "a longer one": (b"\x8e" + b"\xff" * 7 + b"\x7f" + b"abc", "cannot be read"),
    "a long number": (b"I" + b"9" * 10_000 + b"\n", "cannot be read"),
    "text that is none": (b"X\x02\x00\x00\x00\xff\xfe", "cannot be read"),
    "no end": (b"]" * 1000 + b"(" * 1000, "cannot be read"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_would_never_end_is_refused_at_once(name: str, tmp_path: Path) -> None:
    body, said = BOMBS[name]
    path = zipped(tmp_path / "file.pth", b"\x80\x04" + body + (b"" if name == "no end" else b"."))
    began = time.monotonic()
    with pytest.raises(ValueError, match=said) as caught:
        read(path)
    assert time.monotonic() - began < 5
    assert str(caught.value).startswith(f"{path} cannot be read: ") and "\n" not in str(caught.value)


def test_opcodes_without_end_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inert, "MAX_OPCODES", 1000)
    path = zipped(tmp_path / "file.pth", b"\x80\x04" + b"K\x010" * 1000 + b"N.")
    with pytest.raises(ValueError, match="its pickle has more than 1,000 opcodes"):
        read(path)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol_are_themselves(protocol: int, tmp_path: Path) -> None:
    value = (
        {
            "texts": ["", "a\nb", "ü", "x" * 300],
            "numbers": [0, -1, 255, 65536, 2**31, -(2**63), 2**2000, 0.5, float("-inf"), True, False, None],
            "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((1, 2), [3])],
            "shared": [(one := ["x"]), one],
            7: {(1, "a"): {}},
        }
        | ({} if protocol < 3 else {"bytes": [b"", b"\xff" * 300]})
        | ({} if protocol < 4 else {"set": {1, "a"}})
    )
    pickled = pickle.dumps(value, protocol)
    assert read(zipped(tmp_path / "file.pth", pickled)) == value
    assert {opcode.name for opcode, _, _ in pickletools.genops(pickled)} & {"MEMOIZE", "BINPUT", "PUT"}


def test_a_tensor_with_attributes_is_a_tensor(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(3.0))
    weight.note = "kept by torch.save"  # type: ignore[attr-defined]
    torch.save({"weight": weight}, tmp_path / "file.pt")
    assert tensors(tmp_path / "file.pt")["weight"].read().tolist() == [0, 1, 2]
