"""Adapters of any PEFT type, made by PEFT on tiny models; what PEFT's own merge makes of them is the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from models import read_model
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor

import mergebench
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.files import Files
from mergebench.deltas import verbs
from mergebench.deltas.open import open_model
from tests.deltas.test_lora import GPT2, LLAMA

RESNET = transformers.ResNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
BIASED = type(LLAMA)(**LLAMA.to_dict() | {"attention_bias": True, "mlp_bias": True})
FAMILIES = {"llama": LLAMA, "biased": BIASED, "gpt2": GPT2, "resnet": RESNET}
CLOSE = 2e-6  # of a tensor's largest element


def make(folder: Path, family: str, config: PeftConfig, noise: float = 0.2) -> dict[str, Tensor]:
    """Save a base and an adapter on it, every parameter of it random; return what PEFT merges of the saved ones.

    folder: gets base/, adapter/ and folded/.
    """
    torch.manual_seed(0)
    auto = transformers.AutoModel if family == "resnet" else transformers.AutoModelForCausalLM
    model = auto.from_config(FAMILIES[family])
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):  # zeros otherwise
                value.add_(noise * torch.randn_like(value))
    model.save_pretrained(folder / "base")
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(auto.from_pretrained(folder / "base"), config)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(noise * torch.randn_like(value))
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        again = PeftModel.from_pretrained(auto.from_pretrained(folder / "base"), folder / "adapter")
        again.merge_and_unload().save_pretrained(folder / "folded")
    return read_model(folder / "folded")


def check(folder: Path, family: str, config: PeftConfig, close: float = CLOSE, noise: float = 0.2) -> dict[str, Any]:
    """`BASE+ADAPTER` is what PEFT merges: tensors that PEFT leaves alone to the bit, the others to `close`.

    Also merged by a recipe, in chunks. Returns the deltas by tensor.
    """
    expected = make(folder, family, config, noise)
    reference = f"{folder / 'base'}+{folder / 'adapter'}"
    model = open_model(reference)
    recipe = {"merge_method": "passthrough", "models": [{"model": reference}]}
    plan = mergebench.plan(mergebench.load(recipe), device="cpu")
    out, base = read_model(mergebench.run(plan, folder / "out").out), read_model(folder / "base")
    changed = {name for name in base if not torch.equal(base[name], expected[name])}
    assert changed and model.deltas.keys() >= changed
    for name, value in out.items():
        if name not in changed:
            assert torch.equal(value, base[name]), name
        worst = float((value.double() - expected[name].double()).abs().max())
        assert worst <= close * float(expected[name].abs().max()), f"{name}: {worst:.3g}"
    return dict(model.deltas)


def check_exact(deltas: Mapping[str, Sequence[Delta]], kind: str, most: int) -> None:
    """Every delta of the `kind` is a LoRA of rank `most` or less, exactly."""
    found = [one for (one,) in deltas.values() if one.kind == kind]
    assert found
    with Files() as files:
        for one in found:
            factors, kept, _ = verbs.as_low_rank(files, one)
            whole = verbs.materialise(files, one)
            assert kept == 1 and len(factors.a) <= most
            torch.testing.assert_close(factors.b @ factors.a, whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
