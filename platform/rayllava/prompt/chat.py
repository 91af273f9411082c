"""Turns -> spans: what each project writes around a dialogue, and which of it the model learns to say.

    system, [(question, answer), ...]  --render-->  a list of spans for every round

    vicuna_v1    ‹BOS system USER: <image>⏎question ASSISTANT:› ⟦ answer</s>⟧ ‹USER: ...›     ‹no loss› ⟦loss⟧

A template says words; which ids they become is `encode`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rayllava.records import IMAGE_MARK

Part = Literal["prompt", "answer", "stop", "silence", "gap"]
"""What a span is for. Loss lies on answer and stop; silence is an empty answer with its stop."""

Kind = Literal["markup", "said", "image", "bos", "eos"]
"""markup: the template's own text, in which `<|im_end|>` is a control token; said: somebody's words, in which it
is not; image: one picture; bos, eos: the tokenizer's own begin and end of a sequence."""


@dataclass(frozen=True, slots=True)
class Span:
    part: Part
    kind: Kind
    text: str = ""


@dataclass(frozen=True, slots=True)
class Round:
    """A question and its answer; an open round has none yet."""

    question: str
    answer: str | None


@dataclass(frozen=True)
class Template:
    """How a dialogue is written. `{system}` in `user` stands for the system block, in the first round alone."""

    user: str
    """A question, up to the point where the assistant takes over: `{system}` and `{text}` are filled in."""
    system: str = ""
    """The system block around `{system}`; left out as a whole when there is no system text."""
    default_system: str = ""
    """System text of a dialogue that brings none."""
    lead: str = ""
    """What the assistant says before the answer itself."""
    stop: str = ""
    """Text after the answer that the model learns to say."""
    eos: bool = False
    """The tokenizer's end of sequence follows `stop`, and is learned too."""
    gap: str = ""
    """Text between rounds that nobody learns."""
    bos: Literal["once", "rounds", "never"] = "once"
    """Where the tokenizer's begin of sequence stands: at the front, before every round, nowhere."""
    joined: bool = True
    """True: tokenised as one string between pictures, as LLaVA does. False: question, answer with stop, and gap
    one by one, as XTuner does. It decides about blanks and newlines at the seams."""
    wordless: bool = False
    """The question's words are dropped; only its pictures stay."""

    def render(self, rounds: Sequence[Round], *, system: str | None = None) -> list[list[Span]]:
        """Return the spans of every round.

        `system` replaces the template's default text; an empty one leaves the system block out.
        """
        text = self.default_system if system is None else system
        block = _fill("prompt", self.system, "{system}", text) if text and self.system else []
        return [self._round(r, first=number == 0, block=block) for number, r in enumerate(rounds)]

    def _round(self, round_: Round, *, first: bool, block: list[Span]) -> list[Span]:
        spans = []
        if self.bos == "rounds" or (self.bos == "once" and first):
            spans.append(Span("prompt", "bos"))
        for word in re.split(r"(\{system\}|\{text\})", self.user):
            if word == "{system}":
                spans += block if first else []
            elif word == "{text}":
                spans += self._question(round_.question)
            elif word:
                spans.append(Span("prompt", "markup", word))
        if round_.answer is None:
            return spans
        silent = not round_.answer.strip()
        answer: Part = "silence" if silent else "answer"
        stop: Part = "silence" if silent else "stop"
        spans += [Span(answer, "markup", self.lead), Span(answer, "said", round_.answer)]
        spans.append(Span(stop, "markup", self.stop))
        if self.eos:
            spans.append(Span(stop, "eos"))
        spans.append(Span("gap", "markup", self.gap))
        return [span for span in spans if span.text or span.kind not in ("markup", "said")]

    def _question(self, text: str) -> list[Span]:
        spans = []
        for number, words in enumerate(text.split(IMAGE_MARK)):
            if number:
                spans.append(Span("prompt", "image"))
            if words and not self.wordless:
                spans.append(Span("prompt", "said", words))
        return spans


def _fill(part: Part, form: str, field: str, text: str) -> list[Span]:
    before, _, after = form.partition(field)
    spans = [Span(part, "markup", before), Span(part, "said", text), Span(part, "markup", after)]
    return [span for span in spans if span.text]


def _llava_v1(asker: str) -> Template:
    return Template(
        system="{system} ",
        default_system=(
            f"A chat between a curious {asker} and an artificial intelligence assistant. "
            f"The assistant gives helpful, detailed, and polite answers to the {asker}'s questions."
        ),
        user="{system}USER: {text} ASSISTANT:",
        lead=" ",
        eos=True,
    )


def _llava_chatml(default_system: str) -> Template:
    return Template(
        system="<|im_start|>system\n{system}<|im_end|>",
        default_system=default_system,
        user="{system}<|im_start|>user\n{text}<|im_end|><|im_start|>assistant\n",
        stop="<|im_end|>",
        bos="never",
    )


_LLAVA = {
    "vicuna_v1": _llava_v1("user"),
    "llava_v1": _llava_v1("human"),
    "plain": Template(user="{text}", stop="\n", wordless=True),
    "llava_llama_2": Template(
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        default_system=(
            "You are a helpful language and vision assistant. You are able to understand the visual content "
            "that the user provides, and assist the user with a variety of tasks using natural language."
        ),
        user="[INST] {system}{text} [/INST]",
        lead=" ",
        stop=" ",
        eos=True,
        bos="rounds",
    ),
    "mpt": _llava_chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "chatml_direct": _llava_chatml("Answer the questions."),
}
"""LLaVA's conversations, by the names of its `--version`."""

_XTUNER = {
    "vicuna": Template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. {system}\n "
        ),
        user="{system}USER: {text} ASSISTANT:",
        eos=True,
        gap="\n",
        bos="rounds",
        joined=False,
    ),
    "internlm_chat": Template(
        system="<|System|>:{system}\n",
        user="{system}<|User|>:{text}<eoh>\n<|Bot|>:",
        stop="<eoa>",
        gap="\n",
        joined=False,
    ),
    "internlm2_chat": Template(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        stop="<|im_end|>",
        gap="\n",
        joined=False,
    ),
    "qwen_chat": Template(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        stop="<|im_end|>",
        gap="\n",
        bos="never",
        joined=False,
    ),
    "llama3_chat": Template(
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        user=(
            "{system}<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        stop="<|eot_id|>",
        joined=False,
    ),
    "phi3_chat": Template(
        system="<|system|>\n{system}<|end|>\n",
        user="{system}<|user|>\n{text}<|end|>\n<|assistant|>\n",
        stop="<|end|>",
        gap="\n",
        joined=False,
    ),
}
"""XTuner's templates. None has a system text of its own: XTuner trains LLaVA without one."""

TEMPLATES: dict[str, Template] = {**_LLAVA, **_XTUNER}


def template_of(name: str) -> Template:
    """Return a template by name; LookupError that lists what there is."""
    if name not in TEMPLATES:
        raise LookupError(f"no template {name!r}; there are: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]
