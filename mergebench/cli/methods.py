"""`mergebench methods`: the merge methods and edits, by what they take."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import complete
from mergebench.cli import options as opt
from mergebench.cli.lazy import torch_later
from mergebench.cli.output import print_table, say, say_json, say_prose
from mergebench.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from mergebench.editing.edit import Edit
    from mergebench.engine.method import Method

EDITS = "Edits"
NOTATION = "theta_0: the base; theta_i: the N models, w_i: their weights; tau_i = theta_i - theta_0: task vectors."


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="One of them, or one of your own as FILE.py:NAME.",
            autocompletion=complete.methods_and_edits,
        ),
    ] = None,
    json_: opt.Json = False,
) -> None:
    """List the merge methods and edits, or show one: formula, paper, parameters, defaults.

    Example: mergebench methods ties
    """
    with torch_later():
        listed = _listed() if name is None else [_find(name)]
        found = [_described(one, package) for one, package in listed]
    if json_:
        say_json(found if name is None else found[0])
    elif name is None:
        _show_all(found)
    else:
        _show(found[0], inspect.getdoc(listed[0][0].function) or "")


def _listed() -> list[tuple[Method | Edit, str]]:
    """Every method, group by group, then every edit; each with its package."""
    from mergebench import methods as registry
    from mergebench.editing import edits
    from mergebench.engine.method import GROUPS

    made = [(registry.get(name), registry.origin(name)) for name in registry.names()]
    grouped = [pair for group in GROUPS for pair in made if pair[0].group == group]
    return [*grouped, *((edits.get(name), edits.origin(name)) for name in edits.names())]


def _find(name: str) -> tuple[Method | Edit, str]:
    from mergebench import methods as registry
    from mergebench.editing import edits

    if name in edits.names():
        return edits.get(name), edits.origin(name)
    name = registry.read(name)
    if name not in registry.names() and not registry.in_file(name):
        near = did_you_mean(name, [*registry.names(), *edits.names()]) or ""
        if near.startswith("did"):
            raise RecipeError(f"no method is called '{name}'", near)
    return registry.get(name), registry.origin(name)


def _show_all(found: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from mergebench.engine.method import GROUPS

    width = max(len(entry["name"]) for entry in found)
    for group, about in {**GROUPS, EDITS: "changes of single neurons (mergebench edit)"}.items():
        if group != next(iter(GROUPS)):
            say()
        say(f"{group}: {about}")
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
        table.add_column(min_width=width, no_wrap=True)
        table.add_column(ratio=1)
        for entry in found:
            if entry["group"] == group:
                table.add_row(entry["name"], entry["summary"])
        print_table(table)
    say()
    say("mergebench methods NAME shows one: formula, parameters, defaults.")
    say("A method of your own is named by its file: FILE.py:NAME.")


def _show(entry: dict[str, Any], text: str) -> None:
    from rich.table import Column, Table

    say(f"{entry['name']}  ({entry['paper']}; from {entry['package']})")
    say()
    say_prose(text)
    if entry["kind"] == "method":
        say_prose(NOTATION)
        of_models = "" if entry["reads"] is None else f" and each model's statistics on texts ({entry['reads']})"
        say(f"takes {entry['takes'].replace('_', ' ')}{of_models}; statistics over the {entry['scope']}")
        say()
    table = Table("parameter", "default", "range", Column("meaning", ratio=1), box=None, header_style="bold")
    for parameter in entry["parameters"]:
        default = "required" if parameter["required"] else str(parameter["default"])
        each = " (for each model)" if parameter["per_model"] else ""
        table.add_row(parameter["name"], default, parameter["range"], parameter["help"] + each)
    print_table(table)


def _described(one: Method | Edit, package: str) -> dict[str, Any]:
    from mergebench.engine.method import Method

    about = _method(one) if isinstance(one, Method) else _edit(one)
    return {**about, "package": package}


def _method(method: Method) -> dict[str, Any]:
    cut = "by its parameters" if callable(method.cut) else method.cut
    more = {"group": method.group, "takes": method.takes, "scope": method.scope, "cut": cut}
    return {"kind": "method", **_about(method), **more, "reads": method.statistics}


def _edit(edit: Edit) -> dict[str, Any]:
    """An edit's description, with the parameters that every edit has."""
    from mergebench.editing.spec import COMMON, Wanted

    common = [
        {
            "name": key,
            "default": getattr(Wanted(edit.name, "", target=edit.target), key),
            "required": key == "probe",
            "range": "",
            "per_model": False,
            "help": text,
        }
        for key, text in COMMON.items()
    ]
    about = _about(edit)
    return {"kind": "edit", **about, "group": EDITS, "parameters": [*common, *about["parameters"]]}


def _about(one: Method | Edit) -> dict[str, Any]:
    parameters = [
        {
            "name": p.name,
            "default": None if p.required else p.default,
            "required": p.required,
            "range": p.range_text(),
            "per_model": p.per_model,
            "help": p.help,
        }
        for p in one.parameters.values()
    ]
    return {"name": one.name, "summary": one.summary, "paper": one.paper, "parameters": parameters}
