"""Every edit keeps the rules, and the checks see one that does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mergebench.editing import edits
from mergebench.editing.edit import Edit, Rows, edit
from mergebench.parameters import param
from mergebench.testing import check_edit


@dataclass(frozen=True)
class Params:
    alpha: float = param(0.5, "how much")


@edit(paper="")
def writes(rows: Rows, p: Params) -> Tensor:
    """Wrong: it writes into what it is told."""
    return rows.cosine.mul_(p.alpha)


@edit(paper="")
def forgets(rows: Rows, p: Params) -> Tensor:
    """Wrong: it draws anew at every call."""
    return p.alpha * torch.rand(len(rows))


@edit(paper="")
def divides(rows: Rows, p: Params) -> Tensor:
    """Wrong: a row has no such number."""
    return p.alpha / (rows.norm * 0)


@pytest.mark.parametrize("name", edits.names())
def test_every_edit_keeps_the_rules(name: str) -> None:
    check_edit(edits.get(name))


@pytest.mark.parametrize("values", [{"rows": "7"}, {"select": "random", "seed": 3}, {"op": "subtract", "rows": "100%"}])
def test_surgery_with_other_parameters(values: dict[str, Any]) -> None:
    check_edit(edits.get("surgery"), **values)


@pytest.mark.parametrize(
    ("broken", "check"), [(writes, "pure: it writes"), (forgets, "pure: two calls"), (divides, "amounts: .*finite")]
)
def test_a_broken_edit_is_found(broken: Edit, check: str) -> None:
    with pytest.raises(AssertionError, match=check):
        check_edit(broken)


@dataclass(frozen=True)
class Required:
    share: float = param(help="of the direction")


@edit(paper="")
def adds(rows: Rows, p: Required) -> Tensor:
    """A share of the direction to every row."""
    return torch.full((len(rows),), p.share)


def test_what_must_be_given_is_asked_for() -> None:
    with pytest.raises(AssertionError, match="adds: 'share' has no default"):
        check_edit(adds)
    check_edit(adds, share=0.5)
