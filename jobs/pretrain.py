"""Stage 1: train the projector of a LLaVA model on captions.

  python jobs/pretrain.py tiny.pretrain data=shards/captions out=runs/pretrain
  ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- \\
      python jobs/pretrain.py llava_v15.pretrain_7b data=/data/shards/558k out=/data/runs/pretrain_7b

The same command run again continues the run.
"""

from __future__ import annotations

from rayllava import driver


def main(argv: list[str]) -> None:
    driver.train(__doc__, argv)


if __name__ == "__main__":
    driver.job(main)
