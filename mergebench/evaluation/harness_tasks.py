"""Tasks that lm-evaluation-harness includes, or that a task file describes in its format."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergebench.errors import RecipeError, RunError, first_line
from mergebench.evaluation.harness import undisturbed


def own_task(task: Path | str) -> Any:
    """One of lm-eval's own tasks by its name, or the task of a YAML file as lm-eval reads it; its data are loaded.

    Local data are used first; the hub is asked only for missing data. Relative paths in a file are looked up in the
    working directory, then in the file's folder. `RecipeError` if the task does not exist or is invalid, `RunError` if
    its data are not available.
    """
    manager = _manager(isinstance(task, str))
    if isinstance(task, str) and task not in manager.all_subtasks:
        close = difflib.get_close_matches(task, manager.all_subtasks, n=1)
        if task in manager.all_tasks:
            raise RecipeError(f"lm-eval's '{task}' is a group of tasks", "measure its tasks one by one")
        hint = f"did you mean '{close[0]}'?" if close else "`lm-eval ls tasks` lists them; a file ends in .yaml"
        raise RecipeError(f"lm-eval has no task '{task}'", hint)
    name = str(task.resolve()) if isinstance(task, Path) else task
    missing: Exception = RunError("nowhere")
    for place in _places(task):
        with undisturbed(), place:
            try:
                loaded = manager.load([name])
                break
            except (ConnectionError, FileNotFoundError) as error:
                missing = error
            except Exception as error:  # lm-eval raises whatever its parts raise
                raise RecipeError(f"{task}: lm-eval cannot read the task: {first_line(error)}") from None
    else:
        raise RunError(
            f"{task}: its data are not on this machine, and the hub did not give them: "
            + first_line(missing).removesuffix(" (OfflineModeIsEnabled)"),
            "check the task's paths, the network and HF_HUB_OFFLINE",
        )
    if loaded.get("groups") or len(loaded["tasks"]) != 1:
        raise RecipeError(f"{task}: it holds {len(loaded['tasks'])} tasks", "name a file with one task")
    (found,) = loaded["tasks"].values()
    return found


@cache
def _manager(names: bool) -> Any:
    from lm_eval.tasks import TaskManager

    with undisturbed():
        return TaskManager(include_defaults=names)  # 14,000 names: ten seconds


def _places(task: Path | str) -> Iterator[ExitStack]:
    """The places of a task's data: for a file, the working directory or its folder; then the cache, then the hub."""
    from datasets import config
    from huggingface_hub import constants

    def place(offline: bool, folder: Path | None = None, scratch: str | None = None) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(_changed(config, HF_HUB_OFFLINE=offline))
        stack.enter_context(_changed(constants, HF_HUB_OFFLINE=offline))
        if folder and scratch:
            stack.enter_context(chdir(folder))
            stack.enter_context(_changed(config, HF_DATASETS_CACHE=Path(scratch)))
        return stack

    if isinstance(task, Path):  # local data are converted into a temporary folder of this process
        for folder in (Path.cwd(), task.resolve().parent):
            yield place(True, folder, _scratch().name)
    yield place(True)
    if not constants.HF_HUB_OFFLINE and _hub_answers():
        yield place(False)


def _hub_answers() -> bool:
    """Ask the hub one short question, because fetching a missing data set is retried for 23 seconds."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # any error of the library's network layer
        return False
    return True


@cache
def _scratch() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="mergebench-")


@contextmanager
def _changed(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    try:
        vars(module).update(values)
        yield
    finally:
        vars(module).update(before)
