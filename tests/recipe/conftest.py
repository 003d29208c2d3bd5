"""What the recipe tests share: writing a recipe, and a method with the parameters no built-in one has."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mergebench import methods
from mergebench.engine.context import Context
from mergebench.engine.method import Method, Weights, merge_method
from mergebench.parameters import PerModel, param


@dataclass(frozen=True)
class Params:
    share: PerModel = param(help="share of the model", low=0, per_model=True)
    rounds: int = param(3, "rounds to iterate", low=1)


@merge_method(takes="weights", paper="none", scope="model")
def picky(weights: Weights, p: Params, ctx: Context) -> Weights:
    """Needs a value for each model, and a whole number."""
    return weights


@pytest.fixture(autouse=True)
def more_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes may name `picky` beside the built-in methods."""
    names, get = methods.names, methods.get

    def get_more(name: str) -> Method:
        return picky if name == "picky" else get(name)

    monkeypatch.setattr(methods, "names", lambda: sorted([*names(), "picky"]))
    monkeypatch.setattr(methods, "get", get_more)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write `recipe.yaml` into the working directory, a fresh one; its name."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str) -> str:
        Path("recipe.yaml").write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        return "recipe.yaml"

    return write_recipe
