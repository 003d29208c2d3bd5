"""What a model writes after a prompt, against a loop over its own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoders import write_encoder
from language import write_decoder
from models import read_model, write_model

import mergebench
from mergebench.errors import escaped
from tests.conftest import Cli

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a] {% endif %}"
)


def by_hand(place: Path, prompt: str, most: int) -> str:
    """The token of the largest logit, appended, until the end token."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(place)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = list(before)
    while len(ids) < len(before) + most and (ids == before or ids[-1] != tokenizer.eos_token_id):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    text: str = tokenizer.decode(ids[len(before) :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["as it stands", "in the chat template"])
def test_the_likeliest_token_each_time(
    template: str | None, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_decoder(tmp_path / "model", template=template)
    prompt = "Why is it blue?"
    wanted = by_hand(tmp_path / "model", prompt if template is None else f"[user] {prompt}\n[a] ", 12)
    found = json.loads(cli("generate", "model", "--prompt", prompt, "--max-tokens", 12, "--json").out)
    assert found == {"model": "model", "prompt": prompt, "text": wanted} and wanted
    assert mergebench.generate("model", prompt, max_tokens=12) == wanted
    code, out, err = cli("generate", "model", "--prompt", prompt, "--max-tokens", 12)
    assert (code, err) == (0, "reading model\n")
    assert out == "\n".join(map(escaped, wanted.split("\n"))) + "\n"


def test_a_model_with_nan_says_so(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = write_decoder(tmp_path / "model")
    tensors = read_model(place)
    tensors["model.norm.weight"][0] = torch.nan
    broken = write_model(tmp_path / "broken", tensors, config=json.loads((place / "config.json").read_text()))
    for file in place.glob("*token*"):
        (broken / file.name).write_bytes(file.read_bytes())
    code, out, err = cli("generate", "broken", "--prompt", "x")
    assert (code, out) == (1, "") and "error: model 'broken': its outputs are not finite" in err
    code, _, err = cli("generate", "model", "--prompt", "")
    assert code == 1 and "gives no token for ''" in err


def test_a_model_without_a_head_is_told_what_it_is(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_encoder(tmp_path / "encoder")
    code, out, err = cli("generate", "encoder", "--prompt", "x")
    assert (code, out) == (3, "") and err.endswith("hint: it is a BertModel, not a BertLMHeadModel\n")
