"""A LLaVA whose matrices have rows of 256 numbers, as blocks of llama.cpp's K-quants want them."""

from __future__ import annotations

from pathlib import Path

from rayllava.checkpoint.layouts import StoredModel, write
from rayllava.checkpoint.manifest import ModelManifest
from tests.generate.llava import tiny_llava
from tests.tiny import make_parts, processor_spec


def wide_llava(folder: Path) -> Path:
    """Write it in the Hugging Face layout and return the folder."""
    parts = make_parts(folder.parent / "parts")
    made = tiny_llava(hidden_size=256, intermediate_size=512)
    manifest = ModelManifest(processor=processor_spec(max_length=512), family="vicuna", source="wide")
    write("hf", folder, StoredModel.of(made, Path(parts.llm), num_own_rows=330), manifest)
    return folder
