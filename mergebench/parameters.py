"""Declared parameters: each is a field of a dataclass, with its default, meaning and range in one place.

    @dataclass(frozen=True)
    class Params:
        density: float = param(0.2, "share of elements kept", above=0, high=1)

Merge methods, edits, tasks, scorers, probes and published systems declare their parameters this way. Recipes, suites,
configs and the command line check and show them by the declaration.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

PerModel = tuple[float, ...]  # one value for each model
REQUIRED: Any = object()
_MOST = (2 - 2**-23) * 2.0**127  # of float32, which all is computed in
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    Path: "a path",
    Path | str: "a name or a path",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
}


@dataclass(frozen=True)
class Parameter:
    """One declared parameter. A `type` not in `WORDS` is checked by the code that reads it."""

    name: str
    type: Any
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None  # an open lower bound
    below: float | None = None  # an open upper bound
    choices: tuple[str, ...] = ()  # words allowed in place of a number
    per_model: bool = False
    folder: bool = False  # the path must be a directory

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def is_number(self) -> bool:
        return self.type in (int, float)

    def range_text(self) -> str:
        """The allowed values in words, such as `above 0, at most 1`."""
        if self.choices and not self.is_number:
            return " | ".join(self.choices)
        bounds = {"above": self.above, "at least": self.low, "below": self.below, "at most": self.high}
        return ", ".join(f"{word} {_plain(bound)}" for word, bound in bounds.items() if bound is not None)

    def about(self) -> str:
        """`share of elements kept, above 0, at most 1`."""
        return ", ".join(filter(None, (self.help, self.range_text())))

    def complaint(self, value: object) -> str | None:
        """What `value` should have been; None if it is allowed."""
        if self.choices and value in self.choices:
            return None
        if self.choices and not self.is_number:
            return f"must be one of {', '.join(self.choices)}"
        if self.type not in WORDS:
            return None
        if self.type == list[int] and isinstance(value, list):
            each = dataclasses.replace(self, type=int)
            return next((f"each {wrong}" for wrong in map(each.complaint, value) if wrong), None)
        if not _fits(value, self.type):
            return f"must be {' or '.join([self._words(), *self.choices])}"
        return self._out_of_range(value) if isinstance(value, int | float) and self.is_number else None

    def _out_of_range(self, value: float) -> str | None:
        if not abs(value) <= _MOST:
            return "must be within ±3.4e38, float32's range" if abs(value) <= sys.float_info.max else "must be finite"
        too_low = (self.low is not None and value < self.low) or (self.above is not None and value <= self.above)
        too_high = (self.high is not None and value > self.high) or (self.below is not None and value >= self.below)
        if too_low or too_high:
            return f"must be {self.range_text()}"
        if self.type is int and value != int(value):
            return f"must be {self._words()}"
        return None

    def _words(self) -> str:
        return ", ".join(filter(None, (WORDS[self.type], self.range_text())))

    def plain(self, value: Any) -> Any:
        """An allowed value as its type: `3.0` becomes 3 for an int, `1` becomes 1.0 for a float."""
        return self.type(value) if self.is_number and not isinstance(value, str) else value

    def read(self, text: str) -> Any:
        """Parse a command-line value; an unreadable value stays text, and `complaint` then reports it."""
        if self.type is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        if not self.is_number:
            return text
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
        return text


def _plain(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _fits(value: object, kind: Any) -> bool:
    """Whether a value of YAML, JSON or Python is of that kind; an int counts as a float, true is not a number."""
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    if kind == list[int]:
        return False
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind in (int, float):
        return isinstance(value, int | float)
    if isinstance(value, Path):
        return kind in (Path, Path | str)
    return isinstance(value, str) and bool(value.strip())


def param(
    default: Any = REQUIRED,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    per_model: bool = False,
    folder: bool = False,
) -> Any:
    """A declared parameter: default, meaning and range in one place.

    A trailing underscore avoids Python's keywords: the field `lambda_` is the recipe's `lambda`. `per_model` parameters
    may be given once, or once for each model; the method gets a tuple. For a `Literal` field, `choices` come from its
    type. A `Path` must exist, as a file or a `folder`; a `Path | str` may be a name instead.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    about = {"help": help, **bounds, "choices": choices, "per_model": per_model, "folder": folder}
    if default is REQUIRED:
        return field(metadata={"param": about})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"param": about})
    return field(default=default, metadata={"param": about})


def parameters_of(params: type) -> dict[str, Parameter]:
    """The parameters that a dataclass declares, by the names users give them."""
    hints = typing.get_type_hints(params)
    parameters = {}
    for f in dataclasses.fields(params):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        kind, choices = _kind(hints[f.name])
        about = {"help": "", **f.metadata.get("param", {})}
        about["choices"] = about.get("choices") or choices
        name = f.name.rstrip("_")
        required = default is dataclasses.MISSING
        parameters[name] = Parameter(name, kind, REQUIRED if required else default, **about)
    return parameters


def _kind(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """The type of one value and the words allowed for it: for `int | None` int, since None means not given."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        words = [part for part in parts if typing.get_origin(part) is Literal]
        kinds = [part for part in parts if part not in words]
        choices = tuple(word for part in words for word in typing.get_args(part))
        return (reduce(operator.or_, kinds) if kinds else str), choices
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint)
    return (float if hint == PerModel else hint), ()


def params_of(function: Callable[..., Any], count: int, form: str, base: type = object) -> type:
    """The dataclass that a function of `count` arguments takes: its only argument, or the second.

    `TypeError` that names `form` if the argument is no such dataclass. Other annotations are not resolved, because they
    may name late imports.
    """
    arguments = list(inspect.signature(function).parameters.values())
    params = arguments[min(count - 1, 1)].annotation if len(arguments) == count else None
    if isinstance(params, str):
        holder = types.SimpleNamespace(__annotations__={"params": params})
        params = typing.get_type_hints(holder, function.__globals__)["params"]
    if not (isinstance(params, type) and issubclass(params, base) and dataclasses.is_dataclass(params)):
        raise TypeError(f"{function.__name__}: {form}")
    return params


def make_params(params: type, values: Mapping[str, Any]) -> Any:
    """The dataclass `params` from values by the users' names."""
    by_name = {f.name.rstrip("_"): f.name for f in dataclasses.fields(params)}
    return params(**{by_name[name]: value for name, value in values.items()})
