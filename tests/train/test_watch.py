"""Looking at a model while it trains: what is seen is right, and nobody could tell from the training."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rayllava import durable, recipe
from rayllava.checkpoint.run import RunManifest
from rayllava.data.shards import ROW_FILES, Shard, ShardManifest, ShardReader, write_parquet
from rayllava.model.build import read_tensors
from rayllava.place import Place
from rayllava.prompt.encode import Processor
from rayllava.recipe import ModelSpec
from rayllava.records import Request, Sample, Turn
from rayllava.train import launch, watch
from rayllava.train.meter import read_lines, read_metrics
from tests.train.ranks import run_ranks
from tests.train.test_launch import words

SAMPLES = 13
"""Seven batches of two samples, the last of one: an odd number for two ranks."""

KINDS: dict[str, list[str]] = {
    "full": ["scale.zero=3", "scale.checkpointing=true"],
    "lora": ["scale.zero=2", "tuning=lora", "tuning.dropout=0.1"],
    "qlora": [
        "scale.zero=3",
        "scale.dtype=bfloat16",
        "tuning=qlora",
        "tuning.r=4",
        "tuning.vision=lora",
        "scale.checkpointing=true",
    ],
    "plain": ["scale.zero=0"],
    "half": ["scale.zero=2", "scale.dtype=bfloat16"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder of 24 little dialogues, two in three with a picture, made without Ray."""
    folder = tmp_path_factory.mktemp("shards")
    rows = []
    for number in range(24):
        images, question = (), "what is shown in this image?"
        if number % 3:
            images, question = (picture(number),), f"<image>\n{question}"
        turns = Turn("user", question), Turn("assistant", f"the digit {number}")
        rows.append((Sample(str(number), turns, images), {"source": "mine", "line": number, "copy": 0}))
    path = folder / "shard-0.parquet"
    write_parquet(path, rows)
    facts = [[len(sample.images), sum(len(turn.text) for turn in sample.turns)] for sample, _ in rows]
    for (name, dtype), values in zip(ROW_FILES.items(), zip(*facts, strict=True), strict=True):
        np.save(folder / f"{name}.npy", np.array(values, dtype))
    made = Shard(path.name, len(rows), 2, durable.digest(path))
    ShardManifest(
        dir=Place(str(folder)),
        shards=(made,),
        row_files={},
        rows_per_group=16,
        origin={},
        counts={"samples": len(rows)},
        mended={},
        digest=made.digest,
    ).save()
    return folder


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(20 + seed, 30, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def prepared(parts: ModelSpec, shards: Path, out: Path, kind: str, *more: str) -> RunManifest:
    given = [*words(parts, shards, out), "data.global_batch=4", "data.epochs=1", "save.every=2", "save.keep=9"]
    given += [*KINDS[kind], *more]
    return launch.prepare(recipe.override(recipe.load("tiny.finetune"), given))


def looking(shards: Path) -> list[str]:
    return ["watch.every=2", f"watch.shards={shards}", f"watch.samples={SAMPLES}", "watch.max_new_tokens=7"]


def trained(parts: ModelSpec, shards: Path, folder: Path, groups: dict[int, list[str]]) -> dict[str, Path]:
    """Return finished runs of six steps by "W/kind/seen" and "W/kind/unseen"; a group starts once for all of its."""
    found: dict[str, Path] = {}
    for world_size, kinds in groups.items():
        tasks: list[dict[str, Any]] = []
        for kind in kinds:
            for name, more in {"seen": looking(shards), "unseen": []}.items():
                out = folder / f"{world_size}-{kind}-{name}"
                prepared(parts, shards, out, kind, *more)
                found[f"{world_size}/{kind}/{name}"] = out
                tasks.append({"run": str(out), "again": 4 if kind == "full" and name == "seen" else None})
        run_ranks("tests.train.watching:train", world_size, tasks)
    return found


@pytest.fixture(scope="module")
def runs(parts: ModelSpec, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trained(parts, shards, tmp_path_factory.mktemp("watched"), {2: ["full"]})


@pytest.fixture(scope="module")
def more_runs(parts: ModelSpec, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trained(
        parts, shards, tmp_path_factory.mktemp("more"), {2: ["qlora", "lora", "plain"], 1: ["full", "half"]}
    )


def check_bits(seen: Path, unseen: Path) -> None:
    ours, theirs = (
        [(line["loss"], line["grad_norm"]) for line in read_metrics(Place(str(run / "metrics.jsonl")))]
        for run in (seen, unseen)
    )
    assert ours == theirs and len(ours) == 6
    same, plain = (dict(read_tensors(run / "checkpoints" / "step-000006", "")) for run in (seen, unseen))
    assert same.keys() == plain.keys() and all(torch.equal(same[name], plain[name]) for name in plain)
    assert plain and not (unseen / "watch.jsonl").exists()


def test_a_run_that_is_looked_at_has_the_bits_of_one_that_is_not(runs: dict[str, Path]) -> None:
    check_bits(runs["2/full/seen"], runs["2/full/unseen"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2/qlora", "2/lora", "2/plain", "1/full", "1/half"])
def test_looking_moves_no_bit_of_any_other_run(kind: str, more_runs: dict[str, Path]) -> None:
    check_bits(more_runs[f"{kind}/seen"], more_runs[f"{kind}/unseen"])


def test_looks_come_before_the_first_step_every_so_many_and_after_the_last(runs: dict[str, Path]) -> None:
    looks = read_lines(Place(str(runs["2/full/seen"] / "watch.jsonl")))[:4]
    assert [look["step"] for look in looks] == [0, 2, 4, 6]
    lines = read_lines(Place(str(runs["2/full/seen"] / "metrics.jsonl")))[:6]
    assert [line["watch_seconds"] > 0 for line in lines] == [True, True, False, True, False, True]
    assert all(line["watch_seconds"] + line["data_seconds"] < line["seconds"] for line in lines)
    assert {look["num_samples"] for look in looks} == {SAMPLES}


def test_a_continued_run_looks_again_only_after_steps_that_it_does_again(runs: dict[str, Path]) -> None:
    looks = read_lines(Place(str(runs["2/full/seen"] / "watch.jsonl")))
    assert [(look["attempt"], look["step"]) for look in looks] == [(1, 0), (1, 2), (1, 4), (1, 6), (2, 6)]
    assert looks[-1]["loss"] == pytest.approx(looks[-2]["loss"], rel=1e-5)


def test_the_loss_and_the_answers_are_those_of_the_trained_model(runs: dict[str, Path]) -> None:
    check_look(runs["2/full/seen"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2/lora", "1/full"])
def test_loss_and_answers_of_any_other_run_are_those_of_its_model(kind: str, more_runs: dict[str, Path]) -> None:
    check_look(more_runs[f"{kind}/seen"])


def check_look(run: Path) -> None:
    from rayllava.generate.engine import Engine
    from rayllava.model.build import result
    from rayllava.model.forward import LossModel, tensors
    from rayllava.prompt.collate import collate

    llava, manifest = result(Place(str(run)))
    processor = Processor(manifest.processor, run / "tokenizer")
    model = LossModel(llava, manifest.processor).eval()
    samples = ShardReader(manifest.recipe.watch.shards).read(range(SAMPLES))
    batches = [
        collate([processor.encode(sample)], pad_token_id=manifest.processor.pad_token_id) for sample in samples
    ]
    with torch.no_grad():
        total = sum(float(model(**tensors(batch, torch.device("cpu")))) for batch in batches)
    last = read_metrics(Place(str(run / "watch.jsonl")))[-1]
    assert last["num_targets"] == sum(batch.num_targets for batch in batches)
    assert last["loss"] == pytest.approx(total / last["num_targets"], rel=1e-5)

    asked = watch.asked(manifest.recipe.watch, processor)
    assert len(asked) == 4 and {len(one.sample.images) for one in asked} == {0, 1}
    requests = [
        Request(str(number), one.sample.turns, one.sample.images, max_new_tokens=7)
        for number, one in enumerate(asked)
    ]
    said = dict.fromkeys("0123", "")
    for delta in Engine(llava, processor).generate(requests):
        said[delta.id] += delta.text
    assert [answer["answer"] for answer in last["answers"]] == [text.strip() for text in said.values()]
    assert all(answer["reference"].startswith("the digit ") for answer in last["answers"])
    assert all(answer["question"] == "what is shown in this image?" for answer in last["answers"])


def test_questions_of_ones_own_are_asked_instead(parts: ModelSpec, shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(picture(1))
    questions = json.dumps([[str(file), "how many?"], ["", "what is a digit?"]])
    manifest = prepared(parts, shards, tmp_path / "run", "plain", f"watch.questions={questions}")
    processor = Processor(manifest.processor, tmp_path / "run" / "tokenizer")
    asked = watch.asked(manifest.recipe.watch, processor)
    assert [(one.source, one.question, one.reference) for one in asked] == [
        (str(file), "how many?", ""),
        ("", "what is a digit?", ""),
    ]
    assert asked[0].sample.images == (picture(1),) and asked[1].sample.images == ()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("watch.every=0", r"^watch.every=0: input should be greater than or equal to 1"),
        ("watch.shards={tmp}", r"^watch.shards=.* is not a shard folder \(no manifest.json\); make one with jobs/sh"),
        ('watch.questions=[["{tmp}/no.png", "what?"]]', r"^watch.questions=.*no.png cannot be asked \(No such file"),
        ('watch.questions=[["{file}", "what?"]]', r"^watch.questions=.*file cannot be asked \(image 1 of 1: "),
        ('watch.questions=["what?"]', r"^watch.questions.0=.*: input should be a valid tuple"),
        ("track=nobody", r"no tracker 'nobody'; there are: .*tensorboard"),
    ],
)
def test_what_cannot_be_looked_at_is_named_before_anything_is_written(
    word: str, said: str, parts: ModelSpec, shards: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"no picture")
    with pytest.raises((ValueError, LookupError)) as caught:
        prepared(parts, shards, tmp_path / "run", "plain", word.format(tmp=tmp_path, file=file))
    text = str(caught.value.args[0])
    assert re.search(said, text), text
    assert "\n" not in text
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_looking_may_change_when_a_run_is_continued(parts: ModelSpec, shards: Path, tmp_path: Path) -> None:
    prepared(parts, shards, tmp_path / "run", "plain")
    again = prepared(parts, shards, tmp_path / "run", "plain", *looking(shards))
    assert again.recipe.watch.samples == SAMPLES
    with pytest.raises(ValueError, match=r"watch.shards=.* is not a shard folder"):
        prepared(parts, shards, tmp_path / "run", "plain", f"watch.shards={tmp_path}")
