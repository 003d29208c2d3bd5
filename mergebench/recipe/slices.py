"""Slices: an output's layers taken from layers of the models, as in mergekit's configs.

    slices:
    - sources: [{model: A, layer_range: [0, 8]}, {model: B, layer_range: [0, 8]}]
    - sources: [{model: A, layer_range: [6, 12]}, {model: B, layer_range: [8, 14]}]

This file composes the models that the engine merges, by headers alone: the first sources of all slices form one model,
the second sources another. Tensors before the layers (embeddings) come from the first slice's sources, tensors after
the layers (final norm, head) from the last slice's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergebench.checkpoint import Model
from mergebench.checkpoint.align import Ties, is_derived
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.header import Header, TensorInfo
from mergebench.checkpoint.names import layer_of
from mergebench.errors import ModelError, RecipeError
from mergebench.recipe.ends import comes_before
from mergebench.recipe.layers import Layer, first_predictor, follow, unlike, without_predictors
from mergebench.recipe.positions import Loc

_PREDICTOR = re.compile(r"(^|\.)mtp(_\w+)?\.")
_WHOLE = "merge whole models: list them under models"


@dataclass(frozen=True)
class Source:
    """Layers `start` to `stop` of one model, and their parameters."""

    model: str
    start: int
    stop: int
    parameters: dict[str, Any] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        given = {"model": self.model, "layer_range": [self.start, self.stop], "parameters": self.parameters}
        return {key: value for key, value in given.items() if value != {}}


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output."""

    sources: tuple[Source, ...]
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.sources[0].stop - self.sources[0].start

    def to_plain(self) -> dict[str, Any]:
        given = {"sources": [source.to_plain() for source in self.sources], "parameters": self.parameters}
        return {key: value for key, value in given.items() if value != {}}


@dataclass(frozen=True)
class Piece:
    """The origin of one output tensor: its slice, its depth there, and its name in the slice's models."""

    slice: int
    depth: float
    names: tuple[str, ...]  # one for each source


@dataclass(frozen=True)
class Stack:
    """A model taken apart: its layers, and the tensors outside of them."""

    model: Model
    start: str  # of the layers' names
    layers: dict[int, dict[str, TensorInfo]]  # tensors by the names they have within a layer
    outside: tuple[str, ...]

    @classmethod
    def of(cls, model: Model, stop: int) -> Stack:
        """stop: where the layers end that slices name. Layers for multi-token prediction are left out if they lie
        beyond."""
        end = first_predictor(model.config)
        starts: dict[str, dict[int, dict[str, TensorInfo]]] = {}
        outside: list[str] = []
        beyond: dict[str, None] = {}
        for name, info in model.tensors.items():
            found = layer_of(name)
            predictor = _PREDICTOR.search(name)
            if predictor is not None:
                beyond[name[: predictor.end() - 1]] = None
            elif found is not None and end is not None and found[1] >= max(end, stop):
                beyond[f"{found[0]}.{found[1]}"] = None
            elif found is None:
                outside.append(name)
            else:
                starts.setdefault(found[0], {}).setdefault(found[1], {})[found[2]] = info
        if len(starts) != 1:
            listed = ", ".join(f"'{one}'" for one in sorted(starts)) or "none"
            raise RecipeError(f"slices: '{model.reference}' must have one stack of layers, it has {listed}", _WHOLE)
        if beyond:
            remark = f"{', '.join(beyond)}: multi-token prediction, after the layers that slices name: left out"
            changes = {**(model.config_changes or {}), **without_predictors(model.config)}
            model = replace(model, config_changes=changes, remarks=(*model.remarks, remark))
        ((start, layers),) = starts.items()
        return cls(model, f"{start}." if start else "", layers, tuple(outside))

    def layer(self, number: int) -> Layer:
        names = frozenset(name for name, info in self.layers[number].items() if not is_derived(info))
        return Layer(self.model.reference, self.model.config, number, names)


def take_apart(slices: Sequence[Slice], opened: Mapping[str, Model], where: Callable[..., str]) -> dict[str, Stack]:
    """The models' layers, checked: all that the slices name are there, and the sources of a slice have layers of the
    same kinds. `where` gives the place of a part of the recipe."""
    stop = max(source.stop for one in slices for source in one.sources)
    stacks = {name: Stack.of(model, stop) for name, model in opened.items()}
    for number, one in enumerate(slices):
        for place, source in enumerate(one.sources):
            layers = stacks[source.model].layers
            missing = next((at for at in range(source.start, source.stop) if at not in layers), None)
            if missing is not None:
                loc = where("slices", number, "sources", place, "layer_range")
                what = (
                    f"[{source.start}, {source.stop}]: {stacks[source.model].model.reference} has {len(layers)} layers"
                )
                raise ModelError(f"{loc}: {what}", f"they are {min(layers)} to {max(layers)}, the end is not included")
        for at in range(one.length):
            first, *others = (stacks[source.model].layer(source.start + at) for source in one.sources)
            for other in others:
                difference = unlike(first, other)
                if difference is not None:
                    hint = "give layer_ranges whose layers are of the same kinds, one by one"
                    raise ModelError(f"{where('slices', number)}: {difference}", hint)
    return stacks


def pieces_of(slices: Sequence[Slice], stacks: Mapping[str, Stack]) -> dict[str, Piece]:
    """Every tensor of the output by name; the first model of the first slice gives the names."""
    ends = [[stacks[source.model] for source in slices[at].sources] for at in (0, -1)]
    first = ends[0][0]
    outside = {name: comes_before(name, first.model.config.get("model_type")) for name in first.outside}
    for stack in {id(stack): stack for stack in [*ends[0], *ends[1]]}.values():
        for name in set(stack.outside) ^ outside.keys():
            has, lacks = (first, stack) if name in outside else (stack, first)
            if Ties(has.model).target(name) is not None:
                outside.pop(name, None)  # stored twice by one, once by the other
            elif is_derived(has.model.tensors[name]):
                outside.pop(name, None)
            else:
                raise ModelError(f"{name}: {lacks.model.reference} does not have it, {has.model.reference} has it")
    if [source.model for source in slices[0].sources] != [source.model for source in slices[-1].sources]:
        ties = Ties(first.model)
        outside = {name: end for name, end in outside.items() if ties.target(name) is None}  # no other copy
    pieces = {name: Piece(0, 0.0, (name,) * len(ends[0])) for name, before in outside.items() if before}
    out = 0
    for number, one in enumerate(slices):
        for at in range(one.length):
            depth = at / (one.length - 1) if one.length > 1 else 1.0
            layers = [stacks[source.model].layers[source.start + at] for source in one.sources]
            for name in layers[0]:
                if all(name in layer for layer in layers):
                    names = (f"{stacks[s.model].start}{s.start + at}.{name}" for s in one.sources)
                    pieces[f"{first.start}{out}.{name}"] = Piece(number, depth, tuple(names))
            out += 1
    last = len(slices) - 1
    return pieces | {name: Piece(last, 0.0, (name,) * len(ends[1])) for name in outside if name not in pieces}


def put_together(
    pieces: Mapping[str, Piece], slices: Sequence[Slice], places: Sequence[int], stacks: Mapping[str, Stack]
) -> Model:
    """Compose one model of one source per slice: source `places[i]` of slice i."""
    sources = [one.sources[at] for one, at in zip(slices, places, strict=True)]
    tensors: dict[str, TensorInfo] = {}
    deltas: dict[str, tuple[Delta, ...]] = {}
    for name, piece in pieces.items():
        model, theirs = stacks[sources[piece.slice].model].model, piece.names[places[piece.slice]]
        tensors[name] = model.tensors[theirs]._replace(name=name)
        if theirs in model.deltas:
            deltas[name] = model.deltas[theirs]
    used = [stacks[name] for name in dict.fromkeys(source.model for source in sources)]
    models = [stack.model for stack in used]
    headers: dict[Any, Header] = {header.file: header for model in models for header in model.headers}
    layers = [stacks[source.model].layer(at) for source in sources for at in range(source.start, source.stop)]
    known = [stack.layer(number) for stack in used for number in sorted(stack.layers)]
    changes, remarks = follow(layers, known), list(dict.fromkeys(one for model in models for one in model.remarks))
    if models[0].config and not changes and len(layers) != len(used[0].layers):
        remarks.append(f"no known key of config.json is the number of layers: it does not say {len(layers)}")
    return replace(
        models[0],
        reference="/".join(model.reference for model in models),
        headers=list(headers.values()),
        tensors=tensors,
        deltas=deltas,
        origins={name: sources[piece.slice].model for name, piece in pieces.items()},
        config_changes={**(models[0].config_changes or {}), **changes},
        remarks=tuple(remarks),
    )


def check_ranges(slices: Sequence[Slice]) -> tuple[Loc, str, str | None] | None:
    """The first error in the layer ranges: its place, what is wrong, and a hint."""
    most = max(len(one.sources) for one in slices)
    for number, one in enumerate(slices):
        lengths = {source.stop - source.start for source in one.sources}
        if len(lengths) > 1:
            return ("slices", number), "its sources have different numbers of layers", None
        if len(one.sources) not in (1, most):
            what = f"has {len(one.sources)} sources, another slice has {most}: the slices of a merge have as many or 1"
            hint = "merge it in a document of its own, with a name, and take its layers by a slice of 1 source"
            return ("slices", number), what, hint
    return None
