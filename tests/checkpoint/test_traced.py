"""Traced tensors: each operation on them moves elements as torch's own does on numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mergebench.checkpoint.traced import Traced, traced

FIRST, SECOND = torch.arange(24).view(4, 1, 6), 100 + torch.arange(24).view(4, 1, 6)
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "view": lambda one, other: one.view(2, -1, 3),
    "reshape": lambda one, other: one.transpose(0, 2).reshape(3, 8),
    "transpose": lambda one, other: one.transpose(-1, 0),
    "permute": lambda one, other: one.permute(1, -1, 0),
    "unsqueeze": lambda one, other: one.unsqueeze(-1).unsqueeze(1),
    "squeeze": lambda one, other: one.squeeze(1),
    "squeeze of a longer dimension": lambda one, other: one.squeeze(-1),
    "select": lambda one, other: one[-1],
    "slice": lambda one, other: one[1:, :, 1:-1],
    "every second": lambda one, other: one[:, :, ::2],
    "rows with a step": lambda one, other: one[1::2],
    "chunks that do not fit": lambda one, other: one.split(4, dim=2),
    "split": lambda one, other: one.split([1, 3, 2], dim=-1),
    "stack": lambda one, other: torch.stack([one, other], dim=1),
    "cat": lambda one, other: torch.cat([one, other], dim=-1),
    "cat of slices": lambda one, other: torch.cat([one[:, :, :2], other[:, :, 2:]], dim=2),
    "unbind": lambda one, other: one.unbind(2),
    "copies": lambda one, other: one.detach().clone().contiguous().to(torch.float64),
    "experts": lambda one, other: torch.stack(
        [torch.cat(both, 2).squeeze(1).T for both in ((one, other), (other, one))]
    ),
}


def numbers(made: Tensor) -> Tensor:
    assert isinstance(made, Traced) and made.shape == made.laid.shape
    flat = torch.full((made.numel(),), -1)
    for box in made.laid.boxes:
        at, start = torch.tensor(box.at), torch.tensor(box.start)
        for count, step, stride in zip(box.counts, box.steps, box.strides, strict=True):
            at, start = at[..., None] + torch.arange(count) * step, start[..., None] + torch.arange(count) * stride
        flat[at] = {"first": FIRST, "second": SECOND}[box.source].reshape(-1)[start]
    return flat.view(made.shape)


@pytest.mark.parametrize("name", OPERATIONS)
def test_elements_go_where_torch_puts_them(name: str) -> None:
    wanted = OPERATIONS[name](FIRST, SECOND)
    found = OPERATIONS[name](traced("first", FIRST.shape), traced("second", SECOND.shape))
    wanted, found = ([one] if isinstance(one, Tensor) else [*one] for one in (wanted, found))
    assert len(wanted) == len(found)
    assert all(torch.equal(value.long(), numbers(made)) for value, made in zip(wanted, found, strict=True))


def test_no_other_operation_is_taken_for_a_change_of_layout() -> None:
    with pytest.raises(NotImplementedError, match="not a change of layout"):
        traced("first", FIRST.shape) + 1
