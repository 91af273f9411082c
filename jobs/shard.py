"""Cut annotations and their pictures into shards to train from.

    python jobs/shard.py llava llava_v1_5_mix665k.json shards/mix665k images=llava_images
    python jobs/shard.py internvl internvl_1_2_finetune.json shards/sft policy=skip
    python jobs/shard.py webdataset s3://bucket/tars s3://bucket/shards

SOURCE is the format of the annotations:
  llava sharegpt4v        conversations, as a JSON array or JSON lines
  refcoco inv_refcoco     RefCOCO boxes, asked and named
  webdataset parquet      tars, or Hugging Face tables; a file or a folder of them
  internvl mix            a mixture: InternVL's meta file, or one of ours (docs/data.md)
Fields: images=DIR     folder that the records' image paths start from
        policy=skip    leave bad records out and list them in OUT/rejected.jsonl (default: fail at the first)
        budget=0.01    share of the records that policy=skip may leave out (default: 0.01, or ten records)
        rows=1024      about so many records make a shard
        seed=42        of the order in which records are cut into shards
--check reads everything, decodes every picture, reports, and writes nothing.
OUT is whole when it has a manifest.json. After a kill the same command continues.
"""

import json
import os
from contextlib import AbstractContextManager

from rayllava import driver
from rayllava.spec import override


def main(words: list[str]) -> None:
    made = driver.parser(__doc__)
    made.add_argument("source", metavar="SOURCE", help="format of the annotations, e.g. llava")
    made.add_argument("annotations", metavar="ANNOTATIONS", help="file or folder, a path or an address")
    made.add_argument("out", metavar="OUT", help="folder to write")
    made.add_argument("fields", nargs="*", metavar="field=value", help="images=DIR policy=skip ...")
    made.add_argument("--check", action="store_true", help="only report what sharding would meet")
    args = made.parse_intermixed_args(words)

    from rayllava.data.ingest import ShardSpec
    from rayllava.data.sharding import write_shards
    from rayllava.data.survey import survey
    from rayllava.place import Place

    spec = override(ShardSpec(), args.fields)
    if spec.images:
        spec = spec.but(images=driver.absolute(spec.images))
    if args.dry_run:
        print(json.dumps({**vars(args), "fields": spec.model_dump()}, indent=1, ensure_ascii=False))
        return
    annotations, out = (Place(driver.absolute(text)) for text in (args.annotations, args.out))

    def connect() -> AbstractContextManager[None]:
        return driver.connect(args.address, num_cpus=os.cpu_count() or 1)

    if args.check:
        found = survey(args.source, annotations, spec=spec, connect=connect)
        print(found.text())
        found.judge(spec)
        return
    manifest = write_shards(args.source, annotations, out, spec=spec, connect=connect)
    counts = ", ".join(f"{count} {name.replace('_', '-')}" for name, count in manifest.counts.items())
    print(f"{manifest.dir}: {counts}; {len(manifest.shards)} shards, digest {manifest.digest}")


if __name__ == "__main__":
    driver.job(main)
