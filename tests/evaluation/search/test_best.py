"""What a search writes as a recipe: its paths lead from where the recipe lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergebench.evaluation.search.best import write_recipe
from mergebench.recipe import load


def test_statistics_are_found_from_the_new_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "of-a", "of-b", "searches"):
        Path(name).mkdir()
    models = [{"model": name, "statistics": f"of-{name}"} for name in "ab"]
    write_recipe(load({"merge_method": "fisher", "models": models}), Path("searches/best.yaml"), "The best.")
    written = [entry.statistics for entry in load(Path("searches/best.yaml")).models]
    assert written == ["../of-a", "../of-b"]
