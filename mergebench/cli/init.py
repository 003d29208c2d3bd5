"""`mergebench init`: a recipe to start from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli.lazy import torch_later
from mergebench.cli.output import say_text
from mergebench.errors import RecipeError, counted

if TYPE_CHECKING:
    from mergebench.engine.method import Method
    from mergebench.parameters import Parameter


def init(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A merge method, or one of your own: FILE.py:NAME.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="The base first, for a method on task vectors; then the others."),
    ] = None,
) -> None:
    """Print a recipe to start from: the method with its parameters, at their defaults.

    Example: mergebench init ties BASE A B > recipe.yaml
    """
    with torch_later():
        from mergebench import methods

        name = methods.read(method)
        for line in _recipe(name, methods.get(name), list(models or ())):
            say_text(line)  # a file: its lines are not wrapped


def _recipe(name: str, method: Method, given: list[str]) -> Iterator[str]:
    count = method.models or 2
    based = method.needs_base
    places = ["BASE"] * based + ([f"MODEL_{number + 1}" for number in range(count)] if count > 1 else ["MODEL"])
    if method.models is not None and len(given) > len(places):
        beside = " beside the base" if based else ""
        raise RecipeError(f"'{name}' takes {counted(count, 'model')}{beside}, got {len(given) - based}")
    models = given + places[len(given) :]
    yield f"# {method.summary} {method.paper}"
    yield f"merge_method: {_text(name)}"
    if based:
        yield f"base_model: {_text(models[0])}  # what the others were fine-tuned from"
    yield "models:"
    each = ", ".join(f"{p.name}: {_value(p)}" for p in method.parameters.values() if p.per_model)
    for number, model in enumerate(models[based:]):
        yield f"  - model: {_text(model)}"
        if method.statistics is not None:
            yield f"    statistics: STATISTICS_{number + 1}  # of kind {method.statistics}; or data: FILE, its texts"
        if each and number == 0:
            yield f"    # parameters: {{{each}}}  # of this model alone"
    if method.parameters:
        needed = any(p.required for p in method.parameters.values())
        yield "parameters:" if needed else "# parameters:  # take the # away, here and before what you change"
        for p in method.parameters.values():
            about = f"{p.about()}; required" if p.required else p.about()
            yield f"{'  ' if p.required else '#   '}{p.name}: {_value(p)}  # {about}"
    if method.cut == "element":
        other = "model" if method.scope == "tensor" else "tensor"
        yield f"# scope: {method.scope}  # or {other}: what statistics cover"
    yield "# dtype: bfloat16  # of what is written; by default each tensor's own"
    yield "# evaluate: {suite: suite.yaml}  # what to measure (docs/evaluation.md)"


def _value(parameter: Parameter) -> str:
    """The default, or for a parameter that has none an allowed value."""
    value: Any = parameter.default
    if parameter.required:
        low, high = parameter.low or 0, parameter.high
        value = parameter.type(low if high is None else (low + high) / 2)
    return "null" if value is None else _text(value) if isinstance(value, str) else json.dumps(value)


def _text(value: str) -> str:
    """A text as YAML reads it back."""
    return value if re.fullmatch(r"[\w./~][\w./+@:~-]*", value) and not value.endswith(":") else json.dumps(value)
