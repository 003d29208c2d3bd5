"""Metrics of a sequence of tasks: average and last accuracy, forgetting, retrieval, and their spread over seeds.

A record is what one method scored after one task: {"seed", "method", "stage", "accuracy" (on all classes so far),
"by_task": [accuracy on each task so far], "items_by_task": [items of each], "retrieval": None or {"steps": [share of
items with their own task's adapter at step 0..3], "evaluations" (mean an item), "cycles", "agreement" (shares)}}.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergebench.errors import RunError

Record = Mapping[str, Any]
Runs = dict[str, dict[int, list[Record]]]  # method, seed: records in the order of the tasks
CONFIDENCE = 0.95
MOS = "mos"
SECTIONS = (  # the order of the rows
    {
        "simplecil": "frozen prototypes (SimpleCIL)",
        "frozen-head": "no adapters, aligned head",
        "first-task": "first adapter's prototypes",
        "sequential": "one adapter for all",
    },
    {
        "unmerged": "MOS, adapters not merged",
        "first-guess": "MOS, first guess alone",
        "no-retrieval": "MOS, newest adapter alone",
        "no-alignment": "MOS without alignment",
        "no-ensemble": "MOS without ensemble",
    },
    {MOS: "MOS"},
)
NAMES = {name: shown for section in SECTIONS for name, shown in section.items()}


@dataclass(frozen=True)
class Measures:
    """One run of one method: shares from 0 to 1."""

    average: float  # mean over the stages of the accuracy on all classes so far (Rebuffi et al. 2017, arXiv:1611.07725)
    last: float  # after the last task
    forgetting: float | None  # None of one task, which nothing followed
    retrieval: Mapping[str, Any] | None  # after the last task


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and its standard error; None of one seed."""

    mean: float
    stderr: float | None


@dataclass(frozen=True)
class Difference:
    """Mean over the shared seeds of one method's value less another's, with its interval; None of one seed."""

    mean: float
    interval: tuple[float, float] | None

    @property
    def beyond_noise(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def runs_of(records: Iterable[Record]) -> Runs:
    """The runs by method, in the order of the tables, and seed; without those that have not come to the last task yet.

    `RunError` for a record that stands twice, or where no run is left.
    """
    found: defaultdict[str, defaultdict[int, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    stages = set()
    for record in records:
        method, seed, stage = record["method"], record["seed"], record["stage"]
        if stage in found[method][seed]:
            raise RunError(f"method '{method}', seed {seed}: stage {stage} stands twice in the results")
        found[method][seed][stage] = record
        stages.add(stage)
    order = [*(method for method in found if method not in NAMES), *NAMES]
    complete = {
        method: {
            seed: [run[stage] for stage in sorted(run)]
            for seed, run in sorted(found[method].items())
            if len(run) == len(stages)
        }
        for method in order
        if method in found
    }
    complete = {method: by_seed for method, by_seed in complete.items() if by_seed}
    if not complete:
        raise RunError("no run has come to its last task: there is nothing to tabulate")
    return complete


def measures(run: Sequence[Record]) -> Measures:
    """What one run, its records in the order of the tasks, comes to."""
    accuracies = [record["accuracy"] for record in run]
    return Measures(statistics.fmean(accuracies), accuracies[-1], forgetting(run), run[-1]["retrieval"])


def forgetting(run: Sequence[Record]) -> float | None:
    """Mean, over all tasks but the last, of a task's best accuracy minus its final accuracy."""
    final = run[-1]["by_task"]
    lost = [
        max(r["by_task"][task] for r in run if task < len(r["by_task"])) - final[task] for task in range(len(final))
    ]
    return statistics.fmean(lost[:-1]) if len(lost) > 1 else None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of one value a seed."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error)


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """Values by seed less the others', seed by seed; with Student's t for so few. None where no seed is shared."""
    pairs = [value - others[seed] for seed, value in values.items() if seed in others]
    if not pairs:
        return None
    found = estimate(pairs)
    if found.stderr is None:
        return Difference(found.mean, None)
    from scipy.special import stdtrit

    half = float(stdtrit(len(pairs) - 1, (1 + CONFIDENCE) / 2)) * found.stderr
    return Difference(found.mean, (found.mean - half, found.mean + half))
