"""What a shell offers on TAB beside commands, options and files. Nothing heavy is imported for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from mergebench.cli.help import Group
from mergebench.cli.lazy import torch_later
from mergebench.errors import RecipeError

SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")


def words(*known: str) -> Callable[[], list[str]]:
    """Fixed values of an option."""

    def complete() -> list[str]:
        return list(known)

    return complete


def methods() -> list[str]:
    """Merge methods."""
    from mergebench import methods

    return methods.names()


def adapter_methods() -> list[str]:
    """What `adapters merge --method` takes."""
    return sorted({"linear", "cat", "svd", "magnitude_prune", "ema", *methods()})


def edits() -> list[str]:
    from mergebench.editing import edits

    return edits.names()


def methods_and_edits() -> list[str]:
    return [*methods(), *edits()]


def rows(ctx: typer.Context) -> list[str]:
    """The models of the evaluation that --in names."""
    from mergebench.checkpoint.documents import read_json

    with suppress(OSError, ValueError, KeyError, TypeError):
        document = read_json(Path(ctx.params["in_"]) / "evaluation.json")
        return list(dict.fromkeys(str(record["model"]) for record in document["records"]))
    return []


def settings(ctx: typer.Context) -> list[str]:
    """What --set can change of the recipe that is named before it, at the value that it has there."""
    written, parameters = _recipe(ctx)
    given = written.get("parameters") or {}
    defaults = {f"parameters.{name}": one.default for name, one in parameters.items() if name not in given}
    found = dict(_values(written)) | defaults
    return [f"{key}={_as_text(value)}" for key, value in found.items() if value is not None]


def dimensions(ctx: typer.Context, incomplete: str) -> list[str]:
    """What --over can vary of the recipe that is named before it, after those of the word that end in a comma."""
    before = incomplete[: incomplete.rfind(",") + 1]
    written, parameters = _recipe(ctx)
    if written.get("schedule"):
        return [before + name for name in ("first", "last", "schedule")]
    each = [f"{name}.*" for name, one in parameters.items() if one.per_model]
    return [before + name for name in [*parameters, *each]]


def _recipe(ctx: typer.Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe of an unfinished command line as written, and what its method declares; no file of code is run."""
    from mergebench.recipe import yaml

    with suppress(RecipeError, OSError, ValueError, IndexError), torch_later():
        given = str(ctx.params.get("recipe") or ctx.args[0])
        written = yaml.read(given)[-1].data if given != "-" else {}
        name = written.get("merge_method")
        if name in methods():
            from mergebench import methods as registry

            return written, dict(registry.get(name).parameters)
        return written, {}
    return {}, {}


def _values(written: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, word and flag of a recipe, by its path as --set spells it."""
    parts = written.items() if isinstance(written, dict) else enumerate(written)
    for key, value in parts:
        if isinstance(value, dict | list):
            yield from _values(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Main(Group):
    """The program: `--show-completion` and `--install-completion` take a shell or find out which one called."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] in ("--show-completion", "--install-completion") and not ctx.resilient_parsing:
            _complete(args[0] == "--install-completion", *args[1:2])
            raise typer.Exit
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        parameters = super().get_params(ctx)
        for one in parameters:
            if one.name in ("show_completion", "install_completion"):
                one.metavar, one.help = (
                    "[SHELL]",
                    f"{one.help.split()[0]} the shell's completion of commands and names.",
                )
        return parameters


def _complete(install: bool, shell: str | None = None) -> None:
    from typer import _completion_shared as completion

    from mergebench.cli.output import note, say_text

    option = "--install-completion" if install else "--show-completion"
    shell = shell or completion._get_shell_name() or ""
    if shell not in SHELLS:
        raise RecipeError(f"{option}: '{shell}' is no shell that has completion", f"{option} {'|'.join(SHELLS[:4])}")
    how: dict[str, str] = {"prog_name": "mergebench", "complete_var": "_MERGEBENCH_COMPLETE", "shell": shell}
    if not install:
        say_text(completion.get_completion_script(**how))
        return
    _, place = completion.install(**how)
    note(f"{shell} completion installed in {place}; it works in the next terminal")
