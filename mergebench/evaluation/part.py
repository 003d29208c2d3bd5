"""A part of an evaluation, for the jobs of an array: each measures its own models and tasks, and they share a store."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mergebench.errors import RecipeError
from mergebench.evaluation.batch import Batch, Candidate, Meter, Step
from mergebench.evaluation.store import Store
from mergebench.evaluation.suite import Suite


class Part(NamedTuple):
    """Number `number` of `among` parts, from 1."""

    number: int
    among: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.among}"


def parse(text: str) -> Part:
    """`2/8`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError(f"--part: '{text}' is not possible", "1/8 to 8/8, for the eight jobs of an array")
    return Part(int(match[1]), int(match[2]))


def measure_part(
    part: Part,
    candidates: Sequence[Candidate],
    suite: Suite,
    device: str,
    store: Store,
    progress: Callable[[Step], None] | None,
) -> list[tuple[str, str]]:
    """Measure a part of all models and tasks; returns those, of all parts, whose results are not in the store yet.

    The parts are disjoint, and tasks of a model are in one part where that is even. What fails stays missing.
    """
    every = [(candidate, task) for candidate in candidates for task in suite.tasks]
    first, end = (len(every) * number // part.among for number in (part.number - 1, part.number))
    mine = every[first:end]
    batch = Batch(suite, device, store, Meter(progress, sum(task.ready.n for _, task in mine)))
    failed = []
    for candidate in candidates:
        names = [task.name for one, task in mine if one is candidate]
        failed += batch.measure(candidate, names).errors if names else []
    if failed:
        raise failed[0]
    return [(candidate.name, task.name) for candidate, task in every if not batch.is_known(candidate, task)]
