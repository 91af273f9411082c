"""The main job on an embedded default: from handwritten digits to an answer over HTTP, phase by phase.

    pictures -> parts -> shards -> pretrain -> finetune -> proof -> evaluate (x3) -> serve -> report

A finished phase leaves a note in RUN/phases and is not done again; a phase that was cut off is done again or,
where it is a training run or an evaluation, continued.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayllava import durable, recipe, versions
from rayllava.demo.report import write_report
from rayllava.recipe import Recipe
from rayllava.records import IMAGE_MARK, Request, Turn

log = logging.getLogger(__name__)

OPEN, YES_NO = "textvqa", "pope"

MAX_LOGIT_DIFF = 1e-4
"""Between the trained model and its export in plain transformers, float32."""


class Quickstart:
    """The phases of one quickstart folder."""

    def __init__(self, out: Path, serve: Callable[..., Any]) -> None:
        self.out = out.absolute()
        self.serve = serve
        """`serving.local.serve_locally`; handed in because the platform never imports `serving`."""
        self.pictures = self.out / "pictures"
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Do what is not yet done and return the content of report.json."""
        self._phase("pictures", self._pictures)
        self._phase("parts", self._parts)
        self._phase("shards", self._shards)
        self._phase("pretrain", lambda: self._train("pretrain"))
        self._phase("finetune", lambda: self._train("finetune"))
        proof = self._phase("proof", self._proof)
        scores = {
            "pretrain": self._phase("evaluate pretrain", lambda: self._evaluate("pretrain", "none")),
            "finetune": self._phase("evaluate finetune", lambda: self._evaluate("finetune", "none")),
            "nf4": self._phase("evaluate nf4", lambda: self._evaluate("finetune", "nf4")),
        }
        served = self._phase("serve", self._serve)
        return self._report(scores, proof, served)

    # -- phases ------------------------------------------------------------------------------------------

    def _pictures(self) -> None:
        from rayllava.demo.pictures import make_pictures

        make_pictures(self.pictures)

    def _parts(self) -> dict[str, Any]:
        import ray

        return ray.get(ray.remote(num_cpus=2)(_warm_up).remote(str(self.pictures), str(self.out / "parts")))

    def _shards(self) -> None:
        from rayllava.data.ingest import ShardSpec
        from rayllava.data.sharding import write_shards
        from rayllava.place import Place

        train, spec = self.pictures / "train", ShardSpec(images=str(self.pictures / "train" / "images"))
        for stage in ("pretrain", "finetune"):
            out = Place(str(self.out / "shards" / stage))
            write_shards("llava", Place(str(train / f"{stage}.json")), out, spec=spec)

    def _train(self, stage: str) -> dict[str, Any]:
        from rayllava.train import launch

        manifest = launch.train(launch.prepare(self.recipe(stage)))
        return {"steps": manifest.num_steps}

    def _proof(self) -> dict[str, Any]:
        """Compare the trained model with its export as plain transformers loads it."""
        import ray

        rows = ray.get(ray.remote(num_cpus=1)(_compare).remote(str(self.out / "finetune")))
        worst = max(row["max_abs_logit_diff"] for row in rows.values())
        if worst > MAX_LOGIT_DIFF:
            raise ValueError(f"the export's logits differ by {worst:.1e}, more than {MAX_LOGIT_DIFF}: {rows}")
        return {"max_abs_logit_diff": worst, "prompts": rows}

    def _evaluate(self, stage: str, quant: str) -> dict[str, Any]:
        from rayllava.evals.fanout import evaluate

        name = stage if quant == "none" else quant
        scores = evaluate(
            self.out / stage / "export",
            only=[OPEN, YES_NO],
            data_dir=self.pictures / "eval",
            out_dir=self.out / "evals" / name,
            quant=quant,
            num_engines=2,
        )
        return {benchmark: score.metrics for benchmark, score in scores.items()}

    def _serve(self) -> dict[str, Any]:
        """Ask the served NF4 model and the offline engine about held-out pictures."""
        from openai import OpenAI

        from rayllava.generate.ask import messages

        asked = self.questions(OPEN)[::70][:6]
        offline = _offline(self.out / "finetune" / "export", asked, self.pictures / "eval" / OPEN)
        answers = []
        with self.serve(self.out / "finetune" / "export", quant="nf4") as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            model = client.models.list().data[0].id
            for question, expected in zip(asked, offline, strict=True):
                picture = (self.pictures / "eval" / OPEN / "train_images" / question["image"]).read_bytes()
                turns = (Turn("user", f"{IMAGE_MARK}\n{question['text']}"),)
                options: dict[str, Any] = {
                    "model": model,
                    "messages": messages(turns, (picture,)),
                    "temperature": 0,
                    "max_tokens": 16,
                }
                plain = client.chat.completions.create(**options).choices[0].message.content
                chunks = client.chat.completions.create(**options, stream=True)
                streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
                if not plain == streamed == expected:
                    raise ValueError(f"served {plain!r}, streamed {streamed!r}, offline {expected!r} differ")
                answers.append({"image": question["image"], "text": question["text"], "answer": plain})
        return {"answers": answers, "streamed_equals_plain": True, "served_equals_offline": True}

    # -- what they share ---------------------------------------------------------------------------------

    def recipe(self, stage: str) -> Recipe:
        """Return tiny.pretrain or tiny.finetune on this folder."""
        words = [f"data={self.out / 'shards' / stage}", f"out={self.out / stage}"]
        if stage == "pretrain":
            words += [f"model.{part}={self.out / 'parts' / part}" for part in ("llm", "vision")]
        else:
            words.append(f"init_from={self.out / 'pretrain'}")
        return recipe.override(recipe.load(f"tiny.{stage}"), words)

    def questions(self, benchmark: str) -> list[dict[str, Any]]:
        """Return the lines of a benchmark's question file."""
        name = {OPEN: "llava_textvqa_val_v051_ocr.jsonl", YES_NO: "llava_pope_test.jsonl"}[benchmark]
        return [json.loads(line) for line in (self.pictures / "eval" / benchmark / name).read_text().splitlines()]

    def _phase(self, name: str, work: Callable[[], Any]) -> Any:
        """Return what a phase found: from its note when it is done, by doing it otherwise."""
        note = self.out / "phases" / f"{name.replace(' ', '-')}.json"
        if note.exists():
            done = json.loads(note.read_text())
            log.info("%s: done before in %.0f s", name, done["seconds"])
        else:
            log.info("%s ...", name)
            started = time.monotonic()
            result = work()
            done = {"seconds": round(time.monotonic() - started, 1), "result": result}
            durable.write_json(note, done)
            log.info("%s: %.0f s", name, done["seconds"])
        self.seconds[name] = done["seconds"]
        return done["result"]

    def _report(self, metrics: dict[str, Any], proof: Any, served: Any) -> dict[str, Any]:
        chance = chances(self.pictures / "eval")
        scores: dict[str, dict[str, Any]] = {"open_answer": {}, "yes_no": {}}
        kinds: dict[str, dict[str, float]] = {}
        scores["open_answer"]["chance"] = chance["open_answer"]
        scores["yes_no"]["chance"] = chance["yes_no"]
        for column, found in metrics.items():
            scores["open_answer"][column] = round(found[OPEN]["accuracy"] / 100, 4)
            scores["yes_no"][column] = round(found[YES_NO]["accuracy"] / 100, 4)
            for key, value in found[OPEN].items():
                if key.startswith("accuracy."):
                    kinds.setdefault(key.removeprefix("accuracy."), {})[column] = round(value / 100, 4)
        for kind, row in kinds.items():
            kinds[kind] = {"chance": chance["kinds"][kind], **row}
        report = {
            "scores": scores,
            "kinds": kinds,
            "seconds": self.seconds,
            "total_seconds": round(sum(self.seconds.values()), 1),
            "proof": proof,
            "served": served,
            "versions": versions(),
        }
        durable.write_json(self.out / "report.json", report)
        write_report(self.out, report)
        return report


def chances(eval_dir: Path) -> dict[str, Any]:
    """Return the score of the best constant answer: over all yes/no questions, and per kind of open question."""
    truths = json.loads((eval_dir / OPEN / "TextVQA_0.5.1_val.json").read_text())["data"]
    truth = {(entry["image_id"], entry["question"].lower()): entry["answers"][0] for entry in truths}
    by_kind: dict[str, list[str]] = {}
    for line in (eval_dir / OPEN / "llava_textvqa_val_v051_ocr.jsonl").read_text().splitlines():
        question = json.loads(line)
        text = question["text"].splitlines()[0].lower()
        by_kind.setdefault(question["category"], []).append(truth[question["question_id"], text])
    hits = {kind: max(answers.count(a) for a in set(answers)) for kind, answers in by_kind.items()}
    labels = [
        json.loads(line)["label"]
        for path in sorted((eval_dir / YES_NO / "coco").glob("coco_pope_*.json"))
        for line in path.read_text().splitlines()
    ]
    return {
        "open_answer": round(sum(hits.values()) / sum(map(len, by_kind.values())), 4),
        "yes_no": round(max(labels.count("yes"), labels.count("no")) / len(labels), 4),
        "kinds": {kind: round(hits[kind] / len(answers), 4) for kind, answers in by_kind.items()},
    }


def _warm_up(pictures_dir: str, out_dir: str) -> dict[str, Any]:
    from rayllava import log as log_
    from rayllava.demo.warmup import warm_up

    log_.start()
    return warm_up(Path(pictures_dir), Path(out_dir))


def _compare(run_dir: str) -> dict[str, Any]:
    from rayllava.checkpoint.layouts import StoredModel
    from rayllava.checkpoint.manifest import read_model_manifest
    from rayllava.convert import prove
    from rayllava.model.build import result
    from rayllava.place import Place

    folder = Path(run_dir)
    trained, _ = result(Place(run_dir))
    spec = read_model_manifest(folder / "export").processor
    stored = StoredModel.of(trained, folder / "tokenizer", num_own_rows=trained.num_own_rows)
    prompts = prove.fixed_prompts()
    ours = prove.our_side(stored, spec, prompts)
    theirs = prove.plain_side(folder / "export", prompts, ours)
    return prove.compare_logits(prompts, ours, theirs, rows=stored.num_own_rows)


def _offline(model_dir: Path, questions: list[dict[str, Any]], folder: Path) -> list[str]:
    """Return the answers of the NF4 engine without a server, one question at a time."""
    import ray

    requests = [
        Request(
            id=str(number),
            turns=(Turn("user", f"{IMAGE_MARK}\n{question['text']}"),),
            images=((folder / "train_images" / question["image"]).read_bytes(),),
            max_new_tokens=16,
        )
        for number, question in enumerate(questions)
    ]
    return ray.get(ray.remote(num_cpus=1)(_answers).remote(str(model_dir), requests))


def _answers(model_dir: str, requests: list[Request]) -> list[str]:
    from rayllava.generate.load import load_engine

    engine = load_engine(Path(model_dir), quant="nf4", threads=1)
    return ["".join(delta.text for delta in engine.generate([request])) for request in requests]
