"""What a driver tells of a run: a line of progress, event files that follow redone steps, Ray's metrics, a report."""

from __future__ import annotations

import struct
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rayllava import recipe
from rayllava.checkpoint.run import RunManifest
from rayllava.place import Place
from rayllava.recipe import DataSpec, Full, ModelSpec, OptimSpec, PromptSpec, Recipe
from rayllava.spec import override, words
from rayllava.train import tracks
from rayllava.train.goodput import account
from rayllava.train.meter import Meter, Tail
from rayllava.train.reporter import note
from rayllava.train.tracks import Follower, Tracker
from tests.data.store import bucket
from tests.tiny import processor_spec


def line(step: int, attempt: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "attempt": attempt,
        "epoch": 0,
        "loss": 10.0 * attempt + step,
        "lr": 1e-3,
        "grad_norm": None,
        "tokens_per_second": 3000.0,
        "mfu": None,
        "seconds": 0.5,
        "data_seconds": 0.05,
        "save_seconds": 0.0,
        "watch_seconds": 0.0,
        "world_size": 2,
        "time": 100.0 + 10 * attempt + 0.5 * step,
    } | more


def look(step: int, attempt: int = 1) -> dict[str, Any]:
    answer = {"source": "a.png", "question": "what | who?", "answer": f"said\nat {step}", "reference": "a cat"}
    when = 100.0 + 10 * attempt + 0.5 * step
    return {"step": step, "attempt": attempt, "loss": 5.0 * attempt + step, "answers": [answer], "time": when}


def run_manifest(out: Path) -> RunManifest:
    made = Recipe(
        model=ModelSpec(llm="llm", vision="vision", family="vicuna"),
        prompt=PromptSpec(template="vicuna_v1"),
        tuning=Full(),
        data=DataSpec(shards="shards", global_batch=16),
        optim=OptimSpec(lr=1e-3),
        out=str(out),
    )
    return RunManifest(recipe=made, processor=processor_spec(), shards_digest="", num_steps=20)


def shown(folder: Path) -> dict[str, dict[int, float | str]]:
    """Return what TensorBoard shows: {tag: {step: value}}; where a session starts, later steps seen before go."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: dict[str, dict[int, float | str]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16  # the length and its checksum before the record, the record's own behind it
            if event.session_log.status == SessionLog.START:
                found = {tag: {s: v for s, v in seen.items() if s < event.step} for tag, seen in found.items()}
            for value in event.summary.value:
                seen = found.setdefault(value.tag, {})
                assert event.step not in seen, f"{value.tag} of step {event.step} is there twice"
                text = value.tensor.string_val
                seen[event.step] = text[0].decode() if text else value.simple_value
    return found


def test_event_files_hold_every_step_once_and_its_last_count(tmp_path: Path) -> None:
    run, manifest = Place(str(tmp_path)), run_manifest(tmp_path)
    lines, looks = [line(step) for step in (1, 2, 3, 4)], [look(0), look(2), look(4)]
    first = Follower("tensorboard", run, manifest)
    first.follow(lines[:2], looks[:1])
    first.follow(lines, looks)
    lines += [line(step, attempt=2) for step in (3, 4, 5)]  # two steps come again
    first.follow(lines, looks)
    first.close()
    looks += [look(4, attempt=2)]
    lines += [line(6, attempt=2)]
    second = Follower("tensorboard", run, manifest)  # a driver that came after it
    second.follow(lines, looks)
    lines += [line(step, attempt=3) for step in (6, 7)]
    second.follow(lines, looks)
    second.close()
    found = shown(tmp_path / "tensorboard")
    assert found["train/loss"] == {1: 11, 2: 12, 3: 23, 4: 24, 5: 25, 6: 36, 7: 37}
    assert found["validation/loss"] == {0: 5, 2: 7, 4: 14}
    assert found["train/tokens_per_second"][1] == 3000
    (answers,) = (found[tag] for tag in found if tag.startswith("validation/answers"))
    assert answers.keys() == {0, 2, 4} and "| a.png | what \\| who? | said at 4 | a cat |" in str(answers[4])


def test_a_look_is_told_after_the_step_it_follows(tmp_path: Path) -> None:
    follower = Follower("tensorboard", Place(str(tmp_path)), run_manifest(tmp_path))
    follower.follow([line(1)], [look(0), look(2)])  # the loop writes a look before the step's line
    follower.follow([line(1), line(1, attempt=2)], [look(0), look(2)])
    follower.follow([line(1), line(1, attempt=2), line(2, attempt=2)], [look(0), look(2), look(2, attempt=2)])
    follower.close()
    assert shown(tmp_path / "tensorboard")["validation/loss"] == {0: 5, 2: 12}


def test_events_of_a_run_in_a_store_are_put_there(tmp_path: Path) -> None:
    with bucket("events") as address:
        run = Place(address.format("run"))
        follower = Follower("tensorboard", run, run_manifest(tmp_path))
        follower.follow([line(1), line(2)], [])
        follower.close()
        for place in (run / "tensorboard").files():
            (tmp_path / place.name).write_bytes(place.read_bytes())
    assert shown(tmp_path)["train/loss"] == {1: 11, 2: 12}


def test_a_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "metrics.jsonl"))
    tail = Tail(place)
    assert tail.new() == []
    meter = Meter(place)
    meter.write(step=1)
    meter.write(step=2)
    with place.local.open("a") as file:
        file.write('{"step": 3')
    assert [entry["step"] for entry in tail.new()] == [1, 2]
    Meter(place).write(step=3)  # cuts the torn line off
    assert [entry["step"] for entry in tail.new()] == [3]
    assert tail.new() == []


def test_the_line_of_progress_says_what_there_is() -> None:
    lines = [line(step) for step in range(1, 11)]
    spent = account(lines, {1: 105.5}, [])
    assert note(lines, [], None) == "loss 20.000, 3,000 tokens/s, data wait 10%, 2 workers"
    for entry, mfu in zip(lines[-2:], (0.4, 0.426), strict=True):
        entry["mfu"] = mfu
    told = note(lines, [look(0), look(10)], spent)
    assert told == (
        "loss 20.000, validation 15.000, 3,000 tokens/s, MFU 41.3%, data wait 10%, goodput 47%, 2 workers"
    )


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_a_recipe_as_words_is_the_recipe_again(name: str) -> None:
    made = recipe.load(name)
    changes = [
        "data=shards/a b",
        'out="7"',
        "scale.workers=1:4",
        'scale.resources={"trainer": 1}',
        "tuning=qlora",
        "tuning.vision=lora",
        'watch.questions=[["a.png", "what?"]]',
        "data.max_tokens=8192",
        "optim.projector_lr=1e-5",
        "track=wandb",
    ]
    if made.model is None:
        changes += ["model.llm=a", "model.vision=b", "model.family=vicuna"]
    wanted = override(made, changes)
    assert override(made, words(wanted, made)) == wanted
    assert words(made, made) == []


def test_a_tracker_that_is_not_installed_names_the_extra() -> None:
    lacking = [name for name in tracks.TRACKERS if find_spec(tracks.TRACKERS[name].package) is None]
    assert "tensorboard" not in lacking
    for name in lacking:
        with pytest.raises(
            ValueError, match=rf"track={name} needs the package {name}; pip install 'rayllava\[{name}"
        ):
            tracks.check((name,))


def test_a_track_that_cannot_go_back_keeps_the_first_telling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracks, "TRACKERS", {"recorder": Tracker(_Recorder, package="json")})
    run, manifest = Place(str(tmp_path)), run_manifest(tmp_path)
    lines, looks = [line(1), line(2), line(3)], [look(0), look(2)]
    first = Follower("recorder", run, manifest)
    first.follow(lines, looks)
    lines += [line(2, attempt=2), line(3, attempt=2), line(4, attempt=2)]
    looks += [look(2, attempt=2)]
    first.follow(lines, looks)
    first.close()
    second = Follower("recorder", run, manifest)
    second.follow([*lines, line(5, attempt=2)], looks)
    second.close()
    assert _Recorder.told == [(1, 11), (2, 12), (3, 13), (0, 5), (2, 7), (4, 24), "end", (5, 25), "end"]
    assert _Recorder.opened == ["", "its id"], "a run goes on under its id"


class _Recorder:
    """Writes down what it is told, as W&B and MLflow would."""

    rewinds = False
    id = "its id"
    told: list[Any] = []
    opened: list[str] = []

    def __init__(self, folder: Place, manifest: RunManifest, id_: str) -> None:
        self.opened.append(id_)

    def scalars(self, step: int, values: dict[str, float], *, at: float) -> None:
        self.told.append((step, values.get("train/loss", values.get("validation/loss"))))

    def text(self, step: int, markdown: str, *, at: float) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None:
        self.told.append("end")


def test_mlflow_gets_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run, manifest = Place(str(tmp_path / "run")), run_manifest(tmp_path / "run")
    lines = [line(1), line(2), line(2, attempt=2), line(3, attempt=2)]
    for until in (2, 4):
        follower = Follower("mlflow", run, manifest)
        follower.follow(lines[:until], [look(0), look(2)])
        follower.close()
    client = mlflow.MlflowClient()
    (made,) = client.search_runs([client.get_experiment_by_name("rayllava").experiment_id])
    for name, wanted in {"train/loss": [11, 12, 23], "validation/loss": [5, 7]}.items():
        assert [metric.value for metric in client.get_metric_history(made.info.run_id, name)] == wanted


def test_numbers_appear_among_rays_metrics(ray_local: None) -> None:
    from urllib.request import urlopen

    import ray

    from rayllava.train.gauges import Gauges

    Gauges("mine").set({"step": 17, "mfu": None, "goodput": 0.75})
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline, text = time.monotonic() + 30, ""
    while "rayllava_goodput{" not in text:
        assert time.monotonic() < deadline, "the gauges did not appear within half a minute"
        time.sleep(0.5)
        text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    samples = [row for row in text.splitlines() if row.startswith("ray_rayllava_")]
    values = {row.split("{")[0]: float(row.split()[-1]) for row in samples if 'run="mine"' in row}
    assert values == {"ray_rayllava_step": 17.0, "ray_rayllava_goodput": 0.75}
