"""`modules: {NAME: {models | slices, parameters}}`: mergekit's form for a model made of several parts.

A single module, with any name, is the recipe itself: its contents move to the top. Several modules:

    modules:
      text_decoder: {models: [{model: A, parameters: {weight: 0.7}}, {model: B, parameters: {weight: 0.3}}]}
      vision_tower: {models: [{model: A}]}

become one recipe with the models of all modules and parameters by module. A model that a module does not name has
weight 0 there. Tensors in no listed module are copied from the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mergebench import methods
from mergebench.checkpoint import TensorInfo
from mergebench.checkpoint.names import layer_of
from mergebench.errors import RecipeError
from mergebench.recipe.gradients import fits
from mergebench.recipe.positions import Loc, Places, show

# mergekit's names of parts, and the prefixes of their tensor names, at the start or after a dot.
_PROJECTOR = ("multi_modal_projector", "mm_projector", "visual.merger", "visual.deepstack_merger_list")
_VISION = ("vision_tower", "vision_model", "visual")
_KNOWN = {"multi_modal_projector": _PROJECTOR, "vision_tower": _VISION, "vision_model": _VISION}
_TOWERS = (*_PROJECTOR, *_VISION, "audio_tower")
_REST = "text_decoder"  # everything outside the towers
WAY_OUT = "write a document for each module, with include: and the one before as its base_model"
CONTENTS = ("models", "slices", "parameters")
FORM = "write it as modules: {NAME: {models: [...]}}"


class Part(NamedTuple):
    """One module: a filter for its tensors, and its number of layers if the recipe gives it."""

    name: str
    pattern: str
    layers: int | None


class Named(NamedTuple):
    """A model in a module: its place, its reference as written, its parameters there."""

    loc: Loc
    model: Any
    given: dict[str, Any]


def lift(data: dict[str, Any], places: Places) -> tuple[dict[str, Any], tuple[Part, ...]]:
    """The recipe without `modules:`, and the parts if there are several modules. A module's parameters override those
    at the top."""
    lifted = {key: value for key, value in data.items() if key != "modules"}
    modules = data.get("modules")
    if modules is None:
        return lifted, ()
    if not isinstance(modules, dict) or not modules:
        raise places.error(("modules",), f"must be a mapping of modules, got {show(modules or None)}", FORM)
    for name, module in modules.items():
        here = ("modules", name)
        if not isinstance(module, dict):
            raise places.error(here, f"must be a mapping, got {show(module)}", FORM)
        for key, value in module.items():
            if key not in CONTENTS:
                raise places.error((*here, key), "no such key", f"a module has {', '.join(CONTENTS)}")
            if key != "parameters" and value is not None and lifted.get(key) is not None:
                raise places.error((*here, key), f"cannot be given with {key} at the top", "give one of them")
            if key == "parameters" and not isinstance(value, (dict, type(None))):
                raise places.error((*here, key), f"must be a mapping, got {show(value)}")
    if len(modules) > 1:
        return join(lifted, modules, places)
    for key, value in module.items():
        if value is None:
            continue
        below = {loc[2:]: text for loc, text in places.texts.items() if loc[:3] == (*here, key)}
        if key == "parameters" and isinstance(value, dict) and isinstance(lifted.get(key), dict):
            below[(key,)] = places.where((key,))
            value = lifted[key] | {one: before(given, lifted[key].get(one)) for one, given in value.items()}
        lifted[key] = value
        places.texts.update({(key,): places.where((*here, key)), **below})
    return lifted, ()


def join(data: dict[str, Any], modules: Mapping[str, Any], places: Places) -> tuple[dict[str, Any], tuple[Part, ...]]:
    """The recipe without `modules:`: models with parameters by module."""
    parts, entries = [], {}
    for name, module in modules.items():
        entries[name], layers = _entries(name, module, places)
        parts.append(Part(name, _pattern(name, modules), layers))
    named: dict[str, Named] = {}
    for found in entries.values():
        named = found | named
    joined = data | {"models": [], "parameters": dict(data.get("parameters") or {})}
    weighs = _takes_weights(data)
    for number, (reference, first) in enumerate(named.items()):
        given: dict[str, list[Any]] = {}
        for part in parts:
            own = entries[part.name].get(reference)
            if own is None and not weighs and first.model != data.get("base_model"):
                what = f"module '{part.name}' does not name this model, and '{data.get('merge_method')}' has no weights"
                raise places.error(first.loc, what, WAY_OUT)
            for key, value in (own.given if own is not None else {"weight": 0} if weighs else {}).items():
                given.setdefault(key, []).append({"filter": part.pattern, "value": value})
        joined["models"].append({"model": first.model, "parameters": given})
        places.texts[("models", number)] = places.where(first.loc)
    for part in parts:
        for key, value in (modules[part.name].get("parameters") or {}).items():
            top = joined["parameters"].get(key)
            rest = top if isinstance(top, list) and any(isinstance(one, dict) for one in top) else None
            rest = (
                rest if rest is not None else [] if top is None else [top if isinstance(top, dict) else {"value": top}]
            )
            joined["parameters"][key] = [{"filter": part.pattern, "value": value}, *rest]
            places.texts[("parameters", key)] = places.where(("modules", part.name, "parameters", key))
    listed = [one for name in modules for one in _words(name)]
    if _REST in modules:
        joined["exclude"] = [*(data.get("exclude") or []), *_globs(set(_TOWERS) - set(listed))]
    elif data.get("include"):
        raise places.error(("include",), "cannot be given with several modules", "give one of them, or use exclude")
    else:
        joined["include"] = _globs(listed)
        inner = [one for one in _TOWERS if one not in listed and any(one.startswith(f"{word}.") for word in listed)]
        joined["exclude"] = [*(data.get("exclude") or []), *_globs(inner)]
    return joined, tuple(parts)


def check_parts(parts: Iterable[Part], tensors: Mapping[str, TensorInfo], places: Places) -> None:
    """Check that every module is a whole part of the model."""
    for part in parts:
        own = [name for name in tensors if fits(part.pattern, name)]
        if not own:
            heads = dict.fromkeys(re.split(r"\.\d", name)[0].rpartition(".")[0] or name for name in tensors)
            known = ", ".join(list(heads)[:6])
            hint = f"name it as its tensors begin: {known}"
            raise places.error(("modules", part.name), "no tensor of the base belongs to it", hint)
        if part.layers is not None:
            stacks: dict[str, int] = {}
            for layer in filter(None, map(layer_of, own)):
                stacks[layer[0]] = max(stacks.get(layer[0], 0), layer[1] + 1)
            if part.layers not in stacks.values():
                has = ", ".join(map(str, stacks.values())) or "no"
                what = f"slices of {part.layers} layers, the base has {has} there: several modules are merged whole"
                raise places.error(("modules", part.name, "slices"), what, WAY_OUT)


def _entries(name: str, module: Mapping[str, Any], places: Places) -> tuple[dict[str, Named], int | None]:
    """A module's models by reference, with place and parameters; and its number of layers if it has slices."""
    here: Loc = ("modules", name)
    if module.get("models") and module.get("slices"):
        raise places.error((*here, "slices"), "cannot be given with models", "give one of them")
    models, layers = module.get("models"), None
    shared: dict[str, Any] = {}
    where: Loc = (*here, "models")
    if not models:
        slices = module.get("slices")
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
            what = "one of several modules takes models, or one slice of all its layers"
            raise places.error((*here, "slices") if slices else here, what, WAY_OUT)
        models, shared = slices[0].get("sources"), slices[0].get("parameters") or {}
        where = (*here, "slices", 0, "sources")
    if not isinstance(models, list) or not models:
        raise places.error(where, f"must be a list, got {show(models)}", "list the models as '- model: PATH'")
    found: dict[str, Named] = {}
    for number, entry in enumerate(models):
        loc = (*where, number)
        known = {"model", "parameters"} | ({"layer_range"} if "slices" in where else set())
        if not isinstance(entry, dict) or not entry.get("model") or entry.keys() - known:
            raise places.error(loc, f"must be a mapping of {', '.join(sorted(known))}, got {show(entry)}")
        if "layer_range" in known:
            span = entry.get("layer_range")
            if not isinstance(span, list) or len(span) != 2 or span[0] != 0 or layers not in (None, span[1]):
                what = f"layers {show(span) if not isinstance(span, list) else span}: several modules are merged whole"
                raise places.error((*loc, "layer_range"), what, WAY_OUT)
            layers = span[1]
        if str(entry["model"]) in found:
            raise places.error(loc, f"{show(entry['model'])} is listed twice")
        found[str(entry["model"])] = Named(loc, entry["model"], shared | (entry.get("parameters") or {}))
    return found, layers


def _takes_weights(data: Mapping[str, Any]) -> bool:
    try:
        return "weight" in methods.get(str(data.get("merge_method"))).parameters
    except RecipeError:  # reported when the recipe is checked
        return True


def _words(name: str) -> tuple[str, ...]:
    return () if name == _REST else _KNOWN.get(name, (name.strip("."),))


def _pattern(name: str, modules: Iterable[str]) -> str:
    """A /regex/ that fits the names of a module's tensors, and of no other's."""
    words = _words(name)
    others = {*_TOWERS, *(word for one in modules for word in _words(one))} - set(words)
    inner = others if name == _REST else {one for one in others if any(one.startswith(f"{word}.") for word in words)}
    return f"/^{_not(inner)}{_any(words)}/"


def _any(words: Iterable[str]) -> str:
    listed = "|".join(re.escape(word) for word in sorted(words))
    return rf"(.*\.)?({listed})\." if listed else ""


def _not(words: Iterable[str]) -> str:
    return f"(?!{_any(words)})" if words else ""


def _globs(words: Iterable[str]) -> list[str]:
    return [glob for word in sorted(words) for glob in (f"{word}.*", f"*.{word}.*")]


def before(value: Any, top: Any) -> Any:
    """A module's value; if it is a list of filters, the value at the top is used for names that no filter fits."""
    conditions = [value] if isinstance(value, dict) else value
    if top is None or not isinstance(conditions, list) or not any(isinstance(one, dict) for one in conditions):
        return value
    others = [top] if isinstance(top, dict) else top
    if not isinstance(others, list) or not any(isinstance(one, dict) for one in others):
        others = [{"value": top}]
    return [*conditions, *others]
