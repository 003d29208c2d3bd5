"""LoRA on convolutions: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import read_model, write_model

from mergebench.errors import ModelError
from tests.deltas import lora_models as lora

CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "two dimensions": ("vit", transformers.AutoModel, {"target_modules": ["projection", "q_proj"], "r": 3}),
    "two dimensions, DoRA": (
        "vit", transformers.AutoModel, {"target_modules": ["projection"], "r": 3, "use_dora": True, "use_rslora": True},
    ),
    "bias of B": ("vit", transformers.AutoModel, {"target_modules": ["projection"], "r": 3, "lora_bias": True}),
    "one dimension": (
        "whisper", transformers.AutoModelForSpeechSeq2Seq, {"target_modules": ["conv1", "q_proj"], "r": 2},
    ),
    "one dimension, DoRA": (
        "whisper", transformers.AutoModelForSpeechSeq2Seq, {"target_modules": ["conv2"], "r": 2, "use_dora": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    family, auto, settings = CASES[case]
    lora.save_base(tmp_path, family, auto)
    lora.save_lora(tmp_path, auto, **settings)
    assert any(len(read_model(tmp_path / "base")[name].shape) > 2 for name in lora.check(tmp_path))


@pytest.mark.parametrize("kernel", [(3,), (1,), (2, 3), (1, 1), (2, 1, 3)])
def test_kernels(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    """W + s B A, with A taken as a matrix [r, in * kernel]."""
    base, a, b = torch.randn(6, 4, *kernel), torch.randn(2, 4, *kernel), torch.randn(6, 2, *[1] * len(kernel))
    write(tmp_path, {"conv.weight": base}, {"conv.lora_A.weight": a, "conv.lora_B.weight": b})
    expected = base + 1.5 * (b.flatten(1) @ a.flatten(1)).view(base.shape)
    lora.same(lora.merged(tmp_path), {"conv.weight": expected}, {"conv.weight": base})


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ((4, 2, 3, 3), (6, 2, 1, 1), "of a convolution in groups"),
        ((2, 4, 3, 3), (6, 2, 3, 3), "do not multiply"),
        ((2, 5, 3, 3), (6, 2, 1, 1), "another model|the adapter changes"),
        ((2, 9, 2, 2), (6, 2, 1, 1), "the adapter changes"),
    ],
)
def test_refused(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...], said: str) -> None:
    factors = {"conv.lora_A.weight": torch.zeros(a), "conv.lora_B.weight": torch.zeros(b)}
    write(tmp_path, {"conv.weight": torch.zeros(6, 4, 3, 3)}, factors)
    with pytest.raises(ModelError, match=said):
        lora.merged(tmp_path)


def write(folder: Path, base: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], **settings: Any) -> None:
    """A base and an adapter of these tensors."""
    write_model(folder / "base", base)
    (folder / "lora").mkdir()
    lora.write(folder, factors)
    (folder / "lora" / "adapter_config.json").write_text("{}")
    lora.change(folder, **{"peft_type": "LORA", "r": 2, "lora_alpha": 3, **settings})
