"""InternVL's meta file: the sets of a finetuning mixture, each with its folder.

{"chartqa_train_18k": {"root": "playground/data/chartqa/", "data_augment": false, "repeat_time": 1, "length": 18317,
                       "annotation": "playground/opensource/chartqa_train_18k.jsonl"}, ...}

Absolute paths and addresses stay. A relative one starts from the folder that the meta file lies in or, when there
is nothing, from the current folder, as it does for the scripts that the file was written for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rayllava.data.sources import Portion, Source
from rayllava.data.sources._jsonrows import document
from rayllava.data.sources._mixture import beside
from rayllava.place import Place

FIELDS = ("root", "annotation", "data_augment", "repeat_time", "length")


def portions(annotations: Place) -> list[Portion]:
    """Return a portion for every set of a meta file. Raises ValueError naming the field, the value and the cure."""
    meta = document(annotations)
    if not isinstance(meta, dict) or not meta:
        raise ValueError(f"{annotations} is no meta file; it is an object with an object for every set")
    return [_portion(name, entry, annotations) for name, entry in meta.items()]


PLUG = Source(portions=portions)


def _portion(name: str, entry: Any, meta: Place) -> Portion:
    where = f"{meta}: {name}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no object; it needs {', '.join(FIELDS)}")
    if unknown := sorted(entry.keys() - set(FIELDS)):
        raise ValueError(f"{where} has {unknown[0]}, which means nothing here; there are: {', '.join(FIELDS)}")
    if entry.get("data_augment") not in (None, False):
        raise ValueError(
            f"{where} has data_augment={entry['data_augment']}; pictures are not augmented here, set it to false"
        )
    if not isinstance(annotation := entry.get("annotation"), str) or not annotation:
        raise ValueError(f"{where} has annotation={annotation}; give the path of its JSON lines")
    if not isinstance(root := entry.get("root", ""), str):
        raise ValueError(f"{where} has root={root}; give the folder of its pictures, or leave it out")
    repeat, length = entry.get("repeat_time", 1), entry.get("length")
    if not _counts(repeat) or not isinstance(repeat, int | float):
        raise ValueError(f"{where} has repeat_time={repeat}; give a number above 0, or leave the set out")
    if length is not None and not (_counts(length) and isinstance(length, int)):
        raise ValueError(f"{where} has length={length}; give its number of records, or leave it out")
    return Portion(
        name=name,
        source="llava",
        annotations=_found("annotation", annotation, where, meta),
        images=_found("root", root, where, meta) if root else "",
        repeat=float(repeat),
        num_records=length,
    )


def _counts(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _found(field: str, path: str, where: str, meta: Place) -> str:
    near = beside(meta, path)
    if near.exists():
        return near.text
    here = Place(str(Path(path).absolute()))
    if near.text != path and here.exists():
        return here.text
    raise ValueError(f"{where} has {field}={path}, which is neither beside that file nor in the current folder")
