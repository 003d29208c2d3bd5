"""Chat templates by name, rendered as transformers does; expected is what the families' own documents show."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mergebench.recipe.chat import TEMPLATES

TALK = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")]
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s>[INST] Be brief.\n\nHi [/INST] Hello!</s>[INST] Bye [/INST]", ""),
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!</s>\n\n### Instruction:\nBye\n\n",
        "### Response:\n",
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello![|endofturn|]\n[|user|]Bye\n",
        "[|assistant|]",
    ),
}


def render(name: str, talk: list[tuple[str, str]], prompt: bool) -> str:
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in talk]
    template = jinja.from_string(TEMPLATES[name])
    return template.render(messages=messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation(name: str) -> None:
    said, prompt = EXPECTED[name]
    assert render(name, TALK, prompt=False) == said
    assert render(name, TALK, prompt=True) == said + prompt


def test_exaone_opens_with_a_system_prompt() -> None:
    assert render("exaone", TALK[1:2], prompt=True) == "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]"
