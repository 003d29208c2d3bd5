"""A method on rows in memory, cut anywhere, gives the bits of the brute-force oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergebench import methods
from mergebench.engine.context import Context
from mergebench.engine.noise import TILE
from mergebench.engine.replay import run_in_chunks
from mergebench.engine.span import Span
from mergebench.testing.methods import run_whole

CASES: dict[str, dict[str, Any]] = {
    "ties": {"density": (0.3, 0.5, 1.0), "weight": (1.0, -0.5, 2.0)},
    "dare_linear": {"density": (0.3, 0.5, 1.0), "weight": (1.0, -0.5, 2.0)},
    "dare_ties": {"density": (0.3, 0.5, 1.0), "weight": (1.0, -0.5, 2.0)},
    "pcb": {"density": 0.2, "weight": (1.0, 0.5, 2.0)},
    "slerp": {"t": 0.3},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("numel", [1, 7, TILE, 3 * TILE + 11])
def test_chunks_give_the_same_bits(name: str, numel: int) -> None:
    method = methods.get(name)
    models = method.models or 3
    values = torch.randn(models, numel, generator=torch.Generator().manual_seed(numel)) * 0.1
    before = values.clone()
    names = tuple("abc")[:models]
    context = Context(numel, names, (Span("w", 0, numel),), (numel,), "tensor", 3, torch.device("cpu"))
    params = method.params(**CASES[name])
    expected = run_whole(method, values, params, context, [numel])
    for chunk in (TILE, 2 * TILE, 8 * TILE):
        assert torch.equal(run_in_chunks(method, values, params, context, chunk), expected)
    assert torch.equal(values, before)
