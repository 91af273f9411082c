"""Where recipes come from: the upstream file that each reproduces, and the data set it was made for.

@reproduces("XTuner", "llava_internlm_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain.py", data="558k")
def pretrain_7b() -> Recipe: ...

recipe.load understands those files' names too.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rayllava.recipe import Recipe

log = logging.getLogger(__name__)

PROJECTS = {
    "LLaVA": "`scripts/v1_5/` of haotian-liu/LLaVA",
    "XTuner": "`xtuner/configs/llava/` of InternLM/xtuner, run with `--deepspeed deepspeed_zero2`",
    "InternVL": "`internvl_chat_llava/scripts_internvl/` of OpenGVLab/InternVL",
}
"""Where the files of each project lie."""

_OLD = "LLaVA 1.0, whose projector is one linear layer"

LEFT_OUT = {
    "scripts/pretrain.sh": f"{_OLD}; 1.5's is scripts/v1_5/pretrain.sh",
    "scripts/finetune.sh": f"{_OLD}; 1.5's is scripts/v1_5/finetune.sh",
    "scripts/finetune_lora.sh": f"{_OLD}; 1.5's is scripts/v1_5/finetune_lora.sh",
    "finetune_qlora.sh": (
        f"{_OLD}, and no model is named; for 1.5 use llava_v15.lora_7b tuning=qlora tuning.r=64 tuning.alpha=16"
    ),
    "pretrain_xformers.sh": f"{_OLD}, and no model is named; 1.5's is scripts/v1_5/pretrain.sh",
    "llava_llama3_70b_instruct_quant_clip_vit_large_p14_336_e1_gpu8_pretrain.py": (
        "it is named for 70B and loads the 8B model, and no second stage follows it; use llama3.pretrain_8b"
    ),
}
"""Upstream files without a recipe, and why."""


@dataclass(frozen=True)
class DataSet:
    """A published mixture; docs/data.md says how to make shards of it."""

    title: str
    num_samples: int
    note: str = ""


DATASETS = {
    "558k": DataSet("LLaVA-PT", 558_128),
    "mix665k": DataSet("LLaVA-Mix", 665_298),
    "sharegpt4v": DataSet(
        "ShareGPT4V-PT",
        1_246_901,
        "a stand-in: XTuner's 9742 iterations mean 1,246,849 to 1,246,976 records, all of which give the same steps",
    ),
    "internvl_sft": DataSet("InternVL-SFT", 1_267_819, "nine files"),
    "mix665k_refcoco": DataSet("LLaVA-Mix with RefCOCO", 805_298, "70,000 boxes to find and 70,000 to name more"),
}
"""By the name of the shard folder in docs/data.md."""


@dataclass(frozen=True)
class Origin:
    """What a recipe reproduces."""

    project: Literal["LLaVA", "XTuner", "InternVL"]
    file: str
    data: str
    """Key of DATASETS; empty where the user brings the data."""
    named: bool
    """Whether `file` is a name of this recipe: LLaVA's scripts are written for 13B, and 7B is a variant of them."""


ORIGINS: dict[str, Origin] = {}
"""By recipe, `module.function`; complete once the modules are imported."""


def reproduces(
    project: Literal["LLaVA", "XTuner", "InternVL"], file: str, *, data: str = "", named: bool = True
) -> Callable[[Callable[[], Recipe]], Callable[[], Recipe]]:
    """Note the origin of a recipe function."""

    def note(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
        ORIGINS[name_of(function)] = Origin(project, file, data, named)
        return function

    return note


def name_of(function: Callable[[], Recipe]) -> str:
    """Return `module.function`."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def look_up(name: str, recipes: list[str]) -> str:
    """Return the one of `recipes` that reproduces an upstream file, named with or without folder and ending.

    Raises LookupError: why there is none, which may be meant, or all there are.
    """
    for file, why in LEFT_OUT.items():
        if f"/{_bare(name)}".endswith(f"/{_bare(file)}"):
            raise LookupError(f"{name} is left out: {why}")
    files = {_bare(origin.file): recipe for recipe, origin in ORIGINS.items() if origin.named}
    stem = _bare(name).rpartition("/")[2]
    if stem in files:
        log.info("%s is %s", name, files[stem])
        return files[stem]
    known = {recipe: recipe for recipe in recipes} | files
    parts = list(dict.fromkeys(recipe for text, recipe in known.items() if stem in text))
    if len(parts) > 1:
        raise LookupError(f"{name!r} may be several recipes; give one of: {', '.join(parts)}")
    near = parts or [known[text] for text in difflib.get_close_matches(stem, known, n=1)]
    hint = f"did you mean {near[0]}? " if near else ""
    raise LookupError(f"no recipe {name!r}; {hint}there are: {', '.join(recipes)}")


def _bare(path: str) -> str:
    return path.removesuffix(".py").removesuffix(".sh")
