"""Spec -> module: the parts of a model put together as transformers' LlavaForConditionalGeneration.

language model folder   -+
vision tower folder     -+-> LlavaForConditionalGeneration, its projector new (seeded)
[other's checkpoint]    ---> what it holds laid over it, see rayllava.model.foreign
[earlier runs]          ---> what each trained laid over it, adapters folded in, oldest run first
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rayllava.checkpoint import resolve
from rayllava.checkpoint.run import Origin, RunManifest, read_run
from rayllava.checkpoint.store import Store, read_checkpoint
from rayllava.families import FAMILIES
from rayllava.model.foreign import Outline, check_fits, lay_found
from rayllava.model.parts import language_model, llm_config, tower_config, vision_tower
from rayllava.model.tuning import adapt, merge
from rayllava.place import Place
from rayllava.recipe import ModelSpec, ProcessorSpec, Recipe


def build(model: ModelSpec, processor: ProcessorSpec, *, seed: int) -> Any:
    """Return the float32 model on the CPU with a new projector drawn from `seed`.

    Rows that the tokenizer gained (`<image>`, `<pad>`) are drawn around the mean of the old rows; the table is
    padded to a multiple of 64, as the published Hugging Face checkpoints are.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    llm = language_model(resolve.folder(model.llm), family=model.family)
    tower = vision_tower(resolve.folder(model.vision), size=processor.image_size)
    num_own = llm.get_input_embeddings().weight.shape[0]
    rows = _rows(processor)
    if rows > num_own:
        torch.manual_seed(seed)
        llm.resize_token_embeddings(rows, pad_to_multiple_of=64)
    llava = empty(model, processor, llm.config, tower.config)
    llava.model.language_model = llm.model
    llava.lm_head = llm.lm_head
    llava.model.vision_tower = tower
    llava.model.multi_modal_projector = _projector(llava.model.multi_modal_projector, seed)
    llava.num_own_rows = num_own  # of the head: the loss looks at no others
    return llava.eval()


def outline(model: ModelSpec, processor: ProcessorSpec) -> Outline:
    """Return the shapes of the model that `build` would return, from the parts' configs alone."""
    llm = llm_config(Path(model.llm), family=model.family)
    tower = tower_config(Path(model.vision), size=processor.image_size)
    num_own = llm.vocab_size
    llm.vocab_size = padded_rows(processor, num_own)
    llava = empty(model, processor, llm, tower)
    shapes = {name: tuple(tensor.shape) for name, tensor in llava.state_dict().items()}
    return Outline(shapes, num_own, llm.tie_word_embeddings)


def check_start(origin: Origin, model: ModelSpec, processor: ProcessorSpec) -> None:
    """Raise ValueError, in one line, unless the checkpoint of another project fits a run's model."""
    check_fits(origin, model, outline(model, processor))


def _rows(processor: ProcessorSpec) -> int:
    """Return how many rows the tables need at least."""
    return max(processor.image_token_id, processor.pad_token_id) + 1


def padded_rows(processor: ProcessorSpec, num_own: int) -> int:
    """Return how many rows the tables of a language model with `num_own` rows have in a LLaVA."""
    rows = _rows(processor)
    return num_own if rows <= num_own else -(-rows // 64) * 64


def empty(model: ModelSpec, processor: ProcessorSpec, llm: Any, tower: Any) -> Any:
    """Return the model of two configs without memory for its weights."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config: Any = LlavaConfig(
        vision_config=tower,
        text_config=llm,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.num_image_tokens,
        vision_feature_layer=model.vision_feature_layer,
        vision_feature_select_strategy=model.vision_feature_select,
        projector_hidden_act="gelu",
        tie_word_embeddings=llm.tie_word_embeddings,
    )
    config.pad_token_id = processor.pad_token_id
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def lay_over(llava: nn.Module, checkpoint_dir: Path) -> list[str]:
    """Copy the trained parameters of a checkpoint into the model and return their names."""
    parameters = dict(llava.named_parameters())
    names = []
    with torch.no_grad():
        for name, tensor in read_tensors(checkpoint_dir, "param/"):
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ValueError(f"init_from: {checkpoint_dir} holds {name} {tuple(tensor.shape)}, not this model's")
            parameters[name].copy_(tensor)
            names.append(name)
    return names


def read_tensors(checkpoint_dir: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint whose stored name starts with `prefix`, without it, one at a time."""
    for name in sorted(read_checkpoint(Place(str(checkpoint_dir))).files):
        with safe_open(checkpoint_dir / name, framework="pt") as file:
            keys = file.keys()
            for key in keys:
                if key.startswith(prefix):
                    yield key.removeprefix(prefix), file.get_tensor(key)


def initial(recipe: Recipe, processor: ProcessorSpec, *, origin: Origin | None = None) -> Any:
    """Return the model a run starts from: its parts, and the result of all that `init_from` leads back to.

    `origin` is the run's own, where its `init_from` is no run.
    """
    assert recipe.model is not None, "resolved recipes name their model parts"
    llava = build(recipe.model, processor, seed=recipe.seed)
    runs, origin = ancestry(recipe, origin)
    if origin:
        lay_found(llava, origin, resolve.here(recipe.model))
    for run in runs:
        absorb(llava, read_run(run, field="init_from").recipe, final_checkpoint(run))
    return llava


def absorb(llava: Any, recipe: Recipe, checkpoint_dir: Path) -> None:
    """Make what a run trained a part of the float model: weights are replaced, adapters folded in.

    That holds for QLoRA too: its adapters go onto the weights that were rounded for its training, not onto their
    rounded copies.
    """
    assert recipe.model is not None
    names = adapt(llava, recipe.tuning, FAMILIES[recipe.model.family], seed=recipe.seed)
    laid = lay_over(llava, checkpoint_dir)
    assert sorted(laid) == names, f"{checkpoint_dir} holds {len(laid)} tensors, its run trained {len(names)}"
    merge(llava)
    llava.requires_grad_(False)


def ancestry(recipe: Recipe, origin: Origin | None) -> tuple[list[Place], Origin | None]:
    """Return the runs that `init_from` leads back to, the oldest first, and what that one's `init_from` is if no run.

    `origin` is the recipe's own. What a start is was decided when its run began; a run that is gone is an error.
    """
    runs: list[Place] = []
    while recipe.init_from and origin is None:
        runs.insert(0, Place(recipe.init_from))
        before = read_run(runs[0], field="init_from")
        recipe, origin = before.recipe, before.origin
    return runs, origin


def final_checkpoint(run: Place) -> Path:
    """Return a local folder with a finished run's last checkpoint; ValueError when it is unfinished or damaged."""
    manifest = read_run(run, field="init_from")
    found = Store(run).latest()
    step = found.manifest.step if found else 0
    if found is None or step != manifest.num_steps:
        raise ValueError(
            f"init_from={run} has done {step} of its {manifest.num_steps} steps; run its command again first"
        )
    return Store(run).fetch(found.name)


def result(run: Place) -> tuple[Any, RunManifest]:
    """Return the model that a finished run trained, float32 on the CPU, and the run's manifest."""
    manifest = read_run(run)
    assert manifest.recipe.model is not None, "resolved recipes name their model parts"
    resolve.check(manifest.recipe.model, manifest.parts)
    llava = initial(manifest.recipe, manifest.processor, origin=manifest.origin)
    absorb(llava, manifest.recipe, final_checkpoint(run))
    return llava, manifest


def _projector(projector: nn.Module, seed: int) -> nn.Module:
    """Give the projector memory and fresh weights: torch's default for linear layers, from a seed of its own."""
    projector = projector.to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return projector
