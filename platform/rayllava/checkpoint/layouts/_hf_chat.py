"""Our prompt templates in jinja, for readers of a Hugging Face folder that know nothing of ours.

Keys are names in rayllava.prompt.chat.TEMPLATES, and a test compares the words. Content may be a string, or a list
of parts in which pictures go first, as transformers' processors write it.
"""

from __future__ import annotations

_SAID = (
    "{%- macro said(message) -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)


def _words(
    *, system: tuple[str, str], default: str = "", user: tuple[str, str], opens: str, lead: str = "", closes: str
) -> str:
    """Return a template from what stands around the turns; `opens` and `closes` belong to the assistant's."""
    begin, end = map(_quoted, system)
    silent = f"{{%- else -%}}{{{{ {begin} + {_quoted(default)} + {end} }}}}" if default else ""
    ask, asked = map(_quoted, user)
    return (
        f"{{%- if messages[0]['role'] == 'system' -%}}{{{{ {begin} + said(messages[0]) + {end} }}}}"
        f"{silent}{{%- endif -%}}"
        "{%- for message in messages -%}"
        f"{{%- if message['role'] == 'user' -%}}{{{{ {ask} + said(message) + {asked} }}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ {_quoted(opens + lead)} + said(message) + {_quoted(closes)} }}}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ {_quoted(opens)} }}}}{{%- endif -%}}"
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _vicuna(asker: str) -> str:
    return _words(
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


_CHATML = _words(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    opens="<|im_start|>assistant\n",
    closes="<|im_end|>\n",
)

TEMPLATES = {
    "vicuna_v1": _vicuna("user"),
    "llava_v1": _vicuna("human"),
    "llama3_chat": _words(
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        opens="<|start_header_id|>assistant<|end_header_id|>\n\n",
        closes="<|eot_id|>",
    ),
    "phi3_chat": _words(
        system=("<|system|>\n", "<|end|>\n"),
        user=("<|user|>\n", "<|end|>\n"),
        opens="<|assistant|>\n",
        closes="<|end|>\n",
    ),
    "internlm2_chat": _CHATML,
    "qwen_chat": _CHATML,
}


def chat_template(name: str, *, bos_token: str, gap: str = "") -> str | None:
    """Return the template, beginning with `bos_token`; None when nobody has written it in jinja.

    `gap` stands between a picture and the line break after it.
    """
    words = TEMPLATES.get(name)
    if words is None:
        return None
    begin = f"{{{{- {_quoted(bos_token)} -}}}}" if bos_token else ""
    return begin + _SAID.replace("<image>", f"<image>{gap}") + words
