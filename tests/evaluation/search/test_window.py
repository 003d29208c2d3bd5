"""A search over the window of a run: its first step, its last and the schedule of the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from models import fine_tuned
from safetensors.torch import load_file, save_file

import mergebench
from mergebench.deltas.open import open_model
from mergebench.errors import RecipeError
from mergebench.evaluation import Candidate, evaluate_models, load_suite
from mergebench.evaluation.search import search as searching
from mergebench.evaluation.search.space import as_given, at_point, parse
from mergebench.recipe import Recipe, schedules
from mergebench.recipe.windows import steps
from tests.evaluation.conftest import write_data, write_encoder, write_head
from tests.evaluation.search.conftest import write_suite

STEPS = [100, 200, 300, 900]


def recipe(schedule: Any = "mean") -> Recipe:
    models = [{"model": f"run/checkpoint-{step}"} for step in STEPS]
    return mergebench.load({"merge_method": "linear", "models": models, "schedule": schedule})


def plain(over: str, schedule: Any = "mean") -> list[dict[str, Any]]:
    return [dimension.to_plain() for dimension in parse([over], recipe(schedule))]


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ("first", [{"name": "first", "values": STEPS}]),
        ("first=100:300", [{"name": "first", "values": [100, 200, 300]}]),
        ("last=300/900", [{"name": "last", "values": [300, 900]}]),
        ("schedule", [{"name": "schedule", "values": ["mean", "ema", "wsm", "minus-sqrt"]}]),
        ("schedule=mean/ema", [{"name": "schedule", "values": ["mean", "ema"]}]),
    ],
)
def test_forms(over: str, expected: list[dict[str, Any]]) -> None:
    assert plain(over) == expected


def test_a_point_is_a_recipe_of_its_own() -> None:
    space = parse(["first,last,schedule"], recipe("ema"))
    given = as_given(space)

    found = at_point(recipe("ema"), space, {"first": 200, "last": 900, "schedule": "minus-sqrt"})

    assert given == {"first": 100, "last": 900, "schedule": "ema"}
    assert at_point(recipe("ema"), space, given) == recipe("ema")
    assert steps(found) == [200, 300, 900] and mergebench.load(found.to_dict()) == found
    assert [one.parameters["weight"] for one in found.models] == schedules.minus_sqrt(3)


def test_numbers_of_a_schedule_stay_in_the_recipe_as_given() -> None:
    own = recipe({"ema": {"decay": 0.3}})
    space = parse(["schedule"], own)

    assert as_given(space) == {"schedule": None}
    assert at_point(own, space, as_given(space)) == own


@pytest.mark.parametrize(
    ("over", "schedule", "what"),
    [
        ("first=100/150", "mean", "do not have two such steps"),
        ("last=1000:2000", "mean", "do not have two such steps"),
        ("schedule=mean/other", "mean", "must be one of mean, ema, wsm, minus-sqrt"),
        ("weight=0:1", "mean", "the schedule gives each checkpoint its weight"),
        ("weight.*", "mean", "the schedule gives each checkpoint its weight"),
        ("first", {"weights": [1, 2, 3, 4]}, "numbers are for all checkpoints"),
        ("first", None, "'linear' has no parameter 'first'"),
    ],
)
def test_what_cannot_be_searched(over: str, schedule: Any, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        parse([over], recipe(schedule))


def test_the_best_window_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows measured are those that are merged by hand; one that ends before it begins fails alone."""
    monkeypatch.chdir(tmp_path)
    base = write_encoder(Path("base"))
    for step in (1, 2, 3):
        shutil.copytree(base, f"run/checkpoint-{step}")
        tensors = fine_tuned(load_file(base / "model.safetensors"), step, 0.2)
        save_file(tensors, f"run/checkpoint-{step}/model.safetensors", metadata={"format": "pt"})
    for number, name in enumerate(("one", "two")):
        Path(name).mkdir()
        write_head(Path(name), seed=number)
        write_data(Path(f"{name}-validation.jsonl"), count=41, seed=number)
    write_suite(tmp_path, "validation")
    written = {"merge_method": "linear", "models": "run/checkpoint-*", "schedule": "mean"}

    found = searching.search(
        mergebench.load(written),
        "suite.yaml",
        over=["first=2/3,last=2/3"],
        budget=5,
        out="out",
        results=None,
        device="cpu",
    )

    points = {(point.values["first"], point.values["last"]): point for point in found.history.points}
    assert points.keys() == {(1, 3), (2, 2), (2, 3), (3, 2), (3, 3)}
    assert [window for window, point in points.items() if point.error] == [(3, 2)]
    assert points[3, 2].error == "the first step, 3, comes after the last, 2"
    mergebench.merge({**written, "models": "run/checkpoint-{2..3}"}, "by-hand")
    measured = evaluate_models([Candidate("by hand", "input", open_model("by-hand"))], load_suite("suite.yaml"))
    assert {record.task: record.value for record in measured.records} == points[2, 3].tasks
    best = mergebench.load("out/best.yaml")
    assert steps(best)[0] == found.best.values["first"] and steps(best)[-1] == found.best.values["last"]
