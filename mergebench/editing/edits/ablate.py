"""Directional ablation: a model that can no longer write along a direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergebench.editing.edit import Rows, edit
from mergebench.parameters import param

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Params:
    strength: float = param(1.0, "share of the direction that is taken out", low=0, high=1)


@edit(paper="arXiv:2406.11717", target="residual")
def ablate(rows: Rows, p: Params) -> Tensor:
    """Take a probe's direction out of all that is written to the residual stream: W - strength r r'W.

    Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction", section 2.4. r is the direction at
    length one; a row is what one unit, or one token's embedding, writes, so it loses its part along r. At strength 1
    nothing that is edited writes along r any more. Differences from the paper: its r is the difference of the classes'
    mean activations (`direction: mean-diff`) at one token, here the probe's by default; biases are left as they are.
    """
    return -p.strength * rows.cosine * rows.norm / rows.length
