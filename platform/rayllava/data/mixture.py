"""What is to be sharded: one annotation file, a folder of them, or a mixture of portions.

Mixture.of   SOURCE ANNOTATIONS -> portions -> files
peek         the first records of every portion: mistakes are found before a cluster is used
copies       how often each record counts, where a portion draws some of its records
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from rayllava import durable
from rayllava.data.ingest import Policy, check, settle
from rayllava.data.order import permutation
from rayllava.data.sources import SOURCES, Portion, Record, records
from rayllava.data.spill import Copies, File, Job, count
from rayllava.place import Place

_PEEKED = 256
_END = 1 << 20


@dataclass(frozen=True)
class Mixture:
    """Portions and their files, in the order in which they were named."""

    portions: tuple[Portion, ...]
    files: tuple[File, ...]

    @classmethod
    def of(cls, source: str, annotations: Place, *, images: str = "") -> Self:
        """Return what SOURCE and ANNOTATIONS name. Raises LookupError or ValueError with the cure."""
        plug = SOURCES[source]
        if plug.portions is None:
            portions = [Portion(annotations.name, source, annotations.text, images)]
        elif images:
            raise ValueError(f"images={images} is for one set of annotations; a {source} file names its own folders")
        else:
            portions = plug.portions(annotations)
        files = []
        for number, portion in enumerate(portions):
            if portion.images and not (root := Place(portion.images)).remote and not root.is_dir():
                of = f" of {portion.name}" if plug.portions else ""
                raise ValueError(
                    f"images={root}{of} is not a folder; give the one that the records' paths start from"
                )
            files += [File(number, place, name) for place, name in _files(portion)]
        return cls(tuple(portions), tuple(files))

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, each as often as its portion counts it."""
        return math.ceil(sum(file.place.size() * self.portions[file.portion].repeat for file in self.files))

    def facts(self) -> list[dict[str, Any]]:
        """Return what decides the records: portions with a digest of their files, wherever these lie."""
        facts = []
        for number, portion in enumerate(self.portions):
            files = [[file.source, _identity(file.place, portion)] for file in self.files if file.portion == number]
            shown = {"annotations": str(Place(portion.annotations)), "images": str(Place(portion.images))}
            facts.append(asdict(portion) | shown | {"digest": durable.digest_of(files)})
        return facts

    def peek(self, policy: Policy) -> float:
        """Look at the first records of every portion and return how many bytes of a file make one, roughly.

        Raises ValueError for what would fail the whole job.
        """
        num_bytes, num_records = 0, 0
        for portion, files in itertools.groupby(self.files, key=lambda file: self.portions[file.portion]):
            file = next(files)
            peeked = list(itertools.islice(records(portion.source, file.place), _PEEKED))
            for record in peeked:
                self._check(record, file, portion, policy)
            num_records += len(peeked)
            num_bytes += sum(map(_num_bytes, peeked)) if len(peeked) == _PEEKED else file.place.size()
        if not num_records:
            raise ValueError(f"annotations={self.files[0].place} holds no record")
        return num_bytes / num_records

    def _check(self, record: Record, file: File, portion: Portion, policy: Policy) -> None:
        name = f"record {record.line} of {file.source} (id {record.id!r})"
        if not portion.images and any(isinstance(image, str) for image in record.images):
            raise ValueError(f"images is not set but {name} has a picture; add images=DIR")
        if policy == "fail" and (reason := check(settle(record)[0])):
            raise ValueError(f"{name}: {reason}; mend it, or leave such records out with policy=skip")


def copies(job: Job) -> dict[int, Copies]:
    """Return, for the files of portions that draw, how often each of their records counts; counts them with Ray."""
    import ray

    drawing = [number for number, file in enumerate(job.files) if _draws(job.portions[file.portion])]
    task = ray.remote(num_cpus=1, max_retries=10)(count)
    refs = [task.remote(job.files[n], job.portions[job.files[n].portion].source) for n in drawing]
    sizes = dict(zip(drawing, ray.get(refs), strict=True))
    drawn: dict[int, Copies] = {}
    for portion, group in itertools.groupby(drawing, key=lambda n: job.files[n].portion):
        numbers = list(group)
        times = _times(job.portions[portion], sum(sizes[n] for n in numbers), seed=job.spec.seed, number=portion)
        cuts = np.cumsum([sizes[n] for n in numbers])[:-1]
        drawn |= dict(zip(numbers, np.split(times, cuts), strict=True))
    return drawn


def _draws(portion: Portion) -> bool:
    return portion.most is not None or portion.repeat != int(portion.repeat)


def _times(portion: Portion, num_records: int, *, seed: int, number: int) -> Copies:
    """Return (num_records,) copies of each: whole copies of those kept, one more of a fraction of these."""
    kept = permutation(num_records, seed, number)[: portion.most]
    whole, part = divmod(portion.repeat, 1)
    times = np.zeros(num_records, np.uint16)
    times[kept] = int(whole)
    times[kept[: round(part * len(kept))]] += 1
    return times


def _files(portion: Portion) -> list[tuple[Place, str]]:
    place, plug = Place(portion.annotations), SOURCES[portion.source]
    if plug.suffixes and place.is_dir():
        found = place.files(plug.suffixes)
        if not found:
            ends = ", ".join(plug.suffixes)
            raise ValueError(f"annotations={place} holds no file for source {portion.source} ({ends})")
        return [(file, f"{portion.name}/{str(file).removeprefix(str(place)).lstrip('/')}") for file in found]
    if not place.is_file():
        raise ValueError(f"annotations={place} is not a file; give the annotation file itself")
    return [(place, portion.name)]


def _identity(place: Place, portion: Portion) -> str:
    """Return a digest of a file of text; of one that holds pictures, of its size and both its ends."""
    if not SOURCES[portion.source].suffixes:
        with place.open() as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    size = place.size()
    with place.open() as file:
        head = file.read(_END)
        file.seek(max(0, size - _END))
        return f"{size}:{durable.digest_bytes(head + file.read(_END))}"


def _num_bytes(record: Record) -> int:
    """Return about how many bytes a record takes in its file."""
    text = sum(len(turn.text) + 40 for turn in record.turns)
    return 60 + text + sum(len(image) for image in record.images)
