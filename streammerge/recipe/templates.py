"""Chat templates by the names that mergekit has for them, each written from the format that its model's makers tell."""

from __future__ import annotations

from typing import Any, Final

from streammerge.errors import RecipeError, suggestion

AUTO: Final = "auto"
"""The template that most of the models have."""

MIN_TEMPLATE: Final = 20
"""The shortest chat template, in characters: what is shorter is a name."""

_CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LLAMA3: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

_MISTRAL: Final = (
    "{% set spoken = messages %}{% set before = '' %}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set spoken = messages[1:] %}{% set before = messages[0]['content'] + '\\n\\n' %}"
    "{% endif %}"
    "{{ bos_token }}"
    "{% for message in spoken %}"
    "{% if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('After a system message, if there is one, user and assistant take turns.') }}"
    "{% elif message['role'] == 'user' %}"
    "{{ ' [INST] ' + (before if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

_ALPACA: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] | trim }}"
    "{% elif message['role'] == 'user_context' %}{{ '### Input:\\n' + message['content'] | trim }}"
    "{% else %}{{ '### Response:\\n' + message['content'] | trim + eos_token }}{% endif %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)

_EXAONE: Final = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)

TEMPLATES: Final = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""What the names stand for, in Jinja."""


def parse_chat_template(raw: Any, where: str) -> str:  # noqa: ANN401
    """A chat template's name or text, "" where there is none; RecipeError for a name that is none of ours."""
    if raw in (None, ""):
        return ""
    if isinstance(raw, str) and (raw in (AUTO, *TEMPLATES) or (len(raw) >= MIN_TEMPLATE and "{" in raw)):
        return raw
    names = [AUTO, *TEMPLATES]
    raise RecipeError(
        f"{where}: chat_template must be a name, or the text of a template in Jinja, found {str(raw)[:40]!r}",
        advice=f"{suggestion(str(raw), names)}Names: {', '.join(names)}.",
    )
