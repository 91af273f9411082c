"""What an exported model is: manifest.json in its folder, beside the files of its layout.

Training writes it; evaluation, serving and conversion read the prompt path from it and from nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from rayllava import copies, durable
from rayllava.place import Place
from rayllava.recipe import ProcessorSpec
from rayllava.spec import Spec


class ModelManifest(Spec):
    """How a model is asked, and where it comes from."""

    format: Literal[1] = 1
    kind: Literal["model"] = "model"
    layout: str = "hf"
    """Key in rayllava.checkpoint.layouts."""
    processor: ProcessorSpec
    """With which the model is asked; its template differs from the training run's where that was `plain`."""
    family: str
    """Key in rayllava.families, of the language model."""
    source: str
    """The run or folder that the model was made from."""
    parts: dict[str, str] = {}
    """What its language model (llm) and tower (vision) are called where they come from: hub ids, where known."""
    num_own_rows: int | None = None
    """Rows of the vocabulary that the language model came with; empty in manifests from before this was said."""
    proved: bool | None = None
    """Whether a conversion proved that this is the model it was made from; empty for what training wrote."""
    recipe: dict[str, Any] | None = None
    """Of the run that trained it; empty for a model that came from elsewhere."""
    step: int | None = None
    """Optimizer steps of that run."""
    files: dict[str, str] = {}
    """Name to digest of every file with tensors."""
    created: str = ""
    versions: dict[str, str] = {}
    """Of the packages that wrote it."""


class SourceSpec(Spec):
    """What a person says of a checkpoint that has no manifest of ours."""

    template: str | None = None
    """Prompt template that the model was trained with, a name in rayllava.prompt.chat.TEMPLATES."""
    aspect: Literal["pad", "crop"] | None = None
    """What happens to pictures that are not square; empty: what the checkpoint's own files say."""
    family: str | None = None
    """Of the language model; empty: the one that goes with the template."""
    base: str = ""
    """Language model that a checkpoint of adapters, or of a projector, was trained from: a folder or a hub id."""
    vision_tower: str = ""
    """Tower that it was trained with, unless the checkpoint names one that is here."""


def read_model_manifest(folder: Path, *, field: str = "MODEL") -> ModelManifest:
    """Return the manifest of an exported model; ValueError when the folder is none."""
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise ValueError(f"{field}={folder} is no folder; give one that holds a model, such as RUN/export")
    try:
        text = path.read_text()
    except FileNotFoundError:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{field}={folder} holds no model; give RUN/export or a model's folder") from None
        raise ValueError(
            f"{field}={folder} has no manifest.json; give RUN/export, or make one with "
            f"jobs/convert.py {folder} DST --to hf template=NAME"
        ) from None
    if '"kind": "run"' in text:
        raise ValueError(f"{field}={folder} is a run without an export yet; run its training command again")
    try:
        return ModelManifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{field}={folder}: manifest.json is no model's of this version ({where})") from error


def export_dir(folder: Path) -> Path:
    """Return the model's folder that `folder` means: RUN/export of a training run, else itself."""
    inner = folder / "export"
    return inner if (inner / "config.json").is_file() and not (folder / "config.json").is_file() else folder


def local_model(reference: str, *, field: str = "MODEL") -> Path:
    """Return the folder of the model that a person names: RUN, RUN/export or a model's folder, as `export_dir`.

    One in a store is copied once a node (rayllava.copies); ValueError when there is none.
    """
    place = Place(reference)
    if not place.remote:
        return export_dir(place.local)
    for folder in (place, place / "export"):
        if (folder / "config.json").is_file():
            return copies.local(folder)
    raise ValueError(f"{field}={place} holds no model; give one that does, or a run that is finished")


def write_model_manifest(folder: Path, manifest: ModelManifest) -> None:
    durable.write_text(folder / "manifest.json", manifest.model_dump_json(indent=1) + "\n")
