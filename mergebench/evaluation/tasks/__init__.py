"""The kinds of tasks: one file each, its name is the kind's with `_` for `-`.

Nothing is imported until it is asked for. Third parties add kinds by an entry point in the group
`mergebench.tasks`; `MERGEBENCH_PLUGINS=` (empty) switches them off.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from mergebench.errors import RecipeError, did_you_mean
from mergebench.evaluation.task import Kind


@cache
def _builtin() -> frozenset[str]:
    modules = pkgutil.iter_modules(__path__)
    return frozenset(module.name.replace("_", "-") for module in modules if not module.name.startswith("_"))


@cache
def _plugins() -> dict[str, EntryPoint]:
    if os.environ.get("MERGEBENCH_PLUGINS") == "":
        return {}
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="mergebench.tasks"):
        other = found.get(point.name)
        if point.name in _builtin() or other is not None:
            owner = "mergebench" if other is None else _package(other)
            raise RecipeError(
                f"task kind '{point.name}': both {owner} and {_package(point)} provide it",
                "uninstall one of them, or set MERGEBENCH_PLUGINS= to use the built-in kinds alone",
            )
        found[point.name] = point
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def names() -> list[str]:
    """Every kind that can be named in a suite, sorted."""
    return sorted(_builtin() | _plugins().keys())


def get(name: str) -> Kind:
    """The kind of that name; `RecipeError` where there is none."""
    if name in _builtin():
        module = name.replace("-", "_")
        kind = getattr(importlib.import_module(f"{__name__}.{module}"), module)
    elif name in _plugins():
        kind = _plugins()[name].load()
    else:
        raise RecipeError(f"no kind of task is called '{name}'", did_you_mean(name, names()))
    if not isinstance(kind, Kind):
        raise RecipeError(f"task kind '{name}' is not made with @task")
    return kind
