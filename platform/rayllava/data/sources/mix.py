"""A mixture of our own: which annotations, how often each, and where their pictures lie.

{"portions": [{"name": "mix", "source": "llava", "annotations": "mix665k.json", "images": "llava_images"},
              {"name": "refer", "source": "refcoco", "annotations": "train.json", "images": "llava_images",
               "most": 70000},
              {"name": "charts", "source": "parquet", "annotations": "chartqa", "repeat": 2}]}

Relative paths start from the folder that the mixture lies in.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError

from rayllava.data.sources import SOURCES, Portion, Source
from rayllava.data.sources._jsonrows import document
from rayllava.data.sources._mixture import beside
from rayllava.place import Place
from rayllava.spec import Spec

_Name = Annotated[str, Field(min_length=1)]


class PortionSpec(Spec):
    """What stands in the file of one portion; see `Portion`."""

    name: _Name
    source: _Name
    annotations: _Name
    images: str = ""
    repeat: float = Field(1.0, gt=0, allow_inf_nan=False)
    most: int | None = Field(None, ge=1)
    num_records: int | None = Field(None, ge=1)


class MixSpec(Spec):
    """The whole file."""

    portions: list[PortionSpec] = Field(min_length=1)


def portions(annotations: Place) -> list[Portion]:
    """Return the portions of a mixture file. Raises ValueError naming the field, the value and the cure."""
    try:
        specs = MixSpec.model_validate(document(annotations)).portions
    except ValidationError as error:
        raise ValueError(f"{annotations}: {_one_line(error)}") from error
    found: list[Portion] = []
    for spec in specs:
        where = f"{annotations}: portion {spec.name!r}"
        if spec.name in [portion.name for portion in found]:
            raise ValueError(f"{where} stands there twice; give each a name of its own")
        if spec.source not in SOURCES:
            raise ValueError(f"{where} has source={spec.source}; there are: {', '.join(SOURCES)}")
        if SOURCES[spec.source].portions:
            raise ValueError(
                f"{where} has source={spec.source}, a mixture itself; list its portions here in its stead"
            )
        paths = {"annotations": beside(annotations, spec.annotations).text}
        if spec.images:
            paths["images"] = beside(annotations, spec.images).text
        found.append(Portion(**dict(spec) | paths))
    return found


PLUG = Source(portions=portions)


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"])) or "the file"
    if first["type"] == "extra_forbidden":
        known = MixSpec.model_fields if len(first["loc"]) == 1 else PortionSpec.model_fields
        return f"unknown field {path}; there are: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{path} is missing; add it"
    value = str(first["input"])
    return f"{path}={value if len(value) < 60 else value[:60] + '...'}: {first['msg'][0].lower()}{first['msg'][1:]}"
