"""Files in transformers' two layouts, of architectures whose rules differ most: fused, split, interleaved, transposed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers
from models import read_model
from peft import IA3Config, LoraConfig, get_peft_model

import mergebench
from mergebench.errors import ModelError
from tests.checkpoint.test_architectures import HUB, MEMORY, folded, judged

TWO = "right, two layouts"
MERGED = ["granitemoe", "inkling2_text", "nemo_speechlm", "mistral_large4"]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Any:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("name", MERGED)
def test_merges(tmp_path: Path, name: str) -> None:
    assert judged(architectures.build(name), tmp_path) == TWO


@pytest.mark.parametrize("name", ["granitemoe", "inkling2_text"])
def test_folds(tmp_path: Path, name: str) -> None:
    assert folded(architectures.build(name), tmp_path) == TWO
