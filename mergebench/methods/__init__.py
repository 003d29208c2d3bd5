"""The merge methods: one file each, the file's name is the recipe's name.

Nothing is imported until it is asked for. Third parties add methods by an entry point in the group
`mergebench.methods`; `MERGEBENCH_PLUGINS=` (empty) switches them off.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from mergebench.engine.method import Method
from mergebench.errors import RecipeError, did_you_mean


@cache
def _builtin() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


@cache
def _plugins() -> dict[str, EntryPoint]:
    if os.environ.get("MERGEBENCH_PLUGINS") == "":
        return {}
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="mergebench.methods"):
        other = found.get(point.name)
        if point.name in _builtin() or other is not None:
            owner = "mergebench" if other is None else _package(other)
            raise RecipeError(
                f"method '{point.name}': both {owner} and {_package(point)} provide it",
                "uninstall one of them, or set MERGEBENCH_PLUGINS= to use the built-in methods alone",
            )
        found[point.name] = point
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def names() -> list[str]:
    """Every method that can be named in a recipe, sorted."""
    return sorted(_builtin() | _plugins().keys())


def origin(name: str) -> str:
    """The package a method comes from."""
    return "mergebench" if name in _builtin() else _package(_plugins()[name])


def get(name: str) -> Method:
    """The method of that name; `RecipeError` where there is none."""
    if name in _builtin():
        method = getattr(importlib.import_module(f"{__name__}.{name}"), name)
    elif name in _plugins():
        method = _plugins()[name].load()
    else:
        raise RecipeError(f"merge_method: no method is called '{name}'", did_you_mean(name, names()))
    if not isinstance(method, Method):
        raise RecipeError(f"method '{name}' of {origin(name)} is not made with @merge_method")
    return method
