"""Evaluate a model on benchmarks, the questions fanned out over engines.

    items not answered yet -> chunks --Fleet--> answers -> OUT/BENCHMARK/predictions.jsonl
                                  the last one is there -> OUT/BENCHMARK/score.json -> OUT/scores.json

The same call again asks only what is missing. A benchmark that fails is a row that says so; the others go on.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rayllava import durable
from rayllava.checkpoint.manifest import local_model
from rayllava.evals.benchmark import BENCHMARKS, Benchmark, Item
from rayllava.evals.fleet import Chunk, Engine, Fleet, Load
from rayllava.evals.run import Journal, claim, model_digest, score_json, score_run
from rayllava.place import Place
from rayllava.progress import Progress
from rayllava.records import Prediction, Score
from rayllava.spec import Spec

log = logging.getLogger(__name__)

MAX_CHUNK = 64
MIN_CHUNK = 8
"""Questions an engine gets at once: many keep its batch full, few let all engines end together."""


class EngineSpec(Spec):
    """The engines of an evaluation. Only `quant` may change an answer."""

    quant: Literal["none", "nf4", "int8"] = "none"
    """Precision of the language model's weights."""
    engines: int = Field(1, ge=1)
    """How many work at once."""
    threads: int = Field(1, ge=1)
    """CPUs of each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU each when the cluster has any."""


def evaluate(
    model: Path | str,
    *,
    only: list[str],
    data_dir: Path,
    out_dir: Path,
    quant: str = "none",
    num_engines: int = 1,
    threads: int = 1,
    device: str = "auto",
    load: Load | None = None,
) -> dict[str, Score]:
    """Return the score of each benchmark in `only`; the process is connected to Ray.

    `load` replaces the engine that rayllava.generate builds from the model. Raises ValueError naming the
    benchmarks that failed, after everything else is done and written.
    """
    import ray

    for key in only:
        BENCHMARKS[key]  # an unknown one ends it here
    durable.check_writable(out_dir)
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    load = load or partial(_load, str(model), quant=quant, device=device, threads=threads)
    digest = model_digest(local_model(str(model)))
    owner = {"model": str(Place(str(model))), "model_digest": digest, "quant": quant}
    with ExitStack() as stack:
        round_ = _Round(only, data_dir, out_dir, owner, stack)
        with round_.fence():
            num = min(num_engines, round_.num_open)
            num_gpus = 1 if device == "cuda" else 0
            with Fleet(load, num_engines=num, num_cpus=threads, num_gpus=num_gpus) as fleet:
                for key, answer in fleet.ask(partial(round_.pull, num)):
                    round_.take(key, answer)
    if round_.failed:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in round_.failed.items())
        raise ValueError(f"{len(round_.failed)} of {len(only)} benchmarks failed: {reasons}")
    return {key: round_.scores[key] for key in only}


def _load(model: str, *, quant: str, device: str, threads: int) -> Engine:
    from rayllava.generate.load import load_engine

    return load_engine(model, quant=quant, device=device, threads=threads)


class _Round:
    """All benchmarks of one call, and what became of each."""

    def __init__(
        self, only: list[str], data_dir: Path, out_dir: Path, owner: dict[str, Any], stack: ExitStack
    ) -> None:
        self.data_dir = data_dir
        self.out_dir = out_dir
        self.open: dict[str, _Exam] = {}
        self.scores: dict[str, Score] = {}
        self.failed: dict[str, str] = {}
        self.progress = stack.enter_context(Progress("answers"))
        for key in only:
            with self.fence(key):
                exam = _Exam(BENCHMARKS[key], data_dir, out_dir / key, owner)
                stack.enter_context(exam.journal)
                self.open[key] = exam
                self.progress.add(key, total=exam.num, done=exam.num - exam.num_open)
                self._finish(key)

    @property
    def num_open(self) -> int:
        return sum(exam.num_open for exam in self.open.values())

    def pull(self, num_engines: int) -> Chunk | None:
        """Return questions of the first benchmark that has some to ask."""
        for key in list(self.open):
            with self.fence(key):
                chunk = self.open[key].chunk(key, num_engines)
                if chunk:
                    return chunk
        return None

    def take(self, key: str, answer: Prediction | Exception) -> None:
        """Write an answer down, and score the benchmark when it was the last."""
        if key not in self.open:  # it failed; what other engines still had to say is asked again next time
            return
        with self.fence(key):
            if isinstance(answer, Exception):
                raise answer
            self.open[key].take(answer)
            self.progress.advance(key)
            self._finish(key)

    @contextmanager
    def fence(self, key: str = "") -> Iterator[None]:
        """Turn an error inside into a failed row: of this benchmark, else of all that are not finished."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, ValueError | LookupError | OSError):
                log.exception("%s failed", key or "the evaluation")
            reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split())
            for each in [key] if key else list(self.open):
                self.open.pop(each, None)
                self.failed[each] = reason
                self._write(each, {"status": "failed", "error": reason})

    def _finish(self, key: str) -> None:
        exam = self.open[key]
        if exam.num_open:
            return
        exam.journal.sync()
        if exam.journal.num_aborted:
            text = "%s: %d questions were given up; they count as wrong, the same command asks them again"
            log.warning(text, key, exam.journal.num_aborted)
        score = score_run(key, self.data_dir, self.out_dir / key)
        del self.open[key]
        self.scores[key] = score
        self._write(key, {"status": "done", **score_json(score)})
        log.info("%s: %s %.2f of %d questions", key, *score.primary, score.num)

    def _write(self, key: str, row: dict[str, Any]) -> None:
        """Put a row into OUT/scores.json; rows of other benchmarks, of an earlier call too, stay."""
        path = self.out_dir / "scores.json"
        rows = json.loads(path.read_text()) if path.is_file() else {}
        durable.write_json(path, rows | {key: row})


class _Exam:
    """One benchmark while it is asked."""

    def __init__(self, benchmark: Benchmark, data_dir: Path, run_dir: Path, owner: dict[str, Any]) -> None:
        self.benchmark = benchmark
        items = benchmark.listed(data_dir / benchmark.folder)
        asked = durable.digest_of([[item.id, item.text] for item in items])
        claim(
            run_dir,
            owner | {"profile": benchmark.profile, "max_new_tokens": benchmark.max_new_tokens, "questions": asked},
        )
        (run_dir / "score.json").unlink(missing_ok=True)
        self.journal = Journal(run_dir / "predictions.jsonl")
        self.num = len(items)
        open_items = [item for item in items if item.id not in self.journal.answers]
        self.num_open = len(open_items)
        self._groups = deque(_groups(open_items))
        self._num_unsent = len(open_items)

    def chunk(self, key: str, num_engines: int) -> Chunk | None:
        """Return the next questions, fewer at a time towards the end; None when all are out."""
        size = min(MAX_CHUNK, max(MIN_CHUNK, self._num_unsent // (2 * num_engines)))
        items: list[Item] = []
        while self._groups and len(items) < size:
            items += self._groups.popleft()
        self._num_unsent -= len(items)
        return Chunk(key, tuple(map(self.benchmark.question, items))) if items else None

    def take(self, prediction: Prediction) -> None:
        self.journal.write(prediction)
        self.num_open -= 1


def _groups(items: list[Item]) -> list[list[Item]]:
    """Gather the items of each group where its first one stands; an item without a group is one alone."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.group, "" if item.group else item.id), []).append(item)
    return list(groups.values())
