"""OFT and BOFT: PEFT's `merge_and_unload` is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig, OFTConfig
from peft.tuners.boft.layer import BOFTLayer
from safetensors.torch import load_file, save_file

from mergebench.deltas.butterfly import Butterfly, butterfly
from mergebench.deltas.open import open_model
from mergebench.deltas.rotated import cayley
from mergebench.errors import ModelError
from tests.deltas import peft_types

LAYERS = ["q_proj", "down_proj"]
OFT: dict[str, tuple[str, dict[str, Any]]] = {
    "series": ("llama", {"oft_block_size": 4, "target_modules": LAYERS}),
    "inverse": ("llama", {"oft_block_size": 8, "target_modules": LAYERS, "use_cayley_neumann": False}),
    "one block": ("llama", {"oft_block_size": 0, "r": 1, "target_modules": ["v_proj"]}),
    "two terms": ("llama", {"oft_block_size": 4, "target_modules": LAYERS, "num_cayley_neumann_terms": 2}),
    "three terms": ("llama", {"oft_block_size": 4, "target_modules": LAYERS, "num_cayley_neumann_terms": 3}),
    "seven terms": ("llama", {"oft_block_size": 4, "target_modules": LAYERS, "num_cayley_neumann_terms": 7}),
    "shared": ("llama", {"oft_block_size": 4, "target_modules": LAYERS, "block_share": True}),
    "constrained": ("llama", {"oft_block_size": 4, "target_modules": LAYERS, "coft": True, "eps": 0.5}),
    "embedding": ("llama", {"oft_block_size": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, saved whole": (
        "llama",
        {"oft_block_size": 4, "target_modules": ["embed_tokens"], "modules_to_save": ["norm"]},
    ),
}


@pytest.mark.parametrize("case", OFT)
def test_oft_as_peft_merges(tmp_path: Path, case: str) -> None:
    family, settings = OFT[case]
    deltas = peft_types.check(tmp_path, family, OFTConfig(**settings))
    assert {delta.kind for (delta,) in deltas.values()} <= {"rotated", "dense"}


def test_an_old_file_is_refused(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", OFTConfig(oft_block_size=4, target_modules=["q_proj"]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("oft_R.weight", "oft_r"): value for name, value in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="oft_r: an OFT of PEFT"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


BOFT: dict[str, dict[str, Any]] = {
    "sizes": {"boft_block_size": 4, "target_modules": LAYERS},
    "numbers, saved whole": {
        "boft_block_size": 0, "boft_block_num": 2, "target_modules": LAYERS, "modules_to_save": ["norm"],
    },
    "odd blocks": {"boft_block_size": 3, "target_modules": ["down_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("case", BOFT)
def test_boft_as_peft_merges(tmp_path: Path, case: str) -> None:
    deltas = peft_types.check(tmp_path, "llama", BOFTConfig(**BOFT[case]))
    assert {delta.kind for (delta,) in deltas.values()} <= {"butterfly", "dense"}


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_butterflies_of_more_factors(factors: int) -> None:
    """The formula with matrices written out: PEFT has more than one factor on a GPU only."""
    random = torch.Generator().manual_seed(0)
    size, number, columns = 4, 4, 16
    weight = torch.randn(6, columns, generator=random, dtype=torch.float64)
    blocks = torch.randn(factors, number, size, size, generator=random, dtype=torch.float64)
    scale = torch.rand(6, 1, generator=random, dtype=torch.float64)
    rotation, identity = torch.eye(columns, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    for level in range(factors):
        permuted = torch.zeros(columns, columns, dtype=torch.float64)
        taken = BOFTLayer.block_butterfly_perm(None, columns, number // 2**level, size // 2, factors - 1)
        permuted[torch.arange(columns), taken] = 1
        skew = [(block - block.T) / 2 for block in blocks[level]]
        turns = torch.block_diag(*[(identity - q) @ torch.linalg.inv(identity + q) for q in skew])
        rotation = permuted @ turns @ permuted.T @ rotation
    expected = scale * (weight @ rotation.T) - weight
    torch.testing.assert_close(butterfly(Butterfly(blocks, scale), slice(0, 6), weight), expected)


def test_what_does_not_fit(tmp_path: Path) -> None:
    peft_types.make(tmp_path, "llama", OFTConfig(oft_block_size=4, target_modules=["q_proj"]))
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"block_share": True}))
    with pytest.raises(ModelError, match="block_share, but 4 blocks"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    config.write_text(json.dumps({key: value for key, value in settings.items() if key != "peft_version"}))
    with pytest.raises(ModelError, match="a PEFT before"):
        open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


def test_a_series_of_no_terms(tmp_path: Path) -> None:
    """PEFT rotates by the identity then."""
    config = OFTConfig(oft_block_size=4, target_modules=["q_proj"], num_cayley_neumann_terms=0)
    expected = peft_types.make(tmp_path, "llama", config)
    found = open_model(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_large_blocks_on_several_threads() -> None:
    """torch 2.13's LU of a batch of large matrices fails there, once the number of threads was set."""
    q = 0.1 * torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    q = (q - q.mT) / 2
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        turned = cayley(q).double() + torch.eye(256)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(turned @ turned.mT, torch.eye(256).double().expand(3, -1, -1), rtol=0, atol=1e-5)
