"""A checkpoint of any layout -> the whole model in it, and how it is asked.

    a folder of ours, or of the Hugging Face layout    read as it is
    any other layout                                   put together of its parts, see rayllava.model.compose

What no file says, a person does: the template, and the folders of parts that were not trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rayllava.checkpoint import hub, resolve
from rayllava.checkpoint.layouts import LAYOUTS, Found, Own, StoredModel, cannot_read, detect
from rayllava.checkpoint.manifest import ModelManifest, SourceSpec, read_model_manifest
from rayllava.checkpoint.parts import read_llm_config
from rayllava.families import FAMILIES
from rayllava.model.compose import check_whole, compose
from rayllava.prompt.assemble import assemble
from rayllava.prompt.chat import TEMPLATES, template_of
from rayllava.recipe import ModelSpec, ProcessorSpec, PromptSpec


@dataclass(frozen=True)
class Source:
    """A whole model, wherever its parts lie."""

    layout: str
    stored: StoredModel
    manifest: ModelManifest
    found: Found | None = None
    """What the checkpoint itself holds, where the model was put together of parts."""


def open_source(path: Path, spec: SourceSpec, *, scratch: Path, field: str = "SRC", exact: bool = False) -> Source:
    """Return the model that a folder or file holds; no tensor is read yet.

    The tokenizer of one that is put together lies in `scratch`, an empty folder that must stay while the model is
    used. Weights that adapters are added to are float32 if they are to be `exact`. Raises ValueError, naming `field`
    or the flag, when something is missing or does not fit.
    """
    layout = detect(path, field=field)
    said = _said(path, spec, field=field)
    if LAYOUTS[layout].read is not cannot_read:
        for name, value in (("--base", spec.base), ("--vision-tower", spec.vision_tower)):
            if value:
                raise ValueError(f"{field}={path} is a whole model; leave {name} out")
        stored = LAYOUTS[layout].read(path)
        check_whole(stored, said=f"{field}={path}")
        manifest = said or _described(path, layout, stored, spec, field=field)
        if said is None or spec.template:
            manifest = manifest.but(processor=_stopping(manifest.processor, manifest.family, stored))
        return Source(layout, stored, manifest)
    template = said.processor.template if said else _template(path, spec, field=field)
    family = said.family if said else spec.family or _family(template)
    for name in ("own", "tokenizer"):
        (scratch / name).mkdir()
    own, found = LAYOUTS[layout].own(path, scratch / "own"), LAYOUTS[layout].open(path, field=field)
    model = ModelSpec(
        llm=str(base_folder(path, own, spec, field=field)),
        vision=str(tower_folder(path, own, spec, field=field)),
        family=family,
        image_size=own.image_size,
        vision_feature_layer=own.layer,
        vision_feature_select=own.select,
    )
    words = own.words or read_llm_config(Path(model.llm), family=family)
    kinds = (FAMILIES[family].model_type, FAMILIES[family].remap, "llama")  # which any of them may have become
    if (kind := words.get("model_type")) not in kinds:
        raise ValueError(
            f"{field}={path} holds a language model of type {kind}, which is not of family {family}, the one of "
            f"template={template}; give its own template, or family=NAME"
        )
    length = words.get("max_position_embeddings", PromptSpec.model_fields["max_length"].default)
    aspect = said.processor.aspect if said else spec.aspect or own.aspect
    processor = assemble(
        llm_dir=Path(model.llm),
        vision_dir=Path(model.vision),
        model=model,
        prompt=PromptSpec(template=template, aspect=aspect, max_length=length),
        out_dir=scratch / "tokenizer",
    )
    stored = compose(found, own, model, processor, scratch / "tokenizer", exact=exact, said=f"{field}={path}")
    if said:
        return Source(layout, stored, said.but(processor=processor), found)
    names = {"llm": spec.base, "vision": spec.vision_tower or own.tower}
    parts = {part: name for part, name in names.items() if hub.parse(name) and not Path(name).exists()}
    return Source(layout, stored, _fresh(path, processor, family).but(parts=parts), found)


def _said(path: Path, spec: SourceSpec, *, field: str) -> ModelManifest | None:
    """Return what our manifest.json says, with what a person says instead."""
    if not (path / "manifest.json").is_file():
        return None
    manifest = read_model_manifest(path, field=field)
    if spec.template:
        _template(path, spec, field=field)
    changes = spec.model_dump(include={"template", "aspect"}, exclude_none=True)
    return manifest.but(processor=manifest.processor.but(**changes), family=spec.family or manifest.family)


def base_folder(path: Path, own: Own, spec: SourceSpec, *, field: str) -> Path:
    """Return the folder of a checkpoint's language model: its own, or what a person names."""
    if own.llm and spec.base:
        raise ValueError(f"{field}={path} holds its language model whole; leave --base out")
    if own.llm:
        return own.llm
    if not spec.base:
        raise ValueError(
            f"{field}={path} holds no language model of its own; add --base DIR, what it was trained from"
        )
    return _part(spec.base, "--base")


def tower_folder(path: Path, own: Own, spec: SourceSpec, *, field: str) -> Path:
    """Return the folder of a checkpoint's tower: its own, what a person names, or what the checkpoint does."""
    if own.vision and spec.vision_tower:
        raise ValueError(f"{field}={path} holds its vision tower whole; leave --vision-tower out")
    if own.vision:
        return own.vision
    if spec.vision_tower:
        return _part(spec.vision_tower, "--vision-tower")
    if not own.tower:
        raise ValueError(
            f"{field}={path} does not name its vision tower; add --vision-tower DIR, what it was trained with"
        )
    beside = path.parent / own.tower
    try:
        return beside if (beside / "config.json").is_file() else _part(own.tower, "--vision-tower")
    except ValueError as error:
        raise ValueError(f"{field}={path} names a vision tower that is not here: {error}") from error


def _part(reference: str, flag: str) -> Path:
    try:
        found = resolve.folder(resolve.pin(reference, flag))
    except (OSError, LookupError) as error:
        raise ValueError(f"{flag}={reference} cannot be had ({error}); give its folder: {flag} DIR") from error
    if not (found / "config.json").is_file():
        raise ValueError(f"{flag}={reference} has no config.json; give a folder that holds a model")
    return found


def _described(path: Path, layout: str, stored: StoredModel, spec: SourceSpec, *, field: str) -> ModelManifest:
    """Return the manifest of a folder that has none, from its files and what the person says."""
    template = _template(path, spec, field=field)
    processor = LAYOUTS[layout].describe(path, stored, template=template, aspect=spec.aspect)
    return _fresh(path, processor, spec.family or _family(template))


def _stopping(processor: ProcessorSpec, family: str, stored: StoredModel) -> ProcessorSpec:
    """Return the processor with what ends an answer in its template, beside what the checkpoint's files say.

    What a model says at the end of a turn is not what its tokenizer calls the end: Llama-3, Phi-3.
    """
    from tokenizers import Tokenizer

    path = stored.tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{stored.tokenizer_dir} holds no tokenizer.json; save its tokenizer with transformers first"
        )
    tokenizer = Tokenizer.from_file(str(path))
    ends = (*FAMILIES[family].stop_tokens, template_of(processor.template).stop.strip())
    known = [id_ for end in ends if end and (id_ := tokenizer.token_to_id(end)) is not None]
    return processor.but(stop_token_ids=tuple(dict.fromkeys([*processor.stop_token_ids, *known])))


def _template(path: Path, spec: SourceSpec, *, field: str) -> str:
    names = ", ".join(TEMPLATES)
    if spec.template is None:
        raise ValueError(f"{field}={path} does not say how its model is asked; add template=NAME, one of: {names}")
    if spec.template not in TEMPLATES:
        raise ValueError(f"template={spec.template} is none of: {names}")
    return spec.template


def _fresh(path: Path, processor: ProcessorSpec, family: str) -> ModelManifest:
    return ModelManifest(
        processor=processor,
        family=family,
        source=path.name,
        versions={name: version(name) for name in ("torch", "transformers", "safetensors")},
    )


def _family(template: str) -> str:
    for key, family in FAMILIES.items():
        if family.template == template:
            return key
    raise ValueError(f"template={template} belongs to no family; add family=NAME, one of: {', '.join(FAMILIES)}")
