"""Mixtures: every portion as often as it counts, and every sample with its origin."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayllava.data.ingest import ShardSpec
from rayllava.data.sharding import write_shards
from rayllava.data.shards import ShardManifest
from rayllava.place import Place
from tests.data.annotated import Folder

pytestmark = pytest.mark.usefixtures("ray_local")


def mix(root: Path, *portions: dict[str, Any], **words: Any) -> ShardManifest:
    path = root / "mix.json"
    path.write_text(json.dumps({"portions": portions}))
    return write_shards("mix", Place(str(path)), Place(str(root / "out")), spec=ShardSpec(**words))


def origins(manifest: ShardManifest) -> Counter[tuple[str, int]]:
    """How often each (source, line) is in the shards."""
    files = [manifest.dir.local / shard.file for shard in manifest.shards]
    rows = [row for file in files for row in pq.read_table(file, columns=["source", "line", "copy"]).to_pylist()]
    assert len({tuple(row.values()) for row in rows}) == len(rows), "a copy is there once"
    return Counter((row["source"], row["line"]) for row in rows)


@pytest.fixture
def two(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    made = []
    for name, num in (("a", 30), ("b", 40)):
        folder = Folder(tmp_path / name, num)
        made.append({"name": name, "source": "llava", "annotations": f"{name}/a.json", "images": str(folder.images)})
    return made[0], made[1]


def test_portions_repeat_whole_and_in_part(tmp_path: Path, two: tuple[dict, dict]) -> None:
    manifest = mix(tmp_path, two[0] | {"repeat": 2}, two[1] | {"repeat": 1.25})
    times = origins(manifest)
    assert {line: times["a", line] for line in range(1, 31)} == dict.fromkeys(range(1, 31), 2)
    assert Counter(times["b", line] for line in range(1, 41)) == {1: 30, 2: 10}
    assert manifest.num_samples == 60 + 50
    assert manifest.origin["records"] == {"a": 30, "b": 40}


def test_a_draw_has_its_size_and_follows_the_seed(tmp_path: Path, two: tuple[dict, dict]) -> None:
    drawn = {}
    for seed in (1, 2):
        root = tmp_path / str(seed)
        root.mkdir()
        portions = [one | {"annotations": str(tmp_path / one["annotations"])} for one in two]
        manifest = mix(root, portions[0] | {"most": 7}, portions[1] | {"repeat": 0.5}, seed=seed)
        drawn[seed] = origins(manifest)
        assert Counter(source for source, _ in drawn[seed].elements()) == {"a": 7, "b": 20}
    assert drawn[1] != drawn[2]


def test_a_portion_with_a_missing_folder_is_named(tmp_path: Path, two: tuple[dict, dict]) -> None:
    with pytest.raises(ValueError, match=r"images=.*nowhere of b is not a folder"):
        mix(tmp_path, two[0], two[1] | {"images": "/nowhere"})


def test_images_belongs_to_the_portions_of_a_mixture(tmp_path: Path, two: tuple[dict, dict]) -> None:
    with pytest.raises(ValueError, match="images=x is for one set of annotations"):
        mix(tmp_path, *two, images="x")


def test_internvl_meta_files_make_the_same_shards(tmp_path: Path, two: tuple[dict, dict]) -> None:
    folders = {one["name"]: one for one in two}
    for name in folders:  # InternVL writes JSON lines
        rows = json.loads((tmp_path / name / "a.json").read_text())
        (tmp_path / name / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = {
        name: {"root": one["images"], "annotation": f"{name}/a.jsonl", "repeat_time": 1, "length": 30}
        for name, one in folders.items()
    }
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(meta))
    manifest = write_shards("internvl", Place(str(path)), Place(str(tmp_path / "out")))
    assert set(origins(manifest)) == {("a", n + 1) for n in range(30)} | {("b", n + 1) for n in range(40)}


def test_a_promise_that_is_not_kept_is_told(
    tmp_path: Path, two: tuple[dict, dict], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(tmp_path / "pt", 5)
    path = tmp_path / "blip_laion_cc_sbu_558k.json"
    folder.annotations.rename(path)
    spec = ShardSpec(images=str(folder.images))
    write_shards("llava", Place(str(path)), Place(str(tmp_path / "out")), spec=spec)
    assert "has 5 records; 558128 are known to be in it" in caplog.text
