"""Ask and score, each alone.

ask     Question -> Request -> Delta, Delta, ... -> Prediction -> a line of predictions.jsonl, at once
score   predictions.jsonl -> Score -> score.json

    RUN_DIR/predictions.jsonl  the journal: whoever asks again continues it
    RUN_DIR/run.json           whose answers these are
    RUN_DIR/score.json         what they are worth
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rayllava import durable
from rayllava.evals.benchmark import BENCHMARKS
from rayllava.records import IMAGE_MARK, Delta, Prediction, Question, Request, Score, Turn

log = logging.getLogger(__name__)

Answer = Callable[[Iterable[Request]], Iterator[Delta]]
"""Whatever turns requests into pieces of answers, an engine's `generate` above all."""

SYNC_EVERY_S = 1.0


def ask(questions: Iterable[Question], answer: Answer, journal_path: Path) -> dict[str, Prediction]:
    """Ask what the journal does not hold yet, write every answer down as it comes, and return them all."""
    with Journal(journal_path) as journal:
        for prediction in predict((q for q in questions if q.id not in journal.answers), answer):
            journal.write(prediction)
        return dict(journal.answers)


def predict(questions: Iterable[Question], answer: Answer) -> Iterator[Prediction]:
    """Yield one prediction a question, in the order in which the answers end."""
    started: dict[str, float] = {}
    texts: dict[str, list[str]] = {}

    def requests() -> Iterator[Request]:
        for question in questions:
            started[question.id] = time.perf_counter()
            texts[question.id] = []
            yield request(question)

    for delta in answer(requests()):
        texts[delta.id].append(delta.text)
        if delta.finish:
            seconds = round(time.perf_counter() - started.pop(delta.id), 4)
            text = "".join(texts.pop(delta.id))
            yield Prediction(delta.id, text, delta.finish, delta.num_tokens, seconds)
    assert not started, f"the engine left {len(started)} requests open, {next(iter(started))} first"


def request(question: Question) -> Request:
    """Return a question as a greedy request of one user turn, its pictures in front."""
    # A mark in the text itself would stand for a picture that does not exist.
    text = IMAGE_MARK + "\n" if question.images else ""
    text = text * len(question.images) + question.text.replace(IMAGE_MARK, "")
    return Request(question.id, (Turn("user", text),), question.images, question.max_new_tokens)


class Journal:
    """predictions.jsonl while somebody asks: each answer is written once, when it is there.

    A killed process loses no line; a power cut those of the last second. A torn last line is dropped, so that
    its question is asked again. So is one whose answer the engine gave up.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.num_aborted = 0
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path} is being written by another process; wait for it or stop it") from None
        self.answers, num_bytes = _read(path)
        if num_bytes < path.stat().st_size:
            log.warning("dropped a torn last line of %s; its question is asked again", path)
        self._file.truncate(num_bytes)
        if num_bytes and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # all of the last line but its end was written
        self._synced = 0.0

    def write(self, prediction: Prediction) -> None:
        """Add an answer; an aborted one is counted only."""
        if prediction.finish == "abort":
            self.num_aborted += 1
            return
        assert prediction.id not in self.answers, f"{prediction.id} was answered twice"
        self.answers[prediction.id] = prediction
        line = json.dumps(dataclasses.asdict(prediction), ensure_ascii=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Make everything written survive a power cut."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sync()
        self._file.close()


def load_predictions(path: Path) -> dict[str, Prediction]:
    """Return the answers of a predictions.jsonl by id; a torn last line counts as not written."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; ask the questions first")
    return _read(path)[0]


def score_run(key: str, data_dir: Path, run_dir: Path) -> Score:
    """Score RUN_DIR/predictions.jsonl with the benchmark `key` and write RUN_DIR/score.json."""
    benchmark = BENCHMARKS[key]
    predictions = load_predictions(run_dir / "predictions.jsonl")
    score = benchmark.score(data_dir / benchmark.folder, predictions)
    owner_path = run_dir / "run.json"
    if owner_path.is_file():
        owner = json.loads(owner_path.read_text())
        decoding = score.decoding | {"quant": owner["quant"]}
        score = dataclasses.replace(score, model=owner["model"], decoding=decoding)
    durable.write_json(run_dir / "score.json", score_json(score))
    return score


def score_json(score: Score) -> dict[str, Any]:
    name, value = score.primary
    return dataclasses.asdict(score) | {"primary": {"name": name, "value": value}}


def claim(run_dir: Path, owner: dict[str, Any]) -> None:
    """Write down whose answers `run_dir` holds; ValueError when they are somebody else's.

    A model is who its digest says, wherever its folder lies.
    """
    path = run_dir / "run.json"
    if path.is_file():
        before = json.loads(path.read_text())
        for field in owner:
            if field != "model" and before.get(field) != owner[field]:
                raise ValueError(
                    f"{run_dir} holds answers with {field}={before.get(field)} of {before['model']}, not "
                    f"{field}={owner[field]}; give another out folder or delete this one"
                )
    elif (run_dir / "predictions.jsonl").is_file():
        raise ValueError(f"{run_dir} holds predictions of an unknown model; give another out folder")
    durable.write_json(path, owner)


def model_digest(model_dir: Path) -> str:
    """Return a digest of everything in a model's folder that can change an answer."""
    telling = {".json", ".jinja", ".txt", ".model", ".safetensors", ".gguf", ".bin"}
    files = sorted(p for p in model_dir.rglob("*") if p.suffix in telling and p.is_file())
    if not files:
        raise ValueError(f"{model_dir} holds no model; give a checkpoint's folder")
    return durable.digest_of({str(p.relative_to(model_dir)): durable.digest(p) for p in files})


def _read(path: Path) -> tuple[dict[str, Prediction], int]:
    """Return the answers in a journal and how many of its bytes are whole lines."""
    answers: dict[str, Prediction] = {}
    num_bytes = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            prediction = Prediction(**json.loads(line))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"line {number} of {path} is no answer; delete the file to ask again") from error
        if prediction.id in answers:
            raise ValueError(f"line {number} of {path} answers {prediction.id} again; delete that line")
        answers[prediction.id] = prediction
        num_bytes += len(line)
    return answers, num_bytes
