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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergebench.checkpoint import Model
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.header import Header, TensorInfo
from mergebench.checkpoint.names import layer_of
from mergebench.errors import ModelError, RecipeError
from mergebench.recipe.positions import Loc

_BEFORE = re.compile(r"(^|[._])(emb|wte|wpe|shared|position|tok)")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


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

    def to_plain(self) -> dict[str, Any]:
        given = {"sources": [source.to_plain() for source in self.sources], "parameters": self.parameters}
        return {key: value for key, value in given.items() if value != {}}


@dataclass(frozen=True)
class Piece:
    """The origin of one output tensor: its slice, its depth there, and its name in the slice's models."""

    slice: int
    depth: float
    names: tuple[str, ...]  # one for each source


def pieces_of(slices: Sequence[Slice], first: Model) -> dict[str, Piece]:
    """Every tensor of the output by name; `first` is the first model of the first slice, which gives the names."""
    layers = {name: layer_of(name) for name in first.tensors}
    stacks = {layer[0] for layer in layers.values() if layer is not None}
    if len(stacks) != 1:
        found = ", ".join(f"'{stack}'" for stack in sorted(stacks)) or "none"
        raise RecipeError(f"slices: '{first.reference}' must have one stack of layers, it has {found}", _WHOLE)
    (stack,) = stacks
    start = f"{stack}." if stack else ""
    kinds = dict.fromkeys(layer[2] for layer in layers.values() if layer is not None)
    outside = [name for name, layer in layers.items() if layer is None]
    before = [name for name in outside if comes_before(name)]
    after = [name for name in outside if not comes_before(name)]
    pieces = {name: Piece(0, 0.0, (name,) * len(slices[0].sources)) for name in before}
    out = 0
    for number, one in enumerate(slices):
        count = one.sources[0].stop - one.sources[0].start
        for at in range(count):
            depth = at / (count - 1) if count > 1 else 1.0
            for kind in kinds:
                names = tuple(f"{start}{source.start + at}.{kind}" for source in one.sources)
                pieces[f"{start}{out}.{kind}"] = Piece(number, depth, names)
            out += 1
    last = len(slices) - 1
    return pieces | {name: Piece(last, 0.0, (name,) * len(slices[-1].sources)) for name in after}


def comes_before(name: str) -> bool:
    """Whether a tensor outside of the layers comes before them: an embedding, by its name."""
    return bool(_BEFORE.search(name))


def put_together(
    pieces: Mapping[str, Piece], slices: Sequence[Slice], places: Sequence[int], opened: Mapping[str, Model]
) -> Model:
    """Compose one model of one source per slice: source `places[i]` of slice i."""
    sources = [one.sources[at] for one, at in zip(slices, places, strict=True)]
    tensors: dict[str, TensorInfo] = {}
    deltas: dict[str, tuple[Delta, ...]] = {}
    for name, piece in pieces.items():
        model, theirs = opened[sources[piece.slice].model], piece.names[places[piece.slice]]
        if theirs not in model.tensors:
            raise ModelError(f"{theirs}: {model.reference} does not have it, and a layer_range asks for it")
        tensors[name] = model.tensors[theirs]._replace(name=name)
        if theirs in model.deltas:
            deltas[name] = model.deltas[theirs]
    models = [opened[name] for name in dict.fromkeys(source.model for source in sources)]
    headers: dict[Any, Header] = {header.file: header for model in models for header in model.headers}
    layers = [layer for source in sources for layer in range(source.start, source.stop)]
    return replace(
        models[0],
        reference="/".join(model.reference for model in models),
        headers=list(headers.values()),
        tensors=tensors,
        deltas=deltas,
        sliced=True,
        config_changes={**(models[0].config_changes or {}), **_config_changes(models[0].config, layers)},
    )


def _config_changes(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Changes of config.json for other layers: their number, and every list with an entry per layer."""
    key = next((key for key in _COUNTS if key in config), None)
    if key is None:
        return {}
    lists = {k: v for k, v in config.items() if isinstance(v, list) and len(v) == config[key] and max(layers) < len(v)}
    return {key: len(layers)} | {name: [value[layer] for layer in layers] for name, value in lists.items()}


_WHOLE = "merge whole models: list them under models"


def check_ranges(slices: Sequence[Slice]) -> tuple[Loc, str] | None:
    """The first error in the layer ranges, and its place."""
    for number, one in enumerate(slices):
        lengths = {source.stop - source.start for source in one.sources}
        if len(lengths) > 1:
            return ("slices", number), "its sources have different numbers of layers"
        if len(one.sources) != len(slices[0].sources):
            return ("slices", number), f"has {len(one.sources)} sources, the first slice has {len(slices[0].sources)}"
    return None
