"""The exact length of every sample, which packing plans with: text tokenised, no picture opened, as Ray tasks."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayllava import copies
from rayllava.data.sharding import tasks
from rayllava.data.shards import ShardManifest
from rayllava.data.stream import NUM_EMPTY
from rayllava.place import Place
from rayllava.progress import Progress
from rayllava.prompt.encode import Processor, SampleError
from rayllava.recipe import ProcessorSpec
from rayllava.records import Sample, Turn


def measure(shards: ShardManifest, processor: ProcessorSpec, tokenizer: Place, place: Place) -> None:
    """Write (num_samples,) positions of every sample to a .npy file, unless it is there.

    The file belongs to these shards and this processor: keep it where they are fixed, in a run's folder.
    """
    if place.exists():
        return
    lengths: dict[int, NDArray[np.int32]] = {}
    with Progress("samples") as progress:
        progress.add("measuring", total=shards.num_samples)
        calls = ((shards, number, processor, tokenizer) for number in range(len(shards.shards)))
        for number, part in tasks(lengths_of, calls):
            lengths[number] = part
            progress.advance("measuring", len(part))
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([lengths[number] for number in sorted(lengths)]))
    place.write_bytes(buffer.getvalue())


def lengths_of(shards: ShardManifest, number: int, spec: ProcessorSpec, tokenizer: Place) -> NDArray[np.int32]:
    """Return the positions of every sample of one shard; the body of a Ray task."""
    processor = Processor(spec, copies.local(tokenizer))
    start = sum(shard.rows for shard in shards.shards[:number])
    lengths: list[int] = []
    place = shards.dir / shards.shards[number].file
    with place.open() as file:
        for rows in pq.ParquetFile(file).iter_batches(batch_size=256, columns=["id", "turns"]):
            for row in rows.to_pylist():
                turns = tuple(Turn(**turn) for turn in row["turns"])
                pictures = (b"",) * int(shards.row_images[start + len(lengths)])
                try:
                    lengths.append(processor.length(Sample(row["id"], turns, pictures)))
                except SampleError:
                    lengths.append(NUM_EMPTY)
    return np.array(lengths, np.int32)
