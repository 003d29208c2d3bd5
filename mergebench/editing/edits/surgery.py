"""Model surgery: make the neurons that are least active on a behaviour fire on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mergebench.editing.edit import Rows, edit
from mergebench.parameters import param

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Params:
    rows: str = param("4.65%", "how many rows are edited: 16384, or a share of the candidates such as 4.65%")
    alpha: float = param(1.08, "how much of the direction is added to each")
    alpha_relative: bool = param(False, "alpha is the length of what is added, in median norms of the candidate rows")
    select: Literal["min-cos", "max-cos", "random"] = param("min-cos", "which rows, by their cosine with it")
    op: Literal["add", "subtract"] = param("add", "what is done to them")
    seed: int = param(0, "of select: random", low=0)


@edit(paper="arXiv:2407.08770")
def surgery(rows: Rows, p: Params) -> Tensor:
    """Add alpha W to the K gate rows of all layers with the lowest cosine to a behaviour probe W.

    Wang et al., "Model Surgery: Modulating LLM's Behavior Via Simple Parameter Editing", section 3. A row of the gate
    is the key of its neuron: those that point away from W are silent where the behaviour is, until
    W is added. The paper's K of 16,384 is 4.65 % of Llama 2 7B's rows. A negative alpha strengthens the behaviour.
    In the authors' code W is the probe's undesired row (`direction: row1`), its bias unused, as here.
    """
    score = {"min-cos": rows.cosine, "max-cos": -rows.cosine, "random": rows.random(p.seed)}[p.select]
    chosen = rows.lowest(score, rows.count(p.rows))
    alpha = p.alpha * float(rows.norm.median()) / rows.length if p.alpha_relative else p.alpha
    return chosen * (alpha if p.op == "add" else -alpha)
