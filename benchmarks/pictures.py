"""Photos -> the same JPEG files as a folder, as our shards, as tars and as MDS.

The photos are those that come with scikit-learn. A picture of 640 px is a random crop of one of them, resized; one of
2048 px is a crop of a photo tiled with its own mirror images, so that its detail, and the bytes that a decoder has to
read, are those of a photo and not of an enlargement.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RATIOS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3)
PER_TAR = 100
SIZE = 336


def make(folder: Path, *, side: int, num: int) -> None:
    """Write FOLDER/{files,tars,shards,mds,tokenizer} unless they are there."""
    done = folder / "done.json"
    if done.is_file() and json.loads(done.read_text()) == [side, num]:
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    for number, content in enumerate(_jpegs(side, num)):
        (folder / "files" / f"{number:05}.jpg").write_bytes(content)
    _write_tars(folder)
    _write_mds(folder)
    _write_shards(folder)
    _write_processor(folder)
    done.write_text(json.dumps([side, num]))


def files(folder: Path) -> list[Path]:
    return sorted((folder / "files").glob("*.jpg"))


def import_streaming() -> Any:
    """Return mosaicml-streaming, which cannot be imported here as it is: its own picture datasets, which nobody asks
    for, want torchvision, and the public build of that does not load beside a torch for CPUs."""
    from unittest.mock import MagicMock

    from transformers import LlavaImageProcessorPil  # noqa: F401  it must have seen that there is none

    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        sys.modules.setdefault(f"torchvision{name}", MagicMock())
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    return import_module("streaming")


def _jpegs(side: int, num: int) -> Iterator[bytes]:
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(side)
    photos = load_sample_images().images
    for number in range(num):
        ratio = rng.choice(RATIOS)
        width, height = (side, round(side / ratio)) if ratio >= 1 else (round(side * ratio), side)
        photo = _tiled(photos[number % len(photos)], width if side > 640 else 0, height if side > 640 else 0)
        scale = 1.0 if side > 640 else rng.uniform(0.6, 1)
        cut_width = min(photo.width, photo.height * width / height) * scale if side <= 640 else width
        cut_height = cut_width * height / width
        left, top = rng.uniform(0, photo.width - cut_width), rng.uniform(0, photo.height - cut_height)
        box = (left, top, left + cut_width, top + cut_height)
        content = io.BytesIO()
        photo.resize((width, height), Image.Resampling.BICUBIC, box=box).save(
            content, "JPEG", quality=90, subsampling="4:2:0"
        )
        yield content.getvalue()


def _tiled(photo: np.ndarray, width: int, height: int) -> Image.Image:
    """Return the photo, or enough of its mirror images around it to cut `width` x `height` from."""
    both = [photo, photo[:, ::-1]]
    across, down = 1 + width // photo.shape[1], 1 + height // photo.shape[0]
    row = np.concatenate([both[n % 2] for n in range(across + (width > 0))], axis=1)
    return Image.fromarray(np.concatenate([row[:: 1 - 2 * (n % 2)] for n in range(down + (height > 0))], axis=0))


def _write_tars(folder: Path) -> None:
    (folder / "tars").mkdir(exist_ok=True)
    paths = files(folder)
    for start in range(0, len(paths), PER_TAR):
        with tarfile.open(folder / "tars" / f"{start // PER_TAR:04}.tar", "w") as tar:
            for path in paths[start : start + PER_TAR]:
                tar.add(path, arcname=path.name)


def _write_mds(folder: Path) -> None:
    with import_streaming().MDSWriter(
        out=str(folder / "mds"), columns={"jpg": "bytes"}, size_limit=1 << 24
    ) as writer:
        for path in files(folder):
            writer.write({"jpg": path.read_bytes()})


def _write_shards(folder: Path) -> None:
    from rayllava import driver
    from rayllava.data.ingest import ShardSpec
    from rayllava.data.sharding import write_shards
    from rayllava.place import Place

    turns = [
        {"from": "human", "value": "<image>\nwhat is shown in this image?"},
        {"from": "gpt", "value": "a small picture"},
    ]
    records = [{"id": path.stem, "image": path.name, "conversations": turns} for path in files(folder)]
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(records))
    write_shards(
        "llava",
        Place(str(annotations)),
        Place(str(folder / "shards")),
        spec=ShardSpec(images=str(folder / "files")),
        connect=lambda: driver.connect("local", num_cpus=2),
    )


def _write_processor(folder: Path) -> None:
    from tests.tiny import assembled, make_parts

    spec = assembled(make_parts(folder / "parts"), folder / "tokenizer", max_length=2048)
    spec = spec.but(image_size=SIZE, num_image_tokens=(SIZE // 14) ** 2)
    (folder / "processor.json").write_text(spec.model_dump_json())
