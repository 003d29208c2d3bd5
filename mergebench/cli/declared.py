"""Command options made from the declared parameters of a method, edit or probe.

The declaration is read when the command runs or shows help, so that no other command waits for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from mergebench.cli.help import NOUNS, App, Command, named
from mergebench.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from mergebench.parameters import Parameter

    # by heading of the help, then by option; the last heading names the owner
    Declared = Mapping[str, Mapping[str, Parameter]]

OF = "Options of "  # headings of the help


class DeclaredCommand(Command):
    """A command whose function finds the declared parameters that were given, checked, in `ctx.obj`."""

    ignore_unknown_options = allow_extra_args = True  # unknown options are refused here, in one line

    def declared(self, args: list[str]) -> Declared:
        """The options of this call, by its arguments."""
        raise NotImplementedError

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        declared = self.declared(args)
        ctx.meta[__name__] = [option for heading, below in declared.items() for option in _options(heading, below)]
        rest: list[str] = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            raise self._refused(ctx, next((word for word in rest if word.startswith("-")), rest[0]), declared)
        ctx.obj = {}
        for option, parameter in (entry for below in declared.values() for entry in below.items()):
            given = ctx.params.pop(_python(option))
            if given is not None:
                ctx.obj[parameter.name] = _checked(option, parameter, given)
        return rest

    def get_params(self, ctx: Any) -> list[Any]:
        *static, help_option = super().get_params(ctx)
        return [*static, *named(ctx.meta.get(__name__, [])), help_option]

    def _refused(self, ctx: Any, word: str, declared: Declared) -> RecipeError:
        if not word.startswith("-"):
            return RecipeError(f"'{word}': an argument too many", "write options as --NAME VALUE")
        name = word.split("=")[0]
        known = [option for parameter in self.get_params(ctx) for option in parameter.opts]
        owner = list(declared)[-1].removeprefix(OF)
        return RecipeError(f"{name}: {owner} has no such option", did_you_mean(name, known))


def option_of(name: str) -> str:
    """`--no-bias` of `no_bias`."""
    return f"--{name.replace('_', '-')}"


def _python(option: str) -> str:
    """The parameter's name in the parsed options."""
    return "declared_" + option.removeprefix("--").replace("-", "_")


def _options(heading: str, parameters: Mapping[str, Parameter]) -> list[Any]:
    """Options as Typer makes them from a function's arguments."""

    def nothing(**values: Any) -> None: ...

    arguments = []
    for option, parameter in parameters.items():
        flag = parameter.type is bool
        form = f"{option}/--no-{option[2:]}" if flag and parameter.default else option
        metavar = None if flag else NOUNS.get(parameter.type, "TEXT")
        default = typer.Option(None, form, metavar=metavar, help=_help(parameter), rich_help_panel=heading)
        kind: Any = bool if flag else str
        by_name = inspect.Parameter.KEYWORD_ONLY
        arguments.append(inspect.Parameter(_python(option), by_name, default=default, annotation=kind | None))
    nothing.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    nothing.__annotations__ = {argument.name: argument.annotation for argument in arguments}
    app = App(add_completion=False)
    app.command()(nothing)
    return list(typer.main.get_command(app).params)


def _help(parameter: Parameter) -> str:
    """`Of select: random, at least 0. Default: 0.`"""
    text, default = f"{parameter.help[:1].upper()}{parameter.about()[1:]}.", parameter.default
    if parameter.required:
        return f"{text} Required."
    if default is None or default is False or default == "":
        return text
    return f"{text} Default: {'true' if default is True else default}."


def _checked(option: str, parameter: Parameter, given: Any) -> Any:
    value = parameter.read(given) if isinstance(given, str) else given
    complaint = parameter.complaint(value)
    if complaint is not None:
        raise RecipeError(f"{option}: {complaint}, got {value!r}", parameter.help or None)
    return parameter.plain(value)
