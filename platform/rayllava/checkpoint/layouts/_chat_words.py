"""Our prompt templates for readers that know nothing of ours: in jinja, and in Go's language, which Ollama reads.

Keys are names in rayllava.prompt.chat.TEMPLATES, and a test compares the words. Content may be a string, or a list
of parts in which pictures go first, as transformers' processors write it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """What stands around the turns of a dialogue."""

    system: tuple[str, str]
    user: tuple[str, str]
    opens: str
    """Where the assistant's turn begins; an open one ends here."""
    closes: str
    """Where it ends."""
    lead: str = ""
    """What the assistant says before the answer itself."""
    default: str = ""
    """System text of a dialogue that brings none."""


def _vicuna(asker: str) -> Words:
    return Words(
        system=("", " "),
        default=(
            f"A chat between a curious {asker} and an artificial intelligence assistant. "
            f"The assistant gives helpful, detailed, and polite answers to the {asker}'s questions."
        ),
        user=("USER: ", " "),
        opens="ASSISTANT:",
        lead=" ",
        closes="</s>",
    )


_CHATML = Words(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    opens="<|im_start|>assistant\n",
    closes="<|im_end|>\n",
)

TEMPLATES = {
    "vicuna_v1": _vicuna("user"),
    "llava_v1": _vicuna("human"),
    "llama3_chat": Words(
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        opens="<|start_header_id|>assistant<|end_header_id|>\n\n",
        closes="<|eot_id|>",
    ),
    "phi3_chat": Words(
        system=("<|system|>\n", "<|end|>\n"),
        user=("<|user|>\n", "<|end|>\n"),
        opens="<|assistant|>\n",
        closes="<|end|>\n",
    ),
    "internlm_chat": Words(
        system=("<|System|>:", "\n"),
        user=("<|User|>:", "<eoh>\n"),
        opens="<|Bot|>:",
        closes="<eoa>\n",
    ),
    "internlm2_chat": _CHATML,
    "qwen_chat": _CHATML,
}


def chat_template(name: str, *, bos_token: str, gap: str = "") -> str | None:
    """Return the template in jinja, beginning with `bos_token`; None when nobody has written down its words.

    `gap` stands between a picture and the line break after it.
    """
    words = TEMPLATES.get(name)
    if words is None:
        return None
    begin = f"{{{{- {_quoted(bos_token)} -}}}}" if bos_token else ""
    return begin + _SAID.replace("<image>", f"<image>{gap}") + _jinja(words)


def ollama_template(name: str) -> str | None:
    """Return the template in Ollama's words, which have no pictures; None when nobody has written them down."""
    words = TEMPLATES.get(name)
    if words is None:
        return None
    begin, end = words.system
    ask, asked = words.user
    # It is filled in round by round, .System in the first alone, and cut before an answer that is not there yet: what
    # leads an answer would stand at the prompt's end, where it is not when the model is trained.
    return (
        f"{{{{ if .System }}}}{begin}{{{{ .System }}}}{end}{{{{ end }}}}"
        f"{{{{ if .Prompt }}}}{ask}{{{{ .Prompt }}}}{asked}{{{{ end }}}}"
        f"{words.opens}{{{{ .Response }}}}{words.closes}"
    )


def stops(name: str) -> list[str]:
    """Return what ends an answer, or begins somebody else's turn, in the words of a template."""
    words = TEMPLATES.get(name)
    if words is None:
        return []
    marks = re.findall(r"<[^<>\s]+>", "".join((*words.user, words.opens, *words.system, words.closes)))
    plain = [] if words.user[0].startswith("<") else [words.user[0].strip()]
    return list(dict.fromkeys([*plain, *marks]))


_SAID = (
    "{%- macro said(message) -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)


def _jinja(words: Words) -> str:
    begin, end = map(_quoted, words.system)
    silent = f"{{%- else -%}}{{{{ {begin} + {_quoted(words.default)} + {end} }}}}" if words.default else ""
    ask, asked = map(_quoted, words.user)
    return (
        f"{{%- if messages[0]['role'] == 'system' -%}}{{{{ {begin} + said(messages[0]) + {end} }}}}"
        f"{silent}{{%- endif -%}}"
        "{%- for message in messages -%}"
        f"{{%- if message['role'] == 'user' -%}}{{{{ {ask} + said(message) + {asked} }}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ {_quoted(words.opens + words.lead)} + said(message) + {_quoted(words.closes)} }}}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ {_quoted(words.opens)} }}}}{{%- endif -%}}"
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
