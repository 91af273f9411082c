"""The loss of a batch is the one that XTuner computes, for models that it trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayllava.families import FAMILIES
from rayllava.model.build import build
from rayllava.model.forward import LossModel, tensors
from rayllava.model.tuning import adapt, merge
from rayllava.prompt.assemble import assemble
from rayllava.prompt.collate import collate
from rayllava.prompt.encode import Processor
from rayllava.recipe import ModelSpec, Projector, PromptSpec, TowerLoRA
from rayllava.records import Sample, Turn

ASSETS = Path(__file__).parents[1] / "assets"
LLM_SCALE = 16 / 4
"""alpha / r of the adapters on the language model."""
TOWER = TowerLoRA(r=8, alpha=16, dropout=0)


def samples(source: Path) -> list[Sample]:
    found = []
    for record in json.loads((source / "data.json").read_text()):
        said = [(s["from"], s["value"]) for s in record["conversations"]]
        turns = tuple(Turn("user" if who == "human" else "assistant", text) for who, text in said)
        images = ((source / record["image"]).read_bytes(),) if "image" in record else ()
        found.append(Sample(record["id"], turns, images))
    return found


def below(trained: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in trained.items() if name.startswith(prefix)}


def write_parts(family: str, folder: Path, trained: dict[str, Tensor]) -> ModelSpec:
    """Write the language model and the tower that the training began with, or replaced as a whole."""
    for part in ("llm", "vision"):
        shutil.copytree(ASSETS / f"xtuner_{family}" / part, folder / part)
    base = folder / "llm" / "model.safetensors"
    if base.exists():  # adapters on InternLM2's own layers, the head among them, folded in by hand
        weights = {name: tensor.float() for name, tensor in load_file(base).items()}
        adapters = below(trained, "llm.base_model.model.")
        for name in [name for name in adapters if ".lora_A." in name]:
            up = adapters[name.replace("lora_A", "lora_B")]
            weights[name.replace("lora_A.default.", "")] += LLM_SCALE * up @ adapters[name]
        save_file(weights, base)
    else:
        save_file(below(trained, "llm."), base)
    if tower := below(trained, "visual_encoder.vision_model."):
        save_file(tower, folder / "vision" / "model.safetensors")
    return ModelSpec(llm=str(folder / "llm"), vision=str(folder / "vision"), family=family)


# What is left of the trained Phi-3 was stored in float16, that of the others as it was trained.
@pytest.mark.parametrize(("family", "bound"), [("llama3", 1e-6), ("internlm2", 1e-6), ("phi3", 5e-5)])
def test_the_loss_of_a_batch_equals_xtuners(family: str, bound: float, tmp_path: Path) -> None:
    source = ASSETS / f"xtuner_{family}"
    trained = load_file(source / "trained.safetensors")
    model = write_parts(family, tmp_path, trained)
    prompt = PromptSpec(template=f"{family}_chat")
    spec = assemble(
        llm_dir=Path(model.llm), vision_dir=Path(model.vision), model=model, prompt=prompt, out_dir=tmp_path / "t"
    )
    llava = build(model, spec, seed=0)
    learned = {
        f"model.multi_modal_projector.linear_{layer // 2 + 1}.{kind}": trained[f"projector.model.{layer}.{kind}"]
        for layer in (0, 2)
        for kind in ("weight", "bias")
    }
    if adapters := below(trained, "visual_encoder.base_model.model.vision_model."):
        names = adapt(llava, Projector(vision=TOWER), FAMILIES[family], seed=0)
        learned |= {f"model.vision_tower.{name}": tensor for name, tensor in adapters.items()}
        # XTuner puts adapters on the last block too, whose output is never used.
        unused = {name for name in learned if ".encoder.layers.2." in name}
        assert learned.keys() - unused == set(names)
        learned = {name: learned[name] for name in names}
    with torch.no_grad():
        for name, tensor in learned.items():
            llava.get_parameter(name).copy_(tensor)
        processor = Processor(spec, tmp_path / "t")
        batch = collate([processor.encode(sample) for sample in samples(source)], pad_token_id=spec.pad_token_id)
        given = tensors(batch, torch.device("cpu"))
        want = json.loads((source / "golden.json").read_text())["batch_loss"]
        loss = float(LossModel(llava, spec)(**given)) / batch.num_targets
        merge(llava)
        folded = float(LossModel(llava, spec)(**given)) / batch.num_targets
    assert abs(loss - want) <= bound * want
    assert folded == pytest.approx(loss, rel=1e-5)
