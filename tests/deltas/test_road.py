"""RoAd: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import RoadConfig

from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.deltas import peft_types

LAYERS = ["q_proj", "down_proj", "up_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "road_1": ("llama", {"group_size": 4, "target_modules": LAYERS}),
    "road_2": ("llama", {"group_size": 8, "target_modules": LAYERS, "variant": "road_2", "init_weights": False}),
    "road_4": ("llama", {"group_size": 2, "target_modules": LAYERS, "variant": "road_4"}),
    "saved whole": ("llama", {"group_size": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "biases": ("biased", {"group_size": 4, "target_modules": LAYERS, "variant": "road_4"}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    deltas = peft_types.check(tmp_path, family, RoadConfig(**settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"paired", "dense"}
    assert any(name.endswith("bias") for name in deltas) == (family == "biased")


def test_what_does_not_fit(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", RoadConfig(group_size=4, target_modules=["q_proj"]))
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"group_size": 64}))
    with pytest.raises(ModelError, match="group_size: 64 does not divide 16 outputs"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    config.write_text(json.dumps(settings | {"variant": "road_2"}))
    with pytest.raises(ModelError, match="8 angles of RoAd-2 for 16 outputs"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
