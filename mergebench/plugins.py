"""Lookup by name of whatever a recipe or suite can name: the files of a directory, plug-ins of other packages, and
what a user has in a Python file or in this process.

Nothing is imported before its first use. Third parties register by an entry point; `MERGEBENCH_PLUGINS=` (empty)
switches plug-ins off. A Python file is run only by `read`, for a name that the user gave: names in a model's files are
looked up by `get`, which runs none.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar
from urllib.parse import quote, unquote

from mergebench.errors import MergebenchError, RecipeError, did_you_mean, first_line

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
        self._own: dict[str, T] = {}  # what `read` and `add` made known

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
        """The package, the file or the module that the object `name` comes from."""
        if name in self._own:
            return name.rpartition(":")[0]
        return "mergebench" if name in self._builtin else _package(self._plugins[name])

    def read(self, text: str, folders: Sequence[Path] = ()) -> str:
        """The name of the object that a user's `FILE.py:NAME`, or any other name, means.

        Runs the file, which is looked up from the working directory, then from `folders`. `RecipeError` if there is
        none, if it fails, or if it has no such object.
        """
        match = IN_FILE.fullmatch(text)
        if match is None:
            return text.replace("++", "_plusplus")  # as the papers spell what Python cannot
        file, name = Path(os.path.expanduser(match[1])), match[2]  # noqa: PTH111 - it never fails
        path = next((place for place in [file, *(folder / file for folder in folders)] if place.is_file()), None)
        if path is None:
            beside = {one.name for folder in [Path(), *folders] for one in (folder / file).parent.glob("*.py")}
            raise RecipeError(f"{file}: no such file", did_you_mean(file.name, beside))
        values = vars(run_file(path))
        known = [name for name, value in values.items() if isinstance(value, self._kind)]
        if not name or name not in values:
            what = f"it has no '{name}'" if name else f"which {self._what} in it?"
            hint = did_you_mean(name or "", known) or f"a {self._what} is a function with {self._decorator} above it"
            raise RecipeError(f"{path}: {what}", hint)
        return self.add(values[name], f"{path}:{name}")

    def add(self, one: Any, name: str | None = None) -> str:
        """Make an object known, by its file and name or as `name`; returns the name to `get` it by."""
        if not isinstance(one, self._kind):
            what = repr(getattr(one, "__name__", one)) if name is None else name
            raise RecipeError(f"{what} is not made with {self._decorator}", "put that above the function")
        function: Any = getattr(one, "function", one)
        if name is None:
            short = str(getattr(one, "name", ""))
            if short in self.names() and self.get(short) is one:
                return short
            name = f"{_source_file(function) or function.__module__}:{function.__qualname__}"
        self._own[name] = one
        return name

    def get(self, name: str) -> T:
        """The object of that name; `RecipeError` if there is none."""
        if name in self._own:
            return self._own[name]
        if name in self._builtin:
            module = name.replace("-", "_")
            found = getattr(importlib.import_module(f"{self._room}.{module}"), module)
        elif name in self._plugins:
            found = self._plugins[name].load()
        else:
            raise RecipeError(f"no {self._what} is called '{name}'", self._hint(name))
        if not isinstance(found, self._kind):
            raise RecipeError(f"{self._what} '{name}' of {self.origin(name)} is not made with {self._decorator}")
        return found

    def _hint(self, name: str) -> str:
        """The nearest name, or all; and the ways to have one of one's own."""
        hint = did_you_mean(name, self.names()) or ""
        if hint.startswith("did"):
            return hint
        off = "; MERGEBENCH_PLUGINS is empty: plug-ins are off" if os.environ.get("MERGEBENCH_PLUGINS") == "" else ""
        return f"{hint}; your own: FILE.py:NAME, or a package's (docs/plugins.md){off}"


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


IN_FILE = re.compile(r"(.+\.py)(?::(.*))?")  # FILE.py:NAME
_RUN = "python-file:"  # begins the module names of files that were run; the path follows, quoted


def run_file(path: Path) -> ModuleType:
    """The module that a Python file makes; run again where the file has changed since.

    `RecipeError` with the line where it fails.
    """
    place = path.resolve()
    name = _RUN + quote(str(place), safe="").replace(".", "%2E")  # a dot would mean a package
    content = sha256(place.read_bytes()).hexdigest()
    known = sys.modules.get(name)
    if known is not None and vars(known).get("__sha256__") == content:
        return known
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)["__sha256__"] = content
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed(path, error) from None
    return module


def in_file(name: str) -> bool:
    """Whether a name is of an object in a Python file."""
    return IN_FILE.fullmatch(name) is not None


class _Files:
    """Finds modules that are files which another process has run, so that what is pickled there is read here."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if not name.startswith(_RUN):
            return None
        return importlib.util.spec_from_file_location(name, unquote(name.removeprefix(_RUN)))


if _Files not in sys.meta_path:
    sys.meta_path.append(_Files)


def failed_at(function: Any, error: Exception) -> MergebenchError | None:
    """An error that somebody's function raised, with the line in its file; None for a function of ours."""
    if str(function.__module__).partition(".")[0] == "mergebench":
        return None
    return _failed(Path(function.__code__.co_filename), error)


def _failed(path: Path, error: BaseException) -> MergebenchError:
    if isinstance(error, MergebenchError):
        return error
    if isinstance(error, SyntaxError):
        return RecipeError(f"{error.filename or path}:{error.lineno}:{error.offset}: {error.msg}")
    line, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == path.resolve():
            line = trace.tb_lineno
        trace = trace.tb_next
    return RecipeError(f"{path}{'' if line is None else f':{line}'}: {type(error).__name__}: {first_line(error)}")


def _source_file(function: Any) -> Path | None:
    """The file in which a function is written; None for one of a notebook."""
    found = inspect.getsourcefile(inspect.unwrap(function))
    return Path(found) if found is not None and Path(found).is_file() else None


def source_of(function: Any) -> dict[str, str]:
    """The file that a function is in and its hash (of a notebook's function, of its text); nothing for ours, which
    the version stands for."""
    if str(function.__module__).partition(".")[0] == "mergebench":
        return {}
    file = _source_file(function)
    ran = function.__globals__.get("__sha256__")  # of a file as it was when it was run
    if ran is not None:
        return {"file": str(file), "sha256": ran}
    try:
        text = file.read_bytes() if file is not None else inspect.getsource(function).encode()
    except OSError:
        code = function.__code__
        text = repr((code.co_code, code.co_names, code.co_varnames, code.co_consts)).encode()
    return {**({} if file is None else {"file": str(file)}), "sha256": sha256(text).hexdigest()}


def named(module: str, name: str) -> Any:
    """Look up a name in a module, to unpickle declared objects: the decorator puts them in their function's place."""
    return getattr(importlib.import_module(module), name)


_SMALLER = {
    "scikit-learn": "probe",
    "accelerate": "train",
    "peft": "train",
    "ray": "ray",
}  # the smallest extra; [eval] has others


def need(library: str, what: str) -> str:
    """The version of a library from an extra, without importing it; `RecipeError` if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        extra = _SMALLER.get(library, "eval")
        raise RecipeError(f"{what} need {library}, which is not installed", install_command(extra)) from None


def install_command(extra: str) -> str:
    """The command that brings an extra: into a checkout of the source, or as a package."""
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        return f"pip install 'mergebench[{extra}]'"
    return f"pip install -e '{'.' if root == Path.cwd() else root}[{extra}]'"
