"""XTuner's layouts, read only.

iter_2181.pth                                   a training checkpoint of mmengine: what trained, and much else
projector/  llm_adapter/  visual_encoder_adapter/  visual_encoder/  *.safetensors
                                                a LLaVA folder: each where it trained; the language model at the root
config.json  model.safetensors                  its projector/ alone

llm.model.layers.*                  model.layers.*             language model
visual_encoder.vision_model.*       vision_model.*             tower
projector.model.0.weight            model.0.weight             projector
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rayllava.checkpoint.layouts import Found, Layout, Own, Part, Weight
from rayllava.checkpoint.layouts._adapters import Scale, is_adapter, products, read_adapter
from rayllava.checkpoint.layouts._hf_names import COMPUTED
from rayllava.checkpoint.layouts._projector import projector_name
from rayllava.checkpoint.weights import Held, has_weights, open_weights, read_config, weight_files

_PREFIXES: tuple[tuple[str, Part, str], ...] = (
    ("llm.", "llm", "llm_lora"),
    ("visual_encoder.", "vision", "visual_encoder_lora"),
    ("projector.model.", "projector", ""),
)
"""In a .pth: how names begin, the part, and the word of the training config that speaks of its adapters."""


def detect(path: Path) -> bool:
    if path.is_file():
        return any(name.startswith("projector.model.") for name in _state(path))
    return _is_projector(path) or _is_projector(path / "projector") or _is_sharded(path)


def find(path: Path, *, field: str = "MODEL") -> Found:
    """Find what a training checkpoint or a folder holds."""
    if path.is_file():
        return Found((path,), tuple(_of_training(path)))
    if _is_sharded(path):
        raise ValueError(
            f"{field}={path} is in DeepSpeed's pieces; give the folder that `xtuner convert pth_to_hf` makes of it"
        )
    weights: list[Weight] = []
    files: list[Path] = []

    def take(folder: Path, part: Part) -> None:
        for file in weight_files(folder, field=field):
            files.append(file)
            weights.extend(_whole(part, open_weights(file)))

    def fold(folder: Path, part: Part) -> None:
        if (folder / "adapter_config.json").is_file():
            read, found = read_adapter(folder)
            files.extend(read)
            weights.extend(Weight(part, _within(part, name), held, said, adds=True) for name, said, held in found)

    if _is_projector(path):
        take(path, "projector")
        return Found(tuple(files), tuple(weights))
    take(path / "projector", "projector")
    if has_weights(path):
        take(path, "llm")
    if (path / "visual_encoder").is_dir():
        take(path / "visual_encoder", "vision")
    fold(path / "llm_adapter", "llm")
    fold(path / "visual_encoder_adapter", "vision")
    return Found(tuple(files), tuple(weights))


def own(path: Path) -> Own:
    """Return what a folder says of the parts that were trained as a whole; a .pth says nothing."""
    vision = path / "visual_encoder"
    whole = has_weights(path) and not _is_projector(path)
    return Own(
        llm=path if whole else None,
        words=read_config(path) if whole else None,
        vision=vision if vision.is_dir() else None,
    )


def _of_training(path: Path) -> Iterator[Weight]:
    """Yield the weights of a .pth; adapters are scaled as the training config in it says."""
    state = _state(path)
    for prefix, part, word in _PREFIXES:
        own = {name: held for name, held in state.items() if name.startswith(prefix)}
        adapters = {name.removeprefix(prefix): held for name, held in own.items() if is_adapter(name)}
        whole = {name: held for name, held in own.items() if not is_adapter(name)}
        if adapters:
            if whole:
                raise ValueError(f"{path} holds adapters of {prefix}* beside {next(iter(whole))[:120]!a}; merge them")
            for name, said, held in products(adapters, _scale(path, word), said=str(path)):
                yield Weight(part, _within(part, name), held, prefix + said, adds=True)
        yield from _whole(part, whole, prefix=prefix)
    strange = [name for name in state if not name.startswith(tuple(prefix for prefix, _, _ in _PREFIXES))]
    if strange:
        raise ValueError(f"{path} holds {strange[0][:120]!a}, which is no part of a LLaVA that XTuner trains")


def _whole(part: Part, held: dict[str, Held], *, prefix: str = "") -> Iterator[Weight]:
    for said, tensor in held.items():
        if not said.endswith(COMPUTED):
            yield Weight(part, _within(part, said.removeprefix(prefix)), tensor, said)


def _within(part: Part, name: str) -> str:
    if part == "projector":
        return projector_name(name.removeprefix("model."))
    return name.removeprefix("vision_model.") if part == "vision" else name


def _scale(path: Path, word: str) -> Scale:
    """Return the scale of a .pth's adapters out of the training config in it, which is text and stays text."""
    from rayllava.checkpoint.torchfile import read

    value = read(path)
    meta = value.get("meta") if isinstance(value, dict) else None
    config = meta.get("cfg") if isinstance(meta, dict) else None
    match = re.search(rf"\b{word}=dict\(([^()]*)\)", config) if isinstance(config, str) else None
    alpha = re.search(r"\blora_alpha=(\d+(?:\.\d+)?)", match[1]) if match else None
    if match is None or alpha is None or "use_dora=True" in match[1]:
        raise ValueError(
            f"{path} holds adapters, but its training config does not say {word}.lora_alpha; "
            "give the folder that `xtuner convert pth_to_hf` makes of it"
        )
    return Scale(float(alpha[1]), "use_rslora=True" in match[1])


def _state(path: Path) -> dict[str, Held]:
    try:
        return open_weights(path)
    except ValueError:
        return {}


def _is_projector(folder: Path) -> bool:
    return read_config(folder).get("model_type") == "projector"


def _is_sharded(folder: Path) -> bool:
    """Whether it is what XTuner writes when it trains with DeepSpeed, a folder called iter_N.pth."""
    return any(folder.glob("*mp_rank_00_model_states.pt"))


PLUG = Layout(detect=detect, open=find, own=own)
