"""`--set parameters.density=0.2`: changing a recipe from outside before it is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergebench.errors import RecipeError
from mergebench.recipe.positions import Loc, Places, dotted, show
from mergebench.recipe.yaml import parse

EXAMPLE = "write a path and a value, such as --set parameters.density=0.2 or --set models.0.parameters.weight=0.5"


def apply(data: dict[str, Any], overrides: Sequence[str], places: Places) -> None:
    """Put every override into `data`; messages then name the option, not the file, as its place."""
    for override in overrides:
        option = f"--set {override if override.isprintable() else repr(override)}"
        path, sign, text = override.partition("=")
        parts = path.strip().split(".")
        if not sign or not all(parts):
            raise RecipeError(f"{option}: not of the form PATH=VALUE", EXAMPLE)
        try:
            value = parse(text, "value", Places()) if text.strip() else None
        except RecipeError as error:  # "value:1:3: not valid YAML: ..."
            raise RecipeError(f"{option}: {error.message.partition(': ')[2]}", error.hint) from None
        _put(data, parts, value, option, places)


def _put(data: Any, parts: list[str], value: Any, option: str, places: Places) -> None:
    loc: Loc = ()
    for i, part in enumerate(parts):
        step = _step(data, loc, part, option)
        loc = (*loc, step)
        if i == len(parts) - 1:
            data[step] = value
        elif isinstance(data, dict) and data.get(part) is None:
            data[step] = {}
        else:
            data = data[step]
            continue
        places.move(loc, option)
        data = data[step]


def _step(data: Any, loc: Loc, part: str, option: str) -> str | int:
    """`part` as a key or a list position of `data`."""
    if isinstance(data, dict):
        return part
    if not isinstance(data, list):
        raise RecipeError(f"{option}: {dotted(loc)} is {show(data)}, nothing stands below it", EXAMPLE)
    if not part.isdecimal() or int(part) >= len(data):
        count = f"{len(data)} {'entry' if len(data) == 1 else 'entries'}, counted from 0"
        raise RecipeError(f"{option}: {dotted(loc)} has no entry '{part}'", f"it has {count}")
    return int(part)
