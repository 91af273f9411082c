"""Model parts by folder, hub id and address: named for good, fetched once a node, and known by their content."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayllava.checkpoint import hub as hubs
from rayllava.checkpoint import resolve
from rayllava.place import Place
from rayllava.recipe import ModelSpec
from tests.checkpoint.hub_server import Hub

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def copies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def llm(parts: ModelSpec, tmp_path: Path) -> Path:
    """A language model as hubs hold one: with pickled weights and other things beside."""
    folder = tmp_path / "llm"
    shutil.copytree(parts.llm, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub("acme/llm", llm, commit=OLD)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield server
    server.stop()


def named(parts: ModelSpec, reference: object) -> ModelSpec:
    return parts.but(llm=str(reference))


def test_a_hub_id_is_pinned_to_a_commit_and_then_needs_no_network(hub: Hub, parts: ModelSpec, llm: Path) -> None:
    model = resolve.pinned(named(parts, "acme/llm"))
    assert model.llm == f"acme/llm@{OLD}"
    folder = resolve.folder(model.llm)
    assert {path.name for path in folder.iterdir()} == set(hubs.wanted(path.name for path in llm.iterdir()))
    assert hub.gets["model.safetensors"] == 1 and not {"pytorch_model.bin"} & hub.gets.keys()
    assert resolve.digests(model.llm, field="model.llm") == resolve.digests(str(llm), field="model.llm")
    asked, hub.commit = hub.asked, NEW
    again = resolve.pinned(named(parts, "acme/llm"), before=model)
    assert again == model and resolve.folder(again.llm) == folder
    assert hub.asked == asked, "a run that is continued asked the hub again"
    assert resolve.pinned(named(parts, "acme/llm@main"), before=model).llm == f"acme/llm@{NEW}"


def test_weights_that_are_there_in_no_other_form_are_fetched_as_torch_saved_them(hub: Hub, llm: Path) -> None:
    (llm / "model.safetensors").unlink()
    folder = resolve.folder(f"acme/llm@{OLD}")
    assert (folder / "pytorch_model.bin").read_bytes() == b"pickle"
    assert not (folder / "model.safetensors").exists()


def test_a_model_of_another_family_is_named_by_its_hub_id(hub: Hub, parts: ModelSpec) -> None:
    with pytest.raises(
        ValueError, match=rf"model.family=phi3 does not fit model.llm=acme/llm@{OLD}, which is of type"
    ):
        resolve.pinned(named(parts, "acme/llm").but(family="phi3"))


def test_processes_of_a_node_download_once(hub: Hub, tmp_path: Path) -> None:
    code = f"from rayllava.checkpoint import resolve; print(resolve.folder('acme/llm@{OLD}'))"
    env = os.environ | {
        "PYTHONPATH": str(ROOT / "platform"),
        "TMPDIR": str(tmp_path / "tmp"),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
    }
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert said[0] == said[1] and (Path(said[0].strip()) / "model.safetensors").is_file()
    assert set(hub.gets.values()) == {1}


def test_a_download_that_is_not_what_the_hub_promised_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.lie = b"\1"
    with pytest.raises(OSError, match=r"model.safetensors of acme/llm does not match the hub's digest"):
        resolve.folder(f"acme/llm@{OLD}")
    assert not list((tmp_path / "tmp").rglob("*.safetensors"))
    hub.lie = b""
    assert (resolve.folder(f"acme/llm@{OLD}") / "model.safetensors").is_file()


def test_what_lies_whole_in_the_hubs_cache_is_used_there(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    hf_hub_download("acme/llm", "config.json", revision=OLD)
    assert hubs.cached("acme/llm", OLD) is not None
    assert resolve.folder(f"acme/llm@{OLD}").is_relative_to(tmp_path / "tmp"), "half a model in the hub's cache"
    whole = snapshot_download("acme/llm", revision=OLD)
    assert resolve.folder(f"acme/llm@{OLD}") == Path(whole)


def test_a_hub_that_does_not_answer_is_replaced_by_its_cache(
    hub: Hub, parts: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("acme/llm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve.pinned(named(parts, "acme/llm")).llm == f"acme/llm@{OLD}"
    with pytest.raises(ValueError, match=r"^model.llm=acme/other is no folder here and the hub gave nothing"):
        resolve.pinned(named(parts, "acme/other"))


def test_a_part_in_a_store_is_fetched_without_what_nobody_reads(
    address: str, parts: ModelSpec, llm: Path, tmp_path: Path
) -> None:
    place = Place(address.format("models/llm"))
    for path in llm.rglob("*"):
        if path.is_file():
            (place / str(path.relative_to(llm))).write_bytes(path.read_bytes())
    model = resolve.pinned(named(parts, place.text))
    assert model.llm == place.text
    folder = resolve.folder(model.llm)
    assert folder.is_relative_to(tmp_path / "tmp")
    assert {path.name for path in folder.iterdir()} == set(hubs.wanted(path.name for path in llm.iterdir()))
    expected = {"llm": resolve.digests(str(llm), field="model.llm")}
    resolve.check(model, expected)
    config = (llm / "config.json").read_bytes()
    (place / "config.json").write_bytes(config + b" ")
    with pytest.raises(ValueError, match=r"^model.llm=s3://\S*/models/llm changed since the run began: config.json;"):
        resolve.check(model, expected)


def test_a_folder_that_changed_is_named_with_its_file(parts: ModelSpec, llm: Path) -> None:
    model = resolve.pinned(named(parts, llm))
    expected = {"llm": resolve.digests(model.llm, field="model.llm")}
    resolve.check(model, expected)
    (llm / "tokenizer_config.json").write_text("{}")  # the run holds a tokenizer of its own
    resolve.check(model, expected)
    weights = llm / "model.safetensors"
    content, said = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(said.st_atime_ns, said.st_mtime_ns))
    with pytest.raises(
        ValueError, match=rf"^model.llm={llm} changed since the run began: model.safetensors; give it"
    ):
        resolve.check(model, expected)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("./nowhere", "model.llm=./nowhere does not exist; give a model folder or a hub id"),
        ("s3://nobody/llm?region=us-east-1", "model.llm=s3://nobody/llm cannot be read"),
        ("a/b/c", "model.llm=a/b/c does not exist; give a model folder or a hub id"),
    ],
)
def test_a_part_that_is_not_there_is_named(address: str, parts: ModelSpec, reference: str, said: str) -> None:
    if "nobody" in reference:
        reference = address.format("llm").replace("s3://runs", "s3://nobody")
    with pytest.raises(ValueError, match=rf"^{said}"):
        resolve.pinned(named(parts, reference))
