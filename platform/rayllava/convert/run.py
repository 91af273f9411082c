"""SRC --read--> StoredModel --write--> DST --prove--> DST/proof.json"""

from __future__ import annotations

import logging
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from rayllava import durable
from rayllava.checkpoint import resolve
from rayllava.checkpoint.layouts import LAYOUTS, Own, StoredModel, cannot_read, detect, writable
from rayllava.checkpoint.manifest import ModelManifest, local_model, read_model_manifest
from rayllava.checkpoint.parts import read_llm_config
from rayllava.convert import prove
from rayllava.families import FAMILIES
from rayllava.generate.load import dtype_of
from rayllava.model.compose import compose
from rayllava.prompt.assemble import assemble
from rayllava.prompt.chat import TEMPLATES
from rayllava.recipe import ModelSpec, ProcessorSpec, PromptSpec
from rayllava.spec import Spec

log = logging.getLogger(__name__)


class ConvertSpec(Spec):
    """What a folder without manifest.json does not say of itself, and what shall be different."""

    template: str | None = None
    """Prompt template that the model was trained with, a name in rayllava.prompt.chat.TEMPLATES."""
    aspect: Literal["pad", "crop"] | None = None
    """What happens to pictures that are not square; empty: what the folder's own files say."""
    family: str | None = None
    """Of the language model; empty: the one that goes with the template."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the written tensors; empty: as they are."""
    base: str = ""
    """Language model that a checkpoint of adapters, or of a projector, was trained from: a folder or a hub id."""
    vision_tower: str = ""
    """Tower that it was trained with, unless the checkpoint names one that is here."""


def convert(src: Path | str, dst: Path, *, to: str, spec: ConvertSpec | None = None) -> dict[str, Any]:
    """Write the model in `src` to `dst` in another layout and return the proof, which dst/proof.json holds too.

    The proof's `proved` says whether `dst` may be relied on.
    """
    begin = time.perf_counter()
    spec = spec or ConvertSpec()
    if to not in writable():
        raise ValueError(f"to={to} cannot be written yet; there is: {', '.join(writable())}")
    src = local_model(str(src), field="SRC")
    layout = detect(src, field="SRC")
    _check_free(dst, src)
    with tempfile.TemporaryDirectory(prefix="rayllava-") as scratch:
        stored, manifest = _source(src, layout, spec, tokenizer_dir=Path(scratch))
        wanted = stored.cast(dtype_of(spec.dtype)) if spec.dtype else stored
        manifest = LAYOUTS[to].write(dst, wanted, manifest)
        proof = _prove(stored, wanted, dst, manifest)
    proof |= {"from": layout, "to": to, "seconds": round(time.perf_counter() - begin, 2)}
    durable.write_json(dst / "proof.json", proof)
    return proof


def _source(src: Path, layout: str, spec: ConvertSpec, *, tokenizer_dir: Path) -> tuple[StoredModel, ModelManifest]:
    """Return the model in `src` and how it is asked; the tokenizer of one that has parts goes to `tokenizer_dir`."""
    if LAYOUTS[layout].read is not cannot_read:
        stored = LAYOUTS[layout].read(src)
        return stored, _manifest(src, layout, stored, spec)
    template = _template(src, spec)
    own, found = LAYOUTS[layout].own(src), LAYOUTS[layout].open(src, field="SRC")
    family = spec.family or _family(template)
    model = ModelSpec(
        llm=str(_llm(src, own, spec)),
        vision=str(_vision(src, own, spec)),
        family=family,
        vision_feature_layer=own.layer,
        vision_feature_select=own.select,
    )
    words = own.words or read_llm_config(Path(model.llm), family=family)
    length = words.get("max_position_embeddings", PromptSpec.model_fields["max_length"].default)
    prompt = PromptSpec(template=template, aspect=spec.aspect or own.aspect, max_length=length)
    processor = assemble(
        llm_dir=Path(model.llm), vision_dir=Path(model.vision), model=model, prompt=prompt, out_dir=tokenizer_dir
    )
    stored = compose(found, own, model, processor, tokenizer_dir, exact=spec.dtype is not None, said=f"SRC={src}")
    return stored, _fresh(src, processor, family)


def _llm(src: Path, own: Own, spec: ConvertSpec) -> Path:
    if own.llm and spec.base:
        raise ValueError(f"SRC={src} holds its language model whole; leave --base out")
    if own.llm:
        return own.llm
    if not spec.base:
        raise ValueError(f"SRC={src} holds no language model of its own; add --base DIR, what it was trained from")
    return _part(spec.base, "--base")


def _vision(src: Path, own: Own, spec: ConvertSpec) -> Path:
    if own.vision and spec.vision_tower:
        raise ValueError(f"SRC={src} holds its vision tower whole; leave --vision-tower out")
    if own.vision:
        return own.vision
    if spec.vision_tower:
        return _part(spec.vision_tower, "--vision-tower")
    if not own.tower:
        raise ValueError(
            f"SRC={src} does not name its vision tower; add --vision-tower DIR, what it was trained with"
        )
    beside = src.parent / own.tower
    try:
        return beside if (beside / "config.json").is_file() else _part(own.tower, "--vision-tower")
    except ValueError as error:
        raise ValueError(f"SRC={src} names a vision tower that is not here: {error}") from error


def _part(reference: str, flag: str) -> Path:
    try:
        found = resolve.folder(reference)
    except (OSError, LookupError) as error:
        raise ValueError(f"{flag}={reference} cannot be had ({error}); give its folder: {flag} DIR") from error
    if not (found / "config.json").is_file():
        raise ValueError(f"{flag}={reference} has no config.json; give a folder that holds a model")
    return found


def _manifest(src: Path, layout: str, stored: StoredModel, spec: ConvertSpec) -> ModelManifest:
    """Return the manifest of the folder, or make one from its files and what the person says."""
    if (src / "manifest.json").is_file():
        manifest = read_model_manifest(src, field="SRC")
        changes = spec.model_dump(include={"template", "aspect"}, exclude_none=True)
        return manifest.but(processor=manifest.processor.but(**changes), family=spec.family or manifest.family)
    template = _template(src, spec)
    processor = LAYOUTS[layout].describe(src, stored, template=template, aspect=spec.aspect)
    return _fresh(src, processor, spec.family or _family(template))


def _template(src: Path, spec: ConvertSpec) -> str:
    names = ", ".join(TEMPLATES)
    if spec.template is None:
        raise ValueError(f"SRC={src} does not say how its model is asked; add template=NAME, one of: {names}")
    if spec.template not in TEMPLATES:
        raise ValueError(f"template={spec.template} is none of: {names}")
    return spec.template


def _fresh(src: Path, processor: ProcessorSpec, family: str) -> ModelManifest:
    return ModelManifest(
        processor=processor,
        family=family,
        source=src.name,
        versions={name: version(name) for name in ("torch", "transformers", "safetensors")},
    )


def _family(template: str) -> str:
    for key, family in FAMILIES.items():
        if family.template == template:
            return key
    raise ValueError(f"template={template} belongs to no family; add family=NAME, one of: {', '.join(FAMILIES)}")


def _prove(stored: StoredModel, wanted: StoredModel, dst: Path, manifest: ModelManifest) -> dict[str, Any]:
    written = LAYOUTS[manifest.layout].read(dst)
    proof = prove.compare_tensors(wanted, written)
    ours = prove.our_side(stored, manifest.processor)
    prompts = prove.compare_logits(ours, prove.plain_side(dst), prove.fixed_prompts())
    share = prove.BOUNDS[torch.float32 if wanted is stored else wanted.dtype]
    for row in prompts.values():
        row["bound"] = share * max(row["max_abs_logit"], 1.0)
        row["proved"] = row["max_abs_logit_diff"] <= row["bound"] and row["max_abs_pixel_diff"] <= 1e-6
    proof["prompts"] = prompts
    proof["max_abs_logit_diff"] = {name: row["max_abs_logit_diff"] for name, row in prompts.items()}
    proof["bounds"] = {name: row.pop("bound") for name, row in prompts.items()}
    proof["dtype"] = str(wanted.dtype).removeprefix("torch.")
    proof["proved"] = proof["bit_equal"] and all(row["proved"] for row in prompts.values())
    return proof


def _check_free(dst: Path, src: Path) -> None:
    """Raise ValueError when writing `dst` would destroy something that is no earlier conversion."""
    if dst.resolve() == src.resolve() or dst.resolve() in src.resolve().parents:
        raise ValueError(f"DST={dst} would overwrite SRC={src}; give another folder")
    if dst.is_dir() and any(dst.iterdir()) and not (dst / "proof.json").is_file():
        raise ValueError(f"DST={dst} is not empty and no earlier conversion; give another folder")
    durable.check_writable(dst.parent)
