"""Every knob, as frozen specs with bounds and a sentence each. Read this file second.

recipe = load("tiny.finetune")
recipe = override(recipe, ["data=shards/mix", "optim.lr=1e-5", "scale.workers=1:4"])
"""

from __future__ import annotations

import difflib
import json
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

S = TypeVar("S", bound="Spec")


class Spec(BaseModel):
    """A frozen group of knobs; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shorthand: ClassVar[str | None] = None
    """The field that `name=value` means when `name` is the whole spec."""

    def but(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return type(self).model_validate({**dict(self), **changes})


class ModelSpec(Spec):
    """The parts a model is made of. A part is a local folder or a hub id."""

    llm: str
    """Language model."""
    vision: str
    """Vision tower."""
    family: str
    """Key of the language model's family, see rayllava.families."""
    vision_feature_layer: int = -2
    """Index into the tower's hidden states, counted from the end (-1 is the last block's output)."""
    vision_feature_select: Literal["default", "full"] = "default"
    """default drops the class token (LLaVA's `patch`), full keeps it (`cls_patch`)."""


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


class Projector(Spec):
    """Train the projector only (stage 1, "pretraining")."""

    kind: Literal["projector"] = "projector"


class Full(Spec):
    """Train the projector and every weight of the language model; the tower stays frozen."""

    kind: Literal["full"] = "full"


Tuning = Annotated[Projector | Full, Field(discriminator="kind")]


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
    """AdamW with a linear warm-up and a cosine decay to zero."""

    lr: float = Field(gt=0)
    projector_lr: float | None = Field(None, gt=0)
    """Learning rate of the projector when it differs from `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.03, ge=0, le=1)
    """Fraction of all steps spent warming up, rounded up to whole steps."""
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
    out: str = ""
    """The run's folder (RUN). The same command run again continues what is there."""
    init_from: str = ""
    """A run whose weights, and model parts, this one starts from."""
    fresh: bool = False
    """Start over although `out` already holds a run."""
    seed: int = 42

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
    """Return the recipe `module.function` of rayllava.recipes.

    Raises LookupError that lists what there is.
    """
    module_name, _, function_name = name.partition(".")
    if module_name in recipe_modules() and function_name.isidentifier() and not function_name.startswith("_"):
        function = getattr(import_module(f"rayllava.recipes.{module_name}"), function_name, None)
        if callable(function) and getattr(function, "__module__", "") == f"rayllava.recipes.{module_name}":
            return function().but(name=name)
    names = recipe_names()
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise LookupError(f"no recipe {name!r}; {hint}there are: {', '.join(names)}")


def recipe_modules() -> list[str]:
    folder = Path(import_module("rayllava.recipes").__path__[0])
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def recipe_names() -> list[str]:
    """Return every `module.function` of rayllava.recipes."""
    names = []
    for module_name in recipe_modules():
        module = import_module(f"rayllava.recipes.{module_name}")
        for key, value in vars(module).items():
            if callable(value) and not key.startswith("_") and value.__module__ == module.__name__:
                names.append(f"{module_name}.{key}")
    return names


def override(spec: S, words: list[str]) -> S:
    """Return a recipe, or any other spec, with `field.path=value` words applied, left to right.

    Raises ValueError naming the field, the value and what would be right.
    """
    tree = spec.model_dump()
    values: dict[str, str] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise ValueError(f"{word!r} is not field.path=value")
        path = _put(type(spec), tree, path, text)
        values[path] = text
    try:
        return type(spec).model_validate(tree)
    except ValidationError as error:
        raise ValueError(_one_line(error, values)) from error


def _put(spec: Any, tree: dict[str, Any], path: str, text: str) -> str:
    """Set a leaf of the tree and return its full path."""
    branch = tree
    *parents, leaf = path.split(".")
    for depth, key in enumerate(parents):
        spec = _spec_of(spec, key, ".".join(parents[: depth + 1]), branch)
        if not _is_spec(spec):
            raise ValueError(f"{path}={text}: {'.'.join(parents[: depth + 1])} has no fields of its own")
        if branch.get(key) is None:
            branch[key] = {}
        branch = branch[key]
    field = _spec_of(spec, leaf, path, branch)
    if _is_spec(field):
        inner = field.shorthand
        if inner is None:
            some = f"{path}.{next(iter(field.model_fields))}"
            raise ValueError(f"{path}={text}: {path} is a group of fields; set one of them, as in {some}=...")
        branch = branch[leaf]
        leaf, path = inner, f"{path}.{inner}"
    branch[leaf] = _value(text)
    return path


def _spec_of(spec: Any, key: str, path: str, branch: dict[str, Any]) -> Any:
    """Return the type of a field: a Spec class for a group, anything else for a leaf."""
    fields = spec.model_fields
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown field {path}; {hint}there are: {', '.join(fields)}")
    kind = fields[key].annotation
    options = [option for option in getattr(kind, "__args__", (kind,)) if _is_spec(option)]
    if len(options) > 1:  # a union of specs: the one that the tree holds now
        return next(o for o in options if o.model_fields["kind"].default == branch[key]["kind"])
    return options[0] if options else kind


def _is_spec(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Spec)


def _value(text: str) -> Any:
    """Read numbers, booleans, null and lists as JSON; anything else is the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _one_line(error: ValidationError, values: dict[str, str]) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"] if part not in ("projector", "full"))
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{path}={values.get(path, first['input'])}: {message}" if path else message
