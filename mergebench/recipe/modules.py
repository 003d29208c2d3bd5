"""`modules: {NAME: {models | slices, parameters}}`: mergekit's form for a model made of several parts.

A single module, whatever its name, is the recipe itself: its contents are lifted to the top. Several: `parts`.
"""

from __future__ import annotations

from typing import Any

from mergebench.recipe.parts import Part, before, join
from mergebench.recipe.places import Places, show

CONTENTS = ("models", "slices", "parameters")
FORM = "write it as modules: {NAME: {models: [...]}}"


def lift(data: dict[str, Any], places: Places) -> tuple[dict[str, Any], tuple[Part, ...]]:
    """The recipe without `modules:`, whose parameters go before those at the top; and the parts of several."""
    lifted = {key: value for key, value in data.items() if key != "modules"}
    modules = data.get("modules")
    if modules is None:
        return lifted, ()
    if not isinstance(modules, dict) or not modules:
        raise places.error(("modules",), f"must be a mapping of modules, got {show(modules or None)}", FORM)
    for name, module in modules.items():
        here = ("modules", name)
        if not isinstance(module, dict):
            raise places.error(here, f"must be a mapping, got {show(module)}", FORM)
        for key, value in module.items():
            if key not in CONTENTS:
                raise places.error((*here, key), "no such key", f"a module has {', '.join(CONTENTS)}")
            if key != "parameters" and value is not None and lifted.get(key) is not None:
                raise places.error((*here, key), f"stands beside {key} at the top", "give one of them")
            if key == "parameters" and not isinstance(value, (dict, type(None))):
                raise places.error((*here, key), f"must be a mapping, got {show(value)}")
    if len(modules) > 1:
        return join(lifted, modules, places)
    for key, value in module.items():
        if value is None:
            continue
        below = {loc[2:]: text for loc, text in places.texts.items() if loc[:3] == (*here, key)}
        if key == "parameters" and isinstance(value, dict) and isinstance(lifted.get(key), dict):
            below[(key,)] = places.where((key,))
            value = lifted[key] | {one: before(given, lifted[key].get(one)) for one, given in value.items()}
        lifted[key] = value
        places.texts.update({(key,): places.where((*here, key)), **below})
    return lifted, ()
