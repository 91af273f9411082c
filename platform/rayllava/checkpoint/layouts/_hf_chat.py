"""Our prompt templates in jinja, for readers of a Hugging Face folder that know nothing of ours.

Keys are names in rayllava.prompt.chat.TEMPLATES. Content may be a string, or a list of parts in which pictures
go first, as transformers' processors write it.
"""

from __future__ import annotations

_PARTS = (
    "{%- macro said(message) -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)

_VICUNA_V1 = (
    "{%- if messages[0]['role'] == 'system' -%}{{ said(messages[0]) + ' ' }}{%- else -%}"
    '{{ "A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions. \" }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' + said(message) + ' ' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + said(message) + '</s>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)

_TEMPLATES = {"vicuna_v1": _VICUNA_V1}


def chat_template(name: str, *, bos_token: str) -> str | None:
    """Return the template, beginning with `bos_token`; None when nobody has written it in jinja."""
    words = _TEMPLATES.get(name)
    if words is None:
        return None
    begin = f"{{{{- '{bos_token}' -}}}}" if bos_token else ""
    return begin + _PARTS + words
