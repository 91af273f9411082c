"""LLaVA's conversation JSON, as an array or one object a line; ShareGPT4V and InternVL write the same.

{"id": 7, "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
                                                   {"from": "gpt", "value": "A dog."}]}
"""

from __future__ import annotations

from collections.abc import Iterator

from rayllava.data.sources import Record, Source
from rayllava.data.sources._dialogue import record_of
from rayllava.data.sources._jsonrows import rows
from rayllava.place import Place


def read(annotations: Place) -> Iterator[Record]:
    """Yield the records of a JSON array or of JSON lines."""
    for line, row in rows(annotations):
        yield record_of(line, row)


PLUG = Source(read=read)
