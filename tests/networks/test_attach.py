"""What is attached runs beside the blocks of its thread alone, whatever it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergebench.networks.attach import Hooks
from mergebench.networks.network import Network
from tests.evaluation.conftest import Files, write_encoder

TOKENS = [[2, 7, 9, 30, 3], [2, 5, 5, 8, 3]]


def test_anything_beside_the_blocks(tmp_path: Path) -> None:
    network = Network(Files(write_encoder(tmp_path / "encoder", "distilbert")), "AutoModel", torch.device("cpu"))
    plain, _ = network.encode(TOKENS)
    hooks = Hooks(network)
    seen: list[str] = []

    def half(block: str, x: Tensor) -> Tensor:
        seen.append(block)
        return x / 2

    with hooks.attached(half):
        beside, _ = network.encode(TOKENS)
    assert tuple(seen) == hooks.blocks
    states = network.module.embeddings(network.padded(TOKENS)[0])
    for block in network.blocks.values():
        x = block.sa_layer_norm(block.attention(states)[0] + states)
        states = block.output_layer_norm(block.ffn(x) + x + (x / 2))
        assert len(seen) == len(hooks.blocks)  # nothing is attached any more
    torch.testing.assert_close(beside, states, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(beside, plain, atol=1e-2)
    with pytest.raises(ZeroDivisionError), hooks.attached(lambda block, x: x / (1 // 0)):
        network.encode(TOKENS)
    assert torch.equal(network.encode(TOKENS)[0], plain)
