"""Print docs/recipes.md: `python -m rayllava.recipes > docs/recipes.md`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import groupby

from rayllava.recipe import ModelSpec, Recipe, Tuning, load, recipe_names
from rayllava.recipes._origin import DATASETS, LEFT_OUT, ORIGINS, PROJECTS, Origin

_INTRO = """\
# Recipes

`python -m rayllava.recipes > docs/recipes.md` writes this page; a test compares it with the recipes.

A training job takes a name from a table's first column, or the name of the upstream file in its last one, with or
without its folder and its ending:

    python jobs/finetune.py llava_v15.finetune_13b data=shards/mix665k init_from=runs/pretrain out=runs/finetune
    python jobs/finetune.py scripts/v1_5/finetune.sh data=shards/mix665k init_from=runs/pretrain out=runs/finetune

LLaVA's scripts are written for 13B, so their names mean the 13B recipes. A recipe that starts from another one needs
`init_from`, the folder of that one's run, and takes the model over from it. `init_from` may also be a checkpoint of
LLaVA (`mm_projector.bin`, a folder with adapters, a whole model) or of XTuner (`iter_N.pth`, the folder made of it):
then add `model.llm=DIR model.vision=DIR model.family=NAME`. A whole model in the Hugging Face layout brings its own.

- **batch** is samples in a forward pass × micro-steps × GPUs. Other `scale.workers` compute the same.
- **schedule** says whose: the Trainer counts optimizer steps, mmengine micro-steps (`optim.schedule`). All warm up
  over 3 % of them and decay to 0 along half a cosine.
- **steps** are optimizer steps on the data set named. XTuner fills an incomplete last step from the epoch's
  beginning; LLaVA and InternVL do it short, and InternVL's v1_2 and v1_5 leave it out in stage 1.
- All use AdamW, betas 0.9 and 0.999, no weight decay. XTuner clips gradients at norm 1; the others did not clip when
  their models were trained (`optim.clip`).
- All save every 500 optimizer steps (`save.every`). Upstream's intervals count micro-steps, or are longer than the
  run.
- XTuner trains under its chat template in both stages; LLaVA and InternVL caption in `plain` first. Pictures are
  cropped in stage 1 and padded in stage 2.
"""


def page() -> str:
    """Return the whole page, Markdown."""
    return "\n".join([_INTRO, *_lines(), *_data_sets(), *_left_out()])


def num_steps(recipe: Recipe, num_samples: int) -> int:
    """Return the optimizer steps that a recipe takes over so many samples."""
    whole, rest = divmod(num_samples, recipe.data.global_batch)
    return recipe.data.epochs * (whole + (rest > 0 and recipe.data.tail != "drop"))


def _lines() -> Iterator[str]:
    published = [name for name in recipe_names() if name in ORIGINS]
    for module, names in groupby(published, key=lambda name: name.partition(".")[0]):
        doc = import_module(f"rayllava.recipes.{module}").__doc__
        assert doc is not None, module
        yield f"## {module}\n"
        yield doc.partition("\n")[0] + "\n"
        head = "recipe | starts from | model | data | tuning | batch | lr | schedule | epochs | steps | upstream"
        yield from _table(head.split(" | "), (_cells(name, load(name), ORIGINS[name]) for name in names))
        yield ""


def _cells(name: str, recipe: Recipe, origin: Origin) -> list[str]:
    data = DATASETS.get(origin.data)
    batch, optim = recipe.data.global_batch, recipe.optim
    gpus = recipe.scale.workers
    rate = _number(optim.lr) + (f", projector {_number(optim.projector_lr)}" if optim.projector_lr else "")
    return [
        f"`{name}`",
        f"`{recipe.after}`" if recipe.after else "",
        _model(_first(recipe)),
        data.title if data else "yours",
        _tuning(recipe.tuning),
        f"{recipe.data.atom} × {optim.micro_steps} × {gpus} = {batch}",
        rate,
        optim.schedule,
        str(recipe.data.epochs),
        str(num_steps(recipe, data.num_samples)) if data else f"N / {batch}",
        f"{origin.project} `{origin.file}`",
    ]


def _first(recipe: Recipe) -> ModelSpec:
    """Return the model of the run that a recipe leads back to."""
    while recipe.model is None:
        recipe = load(recipe.after)
    return recipe.model


def _model(model: ModelSpec) -> str:
    llm, vision = (part.rpartition("/")[2] for part in (model.llm, model.vision))
    return f"{llm}, {vision}" + (f" at {model.image_size}" if model.image_size else "")


def _tuning(tuning: Tuning) -> str:
    said = {"projector": "projector", "full": "full", "lora": "LoRA", "qlora": "QLoRA"}[tuning.kind]
    if tuning.kind == "projector" and tuning.quant != "none":
        said += f" under {tuning.quant.upper()}"
    if tuning.kind == "lora" or tuning.kind == "qlora":
        said += f" {tuning.r}/{tuning.alpha:g}"
    tower = tuning.vision
    if tower.kind == "lora":
        said += f", tower LoRA {tower.r}/{tower.alpha:g}"
    return said + (", tower full" if tower.kind == "full" else "")


def _number(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def _data_sets() -> Iterator[str]:
    yield "## Data sets\n"
    yield "[data.md](data.md) says where they come from and how to make shards of them.\n"
    rows = ([f"`shards/{key}`", d.title, f"{d.num_samples:,}", d.note] for key, d in DATASETS.items())
    yield from _table(["shards", "title", "records", "note"], rows)
    yield ""


def _left_out() -> Iterator[str]:
    yield "## Where the upstream files are\n"
    yield from (f"- {project}: {place}" for project, place in PROJECTS.items())
    yield "\nLeft out:\n"
    yield from (f"- `{file}`: {why}" for file, why in LEFT_OUT.items())
    yield ""


def _table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    print(page(), end="")
