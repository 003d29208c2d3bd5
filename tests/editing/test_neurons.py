"""Vectors read and written by number, wherever they lie: equal to indexing the whole tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench.checkpoint.files import Files
from mergebench.deltas.open import open_model
from mergebench.editing import neurons as module
from mergebench.editing.neurons import Neurons, vectors, write_vectors


def vectors_of(tensor: Tensor, transposed: bool) -> Tensor:
    """[neurons, width], by brute force."""
    turned = tensor.transpose(-1, -2) if transposed else tensor
    return turned.reshape(-1, turned.shape[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5), (1, 1)])
@pytest.mark.parametrize("block", [1, 12, 1 << 20])
def test_read_and_write(
    shape: tuple[int, ...],
    transposed: bool,
    dtype: torch.dtype,
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    torch.manual_seed(0)
    tensors = {"before": torch.randn(3, 3).to(dtype), "m": torch.randn(shape).to(dtype), "z": torch.randn(4).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    whole = vectors_of(tensors["m"], transposed)
    for numbers in ([], [0], list(range(len(whole))), [i for i in range(len(whole)) if i % 3 != 1]):
        model = open_model(str(tmp_path))
        neurons = Neurons(model.tensors["m"], transposed)
        assert (neurons.count, neurons.width) == tuple(whole.shape)
        wanted = torch.tensor(numbers, dtype=torch.int64)
        with Files() as files:
            assert torch.equal(whole[wanted], vectors(model.values(files), neurons, wanted))

        new = torch.randn(len(numbers), neurons.width).to(dtype)
        write_vectors(neurons, wanted, new)
        whole[wanted] = new
        found = load_file(tmp_path / "model.safetensors")
        assert torch.equal(whole, vectors_of(found["m"], transposed))
        assert all(torch.equal(tensors[name], found[name]) for name in ("before", "z"))
