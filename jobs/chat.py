"""Talk to a model about a picture on the terminal.

  python jobs/chat.py runs/finetune/export --image cat.jpg --prompt "What is this?"
  python jobs/chat.py http://127.0.0.1:8000/v1 --image cat.jpg

MODEL is RUN, RUN/export or another folder with manifest.json, or the address of an OpenAI-compatible endpoint.
Without --prompt it reads questions from the terminal until the input ends, all in one dialogue. An endpoint's
key is read from where the openai client reads it.

fields: quant=none|nf4|int8   device=auto|cpu|cuda   threads=N   max_new_tokens=N   temperature=T
"""

from __future__ import annotations

import base64
import json
import mimetypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rayllava import driver
from rayllava.recipe import Spec, override
from rayllava.records import IMAGE_MARK, Request, Turn

Ask = Callable[[tuple[Turn, ...], bytes], Iterator[str]]
"""Yields the answer to a dialogue about a picture, piece by piece."""


class ChatSpec(Spec):
    """How a model answers on the terminal."""

    quant: Literal["none", "nf4", "int8"] = "none"
    """Precision of the language model's weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    """Torch threads; empty leaves torch's choice."""
    max_new_tokens: int = Field(512, ge=1)
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""


def main(argv: list[str]) -> None:
    parser = driver.parser(__doc__ or "")
    parser.add_argument("model", metavar="MODEL", help="folder of a model, or an http URL")
    parser.add_argument("--image", metavar="FILE", required=True, help="the picture")
    parser.add_argument("--prompt", metavar="TEXT", help="one question (default: ask on the terminal)")
    parser.add_argument("fields", nargs="*", metavar="field=value", help="quant=nf4 ...")
    words = parser.parse_intermixed_args(argv)

    spec = override(ChatSpec(), words.fields)
    if words.dry_run:
        print(json.dumps({"model": words.model, "image": words.image} | spec.model_dump(), indent=1))
        return
    image = Path(words.image).read_bytes()
    served = words.model.startswith(("http://", "https://"))
    ask = _endpoint(words.model, words.image, spec) if served else _folder(Path(words.model), spec)
    turns: tuple[Turn, ...] = ()
    for question in [words.prompt] if words.prompt else _questions():
        mark = "" if turns else IMAGE_MARK + "\n"
        turns += (Turn("user", mark + question),)
        answer = ""
        for piece in ask(turns, image):
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


def _folder(model_dir: Path, spec: ChatSpec) -> Ask:
    import torch

    from rayllava.generate.load import load_engine

    device = spec.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = load_engine(model_dir, quant=spec.quant, device=device, threads=spec.threads, max_batch=1)

    def ask(turns: tuple[Turn, ...], image: bytes) -> Iterator[str]:
        request = Request("chat", turns, (image,), max_new_tokens=spec.max_new_tokens, temperature=spec.temperature)
        return (delta.text for delta in engine.generate([request]))

    return ask


def _endpoint(url: str, image_path: str, spec: ChatSpec) -> Ask:
    import os

    from openai import OpenAI, OpenAIError

    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    client = OpenAI(base_url=base, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    kind = mimetypes.guess_type(image_path)[0] or "image/jpeg"
    try:
        model = client.models.list().data[0].id
    except OpenAIError as error:
        raise ValueError(f"{base} does not answer ({error}); is the endpoint up?") from error

    def ask(turns: tuple[Turn, ...], image: bytes) -> Iterator[str]:
        address = f"data:{kind};base64,{base64.b64encode(image).decode()}"
        messages: list[dict[str, object]] = []
        for turn in turns:
            text = turn.text.replace(IMAGE_MARK, "").strip()
            parts: list[dict[str, object]] = [{"type": "text", "text": text}]
            if IMAGE_MARK in turn.text:
                parts.insert(0, {"type": "image_url", "image_url": {"url": address}})
            messages.append({"role": turn.role, "content": parts if turn.role == "user" else text})
        stream: Any = client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            stream=True,
        )
        for chunk in stream:
            if chunk.choices:
                yield chunk.choices[0].delta.content or ""

    return ask


if __name__ == "__main__":
    driver.job(main)
