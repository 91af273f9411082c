"""LLaVAs of five families as XTuner leaves them: every part trained, or adapters on the language model and the tower.

FOLDER/llm  FOLDER/vision        what the training began with
FOLDER/trained                   XTuner's folder
FOLDER/iter_9.pth                the training checkpoint it was made of
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayllava.convert.run import ConvertSpec

ASSETS = Path(__file__).parents[1] / "assets"

FAMILIES = {
    "vicuna": ("llava_v15", "vicuna_v1"),
    "llama3": ("xtuner_llama3", "llama3_chat"),
    "phi3": ("xtuner_phi3", "phi3_chat"),
    "internlm2": ("xtuner_internlm2", "internlm2_chat"),
    "internlm": ("xtuner_internlm2", "internlm_chat"),
}
"""Where a family's tokenizer and config lie, and its template."""

Tuned = Literal["full", "lora"]

_LEAVES = {
    "internlm2": ("wqkv", "wo", "w1", "w2", "w3", "output"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}
_LLAMA_LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CLIP_LEAVES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
RANK, ALPHA = 4, 8


def make(folder: Path, family: str, tuned: Tuned) -> Path:
    """Write all of it with random weights and return the folder."""
    torch.manual_seed(len(family) + len(tuned))
    asset = ASSETS / FAMILIES[family][0]
    llm, tower = _base(asset, folder, family), _tower(asset, folder)
    whole: dict[str, Tensor] = {
        "projector.model.0.weight": torch.randn(48 if family != "vicuna" else 64, 32) * 0.2,
        "projector.model.2.weight": torch.randn(*[48 if family != "vicuna" else 64] * 2) * 0.2,
    }
    for layer in (0, 2):
        whole[f"projector.model.{layer}.bias"] = torch.randn(len(whole[f"projector.model.{layer}.weight"])) * 0.2
    if tuned == "full":
        whole |= {f"llm.{name}": (tensor + torch.randn_like(tensor) * 0.05) for name, tensor in llm.items()}
        whole |= {f"visual_encoder.{name}": t + torch.randn_like(t) * 0.05 for name, t in tower.items()}
    else:
        leaves = _LEAVES.get(family, _LLAMA_LEAVES)
        whole |= _adapters("llm.base_model.model.", llm, leaves)
        whole |= _adapters("visual_encoder.base_model.model.", tower, _CLIP_LEAVES)
    _write_pth(folder / "iter_9.pth", whole)
    _write_folder(folder / "trained", folder / "llm", folder / "vision", whole, tuned)
    return folder


def asked(folder: Path, family: str, tuned: Tuned, *, pth: bool = False, **more: Any) -> ConvertSpec:
    """Return what has to be said of the checkpoint beside its path."""
    given = {"base": str(folder / "llm"), "vision_tower": str(folder / "vision")}
    needed = given if pth or tuned == "lora" else {}
    return ConvertSpec(template=FAMILIES[family][1], family=family, **needed, **more)


def _base(asset: Path, folder: Path, family: str) -> dict[str, Tensor]:
    """Write the language model that a training began with; return its tensors, biases and norms random too."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    shutil.copytree(asset / "llm", folder / "llm", ignore=shutil.ignore_patterns("*.safetensors"))
    words = json.loads((folder / "llm" / "config.json").read_text())
    if family == "internlm2":
        tensors = load_file(asset / "llm" / "model.safetensors")
    elif family == "internlm":
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        words = {key: words[key] for key in kept} | {"max_position_embeddings": 512, "rms_norm_eps": 1e-6}
        tensors = LlamaForCausalLM(LlamaConfig(**words, attention_bias=True)).state_dict()
        words |= {"model_type": "internlm", "bias": True, "rotary": {"base": 10000, "type": "origin"}}
        (folder / "llm" / "config.json").write_text(json.dumps(words))
    else:
        tensors = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "llm")).state_dict()
    tensors = {name: (t.float() + torch.randn(t.shape) * 0.05).half() for name, t in tensors.items()}
    save_file(tensors, folder / "llm" / "model.safetensors", metadata={"format": "pt"})
    return tensors


def _tower(asset: Path, folder: Path) -> dict[str, Tensor]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shutil.copytree(asset / "vision", folder / "vision", ignore=shutil.ignore_patterns("*.safetensors"))
    made = CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder / "vision")).state_dict()
    tensors = {
        f"vision_model.{name.removeprefix('vision_model.')}": t + torch.randn_like(t) * 0.05
        for name, t in made.items()
        if t.is_floating_point()
    }
    save_file(tensors, folder / "vision" / "model.safetensors", metadata={"format": "pt"})
    return tensors


def _adapters(prefix: str, base: dict[str, Tensor], leaves: tuple[str, ...]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in base.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in leaves and name.endswith(".weight"):
            rows, columns = tensor.shape
            found[f"{prefix}{module}.lora_A.default.weight"] = torch.randn(RANK, columns) * 0.1
            found[f"{prefix}{module}.lora_B.default.weight"] = torch.randn(rows, RANK) * 0.1
    assert found, f"nothing in {list(base)[:9]} is called {leaves}"
    return found


def _write_pth(path: Path, whole: dict[str, Tensor]) -> None:
    cfg = f"model = dict(llm_lora=dict(lora_alpha={ALPHA}, r={RANK}), visual_encoder_lora=dict(lora_alpha={ALPHA}))"
    torch.save({"meta": {"cfg": cfg}, "state_dict": whole}, path)


def _write_folder(folder: Path, llm: Path, vision: Path, whole: dict[str, Tensor], tuned: Tuned) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in whole.items() if name.startswith(prefix)}

    (folder / "projector").mkdir(parents=True)
    words = {"model_type": "projector", "depth": 2, "hidden_act": "gelu", "bias": True}
    (folder / "projector" / "config.json").write_text(json.dumps(words))
    save_file(part("projector."), folder / "projector" / "model.safetensors")
    if tuned == "full":
        shutil.copytree(llm, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(part("llm."), folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copytree(vision, folder / "visual_encoder", ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(part("visual_encoder."), folder / "visual_encoder" / "model.safetensors", metadata={"format": "pt"})
        return
    for name, prefix in (("llm_adapter", "llm."), ("visual_encoder_adapter", "visual_encoder.")):
        (folder / name).mkdir()
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        adapters = {key.replace(".default", ""): tensor for key, tensor in part(prefix).items()}
        save_file(adapters, folder / name / "adapter_model.safetensors")
