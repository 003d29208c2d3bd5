"""What can be named in a recipe or a suite: the files of a room, and what other packages add to them.

Nothing is imported until it is asked for. Third parties add by an entry point; `MERGEBENCH_PLUGINS=`
(empty) switches them off.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from functools import cached_property
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Generic, TypeVar

from mergebench.errors import RecipeError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """One sort of thing (`what`) of type `kind`, made with `decorator`; its room is the package `room`.

    A name is the file's name, and the object of that name in it; `-` in a name is `_` there.
    """

    def __init__(
        self,
        room: str,
        group: str,
        what: str,
        kind: type[T],
        decorator: str,
        dashes: bool = False,
        beside: tuple[str, ...] = (),
    ) -> None:
        self._room, self._group, self._what = room, group, what
        self._kind, self._decorator, self._dashes, self._beside = kind, decorator, dashes, frozenset(beside)

    @cached_property
    def _builtin(self) -> frozenset[str]:
        path = importlib.import_module(self._room).__path__
        modules = {m.name for m in pkgutil.iter_modules(path) if not m.ispkg and not m.name.startswith("_")}
        return frozenset(n.replace("_", "-") if self._dashes else n for n in modules - self._beside)

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        if os.environ.get("MERGEBENCH_PLUGINS") == "":
            return {}
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self._group):
            other = found.get(point.name)
            if point.name in self._builtin or other is not None:
                owner = "mergebench" if other is None else _package(other)
                raise RecipeError(
                    f"{self._what} '{point.name}': both {owner} and {_package(point)} provide it",
                    "uninstall one of them, or set MERGEBENCH_PLUGINS= to switch all plug-ins off",
                )
            found[point.name] = point
        return found

    def names(self) -> list[str]:
        """Every name that can be used, sorted."""
        return sorted(self._builtin | self._plugins.keys())

    def origin(self, name: str) -> str:
        """The package it comes from."""
        return "mergebench" if name in self._builtin else _package(self._plugins[name])

    def get(self, name: str) -> T:
        """The object of that name; `RecipeError` where there is none."""
        if name in self._builtin:
            module = name.replace("-", "_")
            found = getattr(importlib.import_module(f"{self._room}.{module}"), module)
        elif name in self._plugins:
            found = self._plugins[name].load()
        else:
            raise RecipeError(f"no {self._what} is called '{name}'", did_you_mean(name, self.names()))
        if not isinstance(found, self._kind):
            raise RecipeError(f"{self._what} '{name}' of {self.origin(name)} is not made with {self._decorator}")
        return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def named(module: str, name: str) -> Any:
    """What stands under a name in a module: how declared things pickle, as they stand in their function's place."""
    return getattr(importlib.import_module(module), name)


_SMALLER = {"scikit-learn": "probe"}  # the extra that has it and least besides; [eval] has all


def need(library: str, what: str) -> str:
    """The version of a library of an extra, which is not imported; `RecipeError` where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        extra = _SMALLER.get(library, "eval")
        hint = f"pip install 'mergebench[{extra}]', or in a clone: pip install -e '.[{extra}]'"
        raise RecipeError(f"{what} need {library}, which is not installed", hint) from None
