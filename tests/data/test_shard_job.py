"""jobs/shard.py as a person meets it: one line when it fails, the rest of the work after a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayllava import durable
from rayllava.data.shards import ShardManifest, ShardReader
from tests.data.annotated import Folder

ROOT = Path(__file__).resolve().parents[2]


def shard(*words: str | Path, address: str = "local") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words, address=address), capture_output=True, text=True, env=env(), check=False)


def command(*words: str | Path, address: str = "local") -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / "shard.py"), "--address", address, *map(str, words)]


def env() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "platform"), os.environ.get("PYTHONPATH")]))
    # What `ray job submit --runtime-env` hands to a job: its workers import the code it was submitted with.
    submitted = json.dumps({"runtime_env": {"env_vars": {"PYTHONPATH": path}}})
    return os.environ | {
        "PYTHONPATH": path,
        "RAY_AUTH_MODE": "disabled",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": submitted,
    }


@pytest.fixture(scope="module")
def address(ray_local: None) -> str:
    """Of the tests' own cluster, so that a job need not start one."""
    import ray

    return ray.get_runtime_context().gcs_address


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path, 30)


def fails(done: subprocess.CompletedProcess[str], out: Path) -> str:
    """Check the manners of a failure and return its line, which only progress may precede."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.strip().splitlines() if "rayllava.progress" not in line]
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    assert not (out / "manifest.json").exists()
    assert not list(out.glob("*.parquet"))
    assert lines[0].startswith("error: ")
    return lines[0]


def test_an_unknown_source_is_refused_with_the_known_ones(folder: Folder, tmp_path: Path) -> None:
    line = fails(shard("lava", folder.annotations, tmp_path / "out"), tmp_path / "out")
    assert "no source 'lava'; there are: internvl, inv_refcoco, llava, mix, " in line


def test_an_unknown_field_is_refused_with_the_known_ones(folder: Folder, tmp_path: Path) -> None:
    line = fails(shard("llava", folder.annotations, tmp_path / "out", "image=x"), tmp_path / "out")
    assert "unknown field image; did you mean images?" in line


def test_a_missing_image_folder_is_named(folder: Folder, tmp_path: Path) -> None:
    line = fails(shard("llava", folder.annotations, tmp_path / "out", f"images={tmp_path}/no"), tmp_path / "out")
    assert "/no is not a folder" in line
    assert not (tmp_path / "out").exists()


def test_pictures_without_an_image_folder_name_the_field(folder: Folder, tmp_path: Path) -> None:
    line = fails(shard("llava", folder.annotations, tmp_path / "out"), tmp_path / "out")
    assert "images is not set but record 2" in line and "add images=DIR" in line


def test_malformed_json_is_named_by_line_and_column(folder: Folder, tmp_path: Path) -> None:
    folder.annotations.write_text('[{"id": 1},\n {"id": }]')
    line = fails(shard("llava", folder.annotations, tmp_path / "out"), tmp_path / "out")
    assert "malformed JSON at line 2 column 9" in line


def test_a_wrong_number_of_marks_is_named(folder: Folder, tmp_path: Path) -> None:
    folder.rows[4]["image"] = ["4.png", "4.png"]
    folder.write()
    words = ("llava", folder.annotations, tmp_path / "out", f"images={folder.images}")
    line = fails(shard(*words), tmp_path / "out")
    assert "record 5 of" in line and "1 <image> mark in its questions for 2 images" in line
    assert "policy=skip" in line


def test_an_unwritable_out_is_named(folder: Folder, tmp_path: Path) -> None:
    out = folder.annotations / "out"  # below a file: even root cannot
    line = fails(shard("llava", folder.annotations, out, f"images={folder.images}"), out)
    assert f"out={out} cannot be written" in line


def test_a_file_that_is_no_image_is_named(folder: Folder, tmp_path: Path, address: str) -> None:
    (folder.images / "4.png").write_bytes(b"<html>404</html>")
    words = ("llava", folder.annotations, tmp_path / "out", f"images={folder.images}")
    line = fails(shard(*words, address=address), tmp_path / "out")
    assert "record 5 of" in line and "4.png: not an image" in line and "policy=skip" in line
    done = shard(*words, "policy=skip", address=address)
    assert done.returncode == 0 and "1 rejected" in done.stdout
    assert ShardManifest.load(tmp_path / "out").num_samples == 29


def test_a_dry_run_writes_nothing(folder: Folder, tmp_path: Path) -> None:
    done = shard("llava", folder.annotations, tmp_path / "out", "policy=skip", "--dry-run")
    assert done.returncode == 0 and '"policy": "skip"' in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_check_reports_and_writes_nothing(folder: Folder, tmp_path: Path, address: str) -> None:
    words = ("llava", folder.annotations, tmp_path / "out", f"images={folder.images}", "--check")
    done = shard(*words, address=address)
    assert done.returncode == 0 and "30 records: 30 good (25 images" in done.stdout
    (folder.images / "4.png").unlink()
    done = shard(*words, address=address)
    assert done.returncode == 1 and "bad: 1 x image is missing" in done.stdout
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: record 5 of a.json (id '4'): image 4.png is missing")
    )
    assert not (tmp_path / "out").exists()


def test_a_killed_job_keeps_its_finished_shards(tmp_path: Path, address: str) -> None:
    folder = Folder(tmp_path, 1500)
    out = tmp_path / "out"
    words = ("llava", folder.annotations, out, f"images={folder.images}", "rows=25")
    with subprocess.Popen(command(*words, address=address), env=env(), stderr=subprocess.PIPE) as job:
        deadline = time.monotonic() + 60
        while len(finished(out)) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        job.send_signal(signal.SIGKILL)
    time.sleep(0.5)
    kept = finished(out)
    assert 3 <= len(kept) < 40
    assert not (out / "manifest.json").exists()

    assert shard(*words, address=address).returncode == 0
    manifest = ShardManifest.load(out)
    for name, (inode, written) in kept.items():
        assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == (inode, written)
    samples = ShardReader(out).read(range(manifest.num_samples))
    assert sorted(int(sample.id) for sample in samples) == list(range(1500))
    assert not (out / ".unfinished").exists()


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard of a bucket that has its account."""
    states = {}
    for account in (out / ".unfinished").glob("bucket-*.json"):
        for part in json.loads(account.read_text())["parts"]:
            state = (out / ".unfinished" / part["file"]).stat()
            states[part["file"]] = (state.st_ino, state.st_mtime_ns)
    return states


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_job_killed_anywhere_ends_in_the_same_bytes(kills: int, tmp_path: Path, address: str) -> None:
    folder = Folder(tmp_path, 2000)
    (folder.images / "3.png").unlink()
    words = (f"images={folder.images}", "rows=30", "policy=skip", "budget=0.1")
    begun = time.monotonic()
    assert shard("llava", folder.annotations, tmp_path / "whole", *words, address=address).returncode == 0
    seconds = time.monotonic() - begun
    whole = contents(tmp_path / "whole")
    draw, out, stages = random.Random(kills), tmp_path / "out", set()
    for _ in range(kills):
        with subprocess.Popen(
            command("llava", folder.annotations, out, *words, address=address), env=env(), stderr=subprocess.PIPE
        ) as job:
            time.sleep(draw.uniform(0.1, 0.9) * seconds)
            job.send_signal(signal.SIGKILL)
        stages.add(stage(out))
        if "whole" in stages or draw.random() < 0.3:
            stages.discard("whole")
            shutil.rmtree(out, ignore_errors=True)  # from the start, so that early moments are hit as well
    assert shard("llava", folder.annotations, out, *words, address=address).returncode == 0
    assert contents(out) == whole
    assert kills < 20 or {"spilling", "filling"} <= stages


def stage(out: Path) -> str:
    if not (out / ".unfinished").exists():
        return "whole" if (out / "manifest.json").exists() else "nothing"
    return "filling" if list((out / ".unfinished").glob("spill-*.json")) else "spilling"


def contents(out: Path) -> dict[str, str]:
    return {path.name: durable.digest(path) for path in sorted(out.iterdir()) if path.is_file()}
