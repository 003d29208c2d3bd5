"""The models of a recipe; checkpoints of one run get their weights by a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergebench.engine.method import Method
from mergebench.errors import RecipeError
from mergebench.recipe import schedules
from mergebench.recipe.checkpoints import steps_of
from mergebench.recipe.positions import Places
from mergebench.recipe.schedules import Schedule


@dataclass(frozen=True)
class Entry:
    """One model of the recipe: a model, or a task vector (already a difference), and its own parameters."""

    model: str | None = None
    task_vector: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    as_trained: str | None = None  # nf4: an adapter's base is rounded as in its training
    statistics: str | None = None  # what it does on data, for a method that reads it
    data: str | dict[str, Any] | None = None  # or the texts to make that of


OWN_WEIGHTS = "the schedule gives each checkpoint its weight"
GIVE = "leave out one of them; weights of your own are schedule: {weights: [1, 2, 3]}"


def schedule(
    found: Mapping[str, Any], method: Method, entries: Sequence[Entry], parts: Sequence[Any], places: Places
) -> tuple[Schedule | None, list[Entry]]:
    """The recipe's schedule, and its models with their weights; parts: its modules, if it has several."""
    written = found.get("schedule")
    if written is None:
        return None, list(entries)
    loc = ("schedule",)
    if method.name != "linear":
        what = f"it weights checkpoints for 'linear', not for '{method.name}'"
        raise places.error(loc, what, "take merge_method: linear, or leave the schedule out")
    if found.get("slices") or parts:
        what = "it weights whole models, not slices" if found.get("slices") else "it weights whole models, not modules"
        raise places.error(loc, what, "merge the checkpoints in a document of their own, and name its result")
    if "weight" in found.get("parameters", {}):
        raise places.error(("parameters", "weight"), OWN_WEIGHTS, GIVE)
    for number, entry in enumerate(entries):
        if "weight" in entry.parameters:
            raise places.error(("models", number, "parameters", "weight"), OWN_WEIGHTS, GIVE)
        if entry.model is None:
            what = "a schedule averages checkpoints, not task vectors"
            raise places.error(("models", number, "task_vector"), what, "name the checkpoint: model: PATH")
    try:
        one = schedules.read(written)
        return one, weighted(entries, one)
    except RecipeError as error:
        raise places.error(loc, error.message, error.hint) from None


def common(schedule: Schedule | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of all models: under a schedule none of them is the weight."""
    return {name: value for name, value in parameters.items() if schedule is None or name != "weight"}


def weighted(entries: Sequence[Entry], schedule: Schedule) -> list[Entry]:
    """The checkpoints with their weights; `RecipeError` if they have no steps, or are not in their order."""
    steps_of(entry.model or "" for entry in entries)
    weights = schedule.weights(len(entries))
    return [
        replace(entry, parameters={**entry.parameters, "weight": weight})
        for entry, weight in zip(entries, weights, strict=True)
    ]


def unweighted(entries: Sequence[Entry]) -> list[Entry]:
    """The checkpoints as they are written: without the weights that follow from the schedule."""
    return [
        replace(entry, parameters={name: value for name, value in entry.parameters.items() if name != "weight"})
        for entry in entries
    ]
