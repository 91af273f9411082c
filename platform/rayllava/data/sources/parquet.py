"""Parquet tables as data sets on the Hugging Face hub have them: a row is a dialogue or a caption.

image: struct<bytes, path> | binary | path       or images: a list of these
conversations | messages | texts                 or caption | text, with a picture
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayllava.data.sources import Record, Source
from rayllava.data.sources._dialogue import TALKS, caption_of, id_of, record_of
from rayllava.data.sources._file import head
from rayllava.place import Place

ROWS = 16
"""Rows in memory at once."""

PICTURES = ("image", "images")
CAPTIONS = ("caption", "text")


def read(annotations: Place) -> Iterator[Record]:
    """Yield a record for every row, reading a few rows at a time."""
    if not head(annotations, kind="parquet").startswith(b"PAR1"):
        raise ValueError(f"annotations={annotations} is no parquet file; give one, or download it again")
    with annotations.open() as file:
        try:
            # Buffered: a row group of pictures may be gigabytes.
            table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            columns = _columns(table.schema_arrow.names, annotations)
            line = 0
            for batch in table.iter_batches(batch_size=ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    line += 1
                    yield _record(line, row)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and (annotations.remote or error.errno is not None):
                raise
            what = str(error).partition("\n")[0]
            raise ValueError(
                f"annotations={annotations} is a broken parquet file ({what}); download it again"
            ) from error


PLUG = Source(read=read, suffixes=(".parquet",))


def _columns(names: list[str], annotations: Place) -> list[str]:
    """Return the columns to read; ValueError when they make no record."""
    picture, talk, caption = ([name for name in known if name in names][:1] for known in (PICTURES, TALKS, CAPTIONS))
    if not talk and not (picture and caption):
        raise ValueError(
            f"annotations={annotations} has columns {', '.join(names)}; expected are {', '.join(TALKS)}, "
            f"or {' or '.join(PICTURES)} with {' or '.join(CAPTIONS)}: rename them"
        )
    return [*(["id"] if "id" in names else []), *picture, *(talk or caption)]


def _record(line: int, row: dict[str, Any]) -> Record:
    id_ = id_of(line, row)
    pictures = next((row[name] for name in PICTURES if name in row), None)
    images: list[str | bytes] = []
    for picture in pictures if isinstance(pictures, list) else [] if pictures is None else [pictures]:
        content = picture.get("bytes") or picture.get("path") if isinstance(picture, dict) else picture
        if not content or not isinstance(content, str | bytes):
            return Record(line=line, id=id_, fault=f"image {len(images) + 1} is no picture and no path")
        images.append(content)
    if len({type(image) for image in images}) > 1:
        return Record(line=line, id=id_, fault="some of its images are pictures, some are paths")
    caption = next((name for name in CAPTIONS if name in row), None)
    return record_of(line, row, images=images) if caption is None else caption_of(line, id_, row[caption], images)
