"""Every delta kind keeps the rules, and the checks see one that does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mergebench import deltas
from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import DeltaKind, delta_kind
from mergebench.deltas.low_rank import Factors, low_rank
from mergebench.testing import check_delta


@pytest.mark.parametrize("name", deltas.names())
def test_every_kind_keeps_the_rules(name: str) -> None:
    check_delta(deltas.get(name))


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any]:
    rows, columns = matrix_shape(shape)
    return {"b": torch.randn(rows, 2, generator=random), "a": torch.randn(2, columns, generator=random)}


@delta_kind(paper="", example=_example)
def depends_on_the_tile(p: Factors, tile: slice, base: Tensor | None) -> Tensor:
    """Wrong: the first row of a tile is another one."""
    out = p.b[tile] @ p.a
    out[0] += tile.start
    return out


@delta_kind(paper="", example=_example)
def without_gradient(p: Factors, tile: slice, base: Tensor | None) -> Tensor:
    """Wrong: B cannot be trained."""
    return p.b[tile].detach() @ p.a


BROKEN: dict[str, tuple[DeltaKind, str]] = {
    "tile": (depends_on_the_tile, "formula"),
    "gradient": (without_gradient, "gradients: .*'b' gets none"),
    "energy": (dataclasses.replace(low_rank, energy=lambda p, shape: 1.0), "energy"),
    "factors": (dataclasses.replace(low_rank, factors=lambda p, base, shape: (p.b, p.a)), "factors"),
    "base": (dataclasses.replace(deltas.get("dora"), needs_base=lambda settings: False), "dora"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kind_is_found(broken: str) -> None:
    kind, check = BROKEN[broken]
    with pytest.raises(AssertionError, match=check):
        check_delta(kind)


def test_a_kind_without_an_example_does_not_pass() -> None:
    with pytest.raises(AssertionError, match="low_rank: it declares no example"):
        check_delta(dataclasses.replace(low_rank, example=None))
