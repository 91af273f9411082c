"""Somebody to put a question to: a model in this process, or an endpoint that speaks OpenAI's language.

ask = folder("runs/finetune", spec)  or  endpoint("http://127.0.0.1:8000", spec)
for piece in ask(turns, images): ...
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import Field

from rayllava.checkpoint.manifest import SourceSpec
from rayllava.records import IMAGE_MARK, Request, Turn

Ask = Callable[[tuple[Turn, ...], tuple[bytes, ...]], Iterator[str]]
"""Yields the answer to a dialogue about pictures, piece by piece."""


class AskSpec(SourceSpec):
    """How an answer is made, and what a checkpoint without our manifest.json does not say of itself."""

    quant: Literal["none", "nf4", "int8"] = "none"
    """Precision of the language model's weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    """Torch threads; empty leaves torch's choice."""
    image_hosts: str = ""
    """Domains, with commas, that pictures may be fetched from by https: address."""
    max_new_tokens: int = Field(512, ge=1)
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""


def folder(model: str, spec: AskSpec) -> Ask:
    """Load a model into this process."""
    import torch

    from rayllava.generate.load import load_engine

    device = spec.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = SourceSpec.model_validate(spec.model_dump(include=set(SourceSpec.model_fields)))
    engine = load_engine(model, quant=spec.quant, device=device, threads=spec.threads, max_batch=1, source=source)

    def ask(turns: tuple[Turn, ...], images: tuple[bytes, ...]) -> Iterator[str]:
        request = Request("ask", turns, images, max_new_tokens=spec.max_new_tokens, temperature=spec.temperature)
        return (delta.text for delta in engine.generate([request]))

    return ask


def endpoint(url: str, spec: AskSpec) -> Ask:
    """Ask the first model behind an OpenAI-compatible endpoint; ValueError when it does not answer."""
    from openai import OpenAI, OpenAIError

    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    client = OpenAI(base_url=base, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        model = client.models.list().data[0].id
    except OpenAIError as error:
        raise ValueError(f"{base} does not answer ({error}); is the endpoint up?") from error

    def ask(turns: tuple[Turn, ...], images: tuple[bytes, ...]) -> Iterator[str]:
        try:
            stream: Any = client.chat.completions.create(
                model=model,
                messages=messages(turns, images),
                max_tokens=spec.max_new_tokens,
                temperature=spec.temperature,
                stream=True,
            )
            for chunk in stream:
                if chunk.choices:
                    yield chunk.choices[0].delta.content or ""
        except OpenAIError as error:
            raise ValueError(f"{base} did not answer: {' '.join(str(error).split())}") from error

    return ask


def messages(turns: tuple[Turn, ...], images: tuple[bytes, ...]) -> Any:
    """Return a dialogue in OpenAI's form, each picture as a data URL before the text of its turn."""
    left = list(images)
    made = []
    for turn in turns:
        marks = turn.text.count(IMAGE_MARK) if turn.role == "user" else 0
        text = turn.text.replace(IMAGE_MARK, "").strip() if marks else turn.text
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(left.pop(0))}} for _ in range(marks)
        ]
        user = turn.role == "user"
        made.append({"role": turn.role, "content": [*parts, {"type": "text", "text": text}] if user else text})
    return made


def _data_url(image: bytes) -> str:
    import io

    from PIL import Image

    kind = Image.open(io.BytesIO(image)).get_format_mimetype() or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"
