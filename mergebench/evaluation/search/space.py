"""The space of a search: parameters of the recipe, each over a range or a few values.

- lambda: over a range made from what the method declares and the recipe has
- lambda=0.2:1.2: over a range
- density=0.05/0.1/0.2: over these values
- weight.*: one for each model; weight.tweets: of the model of that name
- first, last, schedule: of a recipe that averages checkpoints: the steps it begins and ends at, the schedule's name
- step, or edits.0.step: of an edit
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergebench.editing.spec import COMMON, OF_ANY
from mergebench.errors import RecipeError, did_you_mean
from mergebench.parameters import Parameter
from mergebench.recipe import Recipe, schedules
from mergebench.recipe.gradients import varies
from mergebench.recipe.open import short_names
from mergebench.recipe.positions import show
from mergebench.recipe.windows import steps, window

FORMS = "write lambda, lambda=0.2:1.2 (a range), density=0.05/0.1/0.2 (values) or weight.* (one a model)"
OF_UNBOUNDED = (0.2, 1.5)  # times the recipe's value, if the method declares no bounds
OF_OPEN = 100  # a parameter above zero starts at its upper bound divided by this

WINDOW = {
    "first": Parameter("first", int, None, "step of the first checkpoint averaged"),
    "last": Parameter("last", int, None, "step of the last one"),
    "schedule": Parameter("schedule", str, None, "how they are weighted", choices=schedules.NAMES),
}

Values = Mapping[str, Any]  # a point: value by the dimension's name


@dataclass(frozen=True)
class Dimension:
    """One parameter: of all models, of one, or of an edit."""

    name: str
    parameter: Parameter
    model: int | None  # place among the recipe's models; None: the recipe's own parameters
    own: Any  # what the recipe as given has
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 1.0
    edit: int | None = None  # place among the recipe's edits

    @property
    def levels(self) -> int | None:
        """The number of different values; None for a continuous range."""
        if self.choices:
            return len(self.choices)
        return int(self.high - self.low) + 1 if self.parameter.type is int else None

    @property
    def by_factors(self) -> bool:
        """Whether the scale is logarithmic: for parameters that must be above zero, such as a density."""
        return self.parameter.above == 0 and self.low > 0

    def at(self, place: float) -> Any:
        """The value at a place from 0 to 1."""
        if self.choices:
            return self.choices[min(int(place * len(self.choices)), len(self.choices) - 1)]  # 1 is the last one's
        if self.by_factors:
            value = self.low * (self.high / self.low) ** place
        else:
            value = self.low + (self.high - self.low) * place
        value = min(max(float(f"{value:.4g}"), self.low), self.high)  # digits that a person reads
        return round(value) if self.parameter.type is int else value

    def place(self, value: Any) -> float:
        """The place of a value; in the middle if it is not in the range or list."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices) if value in self.choices else 0.5
        if value is None or self.high == self.low:
            return 0.5
        value = min(max(value, self.low), self.high)
        if self.by_factors:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))

    def to_plain(self) -> dict[str, Any]:
        """What is varied, ready for JSON."""
        over = {"values": list(self.choices)} if self.choices else {"low": self.low, "high": self.high}
        return {"name": self.name, **over}


def at_point(recipe: Recipe, space: Sequence[Dimension], values: Values) -> Recipe:
    """The recipe with these values."""
    if any(one.name in WINDOW for one in space):
        first, last, name = (values.get(one) for one in WINDOW)
        return window(recipe, first, last, None if name is None else schedules.read(name))
    common, own = dict(recipe.parameters), [dict(entry.parameters) for entry in recipe.models]
    edits = list(recipe.edits)
    for one in space:
        if values[one.name] is not None and one.edit is not None:
            name, value, edit = one.parameter.name, values[one.name], edits[one.edit]
            changed = {name: value} if name in COMMON else {"values": {**edit.values, name: value}}
            edits[one.edit] = replace(edit, **changed)
        elif values[one.name] is not None:
            (common if one.model is None else own[one.model])[one.parameter.name] = values[one.name]
    models = tuple(replace(entry, parameters=given) for entry, given in zip(recipe.models, own, strict=True))
    return replace(recipe, parameters=common, models=models, edits=tuple(edits))


def as_given(space: Sequence[Dimension]) -> dict[str, Any]:
    """The point of the recipe as given."""
    return {one.name: one.own for one in space}


def parse(over: Sequence[str], recipe: Recipe) -> tuple[Dimension, ...]:
    """The dimensions that `--over` names, commas between them; `RecipeError` where it is not understood."""
    words = [word.strip() for text in over for word in text.split(",")]
    if not any(words):
        raise RecipeError("--over: it names no parameter", FORMS)
    found: dict[str, Dimension] = {}
    for word in filter(None, words):
        for one in _dimensions(word, recipe):
            if one.name in found:
                raise RecipeError(f"--over {word}: {one.name} is named twice")
            found[one.name] = one
    counted = recipe.schedule is not None and isinstance(recipe.schedule.value, tuple)
    if counted and {"first", "last"} & found.keys() and "schedule" not in found:
        what = "the schedule's numbers are for all checkpoints of the recipe"
        raise RecipeError(f"--over {next(iter(found))}: {what}", "take a named one: --set schedule=mean")
    for one in found.values():
        if one.model is not None and one.parameter.name in found:
            raise RecipeError(f"--over {one.name}: {one.parameter.name} is searched for all models already")
    return tuple(found.values())


def _dimensions(word: str, recipe: Recipe) -> Iterator[Dimension]:
    """What one word of `--over` names."""
    path, given, span = word.partition("=")
    models, where = _models(recipe), f"--over {word}"
    if path.strip() in WINDOW and recipe.schedule is not None:
        yield _of_the_window(WINDOW[path.strip()], recipe, given and span, where)
        return
    name, _, model = _named(path.strip(), models).partition(".")
    parameters = recipe.method.parameters
    if name not in parameters or path.strip().startswith("edits."):
        if name in WINDOW:
            hint = "the recipe has no schedule, by which checkpoints of one run are averaged"
            raise RecipeError(f"{where}: '{recipe.merge_method}' has no parameter '{name}'", hint)
        edit = _of_edit(path.strip(), recipe, where)
        yield _ranged(edit, given and span, where)
        return
    parameter = parameters[name]
    if name == "weight" and recipe.schedule is not None:
        raise RecipeError(f"{where}: the schedule gives each checkpoint its weight", "--over first,last,schedule")
    if not model:
        others = [label for label, i in models.items() if name in recipe.models[i].parameters]
        if others:
            hint = f"vary it model by model: --over {name}.*"
            raise RecipeError(f"{where}: {', '.join(others)} has its own {name} in the recipe", hint)
        yield _ranged(Dimension(name, parameter, None, recipe.parameters.get(name)), given and span, where)
        return
    if not parameter.per_model:
        raise RecipeError(f"{where}: '{recipe.merge_method}' takes {name} once for all models", f"--over {name}")
    if recipe.slices:
        raise RecipeError(f"{where}: with slices, no model has parameters of its own", f"--over {name}")
    if model != "*" and model not in models:
        raise RecipeError(f"{where}: no model is called '{model}'", did_you_mean(model, models))
    for label in models if model == "*" else [model]:
        own = recipe.models[models[label]].parameters.get(name, recipe.parameters.get(name, parameter.default))
        yield _ranged(Dimension(f"{name}.{label}", parameter, models[label], own), given and span, where)


def _of_the_window(parameter: Parameter, recipe: Recipe, span: str, where: str) -> Dimension:
    """A step of the checkpoints that are averaged, or their schedule: all that there are, or those written."""
    if parameter.name == "schedule":
        assert recipe.schedule is not None, "asked before"
        name = next((one for one in schedules.NAMES if schedules.read(one) == recipe.schedule), None)
        return _ranged(Dimension("schedule", parameter, None, name), span, where)
    there = steps(recipe)
    own = there[0] if parameter.name == "first" else there[-1]
    given = _ranged(Dimension(parameter.name, parameter, None, own), span, where) if span else None
    low, high = (given.low, given.high) if given is not None and not given.choices else (there[0], there[-1])
    strange = [one for one in (given.choices if given is not None else ()) if one not in there]
    choices = (given.choices if given is not None else ()) or tuple(one for one in there if low <= one <= high)
    if strange or len(choices) < 2:
        shown = ", ".join(map(str, there[:8])) + (", ..." if there[8:] else "")
        raise RecipeError(f"{where}: the checkpoints do not have two such steps", f"there are {shown}")
    return Dimension(parameter.name, parameter, None, own, choices)


def _of_edit(path: str, recipe: Recipe, where: str) -> Dimension:
    """A parameter of an edit: `step` where one edit has it, `edits.0.step` else."""
    from mergebench.editing import edits

    every = {
        (place, name): parameter
        for place, wanted in enumerate(recipe.edits)
        for name, parameter in {**OF_ANY, **edits.get(wanted.edit).parameters}.items()
        if name != "probe"
    }
    spelt = {f"edits.{place}.{name}": (place, name) for place, name in every}
    keys = [spelt[path]] if path in spelt else [key for key in every if key[1] == path]
    if not keys:
        spelling, beside = (path, ", nor has an edit") if every else (path.partition(".")[0], "")
        what = f"{where}: '{recipe.merge_method}' has no parameter '{spelling}'{beside}"
        known = dict.fromkeys([*recipe.method.parameters, *(name for _, name in every), *spelt])
        raise RecipeError(what, did_you_mean(path, known) or "there is nothing to search")
    if len(keys) > 1:
        ways = " or ".join(f"edits.{place}.{name}" for place, name in keys)
        raise RecipeError(f"{where}: several edits have it", f"say which: {ways}")
    place, name = keys[0]
    wanted, parameter = recipe.edits[place], every[keys[0]]
    own = getattr(wanted, name) if name in COMMON else wanted.values.get(name, parameter.default)
    return Dimension(path, parameter, None, own, edit=place)


def _named(path: str, models: Mapping[str, int]) -> str:
    """`parameters.lambda` and `models.0.parameters.weight`, as --set spells them: lambda, weight.NAME."""
    parts = path.split(".")
    if len(parts) == 2 and parts[0] == "parameters":
        return parts[1]
    if len(parts) == 4 and parts[0] == "models" and parts[2] == "parameters":
        return f"{parts[3]}.{next((name for name, i in models.items() if str(i) == parts[1]), parts[1])}"
    return path


def _models(recipe: Recipe) -> dict[str, int]:
    """The places of the models that are merged, by their short names."""
    skipped = recipe.base_model if recipe.method.takes == "task_vectors" else None
    listed = [(i, entry.model or entry.task_vector or "") for i, entry in enumerate(recipe.models)]
    listed = [(i, text) for i, text in listed if text != skipped]
    return dict(zip(short_names([text for _, text in listed]), (i for i, _ in listed), strict=True))


def _ranged(one: Dimension, span: str, where: str) -> Dimension:
    """The dimension over what is written, or over its usual range."""
    parameter = one.parameter
    if varies(one.own):
        hint = f"give the recipe one value: --set parameters.{parameter.name}=VALUE"
        raise RecipeError(f"{where}: in the recipe {parameter.name} varies from tensor to tensor", hint)
    if not span:
        return _usual(one, where)
    if ":" in span and "/" not in span and parameter.type not in (str, bool):
        low, *more = (_value(part, parameter, where) for part in span.split(":"))
        high = more[0]
        if len(more) > 1 or not low < high:
            raise RecipeError(f"{where}: a range is LOW:HIGH, the lower end first", FORMS)
        return replace(one, low=low, high=high)
    choices = tuple(_value(part, parameter, where) for part in span.split("/"))
    if len(choices) < 2 or len(set(choices)) < len(choices):
        hint = f"a fixed value is set in the recipe: --set parameters.{parameter.name}={span}"
        raise RecipeError(f"{where}: it takes several different values, or a range LOW:HIGH", hint)
    return replace(one, choices=choices)


def _usual(one: Dimension, where: str) -> Dimension:
    parameter = one.parameter
    if parameter.choices or parameter.type is bool:
        return replace(one, choices=parameter.choices or (False, True))
    least = parameter.low if parameter.above is None else parameter.above
    if least is not None and parameter.high is not None:
        return replace(one, low=parameter.high / OF_OPEN if parameter.above == 0 else least, high=parameter.high)
    if parameter.type is str or not one.own:
        hint = f"give it a range or values: {one.name}=LOW:HIGH or {one.name}=A/B/C"
        raise RecipeError(f"{where}: no range follows from {one.own!r}, where the recipe stands", hint)
    low, high = sorted(factor * one.own for factor in OF_UNBOUNDED)
    if parameter.type is int:
        low, high = math.floor(low), math.ceil(high)
    return replace(one, low=low, high=high)


def _value(text: str, parameter: Parameter, where: str) -> Any:
    """One value as it is written, checked."""
    value = parameter.read(text.strip())
    if parameter.is_number and isinstance(value, str):
        raise RecipeError(f"{where}: '{value}' is no number", FORMS)
    complaint = parameter.complaint(value)
    if complaint is not None:
        raise RecipeError(f"{where}: {complaint}, got {show(value)}", parameter.about() or None)
    return parameter.plain(value)
