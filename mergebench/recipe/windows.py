"""The window of steps whose checkpoints a recipe averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergebench.errors import ModelError
from mergebench.recipe import schedules
from mergebench.recipe.averaging import unweighted, weighted
from mergebench.recipe.checkpoints import steps_of
from mergebench.recipe.open import models_of
from mergebench.recipe.recipe import Recipe
from mergebench.recipe.schedules import Schedule


def steps(recipe: Recipe) -> list[int]:
    """The steps of a recipe's checkpoints; [] if it has no schedule."""
    return [] if recipe.schedule is None else steps_of(entry.model or "" for entry in recipe.models)


def weights_by_step(recipe: Mapping[str, Any]) -> dict[int, float]:
    """The weights of the checkpoints of a written recipe; {} if it has no schedule."""
    if not recipe.get("schedule"):
        return {}
    models = models_of(recipe)
    weights = schedules.read(recipe["schedule"]).weights(len(models))
    return dict(zip(steps_of(models), weights, strict=True))


def window(recipe: Recipe, first: int | None, last: int | None, schedule: Schedule | None) -> Recipe:
    """The recipe with the checkpoints from one step to another alone, and with this schedule.

    None stands for what the recipe has. `ModelError` if no step is left.
    """
    assert recipe.schedule is not None, "only a recipe with a schedule has steps"
    all_steps, one = steps(recipe), schedule or recipe.schedule
    low, high = all_steps[0] if first is None else first, all_steps[-1] if last is None else last
    if low > high:
        raise ModelError(f"the first step, {low}, comes after the last, {high}")
    kept = [entry for entry, step in zip(recipe.models, all_steps, strict=True) if low <= step <= high]
    return replace(recipe, models=tuple(weighted(unweighted(kept), one)), schedule=one)
