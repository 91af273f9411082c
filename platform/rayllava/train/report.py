"""RUN/report.html and RUN/recipe.json: a run that explains itself, from its own files alone."""

from __future__ import annotations

import html
import io
import json
import shlex
from itertools import pairwise
from typing import Any

from rayllava import copies
from rayllava.checkpoint.run import RunManifest
from rayllava.page import data_url, drawing, page, table
from rayllava.place import Place
from rayllava.prompt.encode import Processor
from rayllava.prompt.pixels import decode
from rayllava.recipe import Recipe, load
from rayllava.spec import words
from rayllava.train import goodput, watch
from rayllava.train.goodput import Goodput
from rayllava.train.meter import read_lines, read_metrics

Line = dict[str, Any]

_COLOURS = {
    "useful": "#2a6f97",
    "data": "#e9c46a",
    "save": "#8ab17d",
    "watch": "#b5838d",
    "lost": "#b3261e",
    "restart": "#f4a261",
    "waiting": "#bbbbbb",
}
_NUM_LOOKS = 6
"""Answers to a question that are shown, of looks spread over the run."""


def write_recipe(run: Place, recipe: Recipe) -> None:
    """Write RUN/recipe.json: the command that starts such a run, and every knob."""
    tree = {"command": command(recipe), "recipe": recipe.model_dump(mode="json")}
    (run / "recipe.json").write_bytes(json.dumps(tree, indent=1, ensure_ascii=False).encode() + b"\n")


def command(recipe: Recipe) -> str:
    """Return the words that a shell would start the recipe with; empty for one that no file holds."""
    if not recipe.name:
        return ""
    job = "pretrain" if recipe.tuning.kind == "projector" else "finetune"
    return shlex.join(["python", f"jobs/{job}.py", recipe.name, *words(recipe, load(recipe.name))])


def write(run: Place, manifest: RunManifest) -> None:
    """Write RUN/report.html from what the run holds so far; it has done a step at least."""
    lines = read_lines(run / "metrics.jsonl")
    entries, looks = read_metrics(run / "metrics.jsonl"), read_metrics(run / watch.FILE)
    spent = goodput.measure(run, lines)
    assert spent is not None, f"{run} has done no step"
    recipe = manifest.recipe
    attempts = len({line["attempt"] for line in lines})
    sizes = sorted({entry["world_size"] for entry in entries})
    body = f"""<h1>{html.escape(run.name)}</h1>
<p>{html.escape(recipe.name or "a recipe without a name")}: {entries[-1]["step"]} of {manifest.num_steps} steps,
{sum(entry["num_samples"] for entry in entries):,} samples, {attempts} attempt{"s" * (attempts > 1)} on
{" and ".join(map(str, sizes))} workers, begun {html.escape(manifest.created)}.</p>
<h2>Curves</h2>
<p>Over optimizer steps. An attempt began at each dotted line; of a step that was done again the last counts.</p>
{drawing(_curves(entries, looks), "loss, learning rate, speed and workers over steps")}
<h2>Time</h2>
{drawing(_time(spent), "shares of the run's time")}
<p>{html.escape(spent.text())}</p>
{_answers(looks, _pictures(run, manifest) if looks else {})}
<h2>Recipe</h2>
<pre>{html.escape(command(recipe))}</pre>
<details><summary>every knob</summary><pre>{html.escape(recipe.model_dump_json(indent=1))}</pre></details>
<h2>Versions</h2>
{table(["package", "version"], [[html.escape(k), html.escape(v)] for k, v in manifest.versions.items()])}"""
    (run / "report.html").write_bytes(page(f"{run.name} - RayLLaVA", body).encode())


def _curves(entries: list[Line], looks: list[Line]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), constrained_layout=True)
    (loss, rate), (tokens, workers) = figure.subplots(2, 2, sharex=True)
    steps = [entry["step"] for entry in entries]
    loss.plot(steps, [entry["loss"] for entry in entries], color="#2a6f97", alpha=0.3)
    loss.plot(steps, _smooth([entry["loss"] for entry in entries]), color="#2a6f97", label="training")
    seen = [look for look in looks if look["loss"] is not None]
    if seen:
        steps_seen, losses = [look["step"] for look in seen], [look["loss"] for look in seen]
        loss.plot(steps_seen, losses, color="#b3261e", marker="o", markersize=3, label="validation")
    loss.set(title="loss per target token", yscale="log")
    loss.legend()
    rate.plot(steps, [entry["lr"] for entry in entries], color="#2a6f97")
    rate.set(title="learning rate")
    speeds = [entry["tokens_per_second"] for entry in entries]
    tokens.plot(steps, speeds, color="#2a6f97", alpha=0.3)
    tokens.plot(steps, _smooth(speeds), color="#2a6f97")
    tokens.set(title="tokens per second", xlabel="step", ylim=(0, None))
    workers.step(steps, [entry["world_size"] for entry in entries], color="#2a6f97", where="mid")
    workers.set(title="workers", xlabel="step", ylim=(0, None))
    for axis in (loss, rate, tokens, workers):
        axis.grid(alpha=0.3)
        for before, after in pairwise(entries):
            if before["attempt"] != after["attempt"]:
                axis.axvline(after["step"], color="#888888", linestyle=":", linewidth=1)
    return figure


def _time(spent: Goodput) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4), constrained_layout=True)
    axis, left = figure.subplots(), 0.0
    for name, colour in _COLOURS.items():
        seconds = getattr(spent, name)
        axis.barh(0, seconds, left=left, color=colour, label=f"{name} {seconds / max(1e-9, spent.wall):.0%}")
        left += seconds
    axis.set(yticks=[], xlabel="seconds")
    axis.legend(ncols=len(_COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=8)
    return figure


def _smooth(values: list[float]) -> list[float]:
    """Return a running mean that forgets over a fiftieth of the values, unbiased at its beginning."""
    kept, total, weight = 1 - 1 / max(1.0, len(values) / 50), 0.0, 0.0
    found = []
    for value in values:
        total, weight = kept * total + value, kept * weight + 1
        found.append(total / weight)
    return found


def _answers(looks: list[Line], pictures: dict[tuple[str, str], str]) -> str:
    """Return what was answered to every question of the last look, at looks spread over the run."""
    if not looks or not looks[-1]["answers"]:
        return ""
    stride = -(-len(looks) // _NUM_LOOKS)
    shown = looks[::-1][::stride][::-1]
    parts = ["<h2>Sample answers</h2>"]
    for asked in looks[-1]["answers"]:
        key = asked["source"], asked["question"]
        rows = [
            [str(look["step"]), html.escape(answer["answer"])]
            for look in shown
            for answer in look["answers"]
            if (answer["source"], answer["question"]) == key
        ]
        if asked["reference"]:
            rows.append(["right", f"<b>{html.escape(asked['reference'])}</b>"])
        parts.append(
            f'<div class="asked"><figure>{pictures.get(key, "")}<figcaption>{html.escape(asked["source"])}'
            f"</figcaption></figure><div>{html.escape(asked['question'])}"
            f"{table(['step', 'answer'], rows)}</div></div>"
        )
    return "\n".join(parts)


def _pictures(run: Place, manifest: RunManifest) -> dict[tuple[str, str], str]:
    """Return the first picture of every question that is asked now, by where it came from and the question."""
    processor = Processor(manifest.processor, copies.local(run / "tokenizer"))
    return {
        (one.source, one.question): f'<img alt="picture" src="{_small(one.sample.images[0])}">'
        for one in watch.asked(manifest.recipe.watch, processor)
        if one.sample.images
    }


def _small(content: bytes) -> str:
    from PIL import Image

    image = Image.fromarray(decode(content))
    image.thumbnail((400, 400))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return data_url(buffer.getvalue(), "jpeg")
