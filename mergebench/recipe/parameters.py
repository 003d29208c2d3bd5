"""A recipe's parameters against the method's: which it takes, what they may be, and what each model gets."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from mergebench.engine.method import Method, Parameter
from mergebench.recipe.places import Loc, Places, show

HABITS = ("int8_mask", "normalize", "rescale", "weight")  # written from habit under methods that do not take them


def defaults(method: Method) -> dict[str, Any]:
    """What every model gets unless the recipe says otherwise; None stands for the method's own choice."""
    return {p.name: p.default for p in method.parameters.values() if not p.required and p.default is not None}


def check(method: Method, given: Mapping[str, Any], loc: Loc, places: Places) -> tuple[dict[str, Any], list[Loc]]:
    """The parameters given at `loc`, checked; and the locations of those to pass over with a note."""
    taken, ignored = {}, []
    for name, value in given.items():
        here = (*loc, name)
        parameter = method.parameters.get(name)
        if parameter is not None:
            if loc[0] == "models" and not parameter.per_model:
                hint = f"move it to the recipe's own parameters: {name}: {show(value)}"
                raise places.error(here, f"'{method.name}' takes it once for all models", hint)
            taken[name] = _value(value, parameter, here, places)
        elif name in HABITS:
            ignored.append(here)
        else:
            raise places.error(here, f"'{method.name}' has no such parameter", _meant(name, method))
    return taken, ignored


def note(method: Method, ignored: list[Loc], places: Places) -> tuple[str, ...]:
    """One line for everything passed over."""
    if not ignored:
        return ()
    names = list(dict.fromkeys(str(loc[-1]) for loc in ignored))
    them = "it" if len(names) == 1 else "them"
    return (f"{places.where(ignored[0])}: {', '.join(names)}: ignored, '{method.name}' does not take {them}",)


def resolve(
    method: Method, common: Mapping[str, Any], own: Sequence[tuple[Loc, Mapping[str, Any]]], places: Places
) -> dict[str, Any]:
    """What `Method.make_params` takes: a tuple over the models where a parameter is per model, else one value.

    `common` holds for every model; `own` has each model's location in the recipe and its own parameters.
    """
    values: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        if not parameter.per_model:
            if name in common:
                values[name] = common[name]
            elif parameter.required:
                raise _missing(("parameters", name), parameter, method, places)
            continue
        for loc, mine in own:
            if name not in mine and name not in common and parameter.required:
                raise _missing((*loc, "parameters", name), parameter, method, places)
        values[name] = tuple(mine.get(name, common.get(name, parameter.default)) for _, mine in own)
    return values


def about(parameter: Parameter) -> str:
    """`share of elements kept, above 0, at most 1`."""
    return ", ".join(filter(None, (parameter.help, parameter.range_text())))


def _missing(loc: Loc, parameter: Parameter, method: Method, places: Places) -> Exception:
    return places.error(loc, f"missing, '{method.name}' needs it", about(parameter) or None)


def _meant(name: str, method: Method) -> str:
    close = difflib.get_close_matches(name, method.parameters, n=1)
    if close:
        words = about(method.parameters[close[0]])
        return f"did you mean '{close[0]}'" + (f" ({words})?" if words else "?")
    return f"it takes {', '.join(sorted(method.parameters)) or 'none'}"


def _value(value: Any, parameter: Parameter, loc: Loc, places: Places) -> Any:
    if value is None and parameter.default is None:
        return None
    number = parameter.type not in (str, bool)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        raise places.error(loc, "lists of {filter, value} are not supported yet", "give one value for all tensors")
    if isinstance(value, list) and number:
        each = ", or one under each model's parameters" if parameter.per_model and loc[0] != "models" else ""
        raise places.error(loc, "lists of values over the layers are not supported yet", f"give one number{each}")
    if isinstance(value, (list, dict)) or value is None:
        wanted = parameter.range_text() if parameter.choices else "a number" if number else "a single value"
        raise places.error(loc, f"must be {wanted}, got {show(value)}", about(parameter) or None)
    complaint = parameter.complaint(value)
    if complaint is None and parameter.type is int and value != int(value):
        complaint = f"must be a whole number, got {value!r}"
    if complaint is not None:
        raise places.error(loc, complaint, parameter.help or None)
    if not number:
        return value
    return int(value) if parameter.type is int else float(value)
