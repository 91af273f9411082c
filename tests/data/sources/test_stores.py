"""Sources read from an object store as from a disk; `file://` goes the same way as `s3://`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayllava.data.sources import SOURCES
from rayllava.place import Place
from tests.data import hostile

ROW = {"id": "0", "image": "0.jpg", "conversations": hostile.talk()}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.tar", "a.tar.gz", "a.parquet"])
def test_a_store_reads_like_a_disk(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    tar = hostile.tar(("0.jpg", hostile.healthy()), ("0.json", {"conversations": hostile.talk()}))
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([ROW]), path)
    else:
        path.write_bytes(
            {
                "a.json": json.dumps([ROW]).encode(),
                "a.jsonl": json.dumps(ROW).encode(),
                "a.tar": tar,
                "a.tar.gz": gzip.compress(tar),
            }[name]
        )
    source = {"json": "llava", "jsonl": "llava", "parquet": "parquet"}.get(name.rpartition(".")[2], "webdataset")
    read = SOURCES[source].read
    assert read
    (here,), (there,) = read(Place(str(path))), read(Place(f"file://{path}"))
    assert here == there and not there.fault


@pytest.mark.parametrize("source", ["internvl", "mix"])
def test_a_mixture_in_a_store_finds_what_lies_beside_it(tmp_path: Path, source: str) -> None:
    (tmp_path / "a.jsonl").touch()
    mix = {"portions": [{"name": "a", "source": "llava", "annotations": "a.jsonl"}]}
    (tmp_path / "m.json").write_text(json.dumps({"a": {"annotation": "a.jsonl"}} if source == "internvl" else mix))
    portions = SOURCES[source].portions
    assert portions
    (one,) = portions(Place(f"file://{tmp_path}/m.json"))
    assert one.annotations == f"file://{tmp_path}/a.jsonl"
