"""Score a bank at every stage: records for the tables (metrics.py), for MOS and its ablations from one bank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mergebench.errors import RunError
from mergebench.networks.features import Inputs
from mergebench.networks.loadable import Tick
from mergebench.systems.mos.bank import Bank
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.feature_cache import Seen
from mergebench.systems.mos.published_features import Drifting
from mergebench.systems.mos.retrieval import share
from mergebench.systems.mos.variants import VARIANTS, Answers, Features

FROZEN = {"frozen-head": "frozen-head"}
UNMERGED = {"sequential": "sequential", "unmerged": "mos"}  # what the variants of a bank without merging are called
MERGED = {name: name for name in VARIANTS if name not in (*FROZEN, *UNMERGED)}


def score(bank: Bank, encoder: Encoder, inputs: Inputs, labels: Sequence[str], tick: Tick) -> list[dict[str, Any]]:
    """Records of every variant at every stage, each on the items of the classes so far.

    Features are made as the bank's semantics has it. Raises `RunError` where a label is of no class, or a task has no
    items.
    """
    truth = bank.numbers(labels)
    tasks = bank.task_of[truth]
    for task in range(len(bank.tasks)):
        if not (tasks == task).any():
            raise RunError(f"{bank.directory}: no item to test is of task {bank.tasks[task].name}")
    told = FROZEN if not bank.about.epochs else MERGED if bank.about.alpha else UNMERGED
    records = []
    features, order = _features(bank, encoder, inputs, tick), truth.argsort(stable=True)  # class by class
    for stage in range(len(bank.tasks)):
        positions = order[tasks[order] <= stage]
        seen = features(stage, positions)
        for name, variant in told.items():
            answers = VARIANTS[variant](bank, stage, seen, positions)
            records.append(_record(answers, truth[positions], tasks[positions], stage, name, bank.about.seed))
    return records


def _features(bank: Bank, encoder: Encoder, inputs: Inputs, tick: Tick) -> Callable[[int, Tensor], Features]:
    """What gives the features of items at a stage."""
    if bank.about.semantics == "reference":
        return Drifting(bank, encoder, inputs, bank.about.batch, tick).evaluate
    seen = Seen(bank, encoder, inputs, tick)
    return lambda stage, positions: seen


def _record(answers: Answers, truth: Tensor, tasks: Tensor, stage: int, name: str, seed: int) -> dict[str, Any]:
    right = (answers.classes == truth).double()
    each = [tasks == task for task in range(stage + 1)]
    return {
        "seed": seed,
        "method": name,
        "stage": stage + 1,
        "accuracy": share(right),
        "by_task": [share(right[one]) for one in each],
        "items_by_task": [int(one.sum()) for one in each],
        "retrieval": None if answers.retrieval is None else answers.retrieval.summary(tasks),
    }
