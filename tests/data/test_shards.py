"""A shard folder: whole or absent, and every sample in it as it was."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayllava import durable
from rayllava.data.ingest import ShardSpec
from rayllava.data.plan import GROUP, Plan
from rayllava.data.sharding import write_shards
from rayllava.data.shards import SCHEMA, ShardManifest, ShardReader, write_parquet
from rayllava.place import Place
from rayllava.recipe import DataSpec
from rayllava.records import Sample, Turn
from tests.data.annotated import Folder

ORIGIN = {"source": "a.json", "line": 1, "copy": 0}

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Folder:
    return Folder(tmp_path_factory.mktemp("annotated"), 200)


@pytest.fixture(scope="module")
def made(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> ShardManifest:
    return cut(folder, tmp_path_factory.mktemp("made") / "shards", rows=70)


def cut(folder: Folder, out: Path, **words: Any) -> ShardManifest:
    spec = ShardSpec(images=str(folder.images), **words)
    return write_shards("llava", Place(str(folder.annotations)), Place(str(out)), spec=spec)


def rejected(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def test_every_record_is_there_once_with_its_pictures_bit_for_bit(folder: Folder, made: ShardManifest) -> None:
    samples = ShardReader(made.dir).read(range(made.num_samples))
    assert sorted(int(sample.id) for sample in samples) == list(range(200))
    for sample in samples:
        n = int(sample.id)
        talk = folder.rows[n]["conversations"]
        assert sample.images == folder.pictures(n)
        assert sample.turns == (Turn("user", talk[0]["value"]), Turn("assistant", talk[1]["value"]))


def test_the_manifest_counts_and_digests(made: ShardManifest) -> None:
    assert made.counts == {"records": 200, "samples": 200, "images": 161, "text_only": 40, "rejected": 0}
    assert len(made.shards) == 3 and sum(shard.rows for shard in made.shards) == 200
    assert made.group_rows.sum() == 200 and made.group_rows.max() == GROUP
    for shard in made.shards:
        path = made.dir.local / shard.file
        assert durable.digest(path) == shard.digest
        metadata = pq.read_metadata(path)
        assert (metadata.num_rows, metadata.num_row_groups) == (shard.rows, shard.row_groups)
        assert metadata.schema.to_arrow_schema().equals(SCHEMA)
    for name, digest in made.row_files.items():
        assert durable.digest(made.dir.local / f"{name}.npy") == digest
    assert rejected(made.dir.local) == []


def test_every_row_says_where_it_came_from(folder: Folder, made: ShardManifest) -> None:
    columns = ["id", "source", "line", "copy"]
    files = [made.dir.local / shard.file for shard in made.shards]
    table = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]
    assert sorted(int(row["id"]) for row in table) == list(range(200))
    assert all(row["line"] == int(row["id"]) + 1 for row in table)
    assert {(row["source"], row["copy"]) for row in table} == {("a.json", 0)}


def test_a_loaded_manifest_equals_the_written_one(made: ShardManifest) -> None:
    assert ShardManifest.load(made.dir) == made


def test_row_files_tell_what_the_rows_hold(made: ShardManifest) -> None:
    samples = ShardReader(made.dir).read(range(made.num_samples))
    assert made.row_images.tolist() == [len(sample.images) for sample in samples]
    assert made.row_text.tolist() == [sum(len(t.text.encode()) for t in s.turns) for s in samples]
    estimate = made.lengths(576) - made.lengths(0)
    assert np.array_equal(estimate, 576 * made.row_images.astype(int))


def test_a_reader_finds_any_rows_in_any_order(made: ShardManifest) -> None:
    all_rows = ShardReader(made.dir).read(range(made.num_samples))
    reader = ShardReader(made.dir, num_files=1, num_groups=1)
    for rows in ([199, 0, 70, 69, 140, 139], [5, 5, 4], [], np.array([31, 32, 33])):
        assert reader.read(rows) == [all_rows[row] for row in rows]


def test_a_plan_over_the_folder_reads_every_sample_once(made: ShardManifest) -> None:
    plan = Plan.of(made, DataSpec(global_batch=24, atom=5), seed=1)
    reader = ShardReader(made.dir)
    atoms = [atom for k in range(plan.num_steps) for atom in plan.atoms(k)]
    ids = [sample.id for atom in atoms for sample in reader.read(atom.samples)]
    assert sorted(ids, key=int) == [str(n) for n in range(200)]


def test_a_flipped_bit_is_noticed(made: ShardManifest, tmp_path: Path) -> None:
    samples = ShardReader(made.dir).read(range(10))
    path = tmp_path / "shard.parquet"
    write_parquet(path, ((sample, ORIGIN) for sample in samples))
    content = bytearray(path.read_bytes())
    content[content.index(next(s.images[0] for s in samples if s.images)) + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.ParquetFile(path, page_checksum_verification=True).read()


def test_a_read_that_fails_is_done_again_and_then_counts(
    made: ShardManifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rayllava.data.shards._WAITS_S", (0.0, 0.0))
    open_file, failures = ShardReader._file, iter([1, 2])

    def flaky(self: ShardReader, shard: int) -> pq.ParquetFile:
        if next(failures, None):
            raise OSError("the store is busy")
        return open_file(self, shard)

    monkeypatch.setattr(ShardReader, "_file", flaky)
    assert len(ShardReader(made.dir).read([0])) == 1
    assert caplog.text.count("the store is busy; reading it again") == 2
    failures = iter([1, 2, 3])
    with pytest.raises(OSError, match="the store is busy"):
        ShardReader(made.dir).read([0])


def test_a_group_may_hold_no_picture_at_all(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    write_parquet(path, [(Sample("a", (Turn("user", ""), Turn("assistant", "b"))), ORIGIN)])
    assert pq.read_table(path).to_pylist()[0]["images"] == []


def test_the_same_words_make_the_same_bytes_and_another_seed_another_order(
    folder: Folder, made: ShardManifest, tmp_path: Path
) -> None:
    again = cut(folder, tmp_path / "again", rows=70)
    other = cut(folder, tmp_path / "other", rows=70, seed=1)
    assert again.digest == made.digest != other.digest


def test_a_whole_folder_is_left_alone(folder: Folder, made: ShardManifest) -> None:
    manifest = made.dir.local / "manifest.json"
    before = manifest.stat().st_mtime_ns
    cut(folder, made.dir.local, rows=70)
    assert manifest.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="already holds shards of something else; give a new folder"):
        cut(folder, made.dir.local, rows=71)


def test_a_folder_without_manifest_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a shard folder .*; make one with jobs/shard.py"):
        ShardManifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 2, "sha')
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        ShardManifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="has shard format 9"):
        ShardManifest.load(tmp_path)


def test_skipped_records_are_listed_with_their_reasons(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 100)
    (folder.images / "1.png").unlink()
    (folder.images / "2.png").write_bytes(b"<html>")
    folder.rows[3]["image"] = []
    folder.rows[9] = {"id": "nine"}
    folder.write()
    manifest = cut(folder, tmp_path / "out", policy="skip", rows=40)
    told = rejected(tmp_path / "out")
    assert [(one["source"], one["line"], one["id"]) for one in told] == [
        ("a.json", 2, "1"),
        ("a.json", 3, "2"),
        ("a.json", 4, "3"),
        ("a.json", 10, "nine"),
    ]
    reasons = ["is missing", "not an image", "1 <image> mark", "conversations is missing"]
    assert all(reason in str(one["reason"]) for reason, one in zip(reasons, told, strict=True))
    assert (manifest.counts["samples"], manifest.counts["rejected"]) == (96, 4)
    ids = {sample.id for sample in ShardReader(manifest.dir).read(range(96))}
    assert not ids & {"1", "2", "3", "nine"}


def test_past_the_budget_nothing_is_made_but_the_list(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 50)
    for n in (1, 2, 3):
        (folder.images / f"{n}.png").unlink()
    with pytest.raises(ValueError, match=r"3 of 50 records are rejected .* budget \(0.04\) allows 2; .*raise budget"):
        cut(folder, tmp_path / "out", policy="skip", budget=0.04)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rejected.jsonl", ".unfinished"}
    assert len(rejected(tmp_path / "out")) == 3


def test_a_mended_picture_is_read_again(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 20)
    picture = folder.images / "1.png"
    content = picture.read_bytes()
    picture.unlink()
    with pytest.raises(ValueError, match=r"record 2 of .*a.json \(id '1'\): image 1.png is missing; mend it, or"):
        cut(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="budget"):
        cut(folder, tmp_path / "out", policy="skip", budget=0)
    picture.write_bytes(content)
    manifest = cut(folder, tmp_path / "out")
    assert manifest.counts["rejected"] == 0


def test_a_folder_of_nothing_but_rejects_is_no_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 5)
    for row in folder.rows:
        row["image"] = ["absent.png"]
        row["conversations"][0]["value"] = "<image>"
    folder.write()
    with pytest.raises(ValueError, match=r"every record was rejected; .*rejected.jsonl"):
        cut(folder, tmp_path / "out", policy="skip")
    assert len(rejected(tmp_path / "out")) == 5


def test_what_was_mended_is_counted(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 10)
    folder.rows[0]["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    folder.write()
    manifest = cut(folder, tmp_path / "out")
    assert manifest.mended == {"answer before the first question dropped": 1}


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 100)
    with tiny_disk(tmp_path / "disk") as disk:
        with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\); make room"):
            cut(folder, disk / "out")
        assert not list((disk / "out").rglob("*.parquet"))
        assert {path.name for path in (disk / "out").rglob("*.json")} <= {"spill-000.json"}


@contextlib.contextmanager
def tiny_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a small disk here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
