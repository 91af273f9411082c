"""Damaged and hostile checkpoints: nothing of theirs is run, one line says what is wrong, and DST is not there."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayllava.convert import target
from rayllava.convert.run import ConvertSpec, convert
from tests.checkpoint.attacks import NAMES, attacks, text, zipped
from tests.convert.test_convert import job

ASSETS = Path(__file__).parents[1] / "assets"
LLAVA = ASSETS / "llava_v15"
SPEC = ConvertSpec(template="vicuna_v1", base=str(LLAVA / "llm"), vision_tower=str(LLAVA / "vision"))
WHOLE = SPEC.but(base="")


def refused(src: Path, dst: Path, spec: ConvertSpec = SPEC, *, to: str = "hf") -> str:
    """Return the one line in which a conversion is refused; nothing may stand at or beside `dst`."""
    with pytest.raises(ValueError) as caught:
        convert(src, dst, to=to, spec=spec)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 1000, said
    assert not dst.exists() and not list(dst.parent.glob(f".{dst.name}*"))
    return said


def llava_folder(folder: Path, pickled: Path) -> Path:
    folder.mkdir()
    shutil.copyfile(LLAVA / "whole" / "config.json", folder / "config.json")
    shutil.copyfile(pickled, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("looks", ["xtuner", "llava", "projector"])
def test_a_hostile_pickle_is_refused_in_one_line(looks: str, name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    body = attacks(f"open({str(mark)!r}, 'w').close()")[name]
    key = {
        "xtuner": "projector.model.0.weight",
        "llava": "model.norm.weight",
        "projector": "model.mm_projector.0.bias",
    }
    inner = b"}" + text(key[looks]) + body + b"s"
    state = b"}" + text("state_dict") + inner + b"s" if looks == "xtuner" else inner
    path = zipped(tmp_path / "iter_1.pth", b"\x80\x04" + state + b".")
    if looks == "llava":
        path = llava_folder(tmp_path / "llava", path)
    said = refused(path, tmp_path / "out", WHOLE if looks == "llava" else SPEC)
    assert "iter_1.pth" in said or "pytorch_model.bin" in said
    assert not mark.exists()


@pytest.mark.parametrize("name", ["hostile_iter_1.pth", "hostile_llava"])
def test_the_shipped_hostile_files_run_nothing(name: str, tmp_path: Path) -> None:
    mark = Path("/tmp/rayllava_pwned")
    mark.unlink(missing_ok=True)
    refused(ASSETS / "hostile_pickle" / name, tmp_path / "out", WHOLE if name == "hostile_llava" else SPEC)
    assert not mark.exists()


def storage(key: str, numel: int, kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + _int(numel) + b"tQ"


def _int(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def tensor(stored: bytes, *, offset: int = 0, size: int = 4, stride: int = 1) -> bytes:
    shape = _int(size) + b"\x85" + _int(stride) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + _int(offset) + shape + b"\x89}tR"


TRICKS = {
    "it lacks storage '9'": tensor(storage("9", 4)),
    "is smaller than its pickle says": tensor(storage("0", 1 << 40), size=1 << 40),
    "a tensor reaches beyond its storage": tensor(storage("0", 16), offset=14),
    "beyond its storage of 16 elements": tensor(storage("0", 16), stride=1 << 30),
    "a tensor has a shape that is none": tensor(storage("0", 16), offset=-4),
    "has a shape that is none": tensor(storage("0", 16), size=-1),
    "refers to something beside its storages": tensor(storage("0", 16, "EvilStorage")),
    "it lacks storage '../../data'": tensor(storage("../../data", 16)),
    "is said to be of two kinds": b"(" + tensor(storage("0", 16)) + tensor(storage("0", 8, "DoubleStorage")) + b"t",
}
"""What is said, and the pickle that it is said of."""


@pytest.mark.parametrize("said", TRICKS)
def test_a_storage_that_lies_is_refused(said: str, tmp_path: Path) -> None:
    pickled = b"\x80\x04}" + text("projector.model.0.weight") + TRICKS[said] + b"s."
    assert said in refused(zipped(tmp_path / "iter_1.pth", pickled), tmp_path / "out")


def _nested_zip(path: Path) -> None:
    inner = path.with_name("inner.pth")
    torch.save({"projector.model.0.weight": torch.ones(2)}, inner)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "a/data.pkl")


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * (50 << 20))


def _two_records(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning):
        for _ in range(2):
            archive.writestr("a/data.pkl", pickle.dumps({}, 2))


def _cut(path: Path) -> None:
    path.write_bytes((LLAVA / "pretrain" / "mm_projector.bin").read_bytes()[:3000])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_nested_zip, "cannot be read"),
        (_bomb, "is compressed or encrypted"),
        (_two_records, "two records of one name"),
        (_cut, "cannot be read"),
    ],
)
def test_a_container_that_is_none_is_refused(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    make(tmp_path / "iter_1.pth")
    assert said in refused(tmp_path / "iter_1.pth", tmp_path / "out")


# -- damaged folders -----------------------------------------------------------------------------------------


def copied(tmp_path: Path) -> Path:
    return shutil.copytree(LLAVA / "whole", tmp_path / "llava")


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "fetch it again" in refused(folder, tmp_path / "out", WHOLE)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    rewritten(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    assert "model.language_model.norm.weight is (65,), the model has (64,)" in refused(folder, tmp_path / "o", WHOLE)


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    rewritten(folder, lambda tensors: tensors.__delitem__("model.norm.weight"))
    assert "lacks model.language_model.norm.weight" in refused(folder, tmp_path / "out", WHOLE)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "lacks model-00002-of-00002.safetensors" in refused(folder, tmp_path / "out", WHOLE)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    for name in names.values():
        shutil.copyfile(folder / "model.safetensors", folder / name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "twice" in refused(folder, tmp_path / "out", WHOLE)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    words = ["jobs/convert.py", str(LLAVA / "whole"), str(tmp_path / "out"), "--to", "hf", "template=vicuna_v1"]
    words += ["--vision-tower", str(LLAVA / "vision")]
    done = job("-c", limited + f"sys.argv = {words}; runpy.run_path(sys.argv[0], run_name='__main__')")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: DST={tmp_path / 'out'} cannot be written (File too large); nothing is left of it")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    said = refused(LLAVA / "whole", tmp_path / "out", WHOLE)
    assert "GB are to be written, and its disk has room for 0.0; give a folder on another" in said


def test_what_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"DST=.* is not empty; give another folder, or add --force"):
        convert(LLAVA / "whole", tmp_path / "out", to="hf", spec=WHOLE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    convert(LLAVA / "whole", tmp_path / "out", to="hf", spec=WHOLE.but(force=True, proof=False))
    assert not (tmp_path / "out" / "thesis.tex").exists() and (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("to", ["hf", "llava", "xtuner", "gguf"])
def test_a_hugging_face_folder_is_looked_through_before_anything_is_written(to: str, tmp_path: Path) -> None:
    folder = shutil.copytree(ASSETS / "hf_llava_448" / "model", tmp_path / "hf")
    said = "lacks model.language_model.norm.weight (64,); give a whole model"
    rewritten(folder, lambda tensors: tensors.__delitem__("language_model.model.norm.weight"))
    assert said in refused(folder, tmp_path / "out", ConvertSpec(template="vicuna_v1"), to=to)
    rewritten(folder, lambda tensors: tensors.update({"language_model.model.norm.weight": torch.ones(65)}))
    said = "model.language_model.norm.weight is (65,), its config says (64,)"
    assert said in refused(folder, tmp_path / "out", ConvertSpec(template="vicuna_v1", proof=False), to=to)


# -- GGUF ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "pair"
    convert(LLAVA / "whole", folder, to="gguf", spec=WHOLE.but(proof=False))
    return folder


def test_a_gguf_that_is_cut_off_anywhere_is_refused(pair: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pair, tmp_path / "pair")
    path = next(file for file in folder.glob("*.gguf") if "mmproj" not in file.name)
    content = path.read_bytes()
    for size in [*range(0, 4000, 97), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        refused(folder, tmp_path / "out", ConvertSpec())


def test_a_gguf_that_claims_what_it_does_not_hold_is_refused(pair: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pair, tmp_path / "pair")
    path = next(file for file in folder.glob("*.gguf") if "mmproj" not in file.name)
    content = path.read_bytes()
    for place in (8, 16, 24):  # numbers of tensors and of keys, the first key's length
        changed = bytearray(content)
        changed[place : place + 8] = b"\xff" * 8
        path.write_bytes(bytes(changed))
        refused(folder, tmp_path / "out", ConvertSpec())
    rng = np.random.default_rng(0)
    for _ in range(200):  # anywhere in the header: another model, or a line that says why not, and soon
        changed = bytearray(content)
        changed[int(rng.integers(4, 9000))] = int(rng.integers(256))
        path.write_bytes(bytes(changed))
        try:
            convert(folder, tmp_path / "out", to="hf", spec=ConvertSpec(proof=False, force=True))
        except ValueError as error:
            assert "\n" not in str(error)
