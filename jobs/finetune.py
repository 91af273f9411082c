"""Stage 2: finetune projector and language model on dialogues.

  python jobs/finetune.py tiny.finetune data=shards/dialogues init_from=runs/pretrain out=runs/finetune
  ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- \\
      python jobs/finetune.py llava_v15.finetune_7b data=/data/shards/mix665k \\
          init_from=/data/runs/pretrain_7b out=/data/runs/finetune_7b

The same command run again continues the run.
"""

from __future__ import annotations

from rayllava import driver


def main(argv: list[str]) -> None:
    driver.train(__doc__, argv)


if __name__ == "__main__":
    driver.job(main)
