"""report.html: one self-contained page that shows what the quickstart did."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from rayllava import durable
from rayllava.page import data_url, drawing, page, table
from rayllava.place import Place
from rayllava.train.meter import read_metrics

_COLUMNS = {"chance": "chance", "pretrain": "after stage 1", "finetune": "after stage 2", "nf4": "NF4"}
_NUM_PICTURES = 24


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write OUT/report.html from what report.json says and the run folders beside it."""
    kinds = {f"&nbsp;&nbsp;&nbsp;{html.escape(kind)}": row for kind, row in report["kinds"].items()}
    open_answer, yes_no = report["scores"]["open_answer"], report["scores"]["yes_no"]
    scores = {"Open answers": open_answer, **kinds, "Yes or no": yes_no}
    total = report["total_seconds"]
    body = f"""<h1>RayLLaVA quickstart</h1>
<p>A very small LLaVA, trained from scikit-learn's handwritten digits to an OpenAI-compatible
endpoint in {total / 60:.1f} minutes. Everything below is about digits that no training step has seen.</p>
<h2>Scores</h2>
{table(["", *_COLUMNS.values()], [[name, *_cells(row)] for name, row in scores.items()])}
<h2>Loss</h2>
{_curves(out)}
<h2>Held-out pictures</h2>
<p>Answers of the finetuned model; <span class="bad">red</span> where they are wrong.</p>
<div class="wall">{_wall(out)}</div>
<h2>Served</h2>
<p>The NF4 model behind Ray Serve, asked by the openai client, once plain and once streaming; both equal the
offline engine's answer.</p>
{table(["picture", "question", "answer"], [_served(row) for row in report["served"]["answers"]])}
<h2>Export</h2>
<p>The exported Hugging Face folder, loaded by plain transformers, differs from the trained model by at most
{report["proof"]["max_abs_logit_diff"]:.1e} in any logit.</p>
<h2>Time</h2>
{table(["phase", "seconds"], [*_seconds(report["seconds"]), ["<b>total</b>", f"<b>{total:.0f}</b>"]])}
<h2>Versions</h2>
{table(["package", "version"], [[html.escape(k), html.escape(v)] for k, v in report["versions"].items()])}"""
    durable.write_text(out / "report.html", page("RayLLaVA quickstart", body))


def _cells(row: dict[str, float]) -> list[str]:
    return [f"{100 * row[column]:.1f} %" if column in row else "" for column in _COLUMNS]


def _seconds(seconds: dict[str, float]) -> list[list[str]]:
    return [[html.escape(name), f"{value:.0f}"] for name, value in seconds.items()]


def _served(row: dict[str, str]) -> list[str]:
    return [html.escape(row["image"]), html.escape(row["text"].splitlines()[0]), html.escape(row["answer"])]


def _curves(out: Path) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), constrained_layout=True)
    axes = figure.subplots(1, 2)
    stages = {"pretrain": "stage 1: projector", "finetune": "stage 2: projector and language model"}
    for axis, (stage, title) in zip(axes, stages.items(), strict=True):
        entries = read_metrics(Place(str(out / stage / "metrics.jsonl")))
        axis.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries], color="#2a6f97")
        axis.set(title=title, xlabel="step", ylabel="loss per target token", yscale="log")
        axis.grid(alpha=0.3, which="both")
    return drawing(figure, "loss curves")


def _wall(out: Path) -> str:
    """Return figures of held-out pictures with question, answer and truth."""
    from rayllava.evals.benchmarks.textvqa import PLUG
    from rayllava.evals.metrics import normalise_m4c
    from rayllava.evals.run import load_predictions

    folder = out / "pictures" / "eval" / "textvqa"
    predictions = load_predictions(out / "evals" / "finetune" / "textvqa" / "predictions.jsonl")
    truths = json.loads((folder / "TextVQA_0.5.1_val.json").read_text())["data"]
    questions = list(PLUG.questions(folder))
    figures = []
    stride = max(1, len(questions) // _NUM_PICTURES)
    stride += stride % 3 == 0  # the three kinds of questions take turns: show all of them
    for number in range(0, len(questions), stride):
        question, truth = questions[number], truths[number]["answers"][0]
        answer = predictions[question.id].text.strip()
        right = normalise_m4c(answer) == normalise_m4c(truth)
        figures.append(
            f'<figure><img alt="picture" src="{data_url(question.images[0], "jpeg")}"><figcaption>'
            f"{html.escape(question.text.splitlines()[0])}<br>"
            f'<b class="{"good" if right else "bad"}">{html.escape(answer)}</b>'
            f"{'' if right else f' (truth: {html.escape(truth)})'}</figcaption></figure>"
        )
    return "\n".join(figures[:_NUM_PICTURES])
