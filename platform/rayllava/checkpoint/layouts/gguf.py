"""GGUF pair of llama.cpp and Ollama: a file for the language model, another for tower and projector.

NAME-f16.gguf            a Llama, whatever it was before, with all rows and the tokenizer
NAME-mmproj-f16.gguf     CLIP's blocks up to the one that the projector takes, and the projector
OLLAMA_MODELFILE_F16     both, and the prompt template in Ollama's words

What the pair leaves out comes back as what has no effect: a last block of zeros, a last norm that changes nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllava import durable
from rayllava.checkpoint import llamacpp
from rayllava.checkpoint.gguffile import (
    MAGIC,
    decoded,
    encoded,
    fits,
    read_dtype,
    read_gguf,
    write_gguf,
)
from rayllava.checkpoint.layouts import Found, Layout, Own, StoredModel, Weight, in_whole, part_of
from rayllava.checkpoint.layouts import _gguf_names as names
from rayllava.checkpoint.layouts._gguf_said import (
    depth_of,
    heads_of,
    llama_words,
    modelfile,
    said_of_llm,
    said_of_tower,
    tower_words,
)
from rayllava.checkpoint.layouts._gguf_tokenizer import write_tokenizer
from rayllava.checkpoint.layouts._llama import as_llama, check_clip
from rayllava.checkpoint.manifest import ModelManifest
from rayllava.checkpoint.parts import feature_depth
from rayllava.checkpoint.weights import Computed, Held, dtype_name, has_weights, trail_of

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"} | {
    kind: kind.upper() for kind in ("q8_0", "q5_0", "q4_0")
}
"""ggml's type by what --dtype says; of those that llama.cpp mixes, what it is given."""
_KINDS |= dict.fromkeys(llamacpp.FILE_TYPES, "F16")

Entries = dict[str, tuple[Held, str]]
"""Tensor and ggml's type, by the name in the file."""


def detect(path: Path) -> bool:
    if path.is_dir():
        return not has_weights(path) and any(_is_gguf(file) for file in path.glob("*.gguf"))
    return _is_gguf(path)


def find(path: Path, *, field: str = "MODEL") -> Found:
    """Find the weights of both files, under the names of transformers' Llama and CLIP."""
    llm, mmproj = _pair(path, field=field)
    said, tensors = read_gguf(llm)
    heads, groups = heads_of(said)
    weights: list[Weight] = []
    for said_name, tensor in tensors.items():
        held = names.permuted(said_name, tensor, heads=heads, groups=groups, back=True)
        weights.append(Weight("llm", names.llm_name_back(said_name), held, said_name))
    said, tensors = read_gguf(mmproj)
    hidden = said.number("clip.vision.embedding_length")
    for said_name, tensor in tensors.items():
        if said_name.startswith("mm."):
            weights.append(Weight("projector", names.projector_name_back(said_name), tensor, said_name))
        elif not said_name.startswith("v.post_ln."):
            name = names.vision_name_back(said_name, tensor.shape, hidden)
            weights.append(Weight("vision", name, tensor, said_name))
    weights = [weight for weight in weights if _block(weight) < depth_of(said)]
    weights += _without_effect(weights, depth_of(said))
    return Found((llm, mmproj), tuple(weights), translated=True)


def own(path: Path, scratch: Path) -> Own:
    """Return what both files say; their tokenizer and tower are put in files that others read."""
    llm, mmproj = _pair(path, field="MODEL")
    said, tensors = read_gguf(llm)
    for name in ("llm", "vision"):
        (scratch / name).mkdir()
    write_tokenizer(scratch / "llm", said)
    words = llama_words(said, tensors, llm)
    seen, _ = read_gguf(mmproj)
    for name, content in tower_words(seen).items():
        durable.write_json(scratch / "vision" / name, content)
    return Own(llm=scratch / "llm", words=words, vision=scratch / "vision")


def carry(stored: StoredModel, dtype: str | None) -> StoredModel:
    """Return a model as the pair gives it back: every tensor rounded, or quantized, as its file has it.

    Of a mixture that llama.cpp makes, what it is made of.
    """
    held = _checked(stored)
    llamacpp.check_installed(dtype or "")
    kind = _kind(held, dtype)
    llm, mmproj = _entries(held, kind)
    text = held.config.text_config
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    hidden = held.config.vision_config.hidden_size
    weights: dict[str, Held] = {}
    for name, (one, as_) in llm.items():
        back = names.permuted(name, _rounded(one, as_), heads=heads, groups=groups, back=True)
        weights[in_whole("llm", names.llm_name_back(name))] = back
    found = []
    for name, (one, as_) in mmproj.items():
        back = _rounded(one, as_)
        if name.startswith("mm."):
            weights[in_whole("projector", names.projector_name_back(name))] = back
        else:
            found.append(Weight("vision", names.vision_name_back(name, one.shape, hidden), back, name))
    depth = feature_depth(held.config.vision_feature_layer, held.config.vision_config.num_hidden_layers)
    for weight in (*found, *_without_effect(found, depth)):
        weights[in_whole("vision", weight.name)] = weight.held
    config = copy.deepcopy(held.config)
    config.vision_config.num_hidden_layers, config.vision_feature_layer = depth + 1, -2
    given = dataclasses.replace(held, config=config, weights=weights, dtype=read_dtype(kind))
    return given.own_rows()  # others are in the file, and made anew when it is read


def named(stored: StoredModel, dtype: str | None) -> dict[str, Held]:
    """Return the tensors of both files."""
    held = _checked(stored)
    llm, mmproj = _entries(held, _kind(held, dtype))
    return {name: _rounded(one, as_) for name, (one, as_) in (llm | mmproj).items()}


def fill(folder: Path, stored: StoredModel, manifest: ModelManifest, dtype: str | None) -> dict[str, str]:
    """Write both files, and a Modelfile for Ollama."""
    held, spec = _checked(stored), manifest.processor
    kind = _kind(held, dtype)
    llm, mmproj = _entries(held, kind)
    name = _called(manifest)
    suffix = dtype if dtype in llamacpp.FILE_TYPES else kind.lower()
    paired = "f32" if kind == "F32" else "f16"
    files = (f"{name}-{suffix}.gguf", f"{name}-mmproj-{paired}.gguf")
    numel = sum(math.prod(one.shape) for one, _ in llm.values())
    plain = folder / (files[0] if suffix == kind.lower() else "plain.gguf")
    write_gguf(plain, said_of_llm(held, spec, name=name, kind=kind, numel=numel), llm)
    if suffix in llamacpp.FILE_TYPES:
        llamacpp.quantized(plain, folder / files[0], suffix)
        plain.unlink()
    write_gguf(folder / files[1], said_of_tower(held, spec, name=name, kind=paired), mmproj)
    if words := modelfile(files, spec, held.tokenizer_dir):
        durable.write_text(folder / f"OLLAMA_MODELFILE_{suffix.upper()}", words)
    else:
        log.warning("no Modelfile for Ollama: nobody has written %s in its words yet", spec.template)
    return {file: durable.digest(folder / file) for file in files}


# -- what is written -----------------------------------------------------------------------------------------


def _checked(stored: StoredModel) -> StoredModel:
    """Return a model with a Llama; ValueError when llama.cpp runs it in another way, or not at all."""
    check_clip(
        stored, layout="gguf", why="llama.cpp's graph for it folds pixels together, which LLaVA's models do not"
    )
    if stored.config.vision_feature_select_strategy != "default":
        raise ValueError("to=gguf: this model takes the class token along, which llama.cpp always drops; use to=hf")
    held = as_llama(stored, layout="gguf")
    rope = getattr(held.config.text_config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "dynamic"):
        raise ValueError(f"to=gguf: positions of kind {rope['rope_type']} are not written yet; use to=hf")
    return held


def _kind(stored: StoredModel, dtype: str | None) -> str:
    return _KINDS[dtype or dtype_name(stored.dtype)]


def _entries(stored: StoredModel, kind: str) -> tuple[Entries, Entries]:
    """Return the tensors of the two files, in the types that llama.cpp's own converters give them."""
    text = stored.config.text_config
    depth = feature_depth(stored.config.vision_feature_layer, stored.config.vision_config.num_hidden_layers)
    llm: Entries = {}
    mmproj: Entries = {}
    for whole, held in stored.weights.items():
        part, name = part_of(whole)
        if part == "llm":
            if name == "lm_head.weight" and text.tie_word_embeddings:
                continue
            turned = names.permuted(name, held, heads=text.num_attention_heads, groups=text.num_key_value_heads)
            llm[names.llm_name(name)] = (turned, _llm_kind(name, held, kind))
        elif part == "projector":
            mmproj[names.projector_name(name)] = (held, "F32" if len(held.shape) == 1 else "F16")
        elif not name.startswith("post_layernorm.") and _block(Weight("vision", name, held, name)) < depth:
            plain = len(held.shape) == 1 or (kind == "F32" and not name.startswith("embeddings.patch_embedding."))
            mmproj[names.vision_name(name)] = (held, "F32" if plain else "F16")
    return llm, mmproj


def _llm_kind(name: str, held: Held, kind: str) -> str:
    if len(held.shape) == 1:
        return "F32"
    if kind in ("Q4_0", "Q5_0") and name == "lm_head.weight":
        kind = "Q8_0"  # the head stands finer numbers best, as llama.cpp's own quantizer has it
    return kind if fits(held.shape, kind) else "F16"


def _rounded(held: Held, kind: str) -> Held:
    def make() -> Tensor:
        return decoded(encoded(held.read(), kind), kind, held.shape)

    return Computed(held.shape, read_dtype(kind), make, trail_of(held, f"to {kind}"))


def _called(manifest: ModelManifest) -> str:
    """Return the model's name: llama.cpp reads Phi-3's tokens as Phi-3 does only if the name says so."""
    said = re.sub(r"(\.gguf|\.pth|\.bin|/)+$", "", manifest.source)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(said).name).strip("-") or "llava"
    if manifest.family == "phi3" and not any(word in name.lower() for word in ("phi-3", "phi3")):
        name = f"{name}-phi-3"
    return name


# -- what is read --------------------------------------------------------------------------------------------


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def _pair(path: Path, *, field: str) -> tuple[Path, Path]:
    """Return the two files that a folder, or one of them, means."""
    folder = path if path.is_dir() else path.parent
    files = [file for file in sorted(folder.glob("*.gguf")) if _is_gguf(file)]
    towers = {file for file in files if _architecture(file) == "clip"}
    chosen: dict[str, list[Path]] = {
        "language model": [file for file in files if file not in towers],
        "mmproj": sorted(towers),
    }
    found = []
    for what, candidates in chosen.items():
        if path in candidates:
            candidates = [path]
        if len(candidates) != 1:
            have = ", ".join(file.name for file in candidates) or "none"
            raise ValueError(f"{field}={path}: one {what} file is wanted in {folder}, there is {have}; give the file")
        found += candidates
    return found[0], found[1]


def _architecture(path: Path) -> str:
    return read_gguf(path)[0].get("general.architecture", "")


def _block(weight: Weight) -> int:
    """Return the number of the tower's block that a tensor is in; -1 when it is in none."""
    match = re.match(r"encoder\.layers\.(\d+)\.", weight.name) if weight.part == "vision" else None
    return int(match[1]) if match else -1


def _without_effect(weights: list[Weight], depth: int) -> Iterator[Weight]:
    """Yield the block and the norm that a pair leaves out, so that CLIP's last state but one is the projector's."""
    import torch

    like = [weight for weight in weights if weight.part == "vision" and _block(weight) == depth - 1]
    for weight in like:
        shape, dtype = weight.held.shape, weight.held.dtype

        def zeros(shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        name = weight.name.replace(f"layers.{depth - 1}.", f"layers.{depth}.")
        yield Weight("vision", name, Computed(shape, dtype, zeros, ("-", "zeros")), "a block that is not used")
    norm = next((weight.held for weight in like if weight.name.endswith(".layer_norm1.weight")), None)
    if norm is None:
        return  # what is missing is said by who puts the model together
    for kind, make in (("weight", torch.ones), ("bias", torch.zeros)):

        def plain(make: Any = make) -> Tensor:
            return make(norm.shape, dtype=norm.dtype)

        said = "a norm that is not used"
        yield Weight(
            "vision", f"post_layernorm.{kind}", Computed(norm.shape, norm.dtype, plain, ("-", "no effect")), said
        )


# The projector is float16 in any file. What four bits cost a model, they cost it in llama.cpp too: that the file
# holds the numbers which it was to hold is compared bit by bit.
_ROUNDING = {"float32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2, "q8_0": 0.1, "q5_0": 0.5, "q4_0": 1.0}
_ROUNDING |= {"q5_k_m": 0.5, "q4_k_m": 1.0}
_TOLERANCE = {"q5_k_m": 0.06, "q4_k_m": 0.12}
"""Of mixtures that llama.cpp makes: how far a tensor may be from what it was, as a share of its length."""

PLUG = Layout(
    detect=detect, open=find, named=named, fill=fill, own=own, carry=carry, rounding=_ROUNDING, tolerance=_TOLERANCE
)
