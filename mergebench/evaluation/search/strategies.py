"""Search strategies: which points to try, a generation after the other.

A strategy is a generator. It yields points that may be tried side by side, each as one place from 0 to 1 per dimension,
and is sent their costs, a number for each objective (lower is better). It continues while it is asked. All strategies
are deterministic in their seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Sequence

from mergebench.errors import RecipeError, did_you_mean
from mergebench.evaluation.search.history import FAILED, Costs
from mergebench.evaluation.search.space import Dimension

Places = Sequence[float]
Strategy = Generator[Sequence[Places], Sequence[Costs], None]
Start = Sequence[float]  # the recipe as given


def grid(space: Sequence[Dimension], start: Start, budget: int, seed: int) -> Strategy:
    """All combinations of evenly spread values, as many a dimension as `budget` points allow."""
    counts = [1] * len(space)

    def finer(i: int) -> list[int]:
        return [count + (number == i) for number, count in enumerate(counts)]

    def fits(i: int) -> bool:
        return math.prod(finer(i)) <= budget and counts[i] < (space[i].levels or budget)

    while fitting := [i for i in range(len(space)) if fits(i)]:
        counts = finer(min(fitting, key=lambda i: counts[i]))
    # lambda varies fastest: points that differ only in lambda merge quickly
    order = sorted(range(len(space)), key=lambda i: space[i].parameter.name == "lambda")
    every = itertools.product(*(_spread(space[i], counts[i], start[i]) for i in order))
    yield [[place for _, place in sorted(zip(order, places, strict=True))] for places in every]


def _spread(one: Dimension, count: int, own: float) -> list[float]:
    if count == 1:
        return [own]
    return [i / (count - 1) for i in range(count)]


def random(space: Sequence[Dimension], start: Start, budget: int, seed: int) -> Strategy:
    """Points drawn uniformly."""
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(seed))
    while True:
        yield [generator.random(len(space)).tolist() for _ in range(budget)]


def cmaes(space: Sequence[Dimension], start: Start, budget: int, seed: int) -> Strategy:
    """CMA-ES (Hansen, arXiv:1604.00772), starting from the recipe as given.

    Du et al. (arXiv:2410.02396) search PCB's coefficients this way.
    """
    import numpy as np
    from cmaes import CMA

    bounds = np.array([[0.0, 1.0]] * len(space))
    optimizer = CMA(mean=np.array(start), sigma=0.25, bounds=bounds, seed=seed % 2**32)
    while not optimizer.should_stop():
        points = [optimizer.ask() for _ in range(optimizer.population_size)]
        costs = yield [point.tolist() for point in points]
        optimizer.tell([(point, cost) for point, (cost, *_) in zip(points, costs, strict=True)])


def front(space: Sequence[Dimension], start: Start, budget: int, seed: int) -> Strategy:
    """COMO-CatCMA with margin (arXiv:2504.07884): evolution strategies side by side, each after another part of the
    front of two objectives."""
    from cmaes import COMOCatCMAwM

    kernels = min(max(2, budget // 10), 10)
    optimizer = COMOCatCMAwM(x_space=[[0.0, 1.0]] * len(space), kernel_size=kernels, seed=seed % 2**32)
    worst = [0.0, 0.0]  # what a failed point counts as
    while True:
        points = list(optimizer.ask_iter())
        costs = yield [point.x.tolist() for point in points]
        known = [cost for cost in costs if FAILED not in cost]
        worst = [max(values) for values in zip(worst, *known, strict=True)] if known else worst
        told = [worst if FAILED in cost else list(cost) for cost in costs]
        optimizer.tell(list(zip(points, told, strict=True)))


STRATEGIES: dict[str, Callable[[Sequence[Dimension], Start, int, int], Strategy]] = {
    "grid": grid, "random": random, "cmaes": cmaes, "front": front,
}  # fmt: skip


NAMES = ("grid", "random", "cmaes")  # cmaes of two objectives is `front`


def choose(name: str | None, space: Sequence[Dimension], objectives: int = 1) -> str:
    """A strategy by name; None: a grid over one or two dimensions, evolution over more."""
    if name is None:
        name = "grid" if len(space) <= 2 else "cmaes" if objectives <= 2 else "random"
    if name not in NAMES:
        raise RecipeError(f"--strategy: '{name}' is none", did_you_mean(name, NAMES))
    if name == "cmaes" and objectives > 2:
        raise RecipeError(f"--strategy cmaes: it follows two objectives, not {objectives}", "take grid or random")
    return name
