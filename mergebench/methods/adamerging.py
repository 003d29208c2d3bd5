"""AdaMerging: factors of the task vectors, learnt by making the merged model sure of its answers."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.parameters import param

_LEARNT = "its factors are learnt, and add up to anything"


@dataclass(frozen=True)
class Params:
    coefficients: str = param("layer", "a factor for each tensor of a model, or one", choices=("layer", "task"))
    init: float = param(0.3, "the factors at the start", low=0, high=1)
    steps: int = param(500, "number of steps", low=0)
    lr: float = param(1e-3, "Adam's learning rate", above=0)
    batch: int = param(16, "texts of each task in a step", low=1)


@merge_method(
    takes="task_vectors",
    keeps_base=True,
    statistics="coefficients",
    paper="arXiv:2310.02575",
    exempt={"one model": _LEARNT, "equal models": _LEARNT},
)
def adamerging(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Base plus task vectors, with factors that make the merged model's answers sure.

        theta = theta_0 + sum lambda_i tau_i, lambda_i of each tensor or of the model,
        lambda the argmin of the entropies of p(y | x), x each task's texts, no labels

    Yang et al., "AdaMerging: Adaptive model merging for multi-task learning": `coefficients: layer` has a
    lambda_i for each tensor, `task` one for each model. Adam steps on texts of all tasks, lambda kept
    between 0 and 1, as in their code. They are learnt before the merge: give each model `data:`. The paper
    takes the test inputs.
    """
    assert ctx.on_data is not None, "the engine reads the declared statistics"
    return total(tvs * ctx.on_data.values)
