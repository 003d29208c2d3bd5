"""Models that do not fit together: the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import write_model

import mergebench
from mergebench.errors import ModelError


@pytest.mark.parametrize("longer", ["a", "b"])
def test_a_layer_that_one_model_adds_may_be_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longer: str
) -> None:
    """As multi-token prediction does, which a fine-tune saved by transformers has lost."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        layers = range(4 if name == longer else 3)
        write_model(
            tmp_path / name, {f"model.layers.{at}.{part}": torch.ones(2) for at in layers for part in ("w", "eh_proj")}
        )
    data = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}}
    with pytest.raises(ModelError) as caught:
        mergebench.plan(mergebench.load(data))
    assert caught.value.hint == 'to merge only what all have: exclude: ["model.layers.3.*"]'
    plan = mergebench.plan(mergebench.load(data | {"exclude": ["model.layers.3.*"]}))
    assert len(plan.alignment.merged) == 6
