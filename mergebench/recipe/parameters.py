"""Check a recipe's parameters against the method's, and resolve them for each model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergebench.engine.method import Method
from mergebench.parameters import Parameter
from mergebench.recipe.gradients import fits, scalars, value_at
from mergebench.recipe.positions import Loc, Places, show

HABITS = (
    "int8_mask",
    "normalize",
    "rescale",
    "weight",
    "embed_slerp",
)  # often written from habit under methods that do not take them


def defaults(method: Method) -> dict[str, Any]:
    """The default parameters of a method; None stands for the method's own choice."""
    return {p.name: p.default for p in method.parameters.values() if not p.required and p.default is not None}


def check(method: Method, given: Mapping[str, Any], loc: Loc, places: Places) -> tuple[dict[str, Any], list[Loc]]:
    """The checked parameters at `loc`, and the locations of those to ignore with a note."""
    taken, ignored = {}, []
    for name, value in given.items():
        here = (*loc, name)
        parameter = method.parameters.get(name)
        if parameter is not None:
            if ("models" in loc or "sources" in loc) and not parameter.per_model:
                hint = f"move it to the recipe's own parameters: {name}: {show(value)}"
                raise places.error(here, f"'{method.name}' takes it once for all models", hint)
            taken[name] = _value(value, parameter, here, places)
        elif name in HABITS:
            ignored.append(here)
        else:
            raise places.error(here, f"'{method.name}' has no such parameter", _meant(name, method))
    return taken, ignored


def note(method: Method, ignored: list[Loc], places: Places) -> tuple[str, ...]:
    """A note in one line on all ignored parameters."""
    if not ignored:
        return ()
    names = list(dict.fromkeys(str(loc[-1]) for loc in ignored))
    them = "it" if len(names) == 1 else "them"
    return (f"{places.where(ignored[0])}: {', '.join(names)}: ignored, '{method.name}' does not take {them}",)


Given = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """One model's own parameters: their place, and the tensor's name in that model."""

    loc: Loc
    given: Given
    tensor: str = ""


def resolve(
    method: Method, common: Sequence[Given], own: Sequence[Source], places: Places, tensor: str = "", depth: float = 0.0
) -> dict[str, Any]:
    """The input of `Method.make_params`: a tuple over the models for a per-model parameter, else one value.

    A model's own parameters override those in `common`, and earlier entries in `common` override later ones. A varying
    value is taken for this tensor, at `depth` (0 to 1) of the layers.
    """

    def first(parameter: Parameter, sources: Sequence[Given], name: str, loc: Loc) -> Any:
        written = False
        for given in sources:
            if parameter.name in given:
                written = True
                value = value_at(given[parameter.name], name, depth)
                if value is not None:
                    return round(value) if isinstance(value, float) and parameter.type is int else value
        if parameter.required:
            if written and not name:  # no particular tensor: any written value
                return scalars(next(given[parameter.name] for given in sources if parameter.name in given))[0]
            if written:
                raise places.error((*loc, parameter.name), f"no filter fits '{name}'", "end the list with {value: ...}")
            raise _missing((*loc, parameter.name), parameter, method, places)
        return parameter.default

    values: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        if parameter.per_model:
            values[name] = tuple(
                first(parameter, [one.given, *common], one.tensor or tensor, (*one.loc, "parameters")) for one in own
            )
        else:
            values[name] = first(parameter, common, tensor, ("parameters",))
    return values


def _missing(loc: Loc, parameter: Parameter, method: Method, places: Places) -> Exception:
    return places.error(loc, f"missing, '{method.name}' needs it", parameter.about() or None)


def _meant(name: str, method: Method) -> str:
    close = difflib.get_close_matches(name, method.parameters, n=1)
    if close:
        words = method.parameters[close[0]].about()
        return f"did you mean '{close[0]}'" + (f" ({words})?" if words else "?")
    return f"it takes {', '.join(sorted(method.parameters)) or 'none'}"


def _value(value: Any, parameter: Parameter, loc: Loc, places: Places) -> Any:
    """A value, a gradient (a list of values) or a list of {filter, value}, each single value checked."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return single(value, parameter, loc, places)
    if not value:
        raise places.error(loc, "an empty list", "give one number, a gradient, or {filter, value} entries")
    if any(isinstance(item, dict) for item in value):
        return [_condition(item, parameter, (*loc, i), places) for i, item in enumerate(value)]
    open_end = replace(parameter, above=None, low=parameter.low if parameter.above is None else parameter.above)
    return [single(item, open_end, (*loc, i), places) for i, item in enumerate(value)]


def _condition(item: Any, parameter: Parameter, loc: Loc, places: Places) -> dict[str, Any]:
    if not isinstance(item, dict) or item.get("value") is None or item.keys() - {"filter", "value"}:
        raise places.error(loc, f"must be {{filter, value}} or {{value}}, got {show(item)}")
    pattern = item.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise places.error((*loc, "filter"), f"must be a part of a name, a glob or a /regex/, got {show(pattern)}")
    try:
        fits(pattern, "")
    except re.error as error:
        raise places.error((*loc, "filter"), f"no regular expression: {error}") from None
    return {
        **({} if pattern is None else {"filter": pattern}),
        "value": _value(item["value"], parameter, (*loc, "value"), places),
    }


def single(value: Any, parameter: Parameter, loc: Loc, places: Places) -> Any:
    """One checked value, as the parameter's type."""
    if value is None and parameter.default is None:
        return None
    if parameter.type is bool and isinstance(value, (int, float)) and value in (0, 1):
        value = bool(value)  # mergekit writes booleans as numbers
    complaint = parameter.complaint(value)
    if complaint is not None:
        raise places.error(loc, f"{complaint}, got {show(value)}", parameter.help or None)
    return parameter.plain(value)
