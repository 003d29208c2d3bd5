"""Chat templates of well-known model families by name, in the Jinja form that tokenizers take.

The formats are those the families were trained on; mergekit's templates of these names add line breaks and spaces
to some of them.
"""

from __future__ import annotations

from mergebench.recipe.positions import Places, show

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MISTRAL = (  # the system prompt goes before the first question
    "{{ bos_token }}{% set ns = namespace(before='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.before = message['content'] + '\n\n' %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + ns.before + message['content'] + ' [/INST]' }}"
    "{% set ns.before = '' %}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
_ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
_EXAONE = (  # always starts with a system prompt, even an empty one
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\n' }}{% endif %}"
    "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{{ '\n' if message['role'] == 'user' else '[|endofturn|]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
TEMPLATES = {"chatml": _CHATML, "llama3": _LLAMA3, "mistral": _MISTRAL, "alpaca": _ALPACA, "exaone": _EXAONE}


def chat_template(value: str | None, places: Places) -> str | None:
    """The template a recipe asks for, written out, or `auto`."""
    if value is None or value == "auto":
        return value
    if value in TEMPLATES:
        return TEMPLATES[value]
    if len(value) < 20 or "{" not in value:
        hint = f"write auto (what most of the models have), {', '.join(TEMPLATES)}, or the template itself"
        raise places.error(("chat_template",), f"must be a chat template, got {show(value)}", hint)
    return value
