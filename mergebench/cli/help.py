"""What all commands share: how their help looks. A Typer app of these is an `App`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import typer
from typer.core import TyperCommand, TyperGroup

Function = TypeVar("Function", bound=Callable[..., Any])
NOUNS = {int: "N", float: "NUMBER", Path: "PATH", str: "TEXT"}  # of values that an option does not name


class Command(TyperCommand):
    """A command whose help calls values by nouns."""

    was = ""  # an option that is an argument now, and still taken

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if self.was:
            args = [arg.removeprefix(f"{self.was}=") for arg in args if arg != self.was]
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        return named(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return _plain(super().collect_usage_pieces(ctx))


class Group(TyperGroup):
    """A group of such commands, in the order in which they were added."""

    order: Sequence[str] = ()

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=self.order.index)

    def get_params(self, ctx: Any) -> list[Any]:
        return named(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return _plain(super().collect_usage_pieces(ctx))


class App(typer.Typer):
    """Commands and groups of these classes."""

    def __init__(self, cls: type[Group] = Group, **more: Any) -> None:
        self._order: list[str] = []
        super().__init__(cls=type(cls.__name__, (cls,), {"order": self._order}), **more)

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = Command, was: str = "", **more: Any
    ) -> Callable[[Function], Function]:
        """As Typer's; the help is the docstring, a line for each paragraph. was: an option that its argument was."""
        self._order.append(name or "")
        cls = type(Command.__name__, (cls or Command,), {"was": was}) if was else cls

        def add(function: Function) -> Function:
            more["help"] = flowing(inspect.getdoc(function) or "")
            return super(App, self).command(name, cls=cls, **more)(function)

        return add

    def add_typer(self, typer_instance: typer.Typer, *, name: str | None = None, **more: Any) -> None:
        """As Typer's."""
        self._order.append(name or "")
        super().add_typer(typer_instance, name=name, **more)


def flowing(text: str) -> str:
    """Text whose paragraphs are lines, for whoever shows it to wrap; indented ones stay."""
    paragraphs = re.split(r"\n\n+", text)
    return "\n\n".join(p if re.search(r"^ ", p, re.MULTILINE) else p.replace("\n", " ") for p in paragraphs)


def named(parameters: list[Any]) -> list[Any]:
    """Typer would show `<bool>` behind a flag, `<path>` for PATH, and a type beside an argument's name."""
    for one in parameters:
        if one.param_type_name == "argument":
            one.display_type_rich = lambda ctx: None
        if one.metavar is None:
            kind = one.type_descriptor.annotation
            kind = next(iter(get_args(kind)), kind)  # of a list
            one.metavar = "" if getattr(one, "is_flag", False) else NOUNS.get(kind, "TEXT")
    return parameters


def _plain(pieces: list[str]) -> list[str]:
    """`RECIPE` for `{RECIPE}`."""
    return [re.sub(r"[{}]", "", piece) for piece in pieces]
