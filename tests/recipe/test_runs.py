"""Checkpoints of one run in a recipe: which a range or a glob names, in which order, and their weights in the merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergebench
from mergebench.errors import ModelError, RecipeError
from mergebench.recipe import load
from mergebench.recipe.windows import steps, window
from tests.conftest import Cli

Write = Callable[[str], str]
STEPS = [100, 200, 300, 900, 1000]


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five checkpoints in run/, each filled with its step, and what else a run leaves there."""
    monkeypatch.chdir(tmp_path)
    for step in STEPS:
        Path(f"run/checkpoint-{step}").mkdir(parents=True)
        save_file({"w": torch.full((3,), float(step))}, f"run/checkpoint-{step}/model.safetensors")
    Path("run/checkpoint-100.log").write_text("a file, no model")


def models_of(text: str) -> list[str]:
    return [str(one.model) for one in load({"merge_method": "linear", "models": text}).models]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("run/checkpoint-*", STEPS),
        ("run/checkpoint-?00", [100, 200, 300, 900]),
        ("run/checkpoint-{100..300..100}", [100, 200, 300]),
        ("run/checkpoint-{300..100..100}", [100, 200, 300]),
        ("run/checkpoint-{100..999..800}", [100, 900]),
        ("run/checkpoint-{200..1000}", [200, 300, 900, 1000]),  # what there is
    ],
)
def test_what_a_range_or_glob_names(text: str, named: list[int]) -> None:
    assert models_of(text) == [f"run/checkpoint-{step}" for step in named]


def test_zeros_in_front_are_kept() -> None:
    for step in ("0090", "0100"):
        Path(f"iter_{step}").mkdir()
        save_file({"w": torch.ones(1)}, f"iter_{step}/model.safetensors")

    assert models_of("iter_{0090..0100..10}") == ["iter_0090", "iter_0100"]


def test_adapters_of_one_run_on_a_base() -> None:
    assert models_of("org/base+run/checkpoint-{100..200..100}") == [
        "org/base+run/checkpoint-100",
        "org/base+run/checkpoint-200",
    ]


def test_revisions_on_the_hub_are_not_looked_for() -> None:
    assert models_of("org/name@step{1000..3000..1000}") == [f"org/name@step{n}000" for n in (1, 2, 3)]


def test_they_are_looked_for_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("elsewhere").mkdir()
    Path("recipe.yaml").write_text("merge_method: linear\nmodels: run/checkpoint-*\nschedule: mean\n")
    monkeypatch.chdir("elsewhere")

    assert steps(load("../recipe.yaml")) == STEPS


def test_a_path_that_exists_is_no_glob() -> None:
    Path("a*").mkdir()

    assert load({"merge_method": "linear", "models": [{"model": "a*"}]}).models[0].model == "a*"


def test_other_models_keep_their_places(write: Write) -> None:
    path = write("""
        merge_method: linear
        models:
          - model: run/checkpoint-*
            parameters: {weight: 2}
          - model: other
            parameters: {wieght: 1}
        """)

    with pytest.raises(RecipeError, match=r"recipe.yaml:6:18: models.5.parameters.wieght"):
        load(path)


@pytest.mark.parametrize(
    ("models", "what", "hint"),
    [
        ("run/checkpoint-{100..300..50}", "run/checkpoint-150, run/checkpoint-250: missing", "there are 100, 200, 300"),
        ("run/checkpoint-{100..500}", "run/checkpoint-500: missing", "there are 100, 200"),
        ("run/checkpoint-{1..9}", "no checkpoint from 1 to 9", "there are 100, 200"),
        ("run/checkpoint-{1..9..2}", "none of its 5 checkpoints is there", "there are 100, 200"),
        ("run/checkpoint-{1..9..0}", "a step of 0", "checkpoint-{2000"),
        ("run/checkpoint-{1..99999..1}", "99,999 checkpoints", "checkpoint-{2000"),
        ("run/chekpoint-*", "no directory or .safetensors file fits", "did you mean"),
        ("nowhere/*", "no directory or .safetensors file fits", "looked for in the working directory"),
        ("*/checkpoint-{1..3}+run/*", "more than one range or glob", "checkpoint-{2000"),
    ],
)
def test_checkpoints_that_are_not_there(models: str, what: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load({"merge_method": "linear", "models": models})

    assert what in caught.value.message and hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"models": [{"model": "run/b-2"}, {"model": "run/b-1"}]}, "'run/b-1' stands after 'run/b-2'"),
        ({"models": [{"model": "run/b-2"}, {"model": "old/b-2"}]}, "are both of step 2"),
        ({"models": [{"model": "run/b-2"}, {"model": "run/best"}]}, "'run/best': its name has no step"),
        ({"merge_method": "karcher"}, "weights checkpoints for 'linear', not for 'karcher'"),
        ({"parameters": {"weight": 1}}, "parameters.weight: the schedule gives each checkpoint its weight"),
        ({"models": [{"model": "b-1", "parameters": {"weight": 1}}]}, "models.0.parameters.weight: the schedule"),
        ({"schedule": {"weights": [1, 2]}}, "schedule: 2 weights for 5 checkpoints"),
    ],
)
def test_a_schedule_that_does_not_fit(more: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load({"merge_method": "linear", "models": "run/checkpoint-*", "schedule": "mean", **more})

    assert what in caught.value.message and caught.value.hint


def test_two_names_of_one_step() -> None:
    Path("run/checkpoint-0100").mkdir()

    with pytest.raises(RecipeError, match="are of equal step"):
        models_of("run/checkpoint-*")


def test_the_step_is_the_number_that_always_differs() -> None:
    names = [f"v2/epoch={epoch}-step={step}" for epoch, step in ((0, 500), (0, 1000), (1, 1500))]
    recipe = load({"merge_method": "linear", "models": [{"model": one} for one in names], "schedule": "mean"})

    assert steps(recipe) == [500, 1000, 1500]


def test_the_merge_has_the_schedules_weights() -> None:
    recipe = {"merge_method": "linear", "models": "run/checkpoint-{100..300}", "schedule": {"weights": [1, 1, 2]}}

    mergebench.merge(recipe, "out")

    torch.testing.assert_close(load_file("out/model.safetensors")["w"], torch.full((3,), 225.0))


def test_the_mean_of_a_trainers_checkpoints_is_exact() -> None:
    """In float32, rounded once to their bfloat16; nothing of the run's state goes along."""
    values = {step: torch.randn(50, generator=torch.Generator().manual_seed(step)).bfloat16() for step in STEPS}
    for step, one in values.items():
        save_file({"w": one}, f"run/checkpoint-{step}/model.safetensors")
        torch.save({}, f"run/checkpoint-{step}/optimizer.pt")
        Path(f"run/checkpoint-{step}/trainer_state.json").write_text("{}")

    mergebench.merge({"merge_method": "linear", "models": "run/checkpoint-*", "schedule": "mean"}, "out")

    assert not {"optimizer.pt", "trainer_state.json"} & {path.name for path in Path("out").iterdir()}
    wanted = torch.stack([one.double() for one in values.values()]).mean(0).float().bfloat16()
    assert torch.equal(load_file("out/model.safetensors")["w"], wanted)


def test_a_result_is_made_again_though_the_run_went_on() -> None:
    mergebench.merge({"merge_method": "linear", "models": "run/checkpoint-{100..1000}", "schedule": "ema"}, "out")
    Path("run/checkpoint-950").mkdir()
    again = load("out")

    assert steps(again) == STEPS and again.schedule is not None
    assert load(again.to_dict()) == again


def test_a_window_of_the_run() -> None:
    recipe = load({"merge_method": "linear", "models": "run/checkpoint-*", "schedule": "mean"})

    narrow = window(recipe, 200, 900, None)

    assert steps(narrow) == [200, 300, 900]
    assert [one.parameters["weight"] for one in narrow.models] == pytest.approx([1 / 3] * 3)
    assert steps(window(recipe, 300, None, None)) == [300, 900, 1000]
    with pytest.raises(ModelError, match="the first step, 900, comes after the last, 200"):
        window(recipe, 900, 200, None)


def test_plan_and_explain_show_the_weights_by_step(cli: Cli) -> None:
    Path("recipe.yaml").write_text("merge_method: linear\nmodels: run/checkpoint-*\nschedule: {ema: {decay: 0.5}}\n")

    plan, explained = cli("plan", "recipe.yaml"), cli("explain", "recipe.yaml")
    facts = json.loads(cli("plan", "recipe.yaml", "--json").out)["schedule"]

    assert "step  100  weight 0.0625" in plan.out and "step 1000  weight 0.5000" in plan.out
    assert "schedule: ema, decay 0.5\n  step  100  weight 0.0625\n" in explained.out
    weights = dict(zip(map(str, STEPS), [0.0625, 0.0625, 0.125, 0.25, 0.5], strict=True))
    assert facts == {"name": "ema, decay 0.5", "weights": weights}
