"""Files of torch.save are read to what torch itself reads, tensor by tensor, and damaged ones are refused."""

from __future__ import annotations

import io
import random
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayllava.checkpoint.inert import Inert, Name
from rayllava.checkpoint.torchfile import read, tensors
from rayllava.checkpoint.torchvalues import FileTensor

ASSETS = Path(__file__).parents[1] / "assets"
PUBLISHED = ASSETS / "llava_v15" / "pretrain" / "mm_projector.bin"
TRAINING = ASSETS / "xtuner_internlm2" / "iter_4.pth"

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
NEW_DTYPES = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)


def every_kind() -> dict[str, Any]:
    base = torch.arange(60.0).reshape(3, 4, 5)
    some = (torch.arange(12).reshape(3, 4) - 6).float()
    return {
        **{str(dtype): some.to(dtype) for dtype in DTYPES},
        "shared": base,
        "shared slice": base[1:, ::2, 3],
        "shared transposed": base.permute(2, 0, 1),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "row": torch.arange(7).expand(1, -1),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "nested": OrderedDict(a=[torch.tensor([1, 2]), {"b": (torch.zeros(2), None, True, 1.5, "ü", b"\xff")}]),
        "size": torch.Size([2, 3]),
        "numbers": [2**40, -1, 2**100, float("inf")],
    }


def same(got: Any, want: Any) -> bool:
    """Compare what we read with what torch did, containers walked."""
    if isinstance(want, torch.Tensor):
        if not isinstance(got, FileTensor):
            return False
        mine = got.read()
        bits = (mine.contiguous().view(-1).view(torch.uint8), want.detach().contiguous().view(-1).view(torch.uint8))
        return mine.dtype == want.dtype == got.dtype and mine.shape == want.shape and torch.equal(*bits)
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same(got[key], want[key]) for key in want)
    if isinstance(want, list | tuple):
        return len(got) == len(want) and all(map(same, got, want))
    return type(got) is type(want) and got == want


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_tensor_is_the_one_that_torch_reads(zipped: bool, protocol: int, tmp_path: Path) -> None:
    saved = every_kind() | ({str(d): torch.ones(3).to(d) for d in NEW_DTYPES} if zipped else {})
    path = tmp_path / "file.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    want = torch.load(path, weights_only=protocol == 2)  # torch's own reader of weights knows protocol 2 alone
    assert same(read(path), want)
    path.write_bytes(b"")  # nothing of ours maps the file
    with pytest.raises(ValueError, match=r"file.pt cannot be read: .*; give a whole file of torch.save$"):
        read(path)


@pytest.mark.parametrize("name", ["pretrain/mm_projector.bin", "lora/non_lora_trainables.bin"])
def test_files_that_llava_wrote_are_what_torch_reads(name: str) -> None:
    path = ASSETS / "llava_v15" / name
    want = torch.load(path, weights_only=True)
    assert len(want) == 4 and same(tensors(path), want)


@pytest.mark.parametrize("family", ["internlm2", "llama3"])
def test_a_training_checkpoint_is_read_to_the_bit(family: str) -> None:
    folder = ASSETS / f"xtuner_{family}"
    want = load_file(folder / "trained.safetensors")
    assert same(tensors(folder / "iter_4.pth"), want)


def test_classes_of_a_training_checkpoint_are_inert() -> None:
    value = read(TRAINING)
    assert value["meta"]["iter"] == 4 and value["meta"]["cfg"].startswith("default_hooks = dict(")
    histories = value["message_hub"]["log_scalars"]
    assert histories and all(isinstance(one, Inert) for one in histories.values())
    loss = histories["train/loss"]
    assert loss.of == Name("mmengine.logging.history_buffer", "HistoryBuffer")
    assert loss.state["_log_history"].of == Name("numpy.core.multiarray", "_reconstruct")
    assert {type(one) for one in value["message_hub"]["runtime_info"].values()} <= {int, float, str, list}
    moments = value["optimizer"]["state"]
    assert moments and all(isinstance(one["exp_avg"], FileTensor) for one in moments.values())


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """Copy a zip file with records changed, or left out where `change` gives None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def test_a_file_of_the_other_byte_order_is_turned(tmp_path: Path) -> None:
    saved = {str(d): (torch.arange(6) - 2).to(d) for d in (*DTYPES, torch.uint16, torch.float8_e5m2)}
    saved["slice"] = torch.arange(20.0).reshape(4, 5)[1:3, 2:]
    torch.save(saved, tmp_path / "little.pt")
    kinds = list(saved.values())

    def turn(name: str, content: bytes) -> bytes:
        if name == "byteorder":
            return b"big"
        if not name.startswith("data/"):
            return content
        dtype = kinds[int(name.removeprefix("data/"))].dtype
        width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
        return b"".join(content[at : at + width][::-1] for at in range(0, len(content), width))

    path = rewritten(tmp_path / "little.pt", tmp_path / "big.pt", turn)
    assert sys.byteorder == "little" and same(tensors(path), saved)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(3)}, tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert tensors(tmp_path / "file.pt")["weight"].read().tolist() == [0, 1, 2]


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    size = 1 << 20
    torch.save({str(n): torch.full((size,), n, dtype=torch.uint8) for n in range(16)}, tmp_path / "file.pt")
    tracemalloc.start()
    try:
        for name, tensor in tensors(tmp_path / "file.pt").items():
            assert int(tensor.read().max()) == int(name)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * size
    finally:
        tracemalloc.stop()


def legacy(folder: Path) -> Path:
    path = folder / "legacy.bin"
    torch.save(torch.load(PUBLISHED, weights_only=True), path, _use_new_zipfile_serialization=False)
    return path


def spoiled(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 4])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_a_damaged_file_is_refused_or_reads_as_before(tmp_path: Path) -> None:
    want, path = torch.load(PUBLISHED, weights_only=True), tmp_path / "file.bin"
    rng, refused = random.Random(0), 0
    for _ in range(500):
        path.write_bytes(spoiled(PUBLISHED.read_bytes(), rng))
        try:
            assert same(tensors(path), want)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 300


@pytest.mark.parametrize("head", [True, False], ids=["pickles", "anywhere"])
def test_a_damaged_legacy_file_never_raises_anything_else(head: bool, tmp_path: Path) -> None:
    content = legacy(tmp_path).read_bytes()
    path, rng, refused = tmp_path / "file.bin", random.Random(1), 0
    for _ in range(500):
        part = 700 if head else len(content)
        path.write_bytes(spoiled(content[:part], rng) + content[part:])
        try:
            for tensor in tensors(path).values():
                tensor.read()
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > (250 if head else 50)


def test_what_a_file_claims_is_checked_against_what_it_holds(tmp_path: Path) -> None:
    def without(name: str, content: bytes) -> bytes | None:
        return None if name == "data/1" else content

    def short(name: str, content: bytes) -> bytes:
        return content[:-2] if name == "data/1" else content

    def order(name: str, content: bytes) -> bytes:
        return b"middle" if name == "byteorder" else content

    def nothing(_: str, content: bytes) -> bytes:
        return content

    cases: list[tuple[str, Callable[[str, bytes], bytes | None], dict[str, Any]]] = [
        ("it lacks storage '1'", without, {}),
        ("storage '1' is smaller than its pickle says", short, {}),
        ("its byte order is neither little nor big", order, {}),
        ("is compressed or encrypted", nothing, {"compression": zipfile.ZIP_DEFLATED}),
    ]
    for number, (said, change, options) in enumerate(cases):
        path = rewritten(PUBLISHED, tmp_path / f"{number}.bin", change, **options)
        with pytest.raises(ValueError, match=said):
            read(path)
    content = bytearray(PUBLISHED.read_bytes())
    with zipfile.ZipFile(PUBLISHED) as archive:
        place = archive.getinfo("mm_projector/data/0").header_offset
    content[place + 200] ^= 1
    (tmp_path / "flipped.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped.bin is damaged: storage 0 does not match its checksum"):
        for tensor in tensors(tmp_path / "flipped.bin").values():
            tensor.read()


def crafted(path: Path, *, numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Path:
    """Write a file of one tensor with 24 bytes of storage and these claims, as torch writes it."""

    class Claim:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, OrderedDict())

    class Storage:
        pass

    class Pickler(__import__("pickle").Pickler):  # type: ignore[misc]
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    pickled = io.BytesIO()
    Pickler(pickled, 2).dump({"weight": Claim()})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data.pkl", pickled.getvalue())
        archive.writestr("file/data/0", struct.pack("<6f", *range(6)))
    return path


def test_a_tensor_lies_within_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    fits: dict[str, Any] = {"numel": 6, "offset": 1, "size": (2, 2), "stride": (3, 1)}
    crafted(path, **fits)
    assert tensors(path)["weight"].read().tolist() == [[1, 2], [4, 5]]
    for said, changes in [
        ("storage '0' is smaller than its pickle says", {"numel": 7}),
        ("reaches beyond its storage of 6 elements", {"offset": 2}),
        ("reaches beyond its storage of 6 elements", {"stride": (2**59, 1)}),
        ("a tensor of 1000000 elements lies in a storage of 6", {"size": (1000, 1000), "stride": (0, 0)}),
        ("a tensor of .* elements lies in a storage of 6", {"size": (2**59, 2**59), "stride": (0, 0)}),
        ("a tensor of 0 elements lies in a storage of 6", {"size": (0, 2**59, 2**59), "stride": (0, 0, 0)}),
        ("a tensor has a shape that is none", {"size": (-1, 2)}),
        ("a tensor has a shape that is none", {"size": (2**63, 2)}),
        ("a tensor has a shape that is none", {"offset": 1.0}),
        ("lacks its storage or its shape", {"size": (2, 2, 1)}),
        ("lacks its storage or its shape", {"size": (1,) * 100, "stride": (1,) * 100}),
        ("refers to something beside its storages", {"numel": -1}),
    ]:
        crafted(path, **(fits | changes))
        with pytest.raises(ValueError, match=said):
            read(path)


def test_what_is_no_file_of_weights_is_named_by_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    for value, said in [
        ([torch.ones(1)], "file.pt holds no tensors by name, but a list"),
        ({"epoch": 3, "model": {}}, "file.pt holds 'epoch', which is no tensor"),
        ({}, "file.pt holds no tensors by name, but a dict"),
    ]:
        torch.save(value, path)
        with pytest.raises(ValueError, match=said):
            tensors(path)
    torch.save(torch.nn.Linear(2, 2), path)
    value = read(path)
    assert isinstance(value, Inert) and value.of == Name("torch.nn.modules.linear", "Linear")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.pt")
