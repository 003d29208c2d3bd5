"""Where an evaluation goes, and that it takes nothing away there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergebench.checkpoint.target import PROVENANCE
from mergebench.errors import MergebenchError, RecipeError
from mergebench.evaluation.results import FILE, Results
from mergebench.evaluation.suite import Suite

OTHERS = {PROVENANCE: "a merge", "search.json": "a search"}


def place_of(suite: Path, before: str = "") -> Path:
    """The directory of a suite's results: named after it and its folder, so that suites of one name keep apart."""
    folder = suite.parent.resolve().name if suite.parent != Path() else ""
    return Path("evaluations") / (before + "-".join(part for part in (folder, suite.stem) if part))


def check_place(directory: Path, suite: Suite, overwrite: bool = False) -> None:
    """`RecipeError` if the directory holds another suite's results, or what another command wrote; the same suite may
    be measured again."""
    hint = "replace them with --overwrite, or choose another --out"
    for name, what in OTHERS.items():
        if (directory / name).exists():
            raise RecipeError(f"{directory}: it holds the results of {what}", "choose another --out")
    if overwrite or not (directory / FILE).exists():
        return
    try:
        about = Results.load(directory).made.get("suite", {})
    except MergebenchError as error:
        raise RecipeError(error.message, hint) from None
    file, path = about.get("file"), suite.path
    same = path is not None and file is not None and Path(file).resolve() == path.resolve()
    if not same and _data(about) != _data(suite.to_dict()):
        raise RecipeError(f"{directory}: it holds the results of another suite, {file or 'without a file'}", hint)


def _data(about: dict[str, Any]) -> list[Any]:
    """What was asked, wherever its files lay."""
    tasks = about.get("tasks", [])
    return [[task["name"], task["kind"], task["split"], *task["sha256"].values()] for task in tasks]
