"""NearSwap: the base, moved towards another model by at most t in each element."""

from __future__ import annotations

from dataclasses import dataclass

from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, merge_method
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    t: float = param(help="most that an element moves", low=0)


@merge_method(
    takes="task_vectors",
    keeps_base=True,
    paper="huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    models=1,
    exempt={"one model": "an element moves by t at most"},
)
def nearswap(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """Swap in the other model where it is near the base.

        theta = theta_0 + clamp(tau, -t, t)

    alchemonaut, QuartetAnemoi-70B. The same as w theta_1 + (1-w) theta_0 with w = min(t / |tau|, 1), as
    published: nearer than t the other model's value is taken, elsewhere the base moves by t towards it.
    """
    return tvs[0].clamp(-p.t, p.t)
