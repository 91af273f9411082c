"""Convert a model to another project's layout and prove that it is the same model.

  python jobs/convert.py runs/finetune/export runs/finetune-hf --to hf
  python jobs/convert.py llava-1.5-7b-hf runs/llava-1.5-7b --to hf template=vicuna_v1 aspect=pad

SRC is RUN, RUN/export or a Hugging Face LLaVA folder, on a disk or in a store (s3://...); its layout is found by
looking inside. A folder without our manifest.json does not say how it is asked: add template=NAME.
DST/proof.json holds what was compared. The exit code is 0 only if everything agreed.

fields: template=NAME   aspect=pad|crop   family=NAME   dtype=float32|bfloat16|float16
"""

from __future__ import annotations

import json
from pathlib import Path

from rayllava import driver


def main(argv: list[str]) -> None:
    parser = driver.parser(__doc__ or "")
    parser.add_argument("src", metavar="SRC", help="folder of the model")
    parser.add_argument("dst", metavar="DST", help="folder to make")
    parser.add_argument("--to", metavar="LAYOUT", required=True, help="hf")
    parser.add_argument("fields", nargs="*", metavar="field=value", help="template=vicuna_v1 ...")
    words = parser.parse_intermixed_args(argv)

    from rayllava.convert.run import ConvertSpec, convert
    from rayllava.spec import override

    spec = override(ConvertSpec(), words.fields)
    if words.dry_run:
        print(json.dumps({"src": words.src, "dst": words.dst, "to": words.to} | spec.model_dump(), indent=1))
        return
    proof = convert(words.src, Path(words.dst), to=words.to, spec=spec)
    same = "bit-equal" if proof["bit_equal"] else "NOT EQUAL"
    print(f"{proof['num_tensors']} tensors, {same}, {proof['dtype']}")
    for name, diff in proof["max_abs_logit_diff"].items():
        print(f"{name}: logits differ by at most {diff:.2g}, allowed {proof['bounds'][name]:.2g}")
    if not proof["proved"]:
        raise ValueError(f"{words.dst} is not proved to be the model in {words.src}; see its proof.json")
    print(f"proved in {proof['seconds']} s: {words.dst}")


if __name__ == "__main__":
    driver.job(main)
