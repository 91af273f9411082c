"""README.md of a converted model: what it is made of, how it was trained, how it is asked.

In the shape of the model cards of LLaVA's line. What no manifest says is left open, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayllava.checkpoint.layouts import StoredModel
from rayllava.checkpoint.manifest import ModelManifest
from rayllava.checkpoint.run import read_run
from rayllava.place import Place

_OPEN = "not stated"
_LIBRARY = {"hf": "transformers", "llava": "llava", "xtuner": "xtuner", "gguf": "llama.cpp"}

_THEIR_NAMES = {
    "llava": {"vicuna_v1": "vicuna_v1", "llava_v1": "llava_v1", "mpt": "mpt", "llava_llama_2": "llava_llama_2"},
    "xtuner": {
        "vicuna": "vicuna",
        "vicuna_v1": "vicuna",
        **{name: name for name in ("internlm_chat", "internlm2_chat", "llama3_chat", "phi3_chat", "qwen_chat")},
    },
}
"""What LLaVA's and XTuner's programs call our templates, where they know them."""

_TRANSFORMERS = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("DIR", dtype="auto")
processor = AutoProcessor.from_pretrained("DIR")
dialogue = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
words = processor.apply_chat_template(dialogue, add_generation_prompt=True)
given = processor(text=words, images=[Image.open("cat.jpg")], return_tensors="pt").to(model.dtype)
print(processor.decode(model.generate(**given, max_new_tokens=100)[0], skip_special_tokens=True))
```"""


def card(manifest: ModelManifest, stored: StoredModel, name: str) -> str:
    """Return the README.md of a model in a folder called `name`."""
    stages = _stages(manifest)
    names = sorted({stage["data"] for stage in stages.values() if stage["data"] != _OPEN})
    head = {"pipeline_tag": "image-text-to-text", "library_name": _LIBRARY[manifest.layout]}
    lines = ["---", *([f"datasets: {json.dumps(names)}"] if names else [])]
    lines += [*(f"{key}: {value}" for key, value in head.items()), "---", ""]
    return (
        "\n".join(lines)
        + "\n\n".join(
            [
                f"# {name}",
                f"## Model\n\n{_model(manifest, stored)}",
                f"## Details\n\n{_details(manifest, stored, stages)}",
                "## Results\n\nNone are stated. `jobs/evaluate.py` measures them, and names the profile of each.",
                f"## Quickstart\n\n{_quickstart(manifest)}",
                f"## Reproduce\n\n{_reproduce(manifest)}",
                "## Citation\n\nCite what this model is built on by its authors' own entries: LLaVA (Liu et al., "
                '"Visual Instruction Tuning", 2023), and the language model, tower and datasets named above.',
            ]
        )
        + "\n"
    )


def _model(manifest: ModelManifest, stored: StoredModel) -> str:
    parts = _parts(manifest)
    text = stored.config.text_config
    step = f", after {manifest.step} steps" if manifest.step else ""
    return (
        f"A LLaVA of {parts['llm']} (family {manifest.family}, {text.num_hidden_layers} layers of "
        f"{text.hidden_size}) and {parts['vision']}, made from `{manifest.source}`{step}. It is asked in the "
        f"template `{manifest.processor.template}`."
    )


def _details(manifest: ModelManifest, stored: StoredModel, stages: Mapping[str, dict[str, str]]) -> str:
    projector = sum(name.startswith("model.multi_modal_projector.") for name in stored.weights) // 2
    row = {
        "Model": Path(manifest.source.rstrip("/")).name,
        "Visual Encoder": _parts(manifest)["vision"],
        "Projector": f"MLP of {projector} layers",
        "Resolution": str(manifest.processor.image_size),
    }
    for title, key in (("Strategy", "strategy"), ("Dataset", "data"), ("Epochs", "epochs")):
        row |= {f"{stage} {title}": stages[stage][key] for stage in ("Pretraining", "Fine-tuning")}
    ruler = "|".join("---" for _ in row)
    return f"| {' | '.join(row)} |\n|{ruler}|\n| {' | '.join(row.values())} |"


def _stages(manifest: ModelManifest) -> dict[str, dict[str, str]]:
    """Return strategy, dataset and epochs of both stages, as far as a recipe says them."""
    nothing = dict.fromkeys(("strategy", "data", "epochs"), _OPEN)
    found = {"Pretraining": nothing, "Fine-tuning": nothing}
    recipe = manifest.recipe
    if recipe is None:
        return found
    found["Pretraining" if recipe["tuning"]["kind"] == "projector" else "Fine-tuning"] = _stage(recipe)
    if found["Pretraining"] is nothing and recipe.get("init_from"):
        try:
            before = read_run(Place(recipe["init_from"])).recipe.model_dump(mode="json")
        except (ValueError, OSError):  # it is gone, or no run
            return found
        found["Pretraining"] = _stage(before)
    return found


def _stage(recipe: Mapping[str, Any]) -> dict[str, str]:
    kinds = {"full": "full", "lora": "LoRA", "qlora": "QLoRA", "frozen": "frozen", "projector": "frozen"}
    tuning = recipe["tuning"]
    strategy = f"LLM {kinds[tuning['kind']]}, ViT {kinds[tuning['vision']['kind']]}"
    data = recipe["data"]
    return {"strategy": strategy, "data": Path(data["shards"]).name or _OPEN, "epochs": str(data["epochs"])}


def _parts(manifest: ModelManifest) -> dict[str, str]:
    said = (manifest.recipe or {}).get("model") or {}
    parts = {part: manifest.parts.get(part) or said.get(part) or _OPEN for part in ("llm", "vision")}
    return {part: name if name == _OPEN else f"`{name.partition('@')[0]}`" for part, name in parts.items()}


def _quickstart(manifest: ModelManifest) -> str:
    """Return how the model is asked: by its layout's own programs, where they know its template, and by ours."""
    name = _THEIR_NAMES.get(manifest.layout, {}).get(manifest.processor.template)
    told = []
    if manifest.layout == "hf":
        told = [_TRANSFORMERS]
    elif manifest.layout == "llava" and name:
        told = [f"```\npython -m llava.serve.cli --model-path DIR --image-file cat.jpg --conv-mode {name}\n```"]
        told += [
            "Its loader wants `llava` in the folder's name, and looks for `vision_tower` from where it is started."
        ]
    elif manifest.layout == "xtuner" and name:
        told = [f"```\nxtuner chat DIR --llava DIR --prompt-template {name} --image cat.jpg\n```"]
    elif manifest.layout == "gguf":
        llm, mmproj = manifest.files
        told = [f'```\nllama-mtmd-cli -m DIR/{llm} --mmproj DIR/{mmproj} --image cat.jpg -p "What is this?"\n```']
        told += ["With Ollama: `ollama create NAME -f` the Modelfile, where there is one beside this card."]
    return "\n\n".join([*told, "```\npython jobs/chat.py DIR --image cat.jpg\n```"])


def _reproduce(manifest: ModelManifest) -> str:
    made = ", ".join(f"{name} {number}" for name, number in sorted(manifest.versions.items()))
    if manifest.recipe is None:
        return f"Converted by RayLLaVA from `{manifest.source}` ({made}); how it was trained is not stated there."
    text = json.dumps(manifest.recipe, indent=1, ensure_ascii=False)
    return f"Trained by RayLLaVA ({made}) by this recipe:\n\n```json\n{text}\n```"
