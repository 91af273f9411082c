"""From handwritten digits to an answering endpoint: every room of the house once, on this machine.

  python jobs/quickstart.py            writes runs/quickstart/report.html and report.json
  python jobs/quickstart.py --out DIR

Finished phases are reused; after a kill the same command continues.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rayllava import driver, recipe

ROOT = Path(__file__).resolve().parents[1]
CPUS = 6
"""Logical CPUs for Ray: two workers and two decoders, and room for what coordinates them. More than there may
be; what keeps the machine from being overloaded is the number of threads of each."""


def main(argv: list[str]) -> None:
    parser = driver.parser(__doc__ or "")
    parser.add_argument("--out", default="runs/quickstart", help="folder for everything that is made")
    words = parser.parse_args(argv)
    if words.dry_run:
        for name in ("tiny.pretrain", "tiny.finetune"):
            print(driver.show(recipe.load(name)))
        return
    # `serving` stands beside `jobs` and is no installed package: for this process, and for Ray's.
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with driver.connect(words.address, num_cpus=CPUS):
        from rayllava.demo.quickstart import Quickstart
        from serving.local import serve_locally

        report = Quickstart(Path(words.out), serve_locally).run()
    for name, row in report["scores"].items():
        print(f"{name}: " + ", ".join(f"{column} {100 * value:.1f} %" for column, value in row.items()))
    print(f"{report['total_seconds']:.0f} s in all; the report is {words.out}/report.html")


if __name__ == "__main__":
    driver.job(main)
