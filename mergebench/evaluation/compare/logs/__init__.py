"""Answers in other evaluators' logs, read as they lie: one file for each evaluator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from mergebench.errors import RunError
from mergebench.evaluation.compare.logs import inspect_ai, lm_eval, nemo
from mergebench.evaluation.compare.logs.log import Log


class _Evaluator(Protocol):
    TOOL: str

    def files(self, folder: Path) -> Iterable[Path]:
        """Those in a folder that may be its logs."""

    def read(self, file: Path) -> list[Log] | None:
        """A log for each task and metric in a file; None if it is no log of this evaluator."""


_EVALUATORS: tuple[_Evaluator, ...] = (lm_eval, inspect_ai, nemo)


def read_logs(place: Path) -> list[Log] | None:
    """The logs in a file or folder, one for each task and metric; None if it holds none.

    Of several runs of a task in a folder the last counts. `RunError` with file and line for a broken one, or if a
    folder holds logs of several evaluators, or of several models on one task.
    """
    if not place.is_dir():
        return next((found for one in _EVALUATORS if (found := one.read(place)) is not None), None)
    logs = [log for one in _EVALUATORS for file in one.files(place) for log in one.read(file) or ()]
    tools = list(dict.fromkeys(log.tool for log in logs))
    if len(tools) > 1:
        raise RunError(f"{place}: it holds logs of {' and of '.join(tools)}", "name a folder with the logs of one")
    return _last(logs, place) or None


def _last(logs: Sequence[Log], place: Path) -> list[Log]:
    """The last log of each task and metric."""
    last: dict[tuple[str, str], Log] = {}
    for log in sorted(logs, key=lambda log: log.date):
        other = last.get((log.task, log.metric), log)
        if other.model != log.model:
            what = f"{place}: it holds logs of several models on task '{log.task}': {other.model}, {log.model}"
            raise RunError(what, "name the log, or the folder, of one")
        if other is not log and other.date == log.date:
            raise RunError(f"{place}: two logs of task '{log.task}', and none is later", "name the log of one run")
        last[log.task, log.metric] = log
    order = list(dict.fromkeys((log.task, log.metric) for log in logs))
    return [last[key] for key in order]
