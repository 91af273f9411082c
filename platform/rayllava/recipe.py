"""Every knob, as frozen specs with bounds and a sentence each. Read this file second.

recipe = load("tiny.finetune")
recipe = override(recipe, ["data=shards/mix", "optim.lr=1e-5", "scale.workers=1:4"])
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rayllava.spec import Spec
from rayllava.spec import override as override  # recipes are what it is mostly used on


class ModelSpec(Spec):
    """The parts a model is made of: each a folder, an address in a store, or a hub id, owner/name[@revision]."""

    llm: str
    """Language model."""
    vision: str
    """Vision tower."""
    family: str
    """Key of the language model's family, see rayllava.families."""
    vision_feature_layer: int = -2
    """Index into the tower's hidden states, counted from the end (-1 is the last block's output)."""
    vision_feature_select: Literal["default", "full"] = "default"
    """default drops the class token (LLaVA's `patch`), full keeps it (`cls_patch`). A tower without one (SigLIP)
    takes full."""
    image_size: int | None = Field(None, ge=1)
    """Side of the picture in pixels when the tower was made for another: its positions are interpolated."""


class PromptSpec(Spec):
    """How a dialogue becomes tokens and a picture becomes pixels."""

    template: str
    """Name in rayllava.prompt.chat.TEMPLATES."""
    aspect: Literal["pad", "crop"] = "pad"
    """pad: paste onto a square of the mean colour, then resize (LLaVA's `pad`); crop: resize the short side,
    then cut the centre (LLaVA's default in pretraining)."""
    image_at: Literal["front", "written"] = "front"
    """front: the marks of a user turn move to its beginning, as LLaVA and XTuner do; written: they stay."""
    pixels: Literal["exact", "fast"] = "exact"
    """exact: pixels equal the reference processors' to the bit; fast: another JPEG decoder and resampler, which
    miss fewer than one value in a hundred, and those by one or two of 255 levels."""
    max_length: int = Field(2048, ge=8)
    """Most positions of an example, image tokens included."""


class ProcessorSpec(PromptSpec):
    """A PromptSpec with what the chosen tokenizer and tower add: stored in every checkpoint's manifest.

    Training, evaluation and serving read it from there and from nowhere else.
    """

    image_size: int = Field(ge=1)
    """Side of the square picture in pixels."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    num_image_tokens: int = Field(ge=1)
    """Positions one picture takes."""
    image_token_id: int
    pad_token_id: int
    bos_token_id: int | None
    eos_token_id: int
    stop_token_ids: tuple[int, ...]
    """Ids that end an answer."""


class Frozen(Spec):
    """The vision tower stays as it is."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["frozen"] = "frozen"


class TowerLoRA(Spec):
    """Low-rank adapters on the linear layers of the vision tower, in the blocks that its feature layer depends on."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["lora"] = "lora"
    r: int = Field(64, ge=1)
    """Rank."""
    alpha: float = Field(16.0, gt=0)
    """The adapters' product is scaled by alpha / r."""
    dropout: float = Field(0.05, ge=0, lt=1)


class TowerFull(Spec):
    """Every weight of the vision tower that its chosen feature layer depends on."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["full"] = "full"


Tower = Annotated[Frozen | TowerLoRA | TowerFull, Field(discriminator="kind")]


class Projector(Spec):
    """Train the projector; the language model stays as it is (stage 1, "pretraining")."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["projector"] = "projector"
    quant: Literal["none", "nf4"] = "none"
    """How the frozen language model is held."""
    vision: Tower = Frozen()


class Full(Spec):
    """Train the projector and every weight of the language model."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["full"] = "full"
    vision: Tower = Frozen()


class LoRA(Spec):
    """Train the projector and low-rank adapters on the linear layers of the language model, its head apart."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["lora"] = "lora"
    r: int = Field(128, ge=1)
    """Rank."""
    alpha: float = Field(256.0, gt=0)
    """The adapters' product is scaled by alpha / r."""
    dropout: float = Field(0.05, ge=0, lt=1)
    vision: Tower = Frozen()


class QLoRA(LoRA):
    """LoRA on a language model that is held in NF4 with doubly quantized statistics."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    r: int = Field(512, ge=1)


Tuning = Annotated[Projector | Full | LoRA | QLoRA, Field(discriminator="kind")]


class DataSpec(Spec):
    """Which samples make a step."""

    shorthand: ClassVar[str | None] = "shards"

    shards: str = ""
    """Folder that `jobs/shard.py` wrote."""
    epochs: int = Field(1, ge=1)
    global_batch: int = Field(ge=1)
    """Samples an optimizer step averages over, whatever the number of workers."""
    atom: int = Field(16, ge=1)
    """Most samples in one forward pass. Part of what a step computes: never follows the workers."""
    max_tokens: int | None = Field(None, ge=8)
    """Packing: instead of `atom` samples, a forward pass takes one row of examples end to end, at most so many
    positions, none of which sees another example."""
    group: Literal["none", "modality", "length"] = "none"
    """modality: a step has only samples with pictures or only samples without, the longest first, as LLaVA's
    group_by_modality_length; length: and of like lengths, as XTuner's sampler. Left-overs of both share a step."""
    group_window: int = Field(50, ge=1)
    """Steps that are grouped together. More of them group better, and scatter a step's rows wider over the shards."""
    tail: Literal["short", "drop", "repeat"] = "short"
    """The last, incomplete step of an epoch: short, left out, or filled from the epoch's beginning."""
    budget: float = Field(0.001, ge=0, le=1)
    """Largest share of samples that may prove unusable in training before the run fails."""


class OptimSpec(Spec):
    """AdamW with a linear warm-up and a cosine decay to zero, as one of the two upstreams counts them."""

    lr: float = Field(gt=0)
    projector_lr: float | None = Field(None, gt=0)
    """Learning rate of the projector when it differs from `lr`."""
    vision_lr: float | None = Field(None, gt=0)
    """Learning rate of the vision tower, or of its adapters, when it differs from `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.03, ge=0, le=1)
    """Fraction of all steps spent warming up."""
    schedule: Literal["trainer", "mmengine"] = "trainer"
    """trainer: LLaVA's and InternVL's, counted in optimizer steps, from 0 over ceil(warmup * steps) of them.
    mmengine: XTuner's, counted in micro-steps, from 1e-5 of the rate over floor(warmup * micro-steps) of them."""
    micro_steps: int = Field(1, ge=1)
    """Micro-steps in which the recipe's source does a step (its gradient accumulation); mmengine counts them."""
    clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 leaves gradients alone. Not left to DeepSpeed, whose default moved."""


class ScaleSpec(Spec):
    """How many workers share a step. None of this changes what is computed."""

    workers: str = "1"
    """N, or MIN:MAX for an elastic run."""
    zero: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type; masters and moments are float32 always."""
    checkpointing: bool = True
    """Recompute activations in the backward pass."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of a CPU worker; empty leaves torch's choice."""
    decoders: int = Field(2, ge=1)
    """CPUs that Ray Data may use for reading, decoding and encoding."""
    resources: dict[str, float] = {}
    """What a worker asks of Ray beside a GPU, where it has one; empty for one CPU where it has none. A custom
    resource marks the nodes that train."""
    wait_s: float = Field(1800, gt=0)
    """Longest wait for MIN workers, at the start and after a loss."""
    resize_after_s: float = Field(60, ge=0)
    """A group lives so long before it may grow; growing costs a restart."""
    peak_tflops: float | None = Field(None, gt=0)
    """Most 10^12 operations a second of one worker's device, to which the metric `mfu` refers. Empty takes a known
    GPU's for bfloat16 (rayllava.train.flops); where that is unknown too, as on a CPU, `mfu` is null."""
    hang_s: float = Field(600, gt=0)
    """Seconds in one phase of a step after which the ranks that are late are named and the group starts again."""

    @field_validator("workers", mode="before")
    @classmethod
    def _workers(cls, value: Any) -> str:
        low, _, high = str(value).partition(":")
        if not low.isdigit() or not (high or low).isdigit() or not 1 <= int(low) <= int(high or low):
            raise ValueError("give N or MIN:MAX with 1 <= MIN <= MAX")
        return str(value)

    @model_validator(mode="after")
    def _has_masters(self) -> Self:
        if self.zero == 0 and self.dtype != "float32":
            raise ValueError("zero=0 is for float32; with dtype=bfloat16 use zero=1, 2 or 3")
        return self

    @property
    def min_workers(self) -> int:
        return int(self.workers.partition(":")[0])

    @property
    def max_workers(self) -> int:
        return int(self.workers.rpartition(":")[2])


class SaveSpec(Spec):
    """When the run is written down."""

    every: int = Field(500, ge=1)
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: int = Field(2, ge=1)
    """Checkpoints that stay on disk."""


class WatchSpec(Spec):
    """What is looked at while it trains: costs time, changes nothing. Without shards and questions nothing is."""

    every: int = Field(500, ge=1)
    """Optimizer steps between two looks; there is one before the first step and one after the last too."""
    shards: str = ""
    """Folder that `jobs/shard.py` wrote from samples that do not train: their mean loss is taken."""
    samples: int = Field(256, ge=1)
    """Most samples whose loss is taken: the first of `shards`, which lie in random order."""
    questions: tuple[tuple[str, str], ...] = ()
    """[picture, question] pairs to be answered; an empty picture asks without one."""
    shown: int = Field(4, ge=0)
    """Samples of `shards` whose question is answered when `questions` is empty, the right answer beside it."""
    max_new_tokens: int = Field(100, ge=1)
    """Longest answer. Decoding is greedy."""


class Recipe(Spec):
    """Everything that defines a training run."""

    name: str = ""
    model: ModelSpec | None = None
    """Empty when `init_from` says it."""
    prompt: PromptSpec
    tuning: Tuning
    data: DataSpec
    optim: OptimSpec
    scale: ScaleSpec = ScaleSpec()
    save: SaveSpec = SaveSpec()
    watch: WatchSpec = WatchSpec()
    track: tuple[str, ...] = ()
    """Keys of rayllava.train.tracks that the run's numbers go to beside TensorBoard: wandb, mlflow."""
    out: str = ""
    """The run's folder (RUN). The same command run again continues what is there."""
    init_from: str = ""
    """What this run starts from: an earlier run, whose model parts it takes over; a whole model in the Hugging Face
    layout; or a checkpoint of LLaVA or XTuner (`mm_projector.bin`, `iter_N.pth`, their folders), for which `model`
    says the parts that it was trained with."""
    after: str = ""
    """Recipe whose run `init_from` names."""
    fresh: bool = False
    """Start over although `out` already holds a run."""
    seed: int = 42

    @field_validator("track", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.data.atom > self.data.global_batch:
            raise ValueError(
                f"data.atom={self.data.atom} exceeds data.global_batch={self.data.global_batch}; lower it"
            )
        if self.data.max_tokens is not None and self.data.max_tokens < self.prompt.max_length:
            raise ValueError(
                f"data.max_tokens={self.data.max_tokens} is less than prompt.max_length={self.prompt.max_length}, "
                f"the longest example; use at least {self.prompt.max_length}"
            )
        return self


def load(name: str) -> Recipe:
    """Return the recipe `module.function` of rayllava.recipes, or the one that reproduces an upstream file.

    `name` may be a script or config of LLaVA, XTuner or InternVL, with or without its folder and ending; the
    recipe carries its own name. Raises LookupError with what is near, or lists what there is.
    """
    functions = _functions()
    if name not in functions:
        name = import_module("rayllava.recipes._origin").look_up(name, list(functions))
    return functions[name]().but(name=name)


def recipe_names() -> list[str]:
    """Return every `module.function` of rayllava.recipes."""
    return list(_functions())


def _functions() -> dict[str, Callable[[], Recipe]]:
    found = {}
    folder = Path(import_module("rayllava.recipes").__path__[0])
    for stem in sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")):
        module = import_module(f"rayllava.recipes.{stem}")
        for key, value in vars(module).items():
            if callable(value) and not key.startswith("_") and value.__module__ == module.__name__:
                found[f"{stem}.{key}"] = value
    return found
