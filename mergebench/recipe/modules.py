"""`modules: {NAME: {models | slices, parameters}}`: mergekit's form for a model made of several parts.

A single module, whatever its name, is the recipe itself: its contents are lifted to the top.
"""

from __future__ import annotations

from typing import Any

from mergebench.recipe.places import Places, show

CONTENTS = ("models", "slices", "parameters")
WAY_OUT = "write a document for each part, with include or exclude, each on top of the one before"
FORM = "write it as modules: {NAME: {models: [...]}}"


def lift(data: dict[str, Any], places: Places) -> dict[str, Any]:
    """The recipe without `modules:`; a module's parameters go before those at the top."""
    lifted = {key: value for key, value in data.items() if key != "modules"}
    modules = data.get("modules")
    if modules is None:
        return lifted
    if not isinstance(modules, dict) or not modules:
        raise places.error(("modules",), f"must be a mapping with one module, got {show(modules or None)}", FORM)
    if len(modules) > 1:
        names = ", ".join(modules)
        raise places.error(("modules",), f"several modules ({names}) are not supported yet", WAY_OUT)
    ((name, module),) = modules.items()
    here = ("modules", name)
    if not isinstance(module, dict):
        raise places.error(here, f"must be a mapping, got {show(module)}", FORM)
    for key, value in module.items():
        if key not in CONTENTS:
            raise places.error((*here, key), "no such key", f"a module has {', '.join(CONTENTS)}")
        if value is None:
            continue
        if key != "parameters" and lifted.get(key) is not None:
            raise places.error((*here, key), f"stands beside {key} at the top", "give one of them")
        below = {loc[2:]: text for loc, text in places.texts.items() if loc[:3] == (*here, key)}
        if key == "parameters" and isinstance(value, dict) and isinstance(lifted.get(key), dict):
            below[(key,)] = places.where((key,))
            value = lifted[key] | {one: _before(given, lifted[key].get(one)) for one, given in value.items()}
        lifted[key] = value
        places.texts.update({(key,): places.where((*here, key)), **below})
    return lifted


def _before(value: Any, top: Any) -> Any:
    """A module's value; where it is a list of filters, what stands at the top is for the names that none fits."""
    conditions = [value] if isinstance(value, dict) else value
    if top is None or not isinstance(conditions, list) or not any(isinstance(one, dict) for one in conditions):
        return value
    others = [top] if isinstance(top, dict) else top
    if not isinstance(others, list) or not any(isinstance(one, dict) for one in others):
        others = [{"value": top}]
    return [*conditions, *others]
