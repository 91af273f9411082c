"""Talk to a model about a picture on the terminal.

  python jobs/chat.py runs/finetune --image cat.jpg --prompt "What is this?"
  python jobs/chat.py http://127.0.0.1:8000/v1 --image cat.jpg

MODEL is RUN, RUN/export or another folder with manifest.json, on a disk or in a store (s3://...), or the address
of an OpenAI-compatible endpoint. Without --prompt it reads questions from the terminal until the input ends, all in
one dialogue. An endpoint's key is read from where the openai client reads it.

fields: quant=none|nf4|int8   device=auto|cpu|cuda   threads=N   max_new_tokens=N   temperature=T
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rayllava import driver
from rayllava.generate.ask import AskSpec, endpoint, folder
from rayllava.records import IMAGE_MARK, Turn
from rayllava.spec import override


def main(argv: list[str]) -> None:
    parser = driver.parser(__doc__ or "")
    parser.add_argument("model", metavar="MODEL", help="folder of a model, or an http URL")
    parser.add_argument("--image", metavar="FILE", required=True, help="the picture")
    parser.add_argument("--prompt", metavar="TEXT", help="one question (default: ask on the terminal)")
    parser.add_argument("fields", nargs="*", metavar="field=value", help="quant=nf4 ...")
    words = parser.parse_intermixed_args(argv)

    spec = override(AskSpec(), words.fields)
    if words.dry_run:
        print(json.dumps({"model": words.model, "image": words.image} | spec.model_dump(), indent=1))
        return
    image = Path(words.image).read_bytes()
    served = words.model.startswith(("http://", "https://"))
    ask = endpoint(words.model, spec) if served else folder(words.model, spec)
    turns: tuple[Turn, ...] = ()
    for question in [words.prompt] if words.prompt else _questions():
        turns += (Turn("user", question if turns else f"{IMAGE_MARK}\n{question}"),)
        answer = ""
        for piece in ask(turns, (image,)):
            print(piece, end="", flush=True)
            answer += piece
        print()
        turns += (Turn("assistant", answer),)


def _questions() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    driver.job(main)
