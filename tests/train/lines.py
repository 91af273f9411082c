"""What the rank of test_families.py runs: one little model of every line through training, resuming and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rayllava.checkpoint.lease import Lease
from rayllava.checkpoint.run import Decision, RunManifest, write_decision, write_run
from rayllava.checkpoint.store import decide
from rayllava.families import FAMILIES
from rayllava.model.build import initial, result
from rayllava.model.forward import LossModel, tensors
from rayllava.place import Place
from rayllava.prompt.assemble import assemble
from rayllava.recipe import PromptSpec, SaveSpec
from rayllava.train import loop
from rayllava.train.export import export
from rayllava.train.meter import read_metrics
from tests.model.kinds import model_of
from tests.train.training import batch_of, recipe

CPU = torch.device("cpu")
STEPS = 2
PEAK_TFLOPS = 1e-3


def all_lines(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what `_line` found of every line in the task, by its name."""
    torch.set_num_threads(1)
    return {
        name: _line(Path(task["folder"]) / name, Path(task["tokenizer"]), **given)
        for name, given in task["lines"].items()
    }


def _line(
    folder: Path, tokenizer_dir: Path, *, llm: str, tower: str, zero: int, tuning: dict[str, Any]
) -> dict[str, Any]:
    model = model_of(llm, tower, folder / "parts", tokenizer_dir)
    prompt = PromptSpec(template=FAMILIES[llm].template, max_length=128)
    run_dir = folder / "run"
    processor = assemble(
        llm_dir=Path(model.llm),
        vision_dir=Path(model.vision),
        model=model,
        prompt=prompt,
        out_dir=run_dir / "tokenizer",
    )
    made = recipe(model, zero, tuning=tuning, peak_tflops=PEAK_TFLOPS).but(
        out=str(run_dir), prompt=prompt, save=SaveSpec(every=1)
    )
    made = made.but(optim=made.optim.but(warmup=0))
    manifest = RunManifest(recipe=made, processor=processor, shards_digest="", num_steps=STEPS)
    run = Place(str(run_dir))
    write_run(run, manifest)
    with Lease(run) as lease:
        lines = _run(manifest, decide(run, world_size=1, driver=lease.id))
        again = Decision(attempt=2, checkpoint="step-000001", cursor=1, world_size=1, driver=lease.id)
        write_decision(run, again)
        twice = _run(manifest, again)
    export(run)
    return {
        "losses": [[line["loss"] for line in some] for some in (lines, twice)],
        "metrics": [lines[-1], twice[-1]],
        "norm": float(processor.image_mean[0]),
        "shape": [processor.image_size, processor.num_image_tokens],
        **_compare(run_dir, manifest),
    }


def _run(manifest: RunManifest, decision: Decision) -> list[dict[str, Any]]:
    feed = (
        (
            step,
            0,
            [
                batch_of(list(range(4 * atom + 8 * step, 4 * atom + 8 * step + 4)), atom, manifest.processor)
                for atom in range(2)
            ],
            [],
        )
        for step in range(decision.cursor, STEPS)
    )
    loop.run(manifest, decision, feed, device=CPU, largest=(4, 40, 4))
    return read_metrics(Place(manifest.recipe.out) / "metrics.jsonl")


def _compare(run_dir: Path, manifest: RunManifest) -> dict[str, Any]:
    """Return how far plain transformers is from our forward on what was exported, and that from the beginning."""
    from transformers import LlavaForConditionalGeneration

    trained, _ = result(Place(str(run_dir)))
    loader: Any = LlavaForConditionalGeneration
    plain, report = loader.from_pretrained(run_dir / "export", output_loading_info=True, dtype=torch.float32)
    given = tensors(batch_of([1, 2], 0, manifest.processor), CPU)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (manifest.processor.image_mean, manifest.processor.image_std)
    )
    given.pop("labels")
    mask = (given["positions"] < given["lengths"].unsqueeze(1)).long()
    with torch.no_grad():
        ours = trained.lm_head(LossModel(trained, manifest.processor).eval().hidden(**given))
        before = initial(manifest.recipe, manifest.processor)
        first = before.lm_head(LossModel(before, manifest.processor).eval().hidden(**given))
        theirs = plain.eval()(
            input_ids=given["ids"],
            attention_mask=mask,
            position_ids=given["positions"],
            pixel_values=(given["pixels"].float() / 255 - mean) / std,
        ).logits
    said = mask.bool()
    return {
        "off": float((ours - theirs)[said].abs().max()),
        "moved": float((ours - first)[said].abs().max()),
        "strange": [
            str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]
        ],
        "types": [plain.config.text_config.model_type, plain.config.vision_config.model_type],
        "weights": [type(module).__name__ for module in plain.modules() if "lora" in type(module).__module__],
    }
