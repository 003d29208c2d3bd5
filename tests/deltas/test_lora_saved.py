"""Heads saved whole, names, and LoRA's variants: what the files say is folded, the rest is refused with the reason."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import read_model
from peft import BdLoraConfig, MontecloraConfig

from mergebench.errors import ModelError
from tests.deltas import lora_models as lora
from tests.deltas.test_lora_conv import write

VARIANTS: dict[str, dict[str, Any]] = {
    "BD-LoRA, A": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False)},
    "BD-LoRA, both": {
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2)
    },
    "MonteCLoRA": {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)},
    "MiCA": {"init_lora_weights": "mica"},
    "EVA": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tmp_path: Path, variant: str) -> None:
    lora.save_base(tmp_path, "llama")
    lora.save_lora(tmp_path, r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], **VARIANTS[variant])
    assert len(lora.check(tmp_path)) == 4


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_classifiers_head(tmp_path: Path, kind: str) -> None:
    """PEFT lists `classifier` and `score`, whichever the model has."""
    auto = transformers.AutoModelForSequenceClassification
    lora.save_base(tmp_path, kind, auto)
    targets = ["q_proj"] if kind == "llama" else ["query"]
    lora.save_lora(tmp_path, auto, r=2, target_modules=targets, task_type="SEQ_CLS")
    assert {"score.weight", "classifier.weight"} & lora.check(tmp_path)


HEADS = {
    "reward": ("llama", transformers.AutoModelForSequenceClassification, "SEQ_CLS", ["q_proj"]),
    "tokens": ("bert", transformers.AutoModelForTokenClassification, "TOKEN_CLS", ["query"]),
    "tied": ("tied", transformers.AutoModelForSequenceClassification, "SEQ_CLS", ["q_proj"]),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_on_the_model_it_was_trained_from(tmp_path: Path, case: str) -> None:
    """The result is the classifier: its head, its class, its labels, no other head."""
    family, auto, task, targets = HEADS[case]
    lora.save_base(tmp_path, family)
    three = SimpleNamespace(from_pretrained=partial(auto.from_pretrained, num_labels=3))
    lora.save_lora(tmp_path, three, r=2, target_modules=targets, task_type=task)
    lora.merged(tmp_path)
    model, problems = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(problems.values()) and model.config.num_labels == 3
    expected = read_model(tmp_path / "folded")
    assert any("classifier" in name or "score" in name for name in expected)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_a_head_that_needs_more_than_the_adapter_holds(tmp_path: Path) -> None:
    """BERT's classifier also has a pooler, which PEFT does not save."""
    lora.save_base(tmp_path, "bert", transformers.AutoModelForMaskedLM)
    auto = transformers.AutoModelForSequenceClassification
    lora.save_lora(tmp_path, auto, r=2, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(ModelError, match=r"it brings a part 'classifier\.bias', .* 'bert\.pooler\.dense\.bias'"):
        lora.merged(tmp_path)


def test_a_head_of_no_known_class(tmp_path: Path) -> None:
    auto = transformers.AutoModelForSequenceClassification
    lora.save_base(tmp_path, "llama", auto)
    lora.save_lora(tmp_path, auto, r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    lora.save_base(tmp_path, "llama")
    lora.change(tmp_path, task_type=None, auto_mapping=None)
    with pytest.raises(ModelError, match=r"it brings a part 'score\.weight', which the base does not have"):
        lora.merged(tmp_path)


@pytest.mark.parametrize("listed", [["classifier", "score"], ["pooler", "score"], ["score", "head"]])
def test_none_of_the_listed_modules(tmp_path: Path, listed: list[str]) -> None:
    factors = {"layer.lora_A.weight": torch.zeros(2, 4), "layer.lora_B.weight": torch.zeros(4, 2)}
    write(tmp_path, {"layer.weight": torch.zeros(4, 4)}, factors, modules_to_save=listed)
    with pytest.raises(ModelError, match="modules_to_save names"):
        lora.merged(tmp_path)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("adapter", ["", ".default"])
def test_names(tmp_path: Path, prefix: str, adapter: str) -> None:
    """With and without PEFT's prefix and the adapter's name."""
    lora.save_base(tmp_path, "llama")
    lora.save_lora(tmp_path, r=2, target_modules=["q_proj", "embed_tokens"], trainable_token_indices=None)
    renamed = {}
    for name, value in lora.tensors(tmp_path).items():
        name = name.removeprefix("base_model.model.").replace(".weight", f"{adapter}.weight")
        name += adapter if "embedding" in name else ""
        renamed[prefix + name] = value
    lora.write(tmp_path, renamed)
    lora.check(tmp_path)


def test_the_factors_decide_the_rank(tmp_path: Path) -> None:
    """The first pattern that matches gives alpha; saving sorts the patterns, so theirs of ranks mean nothing."""
    a, b, base = torch.randn(3, 4), torch.randn(4, 3), torch.randn(4, 4)
    patterns = {"rank_pattern": {"layer": 7}, "alpha_pattern": {"x.layer": 2, ".*layer": 6, "layer": 9}}
    write(tmp_path, {"layer.weight": base}, {"layer.lora_A.weight": a, "layer.lora_B.weight": b}, **patterns)
    lora.same(lora.merged(tmp_path), {"layer.weight": base + 2 * b @ a}, {"layer.weight": base})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activated": ({"alora_invocation_tokens": [1]}, "only after its invocation tokens"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "chooses among adapters by the input"),
    "QALoRA": ({"use_qalora": True}, "means of groups of inputs"),
    "VeLoRA": ({"velora_config": {"scale": 1}}, "VeLoRA's projections"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "cannot be redone exactly"),
    "layers twice": ({"layer_replication": [[0, 2]]}, "another model"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "its factors belong to a changed base"),
    "CorDA": ({"init_lora_weights": "corda"}, "its factors belong to a changed base"),
    "no blocks": ({"use_bdlora": {"target_modules_bd_a": ["layer"]}}, "use_bdlora must give nblocks"),
    "odd blocks": ({"use_bdlora": {"target_modules_bd_a": ["layer"], "nblocks": 3}}, "is not 3 blocks"),
    "no number": ({"alpha_pattern": {"layer": "much"}}, "alpha_pattern is .* must map modules to numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    settings, said = REFUSED[case]
    factors = {"layer.lora_A.weight": torch.zeros(2, 4), "layer.lora_B.weight": torch.zeros(4, 2)}
    write(tmp_path, {"layer.weight": torch.zeros(4, 4)}, factors, **settings)
    with pytest.raises(ModelError, match=said):
        lora.merged(tmp_path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    factors = {"layer.lora_A.weight": torch.zeros(2, 4), "layer.lora_B.weight": torch.zeros(4, 2)}
    for name in ("layer.lora_C.weight", "other.weight", "layer.lora_A.mine.weight", "layer.lora_velora_embed"):
        write_again = tmp_path / name
        write(write_again, {"layer.weight": torch.zeros(4, 4)}, factors | {name: torch.zeros(2)})
        with pytest.raises(ModelError, match=name):
            lora.merged(write_again)
    assert read_model(write_again / "base")
