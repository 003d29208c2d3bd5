"""Read the parameters that a kind declares from a user's file, with the place of every mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mergebench.checkpoint.reference import looked_in
from mergebench.errors import RecipeError, did_you_mean
from mergebench.parameters import Parameter, make_params
from mergebench.recipe.positions import Loc, Places, show
from mergebench.recipe.yaml import find

T = TypeVar("T")


class Declaring(Protocol):
    """A kind with declared parameters."""

    @property
    def name(self) -> str: ...

    @property
    def params(self) -> type: ...

    @property
    def parameters(self) -> Mapping[str, Parameter]: ...


class Reader:
    """Reads parameters; relative paths are looked up in the working directory, then in `folders`."""

    def __init__(self, places: Places, folders: Sequence[Path]) -> None:
        self.places, self.folders = places, folders

    def params(self, kind: Declaring, given: Mapping[str, Any], loc: Loc, beside: Sequence[str] = ()) -> Any:
        """The dataclass of a kind's parameters; beside: other keys that may stand there, for hints."""
        values = {name: self.value(kind, name, value, (*loc, name), beside) for name, value in given.items()}
        for parameter in kind.parameters.values():
            if parameter.required and parameter.name not in values:
                raise self.places.error((*loc, parameter.name), f"missing, '{kind.name}' needs it", parameter.help)
        return make_params(kind.params, values)

    def value(self, kind: Declaring, name: str, value: Any, loc: Loc, beside: Sequence[str] = ()) -> Any:
        """One parameter's value."""
        if name not in kind.parameters:
            hint = did_you_mean(name, [*beside, *kind.parameters])
            raise self.places.error(loc, f"'{kind.name}' has no such key", hint)
        return self.of(kind.parameters[name], value, loc)

    def of(self, parameter: Parameter, value: Any, loc: Loc) -> Any:
        """A declared parameter's value, a path as it was found."""
        complaint = parameter.complaint(value)
        if complaint:
            raise self.places.error(loc, f"{complaint}, got {show(value)}", parameter.help)
        if parameter.type not in (Path, Path | str):
            return parameter.plain(value)
        found = find(value, self.folders, parameter.folder)
        if found is None and (parameter.type is Path or value.endswith((".yaml", ".yml"))):
            what = f"no such {'folder' if parameter.folder else 'file'}: {value}"
            raise self.places.error(loc, what, looked_in(value, self.folders))
        return found or value

    def at(self, loc: Loc, make: Callable[[], T]) -> T:
        """The result of `make`; errors get the place in the file."""
        try:
            return make()
        except RecipeError as error:
            raise self.places.error(loc, error.message, error.hint) from None
