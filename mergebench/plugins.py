"""Lookup by name of whatever a recipe or suite can name: the files of a directory, and plug-ins of other packages.

Nothing is imported before its first use. Third parties register by an entry point; `MERGEBENCH_PLUGINS=` (empty)
switches plug-ins off.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from functools import cached_property
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Generic, TypeVar

from mergebench.errors import RecipeError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """All objects of one sort (`what`, such as merge methods), of type `kind`, made with `decorator`, in the package
    `room`.

    A name is the name of a file and of the object in it; `-` in a name is `_` in both.
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
        """The package that the object `name` comes from."""
        return "mergebench" if name in self._builtin else _package(self._plugins[name])

    def get(self, name: str) -> T:
        """The object of that name; `RecipeError` if there is none."""
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


class Scanned(Registry[T]):
    """All declared objects of one sort in several packages and the folders in them, by the names they declare.

    Their modules are imported when the first name is asked for. A module may hold several objects, and others beside.
    """

    def __init__(self, rooms: tuple[str, ...], group: str, what: str, kind: type[T], decorator: str) -> None:
        super().__init__(rooms[0], group, what, kind, decorator)
        self._rooms = rooms

    @cached_property
    def _objects(self) -> dict[str, T]:
        found: dict[str, T] = {}
        for room in self._rooms:
            for about in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}."):
                values = vars(importlib.import_module(about.name)).values()
                found |= {str(vars(one)["name"]): one for one in values if type(one) is self._kind}
        return found

    @cached_property
    def _builtin(self) -> frozenset[str]:
        return frozenset(self._objects)

    def get(self, name: str) -> T:
        """The object of that name; `RecipeError` if there is none."""
        return self._objects[name] if name in self._objects else super().get(name)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def named(module: str, name: str) -> Any:
    """Look up a name in a module, to unpickle declared objects: the decorator puts them in their function's place."""
    return getattr(importlib.import_module(module), name)


_SMALLER = {"scikit-learn": "probe", "accelerate": "train", "peft": "train"}  # the smallest extra; [eval] has others


def need(library: str, what: str) -> str:
    """The version of a library from an extra, without importing it; `RecipeError` if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        extra = _SMALLER.get(library, "eval")
        raise RecipeError(f"{what} need {library}, which is not installed", _install(extra)) from None


def _install(extra: str) -> str:
    """The command that brings an extra: into a checkout of the source, or as a package."""
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'mergebench[{extra}]'"
    return f"pip install -e '{'.' if root == Path.cwd() else root}[{extra}]'"
