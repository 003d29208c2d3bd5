"""Answers in other evaluators' logs, read as they lie: one file for each evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mergebench.errors import RunError
from mergebench.evaluation.compare.logs import inspect_ai, lm_eval, nemo
from mergebench.evaluation.compare.logs.log import Log


class _Evaluator(Protocol):
    TOOL: str

    def is_log(self, file: Path) -> bool: ...

    def logs_in(self, folder: Path) -> list[Path]: ...

    def read(self, file: Path) -> list[Log]: ...


_EVALUATORS: tuple[_Evaluator, ...] = (lm_eval, inspect_ai, nemo)


def read_logs(place: Path) -> list[Log] | None:
    """The logs in a file or folder, one for each task and metric; None if it holds none.

    `RunError` with file and line for a broken one, or if it holds a task's log twice or logs of several evaluators.
    """
    if not place.is_dir():
        return next((one.read(place) for one in _EVALUATORS if one.is_log(place)), None)
    found = [(one, files) for one in _EVALUATORS if (files := one.logs_in(place))]
    if len(found) > 1:
        tools = " and of ".join(one.TOOL for one, _ in found)
        raise RunError(f"{place}: it holds logs of {tools}", "name a folder with the logs of one")
    logs: dict[tuple[str, str], Log] = {}
    for one, files in found:
        for file in files:
            for log in one.read(file):
                if (log.task, log.metric) in logs:
                    hint = "name the logs to compare"
                    raise RunError(f"{place}: two logs of task '{log.task}', one is {file.name}", hint)
                logs[log.task, log.metric] = log
    return list(logs.values()) or None
