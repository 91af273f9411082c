"""What hostile and broken files do to sharding: nothing but a line each in rejected.jsonl."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayllava.data.ingest import ShardSpec
from rayllava.data.sharding import write_shards
from rayllava.data.shards import ShardManifest, ShardReader
from rayllava.place import Place
from tests.data import hostile

ROOT = Path(__file__).resolve().parents[2]

SPEC = ShardSpec(policy="skip", budget=1.0, rows=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/a.json and ROOT/images: every hostile picture and name between two healthy ones."""
    root = tmp_path_factory.mktemp("pictures")
    images = root / "images"
    images.mkdir()
    contents = hostile.pictures(root / "marker")
    for name, content in (contents | hostile.oddities()).items():
        (images / name).write_bytes(content)
    names = [*contents, *hostile.place(images)]
    assert len(names) >= 60
    (images / "healthy.jpg").write_bytes(hostile.healthy())
    rows: list[dict[str, Any]] = []
    for name in names:
        rows.append({"id": "healthy", "image": "healthy.jpg", "conversations": hostile.talk()})
        rows.append({"id": name, "image": name, "conversations": hostile.talk()})
    rows += [{"id": "odd", "image": name, "conversations": hostile.talk()} for name in hostile.oddities()]
    rows.append({"id": "healthy", "image": "healthy.jpg", "conversations": hostile.talk()})
    (root / "a.json").write_text(json.dumps(rows))
    return root


def reasons(manifest: ShardManifest) -> dict[tuple[str, str], str]:
    """Return why each record was left out, by its source and id."""
    lines = (Path(str(manifest.dir)) / "rejected.jsonl").read_text().splitlines()
    return {(one["source"], one["id"]): one["reason"] for one in map(json.loads, lines)}


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def kept(manifest: ShardManifest) -> list[str]:
    return [sample.id for sample in ShardReader(manifest.dir).read(range(manifest.num_samples))]


@pytest.mark.timeout(300)
def test_hostile_pictures_are_named_and_their_neighbours_kept(ray_local: None, folder: Path, tmp_path: Path) -> None:
    before = tree(folder)
    spec = SPEC.but(images=str(folder / "images"))
    manifest = write_shards("llava", Place(str(folder / "a.json")), Place(str(tmp_path / "out")), spec=spec)
    rows = json.loads((folder / "a.json").read_text())
    told = {id_: reason for (_, id_), reason in reasons(manifest).items()}
    bad = {row["id"] for row in rows} - {"healthy", "odd"}
    assert told.keys() - {"odd"} == bad
    assert all(told.values())
    assert kept(manifest).count("healthy") == len(bad) + 1
    assert tree(folder) == before and tree(tmp_path) - {"out"} == {f"out/{name}" for name in tree(tmp_path / "out")}
    assert not (folder / "marker").exists()


@pytest.mark.timeout(300)
def test_hostile_tars_are_named_and_their_neighbours_kept(ray_local: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    contents = hostile.tars(tmp_path / "marker")
    for name, content in contents.items():
        (tmp_path / "in" / name).write_bytes(content)
    before = tree(tmp_path)
    # Outside of the folder of the tars, but where a member says that it lies.
    spec = SPEC.but(images=str(tmp_path / "in"))
    manifest = write_shards("webdataset", Place(str(tmp_path / "in")), Place(str(tmp_path / "out")), spec=spec)
    told = reasons(manifest)
    silent = set(contents) - {source.partition("/")[2] for source, _ in told}
    assert silent == {"empty.tar"}
    assert all(told.values())
    assert set(kept(manifest)) == {"good_first", "good_last"}
    assert kept(manifest).count("good_last") == sum(b"good_last" in content for content in contents.values())
    assert {path for path in tree(tmp_path) if not path.startswith("out")} == before
    assert not (tmp_path / "marker").exists()
    assert not Path("/tmp/rayllava-gauntlet.jpg").exists()


def test_what_is_no_tar_ends_the_job_with_its_name(ray_local: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(hostile.tar(("0.jpg", hostile.healthy()), ("0.txt", "A picture.")))
    (tmp_path / "in" / "1.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"1\.tar is no tar, plain or gzipped"):
        write_shards("webdataset", Place(str(tmp_path / "in")), Place(str(tmp_path / "out")), spec=SPEC)


MEASURE = """
import sys
from rayllava.data.ingest import check, load, settle
from rayllava.data.sources import SOURCES
from rayllava.place import Place
from rayllava.prompt import pixels

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10

before = peak()
for record in SOURCES["llava"].read(Place(sys.argv[1] + "/a.json")):
    record, _ = settle(record)
    if not check(record):
        try:
            load(record, Place(sys.argv[1] + "/images"))
        except ValueError:
            pass
print(peak() - before)
"""


@pytest.mark.timeout(120)
def test_no_picture_takes_more_memory_than_what_it_shows(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "platform"), "PATH": "/usr/bin:/bin"},
    )
    assert int(done.stdout) < 512  # MiB; the largest oddity is 25 million pixels
