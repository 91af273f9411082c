"""Tars as WebDataset writes them, and tars that nobody should trust."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from rayllava.data.sources import SOURCES, Record, _tar
from rayllava.place import Place
from rayllava.records import Turn

TALK = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]}


def read(path: Path) -> list[Record]:
    source = SOURCES["webdataset"].read
    assert source
    return list(source(Place(str(path))))


def tar(*members: tuple[str, Any], format: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar; a member is (name, bytes, text or JSON) or (name, what to set in its header)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as made:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                made.addfile(content)
                continue
            content = content if isinstance(content, bytes | str) else json.dumps(content)
            content = content.encode() if isinstance(content, str) else content
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return file.getvalue()


def header(type_: bytes, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type = type_
    for name, value in fields.items():
        setattr(info, name, value)
    return info


def records(tmp_path: Path, *members: tuple[str, Any], **options: Any) -> list[Record]:
    (tmp_path / "a.tar").write_bytes(tar(*members, **options))
    return read(tmp_path / "a.tar")


def test_a_picture_and_its_dialogue_are_a_record(tmp_path: Path) -> None:
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A dog."))
    members = [("x/0.jpg", b"0"), ("x/0.json", TALK | {"id": 7}), ("x/1.json", TALK), ("x/1.PNG", b"1")]
    assert records(tmp_path, *members) == [
        Record(line=1, id="7", turns=turns, images=(b"0",)),
        Record(line=2, id="x/1", turns=turns, images=(b"1",)),
    ]


@pytest.mark.parametrize("end", ["txt", "caption"])
def test_a_picture_and_its_caption_are_one_round(tmp_path: Path, end: str) -> None:
    (one,) = records(tmp_path, ("0.jpg", b"0"), (f"0.{end}", "\ufeffA dog.\n"))
    assert one.turns == (Turn("user", "<image>"), Turn("assistant", "A dog."))


def test_a_caption_may_stand_in_the_json(tmp_path: Path) -> None:
    one, two = records(
        tmp_path,
        ("0.jpg", b"0"),
        ("0.json", {"caption": "A dog.", "width": 3}),
        ("1.jpg", b"1"),
        ("1.json", {"caption": "not this", "key": "1"}),
        ("1.txt", "A cat."),
    )
    assert (one.turns[1].text, two.turns[1].text) == ("A dog.", "A cat.")


def test_several_pictures_stand_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ["0.img10.png", "0.img2.png", "0.img1.jpg"]
    (one,) = records(tmp_path, *((name, name.encode()) for name in names), ("0.txt", "Three."))
    assert one.images == (b"0.img1.jpg", b"0.img2.png", b"0.img10.png")
    assert one.turns[0].text == "<image>" * 3


def test_members_win_over_paths_in_the_json(tmp_path: Path) -> None:
    (one,) = records(tmp_path, ("0.jpg", b"0"), ("0.json", TALK | {"image": "coco/0.jpg"}))
    assert one.images == (b"0",)


def test_paths_in_the_json_count_without_members(tmp_path: Path) -> None:
    (one,) = records(tmp_path, ("0.json", TALK | {"image": "coco/0.jpg"}))
    assert one.images == ("coco/0.jpg",)


def test_folders_notes_and_litter_are_passed_over(tmp_path: Path) -> None:
    folder = header(tarfile.DIRTYPE)
    members = [
        ("x", folder),
        ("./x/._0.jpg", b"m"),
        ("./x/0.jpg", b"0"),
        ("./x/0.cls", b"3"),
        ("./x/0.txt", "A dog."),
    ]
    (one,) = records(tmp_path, *members, ("x/.DS_Store", b""))
    assert (one.id, one.images, one.fault) == ("x/0", (b"0",), "")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar_is_read(tmp_path: Path, format: int) -> None:
    name = "/".join(["folder" * 5] * 7)
    (one,) = records(tmp_path, (f"{name}/0.jpg", b"0" * 1000), (f"{name}/0.txt", "A dog."), format=format)
    assert (one.id, one.fault, len(one.images[0])) == (f"{name}/0", "", 1000)


def test_a_gzipped_tar_reads_the_same(tmp_path: Path) -> None:
    content = tar(("0.jpg", b"0"), ("0.txt", "A dog."))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.tar").write_bytes(content)
    assert read(tmp_path / "a.tar.gz") == read(tmp_path / "a.tar")


def test_an_empty_tar_holds_no_record(tmp_path: Path) -> None:
    assert records(tmp_path) == []


GOOD = [("good.jpg", b"g"), ("good.txt", "Good.")]


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ([("0.jpg", header(tarfile.SYMTYPE, linkname="/etc/passwd")), ("0.txt", "A")], "0.jpg is a symbolic link"),
        ([("0.jpg", header(tarfile.LNKTYPE, linkname="good.jpg")), ("0.txt", "A")], "0.jpg is a hard link"),
        ([("0.jpg", header(tarfile.CHRTYPE, devmajor=1, devminor=5))], "0.jpg is a device"),
        ([("0.jpg", header(tarfile.BLKTYPE, devmajor=8))], "0.jpg is a device"),
        ([("0.jpg", header(tarfile.FIFOTYPE))], "0.jpg is a pipe"),
        ([("0.jpg", header(tarfile.GNUTYPE_SPARSE))], "0.jpg is a sparse file"),
        ([("0.jpg", header(b"Z"))], "0.jpg is of unknown type b'Z'"),
        ([("0.jpg", header(tarfile.REGTYPE, pax_headers={"GNU.sparse.major": "1"}))], "0.jpg is a sparse file"),
        ([("/etc/0.jpg", b"0"), ("/etc/0.txt", "A")], "member /etc/0.jpg lies outside of the tar"),
        ([("../0.jpg", b"0"), ("../0.txt", "A")], "member ../0.jpg lies outside of the tar"),
        ([("x/../../0.jpg", b"0")], "member x/../../0.jpg lies outside of the tar"),
        ([("0.jpg", b"0"), ("0.jpg", b"1"), ("0.txt", "A")], "member 0.jpg stands there twice"),
        ([("0.jpg", b"0"), ("./0.jpg", b"1"), ("0.txt", "A")], "member 0.jpg stands there twice"),
        *(
            ([(f"0.{end}", b"0")], f"member 0.{end} is a pickle or may hold one; it is not opened")
            for end in ("pkl", "pickle", "pt", "pth", "pyd", "npy", "npz")
        ),
        ([("0.exe", b"MZ"), ("0.jpg", b"0"), ("0.txt", "A")], "member 0.exe is unknown; known are jpg"),
        ([("README", b"hi")], "member README is unknown"),
        ([("0.jpg", b"0")], "it has pictures but neither json nor txt"),
        ([("0.cls", b"3")], "it has pictures but neither json nor txt"),
        ([("0.txt", "A")], "it has a caption but no picture"),
        ([("0.jpg", b"0"), ("0.json", "[1]")], "its json is a list, not an object"),
        ([("0.jpg", b"0"), ("0.json", "{")], "it cannot be read: Expecting property name"),
        ([("0.jpg", b"0"), ("0.json", "[" * 100_000)], "it cannot be read: maximum recursion depth"),
        ([("0.jpg", b"0"), ("0.json", "{}")], "conversations is missing, not a list"),
        ([("0.jpg", b"0"), ("0.json", {"caption": 3})], "the caption is a number, not text"),
        ([("0.jpg", b"0"), ("0.txt", b"\xff")], "it cannot be read: 'utf-8' codec"),
        ([("0.jpg", b"0"), ("0.txt", "A"), ("0.caption", "B")], "it cannot be read: there are 2 of txt, caption"),
        ([*GOOD, ("0.txt", "A"), ("0.jpg", b"0"), ("good.png", b"g")], "good came before; members of one name must"),
    ],
)
def test_a_hostile_member_is_a_fault_of_its_record_alone(
    tmp_path: Path, members: list[tuple[str, Any]], fault: str
) -> None:
    found = records(tmp_path, *members, ("well.jpg", b"w"), ("well.txt", "Well."))
    assert [one.fault for one in found if fault in one.fault]
    assert (found[-1].id, found[-1].fault, found[-1].images) == ("well", "", (b"w",))
    assert [one.line for one in found] == list(range(1, len(found) + 1))


def test_a_member_that_is_too_large_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tar, "LARGEST", 2 << 20)
    found = records(tmp_path, ("0.jpg", bytes(3 << 20)), ("0.txt", "A"), *GOOD)
    assert [one.fault for one in found] == ["member 0.jpg is 3 MiB long; 2 is the most", ""]


def test_members_that_are_too_large_together_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayllava.data.sources import webdataset

    monkeypatch.setattr(webdataset, "LARGEST", 2 << 20)
    found = records(tmp_path, *((f"0.{n}.jpg", bytes(1 << 20)) for n in range(5)), ("0.txt", "A"), *GOOD)
    assert [one.fault for one in found] == ["member 0.2.jpg makes the record longer than 2 MiB", ""]


def test_a_sparse_file_with_a_long_map_is_stepped_over(tmp_path: Path) -> None:
    block = bytearray(header(tarfile.GNUTYPE_SPARSE, name="0.jpg", size=5).tobuf(tarfile.GNU_FORMAT))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    (tmp_path / "a.tar").write_bytes(bytes(block) + maps + b"01234" + bytes(507) + tar(*GOOD))
    assert [one.fault for one in read(tmp_path / "a.tar")] == ["member 0.jpg is a sparse file", ""]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("kept", "ids"),
    [(1, ["good"]), (511, ["good"]), *((kept, ["good", "0"]) for kept in (512, 513, 1024, 2560, 3072, 3100))],
)
def test_a_tar_that_ends_in_the_middle_says_so_in_its_last_record(
    tmp_path: Path, kept: int, ids: list[str], zipped: bool
) -> None:
    content = tar(*GOOD, ("0.jpg", b"0" * 2000), ("0.txt", "A"))[: 4 * 512 + kept]
    (tmp_path / "a.tar").write_bytes(gzip.compress(content) if zipped else content)
    found = read(tmp_path / "a.tar")
    assert "it ends in the middle, at byte" in found[-1].fault
    assert not any(one.fault for one in found[:-1])
    assert [one.id for one in found] == ids  # only the next record's header vouches for a record


@pytest.mark.parametrize("kept", [10_000, 30_000, 49_000])
def test_a_gzip_stream_that_ends_in_the_middle_is_told(tmp_path: Path, kept: int) -> None:
    noise = random.Random(0).randbytes(50_000)
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar(*GOOD, ("0.jpg", noise), ("0.txt", "A")))[:kept])
    good, broken = read(tmp_path / "a.tar")
    assert (good.fault, broken.id) == ("", "0")
    assert "ended before the end-of-stream" in broken.fault


def test_a_tar_without_an_end_does_not_vouch_for_its_last_record(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(*GOOD, ("0.jpg", b"0"), ("0.txt", "A"))[: 8 * 512])
    assert [one.fault[:20] for one in read(tmp_path / "a.tar")] == ["", "the tar breaks off: "]


def test_garbage_behind_a_member_is_told(tmp_path: Path) -> None:
    content = tar(*GOOD)
    (tmp_path / "a.tar").write_bytes(content[:1024] + b"garbage!" * 64 + content[1024:])
    (one,) = read(tmp_path / "a.tar")
    assert one.fault.startswith("the tar breaks off: ") and one.fault.endswith("before byte 1536")


def test_an_extended_header_cannot_fill_the_memory(tmp_path: Path) -> None:
    block = header(tarfile.XHDTYPE, name="0", size=1 << 33).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(tar(*GOOD)[:2048] + block + bytes(4096))
    assert read(tmp_path / "a.tar")[-1].fault.endswith(f"claims {1 << 33} bytes")


@pytest.mark.parametrize(
    "records_", [b"9999999 path=x\n", b"x path=1\n", b"0 path=1\n", b"-1 path=x\n", b"\0" * 20, b"5 =\n", b"9" * 5000]
)
def test_a_broken_extended_header_is_no_crash(tmp_path: Path, records_: bytes) -> None:
    block = header(tarfile.XHDTYPE, name="0", size=len(records_)).tobuf(tarfile.GNU_FORMAT)
    padded = records_ + bytes(-len(records_) % 512)
    (tmp_path / "a.tar").write_bytes(block + padded + tar(*GOOD))
    assert [one.id for one in read(tmp_path / "a.tar")] == ["good"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"no tar at all" * 100, "is no tar, plain or gzipped"),
        (b"short", "is no tar, plain or gzipped"),
        (b"<html>", "is a web page, not a tar"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (gzip.compress(b"no tar at all" * 100), "is no tar, plain or gzipped"),
        (b"\x1f\x8b" + b"garbage" * 100, "is no tar, plain or gzipped"),
        (b"BZh91AY&SY" + bytes(600), "is no tar, plain or gzipped"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.tar")


def test_a_gzip_bomb_is_read_in_small_pieces(tmp_path: Path) -> None:
    import tracemalloc

    with gzip.open(tmp_path / "a.tar", "wb", compresslevel=6) as file:
        file.write(header(tarfile.REGTYPE, name="0.jpg", size=1 << 28).tobuf())
        for _ in range(256):
            file.write(bytes(1 << 20))
        file.write(tar(*GOOD))
    tracemalloc.start()
    try:
        found = read(tmp_path / "a.tar")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [one.fault for one in found] == ["member 0.jpg is 256 MiB long; 64 is the most", ""]
    assert peak < 16 << 20
