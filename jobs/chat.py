"""Talk to a model about pictures on the terminal.

  python jobs/chat.py runs/finetune --image cat.jpg --prompt "What is this?"
  python jobs/chat.py llava-v1.5-7b template=vicuna_v1 vision_tower=clip-vit-large-patch14-336 quant=nf4
  python jobs/chat.py http://127.0.0.1:8000/v1 --image cat.jpg

MODEL is RUN, RUN/export, a checkpoint of any layout (Hugging Face, LLaVA, XTuner, GGUF) on a disk or in a store
(s3://...), or the address of an OpenAI-compatible endpoint. Without --prompt it reads questions from the terminal
until the input ends, all in one dialogue; /help lists what else it understands. An endpoint's key is read from where
the openai client reads it. Flags of LLaVA's and XTuner's own programs are understood too.

fields: quant=none|nf4|int8   device=auto|cpu|cuda   threads=N   max_new_tokens=N   temperature=T
        image_hosts=DOMAIN,...: where pictures may be fetched from by https: address
        template=NAME   base=DIR   vision_tower=DIR   aspect=pad|crop   family=NAME
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rayllava import driver
from rayllava.generate.ask import AskSpec, endpoint, folder
from rayllava.spec import override

THEIRS = {
    "--model-base": "base",
    "--visual-encoder": "vision_tower",
    "--prompt-template": "template",
    "--conv-mode": "template",
    "--temperature": "temperature",
    "--max-new-tokens": "max_new_tokens",
    "--device": "device",
}
"""Flags of LLaVA's and XTuner's chat programs, and our fields."""


def main(argv: list[str]) -> None:
    words = _words(argv)
    spec = override(AskSpec(), words.fields)
    if words.dry_run:
        print(json.dumps({"model": words.model, "images": words.image} | spec.model_dump(), indent=1))
        return
    from rayllava.fetch.remote import Hosts
    from rayllava.generate.terminal import Chat, picture

    hosts = Hosts(tuple(filter(None, spec.image_hosts.split(","))))
    images = [picture(image, hosts) for image in words.image]
    served = words.model.startswith(("http://", "https://"))
    ask = endpoint(words.model, spec) if served else folder(words.model, spec)
    chat = Chat(ask, system=words.system, hosts=hosts)
    for image in images:
        chat.put(image)
    for line in [words.prompt] if words.prompt else _lines():
        try:
            for piece in chat.take(line):
                print(piece, end="", flush=True)
        except (ValueError, OSError) as error:
            if words.prompt or not sys.stdin.isatty():
                raise
            print(f"error: {error}")
        except KeyboardInterrupt:  # of an answer: the dialogue is as it was before the question
            if not sys.stdin.isatty():
                raise
            print()
        if chat.over:
            return


def _words(argv: list[str]) -> argparse.Namespace:
    """Return what was said; a flag of LLaVA's or XTuner's becomes the field that it means."""
    parser = driver.parser(__doc__ or "")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint, or an http URL")
    parser.add_argument(
        "--image", "--image-file", metavar="FILE", action="append", default=[], help="a picture; may be repeated"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="one question (default: ask on the terminal)")
    parser.add_argument("--system", metavar="TEXT", default="", help="system text (default: the template's own)")
    parser.add_argument("fields", nargs="*", metavar="field=value", help="quant=nf4 ...")
    theirs = parser.add_argument_group("as LLaVA and XTuner say it")
    theirs.add_argument("--model-path", "--llava", dest="checkpoint", metavar="DIR", help="MODEL")
    theirs.add_argument("--load-4bit", action="store_true", help="quant=nf4")
    theirs.add_argument("--load-8bit", action="store_true", help="quant=int8")
    theirs.add_argument("--bits", type=int, choices=(4, 8), help="quant=nf4, quant=int8")
    for flag, field in THEIRS.items():
        theirs.add_argument(flag, metavar="VALUE", help=f"{field}=VALUE")
    words = parser.parse_intermixed_args(argv)
    fields = []
    if words.model and re.match(r"[a-z_]+=", words.model):  # a field where a flag has named the model
        words.model, words.fields = None, [words.model, *words.fields]
    if words.checkpoint:
        # XTuner names the language model first, and what was trained on it by a flag; both are one where all was.
        fields += [f"base={words.model}"] if words.model and not _inside(words.model, words.checkpoint) else []
        words.model = words.checkpoint
    if not words.model:
        parser.error("no MODEL is given")
    for flag, field in THEIRS.items():
        value = getattr(words, flag.removeprefix("--").replace("-", "_"))
        value = None if field == "vision_tower" and value and _inside(value, words.model) else value
        fields += [f"{field}={value}"] if value is not None else []
    quants = {"nf4": words.load_4bit or words.bits == 4, "int8": words.load_8bit or words.bits == 8}
    fields += [f"quant={name}" for name, wanted in quants.items() if wanted]
    words.fields = fields + words.fields
    return words


def _inside(part: str, model: str) -> bool:
    """Whether a part's folder is the model's own, or lies in it."""
    return Path(model).resolve() in (Path(part).resolve(), *Path(part).resolve().parents)


def _lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


if __name__ == "__main__":
    driver.job(main)
