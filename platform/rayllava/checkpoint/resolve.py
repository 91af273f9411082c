"""The parts of a model by what a person calls them, on whichever node they are needed.

a folder      on a disk that all nodes share, or alike on each
owner/name    on the hub, or owner/name@revision
s3://...      a folder in a store
   --pinned---> what a run's manifest says: the same on every node, and for every later driver
   --folder---> this node's folder, fetched there once
   --digests--> of its configuration and weights, which a run's manifest says too
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rayllava import copies
from rayllava.checkpoint import hub
from rayllava.checkpoint.parts import check_parts
from rayllava.checkpoint.weights import weight_files
from rayllava.place import Place
from rayllava.recipe import ModelSpec

PARTS = ("llm", "vision")
"""Fields of a ModelSpec that name one."""


def pinned(model: ModelSpec, *, before: ModelSpec | None = None) -> ModelSpec:
    """Return the spec with every part named for good: an absolute path, an address, or owner/name@COMMIT.

    `before` is that of the run which is continued: a hub id without a revision keeps its commit. Raises ValueError
    naming the field when a part is not there, or when they cannot become a model.
    """
    known = {name: getattr(before, name, "") for name in PARTS}
    model = model.but(**{name: pin(getattr(model, name), f"model.{name}", known[name]) for name in PARTS})
    local = here(model)
    try:
        check_parts(local)
    except ValueError as error:  # which speaks of this node's folders
        said = str(error)
        for name in PARTS:
            said = said.replace(getattr(local, name), str(Place(getattr(model, name))))
        raise ValueError(said) from error
    return model


def here(model: ModelSpec) -> ModelSpec:
    """Return a pinned spec with every part replaced by its folder on this node; ValueError when one cannot be had."""
    folders = {}
    for name in PARTS:
        reference = getattr(model, name)
        try:
            found = folder(reference)
        except OSError as error:
            raise ValueError(
                f"model.{name}={Place(reference)} cannot be read ({error}); check the name and your access"
            ) from error
        if not (found / "config.json").is_file():
            raise ValueError(f"model.{name}={Place(reference)} has no config.json; give a folder that holds a model")
        folders[name] = str(found)
    return model.but(**folders)


def folder(reference: str) -> Path:
    """Return the folder of a pinned part on this node; OSError when it cannot be fetched."""
    place = Place(reference)
    if place.remote:
        return copies.local(place, keep=hub.wanted)
    named = None if place.is_dir() else hub.parse(reference)
    if named is None:
        return place.local
    found = hub.cached(*named)
    return found if found and _whole(found) else hub.fetched(*named)


def digests(reference: str, *, field: str) -> dict[str, str]:
    """Return the digest of every file that a module is built from, by its name; each is read once a node."""
    at = folder(reference)
    files = [at / "config.json", *weight_files(at, field=field), *sorted(at.glob("*.index.json"))]
    return copies.digests(at, [path.name for path in files])


def check(model: ModelSpec, expected: Mapping[str, Mapping[str, str]]) -> None:
    """Fetch the parts of a run to this node; ValueError when one is not what it was when the run began.

    `expected` are the digests in the run's manifest, by part and file.
    """
    for name, known in expected.items():
        reference = getattr(model, name)
        found = digests(reference, field=f"model.{name}")
        changed = [file for file in sorted(found.keys() | known.keys()) if found.get(file) != known.get(file)]
        if changed:
            raise ValueError(
                f"model.{name}={Place(reference)} changed since the run began: {', '.join(changed)}; "
                "give it back, or start a new run"
            )


def _whole(at: Path) -> bool:
    try:
        return (at / "config.json").is_file() and all(path.is_file() for path in weight_files(at, field=""))
    except ValueError:
        return False


def pin(reference: str, field: str, known: str = "") -> str:
    """Return what a person calls a part, named for good; ValueError, naming `field`, when it is not there."""
    if Place(reference).remote:
        return reference
    if Path(reference).is_dir():
        return str(Path(reference).absolute())
    named = None if reference.startswith((".", "/", "~")) else hub.parse(reference)
    if named is None:
        raise ValueError(f"{field}={reference} does not exist; give a model folder or a hub id (owner/name)")
    id_, revision = named
    if known.startswith(f"{id_}@") and revision in ("", known.removeprefix(f"{id_}@")):
        return known
    try:
        return f"{id_}@{hub.commit_of(id_, revision)}"
    except LookupError as error:
        raise ValueError(
            f"{field}={reference} is no folder here and {error.args[0]}; "
            f"offline, download it elsewhere and give its folder: {field}=DIR"
        ) from error
