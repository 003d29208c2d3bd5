"""RoAd (Liao and Monz, arXiv:2409.00119): pairs of output rows, each pair rotated and scaled.

    w'_i = c_i w_i - d_i w_j,  w'_j = c_j w_j + d_j w_i,  c = alpha cos(theta), d = alpha sin(theta)

The rows are in groups of g; i in the first half of a group is paired with j = i + g / 2. theta and alpha are one for a
pair (RoAd-1), one for a row (RoAd-2), or apart for c and d (RoAd-4). The weight [out, in] is seen as
[out / g, g in], a group a row, so that a tile holds both rows of a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.delta import matrix_shape
from mergebench.checkpoint.kind import Misfit, delta_kind


@dataclass(frozen=True)
class Pairs:
    """theta and alpha [out / 2], [out] or [2 out]; group: g; variant: 1, 2 or 4."""

    theta: Tensor
    alpha: Tensor
    group: int
    variant: int


def _of_rows(values: Tensor, p: Pairs) -> tuple[Tensor, Tensor]:
    """Those of c and of d, [groups, 1 or 2, g / 2]."""
    parts = values.view(-1, p.variant, p.group // 2)
    return (parts[:, :2], parts[:, 2:]) if p.variant == 4 else (parts, parts)


def _check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    theta, group, variant, (groups, columns) = shapes["theta"], settings["group"], settings["variant"], shape
    if len(theta) != 1 or theta != shapes["alpha"] or group < 2 or group % 2 or variant not in (1, 2, 4):
        raise ValueError(f"RoAd-{variant} of theta {list(theta)}, alpha {list(shapes['alpha'])}, groups of {group}")
    if columns % group or theta[0] != groups * group * variant // 2:
        raise Misfit(f"{theta[0]} angles of RoAd-{variant} for {groups * group} outputs")


def _example(shape: tuple[int, ...], random: torch.Generator) -> dict[str, Any] | None:
    groups, columns = matrix_shape(shape)
    if columns % 4:
        return None
    theta, alpha = torch.randn(2, 8 * groups, generator=random)
    return {"theta": theta, "alpha": alpha, "group": 4, "variant": 4}


@delta_kind(
    paper="arXiv:2409.00119",
    needs_base=True,
    check=_check,
    example=_example,
    label=lambda parts, settings: f"RoAd-{settings['variant']}",
)
def paired(p: Pairs, tile: slice, base: Tensor | None) -> Tensor:
    """c w_i - d w_j - w_i for the first row of a pair, c w_j + d w_i - w_j for the second: RoAd."""
    assert base is not None
    (theta_c, theta_d), (alpha_c, alpha_d) = _of_rows(p.theta, p), _of_rows(p.alpha, p)
    c = (alpha_c[tile] * theta_c[tile].cos())[..., None]
    d = (alpha_d[tile] * theta_d[tile].sin())[..., None]
    rows = base.view(len(base), 2, p.group // 2, -1)
    others = torch.stack([-rows[:, 1], rows[:, 0]], 1)
    return ((c - 1) * rows + d * others).reshape(base.shape)
