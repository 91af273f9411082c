"""Check that a run counted every sample exactly once.

  python jobs/audit.py runs/finetune

Reads the ledger that the newest checkpoint of RUN vouches for and compares it with the shards' own rows and with
the plan: every row of every finished epoch once, however often the run was stopped or resized. RUN may lie in an
object store and may still be training. Writes RUN/ledger.jsonl, a line a step. The exit code is 0 only if
everything agreed; otherwise the first violations of each kind are named.
"""

from __future__ import annotations

import json

from rayllava import driver


def main(argv: list[str]) -> None:
    parser = driver.parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", help="a training run's out=")
    words = parser.parse_args(argv)
    if words.dry_run:
        print(json.dumps({"run": driver.absolute(words.run)}, indent=1))
        return

    from rayllava.place import Place
    from rayllava.train.audit import audit

    found = audit(Place(driver.absolute(words.run)))
    print(found.text())
    if not found.passed:
        raise ValueError(f"RUN={words.run} did not count every sample exactly once; the violations are listed above")


if __name__ == "__main__":
    driver.job(main)
