"""`mergebench explain`: the source and parameters of every tensor."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from functools import partial
from typing import TYPE_CHECKING, Any

from mergebench.cli import options as opt
from mergebench.cli.merge import Recipe, load, say_notes
from mergebench.cli.output import say
from mergebench.cli.plan import averaged, each_stage, say_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mergebench.engine.plan import Plan
    from mergebench.recipe import Stage


def explain(
    recipe: Recipe,
    set_: opt.Set = None,
    seed: opt.Seed = None,
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Print where each tensor of the result comes from and the parameters that hold for it, from headers alone.

    Example: mergebench explain recipes/quickstart.yaml
    """
    each_stage(load(recipe, set_, seed), json_, _facts, partial(_show, quiet=quiet))


def _facts(stage: Stage) -> dict[str, Any]:
    from mergebench import api

    plan = api.plan(stage.recipe)
    return {
        "method": plan.merge.method.name,
        "scope": plan.merge.scope,
        "notes": list(plan.merge.notes),
        **averaged(plan.merge.recipe),
        "tensors": _tensors(plan),
    }


def _show(stage: Stage, quiet: bool) -> None:
    from mergebench import api

    plan = api.plan(stage.recipe)
    say_notes(plan, quiet)
    tensors = _tensors(plan)
    models = [name.replace("|", " or ") for name in plan.merge.names]  # of slices: one or another
    say(f"{plan.merge.method.name}, scope {plan.merge.scope}; models: {', '.join(models)}")
    for one in averaged(plan.merge.recipe).values():
        say(f"schedule: {one['name']}")
        say_weights(one["weights"])
    merged = next(one for one in tensors if "parameters" in one)
    same = {key: value for key, value in merged["parameters"].items() if _everywhere(tensors, key, value)}
    say("everywhere: " + (_written(same) or "no parameters"))
    width = max(len(one["tensor"]) for one in tensors)
    for one in tensors:
        own = {key: value for key, value in one.get("parameters", {}).items() if key not in same}
        said = "copied from the base" if "parameters" not in one else _written(own)
        sources = [source.removesuffix(f":{one['tensor']}") for source in one.get("sources", ())]
        origin = "" if sources == list(plan.merge.names) or not sources else f"  from {', '.join(sources)}"
        say(f"{one['tensor']:{width}}  {said}{origin}".rstrip())


def _tensors(plan: Plan) -> list[dict[str, Any]]:
    from mergebench.recipe.open import short_names

    stored: dict[Path, list[tuple[int, str]]] = {}
    for model in plan.merge.models:
        for header in model.headers:
            stored[header.file] = [(tensor.offset, tensor.name) for tensor in header.tensors]  # in this order
    origins = dict.fromkeys(origin for model in plan.merge.models for origin in model.origins.values())
    labels = dict(zip(origins, short_names(list(origins)), strict=True))
    return [_about(plan, name, stored, labels) for name in plan.merge.reference.tensors]


def _about(
    plan: Plan, name: str, stored: Mapping[Path, list[tuple[int, str]]], labels: Mapping[str, str]
) -> dict[str, Any]:
    if name not in plan.alignment.sources:
        return {"tensor": name}
    sources = []
    columns = zip(plan.merge.models, plan.merge.names, plan.alignment.sources[name], strict=True)
    for model, label, info in columns:
        tensors = stored[info.file]
        own = tensors[bisect_right(tensors, info.offset, key=lambda one: one[0]) - 1][1]
        sources.append(f"{labels[model.origins[name]] if model.sliced else label}:{own}")
    given = dataclasses.asdict(plan.merge.params_for(name))
    parameters = {key.rstrip("_"): value for key, value in given.items()}
    lines = plan.merge.lines
    if lines is not None:
        more = f"auto + {lines.factor(0, name):g}"
        parameters["lines"] = more if lines.alpha is None else lines.factor(lines.alpha, name)
    return {"tensor": name, "sources": sources, "parameters": parameters}


def _everywhere(tensors: list[dict[str, Any]], key: str, value: Any) -> bool:
    return all(one["parameters"][key] == value for one in tensors if "parameters" in one)


def _written(parameters: dict[str, Any]) -> str:
    return "  ".join(f"{key} {_value(value)}" for key, value in parameters.items())


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
