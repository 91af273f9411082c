"""Convert a model to another project's layout and prove that it is the same model.

  python jobs/convert.py runs/finetune/export runs/finetune-hf --to hf
  python jobs/convert.py llava-1.5-7b-hf runs/llava-1.5-7b --to llava template=vicuna_v1 aspect=pad
  python jobs/convert.py llava-v1.5-7b runs/llava --to gguf --dtype q4_0 template=vicuna_v1 \\
    --vision-tower clip-vit-large-patch14-336
  python jobs/convert.py iter_5198.pth runs/mine --to xtuner template=internlm2_chat \\
    --base internlm/internlm2-chat-7b --vision-tower openai/clip-vit-large-patch14-336

SRC is RUN, RUN/export, a Hugging Face LLaVA folder, a folder of LLaVA's own (whole, adapters, or a projector alone),
a folder of XTuner's or its training checkpoint, or a GGUF pair (its folder, or a file of it); its layout is found by
looking inside. Adapters are merged. Nothing but our manifest.json says how a model is asked: add template=NAME where
there is none. DST/proof.json holds what was compared. The exit code is 0 only if everything agreed.

fields: template=NAME   aspect=pad|crop   family=NAME
        part=llm|vision|projector: that part alone, of any checkpoint, of its own folder, or of peft's adapter on it
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from rayllava import driver


def main(argv: list[str]) -> None:
    parser = driver.parser(__doc__ or "")
    parser.add_argument("src", metavar="SRC", help="folder of the model")
    parser.add_argument("dst", metavar="DST", help="folder to make")
    parser.add_argument("--to", metavar="LAYOUT", required=True, help="hf, llava, xtuner or gguf")
    parser.add_argument(
        "--base", metavar="DIR", default="", help="language model that SRC was trained from, a folder or a hub id"
    )
    parser.add_argument(
        "--vision-tower",
        metavar="DIR",
        default="",
        help="vision tower that SRC was trained with, a folder or a hub id",
    )
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        default="",
        help="float32, float16 or bfloat16, gguf: q8_0, q5_0, q4_0, q5_k_m, q4_k_m (default: as the tensors are)",
    )
    adapters = parser.add_mutually_exclusive_group()
    adapters.add_argument("--merge", action="store_true", help="fold adapters into their weights (the default)")
    adapters.add_argument(
        "--keep-adapters", action="store_true", help="leave adapters apart; llava and xtuner have a place for them"
    )
    parser.add_argument("--explain", action="store_true", help="print what every tensor is made of, and stop")
    parser.add_argument("--no-proof", action="store_true", help="write without comparing; proof.json says so")
    parser.add_argument("--force", action="store_true", help="replace DST if it is there")
    parser.add_argument("fields", nargs="*", metavar="field=value", help="template=vicuna_v1 ...")
    words = parser.parse_intermixed_args(argv)

    from rayllava.convert.run import ConvertSpec, convert, explain
    from rayllava.spec import override

    given = {"base": words.base, "vision_tower": words.vision_tower, "dtype": words.dtype}
    wanted = {"keep_adapters": words.keep_adapters, "proof": not words.no_proof, "force": words.force}
    spec = override(ConvertSpec(**given, **wanted), words.fields)
    if words.dry_run:
        print(json.dumps({"src": words.src, "dst": words.dst, "to": words.to} | spec.model_dump(), indent=1))
        return
    if words.explain:
        print("DST", "type and shape", "SRC", "what is done", sep="\t")
        for row in explain(words.src, to=words.to, spec=spec):
            print("\t".join(row))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended from outside; nothing is left of DST"))
    proof = convert(words.src, Path(words.dst), to=words.to, spec=spec)
    if not spec.proof:
        print(f"written in {proof['seconds']} s, not proved: {words.dst}")
        return
    apart = f"{proof['farthest']:.1%} apart at most" if "farthest" in proof else "NOT EQUAL"
    same = "bit-equal" if proof["bit_equal"] else apart
    print(f"{proof['num_tensors']} tensors, {same}, {proof['dtype']}")
    for name, diff in proof["max_abs_logit_diff"].items():
        print(f"{name}: logits differ by at most {diff:.2g}, allowed {proof['bounds'][name]:.2g}")
    if ran := proof.get("llama_cpp"):
        print(f"in llama.cpp: logits differ by at most {ran['max_abs_logit_diff']:.2g}, allowed {ran['bound']:.2g}")
    if not proof["proved"]:
        raise ValueError(f"what was made is not the model in {words.src}: see {proof['at']}/proof.json")
    print(f"proved in {proof['seconds']} s: {words.dst}")


if __name__ == "__main__":
    driver.job(main)
