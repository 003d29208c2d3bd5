"""Model surgery: make the neurons that are least active on a behaviour fire on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mergebench.editing.edit import Rows, edit
from mergebench.errors import RecipeError
from mergebench.parameters import param

if TYPE_CHECKING:
    from torch import Tensor


STEP = 0.75  # takes a quarter of the profanity from a small model, for 3.5% more bits: benchmarks/RESULTS.md


@dataclass(frozen=True)
class Params:
    rows: str = param("4.65%", "how many rows are edited: 16384, or a share of the candidates such as 4.65%")
    step: float | None = param(None, f"length of the step, in median norms of the candidate rows; {STEP} without alpha")
    alpha: float | None = param(None, "instead of step: times the direction, as the paper has it (1.08, for its probe)")
    select: Literal["min-cos", "max-cos", "random"] = param("min-cos", "which rows, by their cosine with it")
    op: Literal["add", "subtract"] = param("add", "what is done to them")
    seed: int = param(0, "of select: random", low=0)


@edit(paper="arXiv:2407.08770")
def surgery(rows: Rows, p: Params) -> Tensor:
    """Add a step along W to the K gate rows of all layers with the lowest cosine to a behaviour probe W.

    Wang et al., "Model Surgery: Modulating LLM's Behavior Via Simple Parameter Editing", section 3. A row of the gate
    is the key of its neuron: those that point away from W are silent where the behaviour is, until
    W is added. The paper's K of 16,384 is 4.65% of Llama 2 7B's rows. A negative step strengthens the behaviour.
    The paper adds alpha W, whose effect depends on the length that W got in training; a step does not.
    In the authors' code W is the probe's undesired row (`direction: row1`), its bias unused, as here.
    """
    score = {"min-cos": rows.cosine, "max-cos": -rows.cosine, "random": rows.random(p.seed)}[p.select]
    chosen = rows.lowest(score, rows.count(p.rows))
    alpha = p.alpha
    if alpha is None:
        alpha = (STEP if p.step is None else p.step) * float(rows.norm.median()) / rows.length
    elif p.step is not None:
        raise RecipeError("step: alpha is given too", "name one of them: step is comparable between probes and models")
    return chosen * (alpha if p.op == "add" else -alpha)
