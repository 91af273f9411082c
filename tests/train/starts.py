"""Second stages of tiny runs that start from checkpoints of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayllava import recipe as recipes
from rayllava.checkpoint.run import RunManifest
from rayllava.model.build import initial
from rayllava.recipe import ModelSpec, Recipe

ASSETS = Path(__file__).parents[1] / "assets"
LLAVA, INTERNLM2, LLAMA3 = ASSETS / "llava_v15", ASSETS / "xtuner_internlm2", ASSETS / "xtuner_llama3"
HF = ASSETS / "hf_llava_448" / "model"

VICUNA = ModelSpec(llm=str(LLAVA / "llm"), vision=str(LLAVA / "vision"), family="vicuna")
INTERN = ModelSpec(llm=str(INTERNLM2 / "llm"), vision=str(INTERNLM2 / "vision"), family="internlm2")


def stage2(init_from: Path, shards: Path, out: Path, model: ModelSpec | None = None, *more: str) -> Recipe:
    made = recipes.override(
        recipes.load("tiny.finetune"), [f"data={shards}", f"out={out}", f"init_from={init_from}", *more]
    )
    return made.but(model=model, data=made.data.but(global_batch=10, atom=2))


def start(manifest: RunManifest) -> Any:
    return initial(manifest.recipe, manifest.processor, origin=manifest.origin)
