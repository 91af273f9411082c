"""Cut an annotation file and its pictures into shards to train from.

    python jobs/shard.py llava llava_v1_5_mix665k.json shards/mix665k images=llava_images

SOURCE is the format of the annotations: llava (LLaVA, ShareGPT4V and InternVL conversations, JSON or JSONL).
Fields: images=DIR     folder that the records' image paths start from
        policy=skip    leave bad records out and list them in OUT/rejected.jsonl (default: fail at the first)
        budget=0.01    share of the records that policy=skip may leave out (default: 0.01, or ten records)
        rows=1024      records in a shard
        seed=42        of the order in which records are cut into shards
OUT is whole when it has a manifest.json. After a kill the same command continues.
"""

import json
import os
from pathlib import Path

from rayllava import driver
from rayllava.recipe import override


def main(words: list[str]) -> None:
    made = driver.parser(__doc__)
    made.add_argument("source", metavar="SOURCE", help="format of the annotations, e.g. llava")
    made.add_argument("annotations", metavar="ANNOTATIONS", help="JSON or JSONL file")
    made.add_argument("out", metavar="OUT", help="folder to write")
    made.add_argument("fields", nargs="*", metavar="field=value", help="images=DIR policy=skip ...")
    args = made.parse_intermixed_args(words)

    from rayllava.data.ingest import ShardSpec
    from rayllava.data.sharding import write_shards

    spec = override(ShardSpec(), args.fields)
    if args.dry_run:
        print(json.dumps({**vars(args), "fields": spec.model_dump()}, indent=1, ensure_ascii=False))
        return
    manifest = write_shards(
        args.source,
        Path(driver.absolute(args.annotations)),
        Path(driver.absolute(args.out)),
        images_dir=Path(driver.absolute(spec.images)) if spec.images else None,
        rows_per_shard=spec.rows,
        policy=spec.policy,
        budget=spec.budget,
        seed=spec.seed,
        connect=lambda: driver.connect(args.address, num_cpus=os.cpu_count() or 1),
    )
    counts = ", ".join(f"{count} {name.replace('_', '-')}" for name, count in manifest.counts.items())
    print(f"{manifest.dir}: {counts}; {len(manifest.shards)} shards, digest {manifest.digest}")


if __name__ == "__main__":
    driver.job(main)
