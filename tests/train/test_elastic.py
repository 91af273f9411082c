"""A run that loses, gains and changes its nodes computes what the undisturbed run computes, sample by sample.

One cluster of several raylets on this machine; every scenario is a real training job on it, and its events come
while it trains.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rayllava import recipe
from rayllava.checkpoint.run import decisions
from rayllava.place import Place
from rayllava.recipe import ModelSpec
from rayllava.train import launch
from rayllava.train.audit import audit
from rayllava.train.meter import read_metrics
from tests.train.lab import TRAINER, Lab
from tests.train.ranks import run_ranks

STEPS = 55
SAMPLES = 60
LONG = 60
"""Samples of a step that takes long enough, over a second, for a new node to be worth a restart."""
SHORT = 12
"""Samples of a step that does not; two go through the model at once."""

TUNINGS = {
    "projector": ["tuning=projector"],
    "full": ["tuning=full"],
    "lora": ["tuning=lora", "tuning.r=4", "tuning.alpha=8", "tuning.vision=lora", "tuning.vision.r=2"],
    "qlora": ["tuning=qlora", "tuning.r=4", "tuning.alpha=8"],
}


def words(
    parts: ModelSpec,
    shards: Path,
    out: Path,
    tuning: str,
    zero: int,
    *,
    steps: int = STEPS,
    batch: int = LONG,
    atom: int = 0,
) -> list[str]:
    """A step takes `batch` / `atom` forward passes; 0 is 1 for LONG and 2 for SHORT steps."""
    atom = atom or (1 if batch == LONG else 2)
    return [
        f"data={shards}",
        f"out={out}",
        f"model.llm={parts.llm}",
        f"model.vision={parts.vision}",
        "model.family=vicuna",
        f"data.global_batch={batch}",
        f"data.atom={atom}",
        f"data.epochs={steps * batch // SAMPLES}",
        "save.every=10",
        "scale.workers=1:3",
        f"scale.zero={zero}",
        f'scale.resources={{"{TRAINER}":1}}',
        "scale.resize_after_s=2",
        "scale.wait_s=120",
        *TUNINGS[tuning],
    ]


class Scene:
    """A training job on the lab, and what is done to it."""

    def __init__(self, lab: Lab, out: Path, arguments: list[str]) -> None:
        self.lab = lab
        self.out = out
        self.arguments = arguments
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        return self.lab.start("jobs/finetune.py", "tiny.finetune", *self.arguments)

    def at(self, step: int, *, world_size: int | None = None, seconds: float = 120) -> None:
        """Wait until this step is done, and done by so many workers."""
        until = time.monotonic() + seconds
        while True:
            lines = read_metrics(Place(str(self.out / "metrics.jsonl")))
            if lines and lines[-1]["step"] >= step and world_size in (None, lines[-1]["world_size"]):
                return
            assert self.driver.poll() is None, f"the driver ended with {self.driver.returncode}: {self.said()}"
            assert time.monotonic() < until, f"no step {step} at W={world_size}: {lines[-1:]}, {self.said()}"
            time.sleep(0.05)

    def finish(self, seconds: float = 240) -> None:
        assert self.driver.wait(timeout=seconds) == 0, self.said()

    def said(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.lab.folder.glob("driver-*.log")))


def kill_a_worker(scene: Scene) -> None:
    scene.at(12, world_size=2)
    os.kill(scene.lab.workers()[0].pid, signal.SIGKILL)


def lose_a_node(scene: Scene) -> None:
    scene.at(12, world_size=2)
    scene.lab.kill(scene.lab.nodes[0])


def drain_a_node(scene: Scene) -> None:
    scene.at(12, world_size=2)
    node = scene.lab.nodes[0]
    scene.lab.drain(node, seconds=60)
    scene.at(14, world_size=1)
    scene.lab.kill(node)


def kill_the_driver(scene: Scene) -> None:
    scene.at(12)
    os.killpg(scene.driver.pid, signal.SIGKILL)
    scene.driver.wait()
    scene.driver = scene.start()


def grow(scene: Scene) -> None:
    """One worker, then two, then three; the third comes while most of the run is left, or a restart would not pay."""
    scene.lab.kill(scene.lab.nodes[0])
    scene.at(1, world_size=1)
    scene.lab.join()
    time.sleep(8)
    scene.lab.join()
    scene.at(2, world_size=2)
    scene.at(3, world_size=3)


def shrink(scene: Scene) -> None:
    scene.lab.join()
    scene.at(12, world_size=3)
    for node in scene.lab.nodes[:2]:
        scene.lab.kill(node)
    scene.at(20, world_size=1)


def two_in_a_row(scene: Scene) -> None:
    kill_a_worker(scene)
    lose_a_node(scene)


EVENTS: dict[str, Callable[[Scene], None]] = {
    event.__name__: event
    for event in (kill_a_worker, lose_a_node, drain_a_node, kill_the_driver, grow, shrink, two_in_a_row)
}


@pytest.fixture(scope="module")
def references(
    parts: ModelSpec, dialogues: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int, int], Path]:
    """Undisturbed runs by tuning, ZeRO stage and samples of a step."""
    made: dict[tuple[str, int, int], Path] = {}

    def reference(tuning: str, zero: int, batch: int) -> Path:
        key = (tuning, zero, batch)
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            made[key] = undisturbed(out, words(parts, dialogues, out, tuning, zero, batch=batch))
        return made[key]

    return reference


def undisturbed(out: Path, given: list[str]) -> Path:
    """Train on one rank, without Ray."""
    manifest = launch.prepare(recipe.override(recipe.load("tiny.finetune"), given))
    run_ranks("tests.train.training:whole_run", 1, {"run": manifest.recipe.out})
    return out


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as made:
        made.join()
        made.join()
        yield made


def check(out: Path, reference: Path, *, steps: int = STEPS) -> None:
    """Every step's loss, the final weights and the count of samples are those of the undisturbed run."""
    lines, wanted = (read_metrics(Place(str(run / "metrics.jsonl"))) for run in (out, reference))
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line, want in zip(lines, wanted, strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=1e-4), f"step {line['step']}"
    weights, others = weights_of(out, steps), weights_of(reference, steps)
    assert weights.keys() == others.keys() and weights
    for name, tensor in weights.items():
        assert (tensor - others[name]).abs().max() <= 1e-4, name
    found = audit(Place(str(out)))
    assert found.passed, found.text()
    assert found.verdict.startswith("exactly once: ")


def weights_of(out: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in (out / "checkpoints" / f"step-{step:06d}").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            tensors |= {name: file.get_tensor(name) for name in keys if name.startswith("param/")}
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("event", EVENTS)
def test_no_event_changes_what_is_computed(
    lab: Lab,
    parts: ModelSpec,
    dialogues: Path,
    tmp_path: Path,
    references: Callable[[str, int, int], Path],
    event: str,
    tuning: str,
    zero: int,
) -> None:
    out = tmp_path / "run"
    batch = LONG if event == "grow" else SHORT
    scene = Scene(lab, out, words(parts, dialogues, out, tuning, zero, batch=batch))
    EVENTS[event](scene)
    scene.finish()
    check(out, references(tuning, zero, batch))


def test_a_hard_life(
    lab: Lab, parts: ModelSpec, dialogues: Path, tmp_path: Path, references: Callable[[str, int, int], Path]
) -> None:
    """A killed worker, a drain, a new node and a lost one in one run."""
    out = tmp_path / "run"
    scene = Scene(lab, out, words(parts, dialogues, out, "lora", 2))
    kill_a_worker(scene)
    scene.at(16, world_size=2)
    node = lab.nodes[0]
    lab.drain(node, seconds=60)
    scene.at(20, world_size=1)
    lab.kill(node)
    lab.join()
    scene.at(26, world_size=2)
    planned = [redone(out, attempt) for attempt in (3, 4)]
    lab.kill(lab.nodes[0])
    scene.finish()
    assert planned == [0, 0], "a planned change redoes no step"
    check(out, references("lora", 2, LONG))


@pytest.mark.slow
def test_a_run_has_one_truth_when_its_driver_dies_while_a_rank_is_late_with_its_save(
    parts: ModelSpec, dialogues: Path, tmp_path: Path
) -> None:
    """Rank 0 has written its share of step 20 and training has gone on; rank 1 has not when the driver is killed."""
    out = tmp_path / "run"
    run = Place(str(out))
    given = words(parts, dialogues, out, "lora", 2, steps=30, atom=2)
    with Lab(tmp_path, path=(Path(__file__).parent / "late",)) as lab:
        lab.join()
        lab.join()
        scene = Scene(lab, out, given)
        scene.at(12, world_size=2)
        second = lab.start("jobs/finetune.py", "tiny.finetune", *given)
        assert second.wait(timeout=60) == 1
        said = (tmp_path / "driver-2.log").read_text()
        assert f"error: out={out} is being trained by pid {scene.driver.pid} on " in said
        scene.at(23, world_size=2)
        written = {path.name for path in (out / "checkpoints" / "step-000020").iterdir()}
        assert written == {"state-1-00000.safetensors", "part-1-00000.json"}, "rank 1 is late"
        kill_the_driver(scene)
        scene.finish()
    decided = decisions(run, {})
    assert [(one.checkpoint, one.cursor) for one in decided.values()] == [(None, 0), ("step-000010", 10)]
    assert decided[1].driver != decided[2].driver
    other = tmp_path / "undisturbed"
    check(out, undisturbed(other, words(parts, dialogues, other, "lora", 2, steps=30, atom=2)), steps=30)


@pytest.mark.slow
def test_a_node_that_is_lost_while_a_group_starts_holds_up_nobody(
    parts: ModelSpec, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 waits for rank 1 in the process group, and its place is needed for the next group."""
    out = tmp_path / "run"
    monkeypatch.setenv("RAYLLAVA_TEST_ABSENT", str(tmp_path))
    with Lab(tmp_path, path=(Path(__file__).parent / "absent",)) as lab:
        lab.join()
        lab.join()
        scene = Scene(lab, out, words(parts, dialogues, out, "projector", 2, steps=10, batch=SHORT))
        until = time.monotonic() + 120
        while not (tmp_path / "node").exists():
            assert time.monotonic() < until and scene.driver.poll() is None, scene.said()
            time.sleep(0.1)
        (lost,) = (node for node in lab.nodes if node.node_id == (tmp_path / "node").read_text())
        lab.kill(lost)
        scene.at(1, world_size=1, seconds=60)
        scene.finish()
    assert [one.cursor for one in decisions(Place(str(out)), {}).values()] == [0, 0]
    assert audit(Place(str(out))).verdict.startswith("exactly once: ")


def redone(out: Path, attempt: int) -> int:
    """Return how many steps were done before an attempt that it did again."""
    import json

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before = max(line["step"] for line in lines if line["attempt"] == attempt - 1)
    return int(before - min(line["step"] for line in lines if line["attempt"] == attempt) + 1)
