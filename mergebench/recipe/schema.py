"""The keys of a recipe and their allowed values. A method's parameters are declared by the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergebench import methods
from mergebench.checkpoint.header import ENCODINGS
from mergebench.errors import RecipeError, did_you_mean
from mergebench.recipe.positions import Loc, Places, dotted, show
from mergebench.recipe.schedules import FORM

DTYPES = ("float32", "float16", "bfloat16")
OUT_DTYPES = (*DTYPES, *ENCODINGS)
SCOPES = ("tensor", "model")
LIST_SLICES = "write it as '- sources: [{model: PATH, layer_range: [0, 8]}]'"
LIST_MODELS = "list the models to merge as '- model: PATH'"
EDITS_FORM = "write it as '- {edit: surgery, probe: FILE, rows: 4.65%, alpha: 1.08}'"
DATA_FORM = "write data: FILE, or data: {file: FILE, text: COLUMN}"
LINES_FORM = "write lines: {alpha: auto, beta: 0.5}"
SHORT = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "float": "float32"}
SHORT_OUT = SHORT | {"fp8": "float8_e4m3", "float8_e4m3fn": "float8_e4m3", "float8": "float8_e4m3", "fp4": "mxfp4"}


@dataclass(frozen=True)
class Kind:
    """The allowed values of a key: in words, as a test, and for lists also for the entries."""

    words: str
    accepts: Callable[[Any], bool]
    each: Kind | None = None
    hint: Callable[[Any], str | None] = lambda value: None
    plain: Callable[[Any], Any] = lambda value: value  # converts an accepted value


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _plain_name(value: Any) -> bool:
    """Whether a stage may have this name: no path, and no reference with a revision or an adapter."""
    plain = _text(value) and value.isprintable() and value == value.strip() and len(value) <= 80
    return plain and not set("/+@") & set(value) and value[0] not in ".-~"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _reference(value: Any) -> str | None:
    """A model's name: as text, or in mergekit's form for a model with an overridden architecture.

    {model: {path: org/name, revision: v2}, lora: {path: org/lora}} is org/name@v2+org/lora. The architecture is
    ignored, because tensors are named as in their files.
    """
    if not isinstance(value, dict):
        return value if _text(value) else None
    if "model" not in value or value.keys() - {"model", "lora", "override_architecture"}:
        return None
    parts = [_path(value["model"])] + ([] if value.get("lora") is None else [_path(value["lora"])])
    return None if None in parts else "+".join(map(str, parts))


def _path(value: Any) -> str | None:
    if not isinstance(value, dict):
        return value if _text(value) else None
    path, revision = value.get("path"), value.get("revision")
    if not _text(path) or value.keys() - {"path", "revision"} or not (revision is None or _text(revision)):
        return None
    return str(path) if revision is None else f"{path}@{revision}"


def _list(words: str, each: Kind, hint: str | None = None) -> Kind:
    return Kind(words, lambda value: isinstance(value, list), each, lambda value: hint)


NAME = Kind("the name of a merge method", _text)
BASELINE = Kind(
    "the name of a merge method, or one with parameters",
    lambda value: _text(value) or (isinstance(value, dict) and len(value) == 1 and all(map(_text, value))),
    hint=lambda value: "write it as ties, or {ties: {density: 0.2}}",
)
MODEL = Kind(
    "a path or org/name",
    lambda value: _reference(value) is not None,
    hint=lambda value: "write it as PATH, org/name@revision or MODEL+ADAPTER" if isinstance(value, dict) else None,
    plain=lambda value: _reference(value),
)
STAGE = Kind("a plain name, it becomes a directory's", _plain_name)
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
GLOBS = _list("a list of globs", Kind("a glob", _text), "write it in brackets: ['*.bias']")
VOCABULARY = Kind("base, union or a model", _text)
SCOPE = Kind("tensor or model", lambda value: value in SCOPES)
NUMBER = Kind("a number", _number)
SEED = Kind("a whole number, at least 0", _whole)


def _stored_type(names: tuple[str, ...], short: Mapping[str, str]) -> Kind:
    return Kind(
        f"one of {', '.join(names)}",
        lambda value: isinstance(value, str) and value.removeprefix("torch.") in names,
        hint=lambda value: _near(value, short) if _text(value) else None,
        plain=lambda value: value.removeprefix("torch."),
    )


def _near(value: str, short: Mapping[str, str]) -> str | None:
    if value.removeprefix("torch.") in short:
        return f"did you mean '{short[value.removeprefix('torch.')]}'?"
    other = SHORT_OUT.get(value.removeprefix("torch."), value)
    return f"did you mean out_dtype: {other}?" if other in ENCODINGS else None


DTYPE, OUT_DTYPE = _stored_type(DTYPES, SHORT), _stored_type(OUT_DTYPES, SHORT_OUT)

RECIPE = {
    "name": STAGE,
    "merge_method": NAME,
    "base_model": MODEL,
    "models": _list("a list", Kind("a mapping", MAPPING.accepts, hint=lambda value: LIST_MODELS), LIST_MODELS),
    "slices": _list("a list", Kind("a mapping", MAPPING.accepts, hint=lambda value: LIST_SLICES), LIST_SLICES),
    "parameters": MAPPING,
    "scope": SCOPE,
    "include": GLOBS,
    "exclude": GLOBS,
    "seed": SEED,
    "dtype": DTYPE,
    "out_dtype": OUT_DTYPE,
    "tokenizer_source": VOCABULARY,
    "tokenizer": Kind("a mapping", MAPPING.accepts, hint=lambda value: "write tokenizer: {source: union}"),
    "chat_template": Kind("auto, chatml, llama3, mistral, alpaca, exaone or a chat template", _text),
    "lines": Kind("a mapping", MAPPING.accepts, hint=lambda value: LINES_FORM),
    "schedule": Kind("a schedule", lambda value: _text(value) or isinstance(value, dict), hint=lambda value: FORM),
    "edits": _list("a list of edits", Kind("a mapping", MAPPING.accepts, hint=lambda value: EDITS_FORM), EDITS_FORM),
    "evaluate": Kind("a mapping", MAPPING.accepts, hint=lambda value: "write evaluate: {suite: FILE}"),
}
RANGE = Kind(
    "two layer numbers, [first, one past the last]",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_whole, value)) and value[0] < value[1],
)
SLICE = {
    "sources": _list("a list", Kind("a mapping", MAPPING.accepts, hint=lambda value: LIST_SLICES), LIST_SLICES),
    "parameters": MAPPING,
    "base_model": MODEL,
}
SOURCE = {"model": MODEL, "layer_range": RANGE, "parameters": MAPPING}
ENTRY = {
    "model": MODEL,
    "task_vector": Kind("a path", _text),
    "as_trained": Kind("nf4", lambda value: value == "nf4"),
    "statistics": Kind("a path", _text),
    "data": Kind(
        "a file or a mapping", lambda value: _text(value) or isinstance(value, dict), hint=lambda _: DATA_FORM
    ),
    "parameters": MAPPING,
}
EVALUATE = {
    "suite": Kind("a file or a mapping", lambda value: _text(value) or isinstance(value, dict)),
    "baselines": _list("a list of merge methods", BASELINE, "write it in brackets: [linear]"),
}
LINES = {"alpha": Kind("a number or auto", lambda value: value == "auto" or _number(value)), "beta": NUMBER}
TOKENIZER = {
    "source": VOCABULARY,
    "tokens": Kind("a mapping of tokens", lambda value: isinstance(value, dict) and all(map(_text, value))),
    "pad_to_multiple_of": Kind("a whole number, at least 1", lambda value: _whole(value) and value > 0),
}
MOE = ("gate_mode", "experts")  # of mergekit-moe
MIXTURE = "this is a config for mergekit-moe, which makes a mixture of experts; mergebench makes none"
MIXTURE_HINT = "make the mixture with mergekit-moe; mergebench merges, edits and measures what it makes"
_OWN = (("evaluate",), ("tokenizer",), ("lines",), ("edits",))  # keys without method parameters below them


def check(data: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """The recipe's keys, each of the right kind; an empty key counts as not given."""
    for key in MOE:
        if key in data:
            raise places.error((key,), MIXTURE, MIXTURE_HINT)
    _check_places(data, places)
    found = _keys(data, RECIPE, (), places)
    if "merge_method" not in found:
        raise places.error(("merge_method",), "missing", "name a method, such as merge_method: linear")
    if not found.get("models") and not found.get("slices"):
        raise places.error(("models",), "names no model", LIST_MODELS)
    if found.get("models") and found.get("slices"):
        raise places.error(("slices",), "cannot be given with models", "give one of them")
    _check_slices(found, places)
    for i, entry in enumerate(found.get("models", ())):
        found["models"][i] = entry = _keys(entry, ENTRY, ("models", i), places)
        if ("model" in entry) == ("task_vector" in entry):
            both = "has both model and task_vector" if "model" in entry else "has neither model nor task_vector"
            raise places.error(("models", i), both, "give one of them")
        if "task_vector" in entry and "base_model" not in found:
            raise places.error(
                ("models", i, "task_vector"), "needs a base_model to be added to", "name it: base_model: PATH"
            )
        if "as_trained" in entry and "+" not in entry.get("model", ""):
            what = "says how the base of an adapter is rounded, and no adapter is named"
            raise places.error(("models", i, "as_trained"), what, "name it: model: BASE+ADAPTER")
    if "tokenizer" in found:
        found["tokenizer"] = _keys(found["tokenizer"], TOKENIZER, ("tokenizer",), places)
    if "lines" in found:
        found["lines"] = _keys(found["lines"], LINES, ("lines",), places)
        for key in LINES.keys() - found["lines"]:
            raise places.error(("lines", key), "missing", LINES_FORM)
    if "evaluate" in found:
        found["evaluate"] = _keys(found["evaluate"], EVALUATE, ("evaluate",), places)
        if not found["evaluate"].get("suite"):
            raise places.error(("evaluate", "suite"), "missing", "name a suite file, or write its tasks here")
    return found


def _check_places(data: Mapping[str, Any], places: Places) -> None:
    """Point a key that stands in the wrong place to the right one: the first such key."""
    try:
        takes = methods.get(str(data.get("merge_method"))).parameters
    except RecipeError:  # reported when the method is checked
        takes = {}

    def check_part(part: Any, kinds: Mapping[str, Kind], loc: Loc) -> None:
        for key, value in part.items() if isinstance(part, dict) else ():
            right = None
            if key in takes and key not in kinds:
                one = takes[key].per_model or not {"models", "sources"} & set(loc)
                right = f"under parameters{'' if one else ' at the top of the recipe'}: {{{key}: {show(value)}}}"
            elif key in kinds:
                continue
            elif key in RECIPE and kinds is not RECIPE:
                right = "at the top of the recipe"
            elif key in TOKENIZER and kinds is RECIPE:
                right = f"under tokenizer: {{source: {data.get('tokenizer_source', 'union')}, {key}: {show(value)}}}"
            elif key in SOURCE and kinds is ENTRY:
                right = "in the sources of slices, in place of models"
            elif key in ENTRY and kinds is RECIPE:
                right = "in the list of models"
            if right is not None:
                here = (*loc, key)
                if key in takes and places.where(here).startswith("--set"):
                    what = f"'{data.get('merge_method')}' takes it as a parameter"
                    raise places.error(here, what, f"did you mean --set {dotted((*loc, 'parameters', key))}=VALUE?")
                raise places.error(here, "is in the wrong place", f"write it {right}")

    check_part(data, RECIPE, ())
    for key, kinds in (("models", ENTRY), ("slices", SLICE)):
        listed = data.get(key)
        for i, one in enumerate(listed if isinstance(listed, list) else ()):
            check_part(one, kinds, (key, i))
            sources = one.get("sources") if isinstance(one, dict) else None
            for k, source in enumerate(sources if isinstance(sources, list) else ()):
                check_part(source, SOURCE, (key, i, "sources", k))
    parameters = data.get("parameters")
    for key in parameters if isinstance(parameters, dict) else ():
        if key in RECIPE and key not in takes:
            raise places.error(("parameters", key), "is in the wrong place", "write it at the top of the recipe")


def _check_slices(found: dict[str, Any], places: Places) -> None:
    slices = [_keys(one, SLICE, ("slices", i), places) for i, one in enumerate(found.get("slices", ()))]
    bases = {one["base_model"] for one in slices if "base_model" in one}
    if len(bases) == 1:  # if all slices that name a base agree, it is the recipe's base
        found.setdefault("base_model", *bases)
    for i, one in enumerate(slices):
        found["slices"][i] = one
        if not one.get("sources"):
            raise places.error(("slices", i, "sources"), "names no model", LIST_SLICES)
        if one.get("base_model", found.get("base_model")) != found.get("base_model"):
            raise places.error(
                ("slices", i, "base_model"), "is not the recipe's: one base for all slices", "leave it out"
            )
        for k, source in enumerate(one["sources"]):
            one["sources"][k] = source = _keys(source, SOURCE, ("slices", i, "sources", k), places)
            for key in ("model", "layer_range"):
                if key not in source:
                    raise places.error(("slices", i, "sources", k, key), "missing", LIST_SLICES)


def _keys(data: Mapping[str, Any], kinds: Mapping[str, Kind], loc: Loc, places: Places) -> dict[str, Any]:
    found = {}
    for key, value in data.items():
        here = (*loc, key)
        if key not in kinds:
            hint = did_you_mean(key, kinds) or ""
            outside = "" if hint.startswith("did") or loc[:1] in _OWN else "; the method's own go under parameters"
            raise places.error(here, "no such key", hint + outside)
        elif value is not None:
            found[key] = _value(value, kinds[key], here, places)
    return found


def _value(value: Any, kind: Kind, loc: Loc, places: Places) -> Any:
    if not kind.accepts(value):
        raise places.error(loc, f"must be {kind.words}, got {show(value)}", kind.hint(value))
    if kind.each is not None:
        return [_value(item, kind.each, (*loc, i), places) for i, item in enumerate(value)]
    return kind.plain(value)
