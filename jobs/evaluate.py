"""Evaluate a model on benchmarks: ask every question, keep every answer, score.

  python jobs/evaluate.py runs/finetune/export --only pope,textvqa --data eval --out runs/scores
  ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- \\
      python jobs/evaluate.py /data/runs/finetune_7b/export --data /data/eval --out /data/scores engines=8

MODEL is RUN, RUN/export or a folder of jobs/convert.py, on a disk or in a store.
DATA is LLaVA's playground/data/eval: DATA/pope, DATA/textvqa, ... as its evaluation guide fills them.
OUT gets BENCHMARK/predictions.jsonl and score.json, and scores.json. The same command run again asks only
what has no answer yet.

fields: quant=none|nf4|int8   engines=N   threads=N (CPUs of each engine)   device=auto|cpu|cuda
"""

from __future__ import annotations

import json
from pathlib import Path

from rayllava import driver
from rayllava.evals.benchmark import BENCHMARKS
from rayllava.evals.fanout import EngineSpec, evaluate
from rayllava.spec import override


def main(argv: list[str]) -> None:
    parser = driver.parser(__doc__ or "")
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--data", metavar="DIR", required=True, help="folder of the benchmarks' files")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the answers and scores")
    parser.add_argument("fields", nargs="*", metavar="field=value", help="quant=nf4 engines=2 ...")
    words = parser.parse_intermixed_args(argv)

    spec = override(EngineSpec(), words.fields)
    only = words.only.split(",") if words.only else list(BENCHMARKS)
    profiles = {key: BENCHMARKS[key].profile for key in only}
    model, data_dir, out_dir = driver.absolute(words.model), Path(words.data).absolute(), Path(words.out).absolute()
    if words.dry_run:
        plan = {"model": model, "only": profiles, "data": str(data_dir), "out": str(out_dir)}
        print(json.dumps(plan | spec.model_dump(), indent=1))
        return
    with driver.connect(words.address, num_cpus=spec.engines * spec.threads):
        scores = evaluate(
            model,
            only=only,
            data_dir=data_dir,
            out_dir=out_dir,
            quant=spec.quant,
            num_engines=spec.engines,
            threads=spec.threads,
            device=spec.device,
        )
    for key, score in scores.items():
        name, value = score.primary
        missing = f", {score.num_failed} without an answer" if score.num_failed else ""
        print(f"{key}: {name} {value:.2f} ({score.profile}, {score.num} questions{missing})")


if __name__ == "__main__":
    driver.job(main)
