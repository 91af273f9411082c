"""A mixture of the size of LLaVA's 665K, sharded and opened: time, and the memory of every process.

    python benchmarks/mixture.py [--records 665298] [--out runs/mixture]

The records are made up: conversations of the usual lengths about small JPEG pictures, most of them shared by
several records, one record in sixteen without a picture. Printed as JSON; kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TEXT = "a small red house beside the river where two people walk with their dog under old trees in the evening"
WORDS = TEXT.split()
PICTURES = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=665_298)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mixture")
    parser.add_argument("--cursor", type=int, help="only open the shards in OUT at this step")
    args = parser.parse_args()
    if args.cursor is not None:
        opening(args.out, args.cursor)
        return
    shutil.rmtree(args.out, ignore_errors=True)
    annotations, images = make(args.out / "raw", args.records)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "records": args.records,
        "json_megabytes": round(annotations.stat().st_size / 1e6, 1),
    }
    shards = args.out / "shards"
    job = [
        sys.executable,
        str(ROOT / "jobs" / "shard.py"),
        "--address",
        "local",
        "llava",
        str(annotations),
        str(shards),
    ]
    result["check"] = watched([*job, f"images={images}", "--check"])
    result["shard"] = watched([*job, f"images={images}"])
    for cursor in (0, 4000):
        command = [sys.executable, str(Path(__file__)), "--cursor", str(cursor), "--out", str(shards)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result[f"first_batch_of_step_{cursor}"] = json.loads(said.splitlines()[-1])
    print(json.dumps(result, indent=1))


def make(folder: Path, num_records: int) -> tuple[Path, Path]:
    """Write the annotation array and its pictures."""
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(min(PICTURES, num_records)):
        noise = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((80, 60)).save(file, "JPEG", quality=85)
        (images / f"{number:05d}.jpg").write_bytes(file.getvalue())
    draw = random.Random(0)
    path = folder / "mix.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(num_records):
            file.write(("," if number else "") + "\n" + json.dumps(_record(draw, number, num_records)))
        file.write("\n]\n")
    return path, images


def _record(draw: random.Random, number: int, num_records: int) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"{number:012d}"}
    pictured = number % 16
    if pictured:
        row["image"] = f"{draw.randrange(min(PICTURES, num_records)):05d}.jpg"
    talk = []
    for turn in range(draw.choice([1, 1, 2, 4, 6])):
        question = " ".join(draw.choices(WORDS, k=10))
        mark = "<image>\n" if pictured and not turn else ""
        talk.append({"from": "human", "value": mark + question})
        talk.append({"from": "gpt", "value": " ".join(draw.choices(WORDS, k=draw.choice([2, 10, 60])))})
    return row | {"conversations": talk}


def watched(command: list[str]) -> dict[str, Any]:
    """Run a job and return its time and the largest memory of each kind of process."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "RAY_AUTH_MODE": "disabled"}
    started = time.monotonic()
    job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    peaks: dict[str, int] = {}
    watch = threading.Thread(target=_watch, args=(job.pid, peaks), daemon=True)
    watch.start()
    said, _ = job.communicate()
    watch.join()
    assert job.returncode == 0, said
    megabytes = {name: round(peak / 1e6) for name, peak in sorted(peaks.items(), key=lambda item: -item[1])}
    return {
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_megabytes": megabytes,
        "said": said.split("\n"),
    }


def _watch(pid: int, peaks: dict[str, int]) -> None:
    """Note the memory of a process and of all below it, ten times a second."""
    try:
        job = psutil.Process(pid)
        while True:
            for process in [job, *job.children(recursive=True)]:
                try:
                    name = "driver" if process.pid == pid else process.name()
                    peaks[name] = max(peaks.get(name, 0), process.memory_info().rss)
                except psutil.Error:
                    continue
            time.sleep(0.1)
    except psutil.NoSuchProcess:
        return


def opening(shards: Path, cursor: int) -> None:
    """Open the plan and make the first atoms of a step, as a fresh process does, and print the seconds."""
    sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
    begun = time.monotonic()
    from rayllava.data.stream import Desk, StreamSpec, stream

    imported = time.monotonic()
    import tempfile

    from rayllava.data.shards import ShardManifest
    from rayllava.recipe import DataSpec
    from tests.tiny import assembled, make_parts

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        processor = assembled(make_parts(Path(folder) / "parts"), tokenizer, max_length=2048)
        opened = time.monotonic()
        manifest = ShardManifest.load(shards)
        cursor = min(cursor, manifest.num_samples // 128 - 1)
        spec = StreamSpec(
            shards=str(shards),
            shards_digest=manifest.digest,
            data=DataSpec(global_batch=128, atom=16),
            seed=42,
            processor=processor,
            tokenizer_dir=str(tokenizer),
            cursor=cursor,
        )
        desk = Desk.open(spec)
        desk.plan.step(cursor)
        planned = time.monotonic()
        fed = next(stream(spec))
        done = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "step": fed.step,
                "import_seconds": round(imported - begun, 2),
                "open_plan_seconds": round(planned - opened, 2),
                "first_batch_seconds": round(done - opened, 2),
                "peak_rss_megabytes": round(peak / 1e6),
            }
        )
    )


if __name__ == "__main__":
    main()
