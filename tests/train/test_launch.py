"""A training run from the outside: what it refuses before it starts, and that a kill costs nothing but time."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayllava import recipe
from rayllava.checkpoint import run as runs
from rayllava.place import Place
from rayllava.recipe import ModelSpec, Recipe
from rayllava.train import launch
from rayllava.train.audit import audit
from rayllava.train.meter import read_metrics
from tests.train.test_reporter import shown

ROOT = Path(__file__).resolve().parents[2]


def words(parts: ModelSpec, shards: Path, out: Path | str) -> list[str]:
    return [
        f"data={shards}",
        f"out={out}",
        f"model.llm={parts.llm}",
        f"model.vision={parts.vision}",
        "model.family=vicuna",
        "data.global_batch=10",
        "data.atom=2",
        "data.epochs=20",
        "save.every=7",
    ]


def tiny(parts: ModelSpec, shards: Path, out: Path, *more: str) -> Recipe:
    return recipe.override(recipe.load("tiny.finetune"), [*words(parts, shards, out), *more])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data={tmp}", r"data=.* is not a shard folder \(no manifest.json\); make one with jobs/shard.py"),
        (
            "init_from={tmp}",
            r"init_from=.* is no run, nor a model in a layout that we read; there are: gguf, hf, llava",
        ),
        ("out={file}/run", r"out=.*/run cannot be written \(Not a directory\); give a folder"),
        ("model.llm={tmp}/none", r"model.llm=.*/none does not exist; give a model folder or a hub id"),
        ("model.llm={tmp}", r"model.llm=.* has no config.json; give a folder that holds a model"),
        ("model.family=gpt5", r"no family 'gpt5'; there are: .*vicuna"),
        (
            "model.family=phi3",
            r"model.family=phi3 does not fit model.llm=.*, which is of type llama; use one of .*vicuna",
        ),
        ("model.vision_feature_layer=-9", r"model.vision_feature_layer=-9: the tower has 3 blocks; use -3 to -1"),
        ("model.image_size=30", r"model.image_size=30 cuts patches of 14 pixels; use 42"),
        ("prompt.template=chatgpt", r"no template 'chatgpt'; there are: .*vicuna_v1"),
        ("scale.workers=6", r"scale.workers=6 is more than the 5 atoms of a step; use at most 5, or lower data.atom"),
        ("data.global_batch=100 data.tail=drop", r"data.tail=drop leaves no step"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(
    parts: ModelSpec, dialogues: Path, tmp_path: Path, word: str, said: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    out = tmp_path / "run"
    more = word.format(tmp=tmp_path, file=file).split()
    with pytest.raises((ValueError, LookupError), match=said):
        launch.prepare(tiny(parts, dialogues, out, *more))
    assert not out.exists() or not list(out.iterdir())


def test_a_hub_id_without_a_network_names_the_folder_to_give(
    parts: ModelSpec, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"model.llm=owner/name is no folder here .*; offline, .* model.llm=DIR"):
        launch.prepare(tiny(parts, dialogues, tmp_path / "run", "model.llm=owner/name"))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tiny.finetune", "python jobs/pretrain.py tiny.pretrain data=DIR out=DIR"),
        ("llava_v15.task_13b", "python jobs/finetune.py llava_v15.finetune_13b data=DIR out=DIR"),
    ],
)
def test_a_second_stage_without_a_first_names_the_command_that_makes_one(name: str, command: str) -> None:
    with pytest.raises(ValueError) as caught:
        launch.prepare(recipe.load(name))
    assert str(caught.value) == (
        f"{name} starts from an earlier run; add init_from=DIR, the out folder of `{command}`"
    )


def test_a_second_stage_of_nobodys_is_asked_for_its_first() -> None:
    with pytest.raises(ValueError, match=r"add init_from=DIR, the out folder of its first stage$"):
        launch.prepare(recipe.load("tiny.finetune").but(after=""))


def test_a_run_is_continued_by_the_same_recipe_only(parts: ModelSpec, dialogues: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = launch.prepare(tiny(parts, dialogues, out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = launch.prepare(tiny(parts, dialogues, out, "scale.workers=1", "scale.zero=0", "save.keep=5"))
    assert again.but(recipe=first.recipe) == first
    for word in ("optim.lr=1e-5", "seed=1", "data.atom=1", "prompt.template=llava_v1"):
        with pytest.raises(ValueError, match=rf"{word.split('=')[0]}=.*, but out=.* holds a run with"):
            launch.prepare(tiny(parts, dialogues, out, word))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    fresh = launch.prepare(tiny(parts, dialogues, out, "optim.lr=1e-5", "fresh=true"))
    assert fresh.recipe.optim.lr == 1e-5


def test_an_unfinished_first_stage_is_no_start(parts: ModelSpec, dialogues: Path, tmp_path: Path) -> None:
    launch.prepare(tiny(parts, dialogues, tmp_path / "first"))
    made = recipe.override(
        recipe.load("tiny.finetune"),
        [f"data={dialogues}", f"out={tmp_path / 'second'}", f"init_from={tmp_path / 'first'}"],
    )
    with pytest.raises(ValueError, match=r"init_from=.*first has done 0 of its 120 steps; run its command again"):
        launch.prepare(made)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/finetune.py", "tiny.finetune", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def killed_and_finished(
    parts: ModelSpec, dialogues: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, float]]]:
    """A run of 120 steps, killed after step 10 with two workers, finished with one; and its metrics before."""
    out = tmp_path_factory.mktemp("killed") / "run"
    metrics = out / "metrics.jsonl"
    driver = start(*words(parts, dialogues, out))
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < 10:
        assert driver.poll() is None, driver.stdout and driver.stdout.read()
        assert time.monotonic() < deadline, "no ten steps in two minutes"
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate(timeout=60)
    time.sleep(3)  # Ray's processes end with their driver
    before = read_metrics(metrics)
    again = start(*words(parts, dialogues, out), "scale.workers=1", "scale.zero=2")
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    (out.parent / "said.log").write_text(said)
    return out, before


def test_a_killed_run_continues_to_its_end(killed_and_finished: tuple[Path, list[dict[str, float]]]) -> None:
    out, _ = killed_and_finished
    after = read_metrics(Place(str(out / "metrics.jsonl")))
    assert [entry["step"] for entry in after] == list(range(1, 121))
    assert {entry["num_samples"] for entry in after} == {10}
    second = runs.read_decision(Place(str(out)), 2)
    assert 7 <= second.cursor < 120 and second.cursor % 7 == 0
    assert second.checkpoint == f"step-{second.cursor:06d}"
    assert [entry["world_size"] for entry in after] == [2] * second.cursor + [1] * (120 - second.cursor)
    assert runs.read_run(Place(str(out))).finished


def test_a_run_is_not_troubled_by_another_cluster_on_its_host(
    killed_and_finished: tuple[Path, list[dict[str, float]]],
) -> None:
    """The tests' own one; Ray Train's helpers may look for the controller of a run there."""
    out, _ = killed_and_finished
    said = (out.parent / "said.log").read_text()
    assert "Traceback" not in said and "multiple active Ray instances" not in said, said


def test_a_killed_run_counted_every_sample_once(
    killed_and_finished: tuple[Path, list[dict[str, float]]],
) -> None:
    out, _ = killed_and_finished
    found = audit(Place(str(out)))
    assert found.passed, found.text()
    assert found.text() == "exactly once: 60 samples x 20 epochs, 120 steps, 2 attempts, world sizes 1..2"
    assert not list((out / "drivers").iterdir())


def test_steps_that_were_done_twice_have_the_same_loss(
    killed_and_finished: tuple[Path, list[dict[str, float]]],
) -> None:
    out, before = killed_and_finished
    cursor = runs.read_decision(Place(str(out)), 2).cursor
    after = {entry["step"]: entry["loss"] for entry in read_metrics(Place(str(out / "metrics.jsonl")))}
    twice = [entry for entry in before if entry["step"] > cursor]
    for entry in twice:
        assert after[entry["step"]] == pytest.approx(entry["loss"], rel=1e-4)


def test_plain_transformers_gives_the_trained_models_logits(
    killed_and_finished: tuple[Path, list[dict[str, float]]],
) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    from rayllava.model.build import result
    from rayllava.model.forward import LossModel

    out, _ = killed_and_finished
    trained, manifest = result(Place(str(out)))
    spec = manifest.processor
    torch.manual_seed(0)
    run = torch.full((4,), spec.image_token_id)
    ids = torch.cat([torch.tensor([1]), run, torch.randint(260, 330, (12,))]).unsqueeze(0)
    pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        positions = torch.arange(17).unsqueeze(0)
        hidden = LossModel(trained, spec).eval().hidden(ids, positions, torch.tensor([17]), pixels)
        ours = trained.lm_head(hidden)
        plain = LlavaForConditionalGeneration.from_pretrained(out / "export", dtype=torch.float32).eval()
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.image_mean, spec.image_std))
        theirs = plain(input_ids=ids, pixel_values=(pixels.float() / 255 - mean) / std).logits
    assert (ours - theirs).abs().max() <= 1e-4


def test_a_run_explains_itself(killed_and_finished: tuple[Path, list[dict[str, float]]]) -> None:
    out, _ = killed_and_finished
    given = json.loads((out / "recipe.json").read_text())
    python, job, name, *fields = shlex.split(given["command"])
    assert (python, job, name) == ("python", "jobs/finetune.py", "tiny.finetune")
    made = recipe.override(recipe.load(name), fields)
    assert made == runs.read_run(Place(str(out))).recipe and made.model_dump(mode="json") == given["recipe"]
    assert made.scale.workers == "1", "a continued run is what its last command says"
    losses = {entry["step"]: entry["loss"] for entry in read_metrics(Place(str(out / "metrics.jsonl")))}
    shown_ = shown(out / "tensorboard")["train/loss"]
    assert shown_ == pytest.approx(losses, rel=1e-6)
    report = (out / "report.html").read_text()
    assert "120 of 120 steps" in report and "2 attempts on\n1 and 2 workers" in report and "http" not in report
    assert json.loads((out / "goodput.json").read_text())["watch"] == 0


def test_a_finished_run_is_left_alone(
    killed_and_finished: tuple[Path, list[dict[str, float]]], parts: ModelSpec, dialogues: Path
) -> None:
    out, _ = killed_and_finished
    before = (out / "metrics.jsonl").read_bytes()
    again = start(*words(parts, dialogues, out))
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "is finished (120 steps); fresh=true starts it over" in said
    assert (out / "metrics.jsonl").read_bytes() == before


def test_the_job_ends_in_one_line_and_a_code(tmp_path: Path) -> None:
    job = start("data=nowhere", f"out={tmp_path / 'run'}", "model.llm=x", "model.vision=y", "model.family=vicuna")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert said.splitlines() == ["error: model.llm=x does not exist; give a model folder or a hub id (owner/name)"]
    assert not (tmp_path / "run").exists()
