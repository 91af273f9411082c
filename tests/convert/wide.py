"""A LLaVA whose matrices have rows of 256 numbers, as blocks of llama.cpp's K-quants want them."""

from __future__ import annotations

from pathlib import Path

from rayllava.checkpoint.layouts import StoredModel, write
from rayllava.checkpoint.manifest import read_model_manifest
from rayllava.convert.run import ConvertSpec, convert
from tests.convert.sources import ASSETS
from tests.generate.llava import tiny_llava


def wide_llava(folder: Path) -> Path:
    """Write it in the Hugging Face layout, with the tokenizer of a published one, and return the folder."""
    narrow = folder.parent / "narrow"
    spec = ConvertSpec(template="vicuna_v1", proof=False)
    convert(ASSETS / "hf_llava_437" / "model", narrow, to="hf", spec=spec)
    manifest = read_model_manifest(narrow)
    processor = manifest.processor.but(image_size=28, num_image_tokens=4)
    made = tiny_llava(hidden_size=256, intermediate_size=512, vocab_size=576)
    made.config.image_token_id, made.config.pad_token_id = processor.image_token_id, processor.pad_token_id
    stored = StoredModel.of(made, narrow, num_own_rows=512)
    write("hf", folder, stored, manifest.but(processor=processor, source="wide"))
    return folder
