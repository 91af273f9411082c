"""Samples on disk: written once, then read at any row number.

OUT/shard-0000-00.parquet ...   id string, images list<binary>, turns list<struct<role, text>>,
                                source string, line int64, copy int32: where the sample came from
OUT/row_images.npy              pictures of every row       } what a plan needs, without opening a shard
OUT/row_text.npy                UTF-8 bytes of every row    }
OUT/rejected.jsonl              records left out: source, line, copy, id, reason
OUT/manifest.json               written last: a folder without it is not a shard folder
"""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayllava.data.plan import GROUP, WINDOW
from rayllava.place import Place
from rayllava.records import Sample, Turn

log = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
ROW_FILES = {"row_images": np.uint16, "row_text": np.uint32}
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("copy", pa.int32()),
        ("images", pa.list_(pa.binary())),
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),
    ]
)


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    file: str
    rows: int
    row_groups: int
    digest: str


@dataclass(frozen=True)
class ShardManifest:
    """What a shard folder holds."""

    dir: Place
    shards: tuple[Shard, ...]
    row_files: dict[str, str]
    """Digest of each file of per-row facts."""
    rows_per_group: int
    """Rows of a row group; the last one of a shard may have fewer."""
    origin: dict[str, Any]
    """portions, seed, ...: where the samples came from."""
    counts: dict[str, int]
    """records (with their copies), samples, images, text_only, rejected"""
    mended: dict[str, int]
    """What was done to how many records so that their turns alternate."""
    digest: str
    """Of everything a sample can be read from; the same wherever the folder lies."""

    @classmethod
    def load(cls, folder: Place | Path | str, *, field: str = "data") -> Self:
        """Read DIR/manifest.json; a folder without one is a ValueError with the cure, under the field's name."""
        folder = folder if isinstance(folder, Place) else Place(str(folder))
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{field}={folder} is not a shard folder (no {MANIFEST}); make one with jobs/shard.py")
        try:
            tree = json.loads(path.read_bytes())
            if tree["format"] != FORMAT:
                raise ValueError(
                    f"{field}={folder} has shard format {tree['format']}, this version reads {FORMAT}; "
                    "make it again with jobs/shard.py"
                )
            shards = tuple(Shard(**shard) for shard in tree.pop("shards"))
            fields = {name: tree[name] for name in cls.__dataclass_fields__ if name not in ("dir", "shards")}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged; make the folder again with jobs/shard.py") from error
        return cls(dir=folder, shards=shards, **fields)

    def save(self) -> None:
        tree = {"format": FORMAT} | {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("dir", "shards")
        }
        tree["shards"] = [asdict(shard) for shard in self.shards]
        text = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
        (self.dir / MANIFEST).write_bytes(text.encode())

    @property
    def num_samples(self) -> int:
        return self.counts["samples"]

    @cached_property
    def row_images(self) -> NDArray[np.uint16]:
        """(num_samples,) pictures of each row."""
        return self._row_file("row_images")

    @cached_property
    def row_text(self) -> NDArray[np.uint32]:
        """(num_samples,) UTF-8 bytes of each row's turns."""
        return self._row_file("row_text")

    def lengths(self, num_image_tokens: int) -> NDArray[np.int64]:
        """Return an estimate of each row's positions: good for balancing work, not for cutting."""
        return 16 + self.row_text.astype(np.int64) // 4 + self.row_images.astype(np.int64) * num_image_tokens

    @cached_property
    def group_rows(self) -> NDArray[np.int64]:
        """Rows of every row group, in row order over all shards."""
        sizes = [np.empty(0, np.int64)]
        for shard in self.shards:
            groups = np.full(shard.row_groups, self.rows_per_group, np.int64)
            groups[-1] += shard.rows - groups.sum()
            sizes.append(groups)
        return np.concatenate(sizes)

    def _row_file(self, name: str) -> NDArray[Any]:
        place = self.dir / f"{name}.npy"
        if place.remote:
            rows = np.load(io.BytesIO(place.read_bytes()), allow_pickle=False)
        else:
            rows = np.load(place.local, mmap_mode="r", allow_pickle=False)
        if len(rows) != self.num_samples:
            raise ValueError(f"{place} has {len(rows)} rows, the manifest {self.num_samples}; make it again")
        return rows


_WAITS_S = (0.5, 2.0, 5.0)
"""Pauses before a row group that could not be read is read again."""


class ShardReader:
    """Samples by row number over all shards of a folder.

    Reads row groups, checks their checksums, and keeps the last ones: as many as a plan mixes, so that
    walking a plan reads every group once. One reader may serve several threads.
    """

    def __init__(self, folder: Place | Path | str, *, num_files: int = 64, num_groups: int = WINDOW) -> None:
        self.manifest = ShardManifest.load(folder)
        self._ends = np.cumsum([shard.rows for shard in self.manifest.shards])
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._num_files = num_files
        self._num_groups = num_groups
        self._lock = threading.Lock()

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> list[Sample]:
        """Return the samples with these row numbers, in this order."""
        # Row groups one after the other, however the rows are mixed, so that a small cache does not thrash.
        found: dict[int, Sample] = {}
        for index in sorted({int(index) for index in indices}):
            assert 0 <= index < self.manifest.num_samples, f"row {index} of {self.manifest.num_samples}"
            shard = int(np.searchsorted(self._ends, index, side="right"))
            row = index - (int(self._ends[shard - 1]) if shard else 0)
            group, row = divmod(row, self.manifest.rows_per_group)
            found[index] = _sample(self._group(shard, group), row)
        return [found[int(index)] for index in indices]

    def _group(self, shard: int, group: int) -> pa.Table:
        with self._lock:
            table = self._groups.pop((shard, group), None)
            if table is None:
                table = self._read_group(shard, group)
            self._groups[shard, group] = table
            if len(self._groups) > self._num_groups:
                self._groups.popitem(last=False)
            return table

    def _read_group(self, shard: int, group: int) -> pa.Table:
        """Read a row group; a disk or store that fails is asked again before the failure counts."""
        for wait_s in _WAITS_S:
            try:
                return self._file(shard).read_row_group(group, columns=_COLUMNS, use_threads=False)
            except OSError as error:
                log.warning("%s: %s; reading it again", self.manifest.shards[shard].file, error)
                self._files.pop(shard, None)
                time.sleep(wait_s)
        return self._file(shard).read_row_group(group, columns=_COLUMNS, use_threads=False)

    def _file(self, shard: int) -> pq.ParquetFile:
        file = self._files.pop(shard, None)
        if file is None:
            place = self.manifest.dir / self.manifest.shards[shard].file
            path = place.open() if place.remote else place.local
            file = pq.ParquetFile(
                path, memory_map=not place.remote, pre_buffer=place.remote, page_checksum_verification=True
            )
        self._files[shard] = file
        if len(self._files) > self._num_files:
            self._files.popitem(last=False)[1].close()
        return file


def write_parquet(
    path: Path, samples: Iterable[tuple[Sample, dict[str, Any]]], *, rows_per_group: int = GROUP
) -> None:
    """Write one shard of samples and where each came from, a row group at a time.

    What was written before an error stays behind.
    """
    # Pictures are compressed already, and statistics would copy whole pictures into the footer.
    with pq.ParquetWriter(
        path,
        SCHEMA,
        compression=dict.fromkeys(("id", "source", "line", "copy"), "zstd")
        | {"images.list.element": "none"}
        | {f"turns.list.element.{field}": "zstd" for field in ("role", "text")},
        use_dictionary=["source", "turns.list.element.role"],
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        rows: list[dict[str, Any]] = []
        for sample, origin in samples:
            turns = [{"role": turn.role, "text": turn.text} for turn in sample.turns]
            rows.append({"id": sample.id, "images": list(sample.images), "turns": turns} | origin)
            if len(rows) == rows_per_group:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=rows_per_group)
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=rows_per_group)


_COLUMNS = ["id", "images", "turns", "source", "line", "copy"]


def _sample(group: pa.Table, row: int) -> Sample:
    values = {name: group.column(name)[row].as_py() for name in _COLUMNS}
    turns = tuple(Turn(**turn) for turn in values["turns"])
    key = sample_key(values["source"], values["line"], values["copy"])
    return Sample(id=values["id"], turns=turns, images=tuple(values["images"]), key=key)


def sample_key(source: str, line: int, copy: int) -> str:
    """Return what a ledger knows a row by."""
    return f"{source}:{line}#{copy}" if copy else f"{source}:{line}"
