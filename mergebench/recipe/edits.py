"""The recipe's edits, applied to the merged model one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergebench.editing.spec import COMMON, Wanted
from mergebench.errors import RecipeError, did_you_mean
from mergebench.recipe import parameters
from mergebench.recipe.positions import Loc, Places, show
from mergebench.recipe.schema import EDITS_FORM


def check(data: Mapping[str, Any], loc: Loc, places: Places) -> Wanted:
    """One entry of edits:, its parameters checked."""
    from mergebench.editing import edits  # this import loads torch

    given = {key: value for key, value in data.items() if value is not None}
    name = given.pop("edit", None)
    if not isinstance(name, str):
        raise places.error(
            (*loc, "edit"), "missing" if name is None else f"must be a name, got {show(name)}", EDITS_FORM
        )
    try:
        edit = edits.get(name)
    except RecipeError as error:
        raise places.error((*loc, "edit"), error.message, error.hint) from None
    common: dict[str, str] = {}
    own: dict[str, Any] = {}
    for key, value in given.items():
        here = (*loc, key)
        if key in COMMON:
            common[key] = _word(value, COMMON[key], here, places)
        elif key in edit.parameters:
            parameter = edit.parameters[key]
            value = str(value) if parameter.type is str and type(value) is int else value  # rows: 16384
            own[key] = parameters.single(value, parameter, here, places)
        else:
            hint = did_you_mean(key, [*COMMON, *edit.parameters])
            raise places.error(here, f"'{name}' has no such parameter", hint)
    if "probe" not in common:
        raise places.error((*loc, "probe"), f"missing, '{name}' needs it", COMMON["probe"])
    common.setdefault("target", edit.target)
    missing = next((p for p in edit.parameters.values() if p.required and p.name not in own), None)
    if missing is not None:
        raise places.error((*loc, missing.name), f"missing, '{name}' needs it", missing.about() or None)
    return Wanted(name, **common, values=own)


def _word(value: Any, help: str, loc: Loc, places: Places) -> str:
    value = str(value) if type(value) is int else value  # layers: 3
    if not (isinstance(value, str) and value.strip()):
        raise places.error(loc, f"must be text, got {show(value)}", help)
    return value
