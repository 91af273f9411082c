"""A model reference to a local folder: resolved once, on the driver, before any worker starts."""

from __future__ import annotations

from pathlib import Path

from rayllava.checkpoint.parts import check_parts
from rayllava.recipe import ModelSpec


def local_folder(reference: str, field: str) -> Path:
    """Return the folder that `reference` means: itself, or a hub id's snapshot.

    Raises ValueError naming `field` and the folder to give when neither can be had.
    """
    folder = Path(reference)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{field}={reference} has no config.json; give a folder that holds a model")
        return folder.absolute()
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise ValueError(f"{field}={reference} does not exist; give a model folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(reference, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
    except Exception as error:  # the hub client raises a dozen kinds; each means: not here and not there
        raise ValueError(
            f"{field}={reference} is no folder here and the hub gave nothing ({type(error).__name__}); "
            f"offline, download it elsewhere and give its folder: {field}=DIR"
        ) from error
    return Path(found)


def local_parts(model: ModelSpec) -> ModelSpec:
    """Return the spec with every part replaced by its local folder; ValueError when they cannot become a model."""
    model = model.but(
        llm=str(local_folder(model.llm, "model.llm")), vision=str(local_folder(model.vision, "model.vision"))
    )
    check_parts(model)
    return model
