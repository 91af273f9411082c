"""What the loop does with the steps it is fed: it counts what it computes, continues exactly, and stops in time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayllava import recipe
from rayllava.checkpoint.run import RunManifest, write_run
from rayllava.place import Place
from rayllava.recipe import ModelSpec, Projector, SaveSpec
from rayllava.train import launch
from rayllava.train.audit import audit
from rayllava.train.meter import read_lines
from tests.train import training
from tests.train.ranks import begin_ranks, run_ranks
from tests.train.test_elastic import weights_of, words

WHOLE = "tests.train.training:whole_run"


def prepared(parts: ModelSpec, shards: Path, out: Path, *changes: str, steps: int) -> RunManifest:
    given = [*words(parts, shards, out, "lora", 2), "data.atom=4", f"data.epochs={steps}", *changes]
    return launch.prepare(recipe.override(recipe.load("tiny.finetune"), given))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("", "exactly once: 60 samples x 3 epochs"),
        ("drop", "samples that were left out: 1"),
        ("double", "samples that were counted too often: 1"),
    ],
)
def test_a_sample_that_is_lost_or_doubled_inside_the_stream_fails_the_audit(
    spoil: str, said: str, parts: ModelSpec, dialogues: Path, tmp_path: Path
) -> None:
    manifest = prepared(parts, dialogues, tmp_path / "run", steps=3)
    run_ranks(WHOLE, 1, {"run": manifest.recipe.out, "spoil": spoil})
    found = audit(Place(manifest.recipe.out))
    assert found.passed == (not spoil), found.text()
    assert said in found.text()


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_killed_and_continued_by_as_many_ranks_has_the_same_bits(
    zero: int, parts: ModelSpec, dialogues: Path, tmp_path: Path
) -> None:
    changes = ["save.every=4", f"scale.zero={zero}"]
    whole, killed = (prepared(parts, dialogues, tmp_path / name, *changes, steps=12) for name in ("whole", "killed"))
    run_ranks(WHOLE, 2, {"run": whole.recipe.out})
    lines = Place(killed.recipe.out) / "metrics.jsonl"
    ranks = begin_ranks(WHOLE, 2, {"run": killed.recipe.out})
    while not (steps := read_lines(lines)) or steps[-1]["step"] < 7:
        assert all(rank.poll() is None for rank in ranks), "it ended before it was killed"
        time.sleep(0.02)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
        rank.communicate()
    run_ranks(WHOLE, 2, {"run": killed.recipe.out})
    redone = [line["step"] for line in read_lines(lines) if line["attempt"] == 2]
    assert redone[0] in (5, 9) and redone[-1] == 12, "it went on from a checkpoint"
    weights, others = (weights_of(Path(run.recipe.out), 12) for run in (whole, killed))
    assert weights.keys() == others.keys() and len(weights) > 20
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_loss_that_is_no_number_stops_before_the_weights_move_and_names_its_sample(
    parts: ModelSpec, tmp_path: Path
) -> None:
    """The third sample of an atom of step 3, on the second of two ranks, holds a token without a number."""
    token = 3
    llm = poison(Path(parts.llm), tmp_path / "llm", token)
    made = training.recipe(parts.but(llm=str(llm)), 2, tuning=Projector())
    made = made.but(out=str(tmp_path / "run"), save=SaveSpec(every=1))
    run = Place(made.out)
    write_run(run, RunManifest(recipe=made, processor=training.SPEC, shards_digest="", num_steps=3))
    first, second = run_ranks("tests.train.training:poisoned", 2, {"run": made.out, "token": token})
    assert first["said"] == second["said"]
    assert first["said"].startswith(
        "loss is nan at step 3, from samples 20, 21, 22, 23; the weights are those of step 2; "
    )
    assert first["same"] and second["same"] and first["num"] + second["num"] == 4


def poison(folder: Path, target: Path, token: int) -> Path:
    """Copy a language model with room for two new tokens, whose embedding of one token is no number."""
    import shutil

    from transformers import LlamaForCausalLM

    shutil.copytree(folder, target)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(384)
    model.save_pretrained(target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
