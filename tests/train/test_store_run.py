"""A run in an object store, from its first word to an answer: nothing of it lies on a disk that workers share."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayllava import recipe
from rayllava.checkpoint import run as runs
from rayllava.checkpoint.store import Store
from rayllava.data.measure import measure
from rayllava.data.shards import ShardManifest
from rayllava.place import Place
from rayllava.recipe import ModelSpec, Recipe
from rayllava.records import IMAGE_MARK, Request, Turn
from rayllava.train import launch
from rayllava.train.audit import audit
from rayllava.train.export import export
from rayllava.train.meter import read_metrics
from tests.data.store import bucket
from tests.train import test_launch
from tests.train.ranks import ROOT, run_ranks


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with bucket("training") as address:
        yield address


@pytest.fixture(scope="module", autouse=True)
def copies_here() -> Iterator[None]:
    """Copies out of the store go to a folder of this module, in its processes too."""
    # Not below pytest's: the names of Ray's sockets end at 107 characters.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="rl-") as folder:
        patch.setenv("TMPDIR", folder)
        patch.setattr("tempfile.tempdir", folder)
        yield


@pytest.fixture(scope="module")
def bases(address: str, parts: ModelSpec) -> ModelSpec:
    """The parts of the model, in the store too."""
    for name in ("llm", "vision"):
        for path in Path(getattr(parts, name)).iterdir():
            Place(address.format(f"bases/{name}/{path.name}")).write_bytes(path.read_bytes())
    return parts.but(llm=address.format("bases/llm"), vision=address.format("bases/vision"))


@pytest.fixture(scope="module")
def trained(address: str, bases: ModelSpec, dialogues: Path) -> Place:
    """A finished run that packs, on one rank without Ray."""
    out = address.format("first")
    manifest = launch.prepare(made(*words(bases, dialogues, out), "data.max_tokens=300", "prompt.max_length=256"))
    run = Place(out)
    measure(ShardManifest.load(str(dialogues)), manifest.processor, run / "tokenizer", run / runs.LENGTHS)
    assert len(run_ranks("tests.train.training:whole_run", 1, {"run": out})[0]) == manifest.num_steps == 6
    return run


def words(parts: ModelSpec, shards: Path, out: str) -> list[str]:
    return [*test_launch.words(parts, shards, out), "data.epochs=1"]


def made(*fields: str) -> Recipe:
    return recipe.override(recipe.load("tiny.finetune"), list(fields))


def answer(model: str) -> list[str]:
    """Return the pieces of a model's answer, its first token at least."""
    from rayllava.generate.load import load_engine

    request = Request("1", (Turn("user", f"{IMAGE_MARK}\nwhat is shown?"),), (_picture(),), max_new_tokens=4)
    deltas = list(load_engine(model, threads=1).generate([request]))
    assert deltas[-1].finish in ("length", "stop")
    return [delta.text for delta in deltas]


def test_a_run_in_a_store_is_audited_exported_and_answers(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert audit(trained).text() == "exactly once: 60 samples x 1 epoch, 6 steps, 1 attempt, world size 1"
    export(trained)
    assert answer(trained.text) == answer((trained / "export").text)
    take = Place.take

    def fail(place: Place, path: Path) -> None:
        if place.name == "manifest.json":
            raise OSError("the node was taken away")
        take(place, path)

    monkeypatch.setattr(Place, "take", fail)
    with pytest.raises(OSError, match="taken away"):
        export(trained)
    with pytest.raises(ValueError, match=r"has no manifest.json; give RUN/export"):
        answer(trained.text)


def test_a_run_in_a_store_starts_from_another_and_starts_over(trained: Place, address: str, dialogues: Path) -> None:
    out = address.format("second")
    fields = [f"data={dialogues}", f"out={out}", f"init_from={trained.text}", "data.global_batch=10", "data.atom=2"]
    first, second = runs.read_run(trained), launch.prepare(made(*fields))
    assert second.recipe.model == first.recipe.model and second.parts == first.parts
    assert {name: sorted(files) for name, files in first.parts.items()} == {
        name: ["config.json", "model.safetensors"] for name in ("llm", "vision")
    }
    assert len(run_ranks("tests.train.training:whole_run", 1, {"run": out})[0]) == 6
    with pytest.raises(ValueError, match=r"^optim.lr=0.5, but out=s3://training/second holds a run with"):
        launch.prepare(made(*fields, "optim.lr=0.5"))
    launch.prepare(made(*fields, "optim.lr=0.5", "fresh=true"))
    assert Store(Place(out)).latest() is None and not read_metrics(Place(out) / "metrics.jsonl")


@pytest.mark.parametrize("why", ["no such bucket", "strange keys"])
def test_a_store_that_cannot_be_written_is_named(
    address: str, parts: ModelSpec, dialogues: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = address.format("elsewhere").replace("training", "absent") if "bucket" in why else address.format(why[:2])
    if "keys" in why:
        monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0.0)  # from now on keys count
    with pytest.raises(ValueError) as caught:
        launch.prepare(made(*words(parts, dialogues, out)))
    said = str(caught.value)
    assert re.fullmatch(rf"out={Place(out)} cannot be written \(.*\); check the address and your access", said), said
    assert ("NO_SUCH_BUCKET" in said) == ("bucket" in why), said


class Job:
    """A job that runs, in a process group of its own; what it says goes to a file."""

    def __init__(self, log: Path, *command: str) -> None:
        self.log = log
        env = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "RAY_AUTH_MODE": "disabled"}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text()

    def finish(self, seconds: float) -> str:
        """Return what it said when it has ended well."""
        assert self.process.wait(timeout=seconds) == 0, self.said()
        return self.said()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A function that starts a job; what is left of it in the end is ended."""
    jobs: list[Job] = []

    def start(*command: str) -> Job:
        jobs.append(Job(tmp_path / f"{len(jobs)}.log", *command))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


@pytest.mark.slow
def test_a_run_in_a_store_survives_its_driver(
    address: str, bases: ModelSpec, dialogues: Path, start: Callable[..., Job]
) -> None:
    out = address.format("killed")
    run, fields = Place(out), [*words(bases, dialogues, out), "data.epochs=8", "scale.workers=2"]
    driver = start("jobs/finetune.py", "tiny.finetune", *fields)
    deadline = time.monotonic() + 240
    while len(read_metrics(run / "metrics.jsonl")) < 10 or Store(run).latest() is None:
        assert driver.process.poll() is None and time.monotonic() < deadline, driver.said()
        time.sleep(0.5)
    os.kill(driver.process.pid, signal.SIGKILL)
    time.sleep(5)  # Ray's processes end with their driver
    before = {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl")}

    start("jobs/finetune.py", "tiny.finetune", *fields).finish(300)
    second = runs.read_decision(run, 2)
    assert second.cursor >= 7 and second.checkpoint == f"step-{second.cursor:06d}"
    after = {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl")}
    assert list(after) == list(range(1, 49))
    for step, loss in before.items():
        assert after[step] == pytest.approx(loss, rel=1e-4)
    assert runs.read_run(run).finished

    said = start("jobs/audit.py", out).finish(60)
    assert "exactly once: 60 samples x 8 epochs, 48 steps, 2 attempts, world size 2" in said
    assert answer(out)


def _picture() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(file, "PNG")
    return file.getvalue()
