"""What all commands share: flags that show no type in the help. A Typer app of these is an `App`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

Function = TypeVar("Function", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command whose flags do not look as if they took a value."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands; the same of its flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))


class App(typer.Typer):
    """Commands and groups of these classes."""

    def __init__(self, **more: Any) -> None:
        super().__init__(cls=Group, **more)

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = Command, **more: Any
    ) -> Callable[[Function], Function]:
        """As Typer's."""
        return super().command(name, cls=cls, **more)


def _plain(parameters: list[Any]) -> list[Any]:
    for one in parameters:
        if getattr(one, "is_flag", False) and one.metavar is None:
            one.metavar = ""  # or Typer shows <bool>
    return parameters
