"""PEFT types whose change is a function of the adapter alone, with settings drawn at random."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest

from tests.deltas import peft_types

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, tuple[Any, dict[str, list[Any]]]] = {
    "adalora": (peft.AdaLoraConfig, {"init_r": [1, 5, 12], "lora_alpha": [1, 8, 30], "total_step": [9]}),
    "delora": (peft.DeloraConfig, {"r": [1, 4, 9], "delora_lambda": [1, 15], "init_weights": [True, False]}),
    "gralora": (peft.GraloraConfig, {"r": [4, 8], "gralora_k": [1, 2, 4], "hybrid_r": [0, 1, 5], "alpha": [3, 64]}),
    "vera": (peft.VeraConfig, {"r": [1, 7, 40], "projection_prng_key": [0, 5], "d_initial": [0.1, 2.0]}),
    "pvera": (peft.PveraConfig, {"r": [1, 7, 40], "projection_prng_key": [0, 5], "d_initial": [0.1, 2.0]}),
    "tinylora": (peft.TinyLoraConfig, {"r": [1, 2, 8], "u": [1, 16], "weight_tying": [0.0, 0.3, 0.75, 1.0]}),
    "vblora": (
        peft.VBLoRAConfig,
        {
            "r": [1, 4], "vector_length": [4, 8], "num_vectors": [5, 90], "topk": [1, 2, 4],
            "save_only_topk_weights": [True, False],
        },
    ),
    "unilora": (peft.UniLoraConfig, {"r": [1, 6], "theta_d_length": [3, 500], "save_indices": [True]}),
    "loha": (peft.LoHaConfig, {"r": [1, 5], "alpha": [1, 8], "alpha_pattern": [{}, {"_proj": 3}]}),
    "lokr": (
        peft.LoKrConfig,
        {"r": [1, 3, 9], "alpha": [1, 8], "decompose_both": [True, False], "decompose_factor": [-1, 2, 8]},
    ),
    "randlora": (peft.RandLoraConfig, {"r": [2, 5, 16], "randlora_alpha": [4, 640], "sparse": [True, False]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_as_peft_merges(tmp_path: Path, kind: str, seed: int) -> None:
    draw = random.Random(f"{kind} {seed}")
    config, choices = SETTINGS[kind]
    settings = {name: draw.choice(values) for name, values in choices.items()}
    targets = draw.sample(TARGETS, draw.randint(1, 5))
    peft_types.check(tmp_path, "llama", config(target_modules=targets, **settings))
