"""Describe an adapter from its settings and header, with its norm in every layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergebench.adapters.adalora import Allocation, allocation
from mergebench.adapters.stored import Stored, read_stored, together
from mergebench.checkpoint.files import Files, whole
from mergebench.checkpoint.names import layer_of
from mergebench.checkpoint.reference import locate_delta
from mergebench.deltas import low_rank
from mergebench.deltas.formats.lora import Adapter, read_adapter
from mergebench.deltas.formats.native import DeltaFile, is_delta_file, read_file
from mergebench.deltas.peft.factors import Factors
from mergebench.engine.machine import one_thread
from mergebench.errors import ModelError, RunError

_VARIANTS = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "lora_bias": "bias of B"}


@dataclass(frozen=True)
class Description:
    """A summary of an adapter; ranks, scales and stored types list all that occur."""

    name: str
    adapter: str
    kind: str
    variants: list[str]
    base: str | None
    ranks: list[int]
    scales: list[float]
    targets: list[str]
    saved_whole: list[str]
    tensors: int
    parameters: int
    dtypes: list[str]
    bytes: int
    norm_of: str  # differences (scale B A) or tensors (as they are stored)
    norm: float
    norms: dict[str, float]  # by layer
    rank_map: dict[str, int]  # of a LoRA or an AdaLoRA: by module
    orthogonality: float | None  # of an AdaLoRA: mean |A A' - I| of its factors

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


def describe_adapter(path: str | Path) -> Description:
    """Describe a PEFT directory of any type, a file of deltas, a module, or a single .safetensors file.

    For a plain LoRA the norms are those of the differences scale B A, else those of the stored tensors. Raises
    `ModelError` if it is no adapter, `RunError` if it is damaged or not finite.
    """
    place = locate_delta(path)
    deltas = read_file(place) if is_delta_file(place) else None
    read = read_stored(place) if deltas is None else _as_stored(place, deltas)
    adapter = _lora(read)
    modules = {} if adapter is None else adapter.modules
    ranks = {module: one.rank for module, one in modules.items()} if deltas is None else _ranks(deltas)
    plain = adapter is not None and adapter.beside is None
    factors = {one.a.name: one for one in modules.values()} if plain else {}
    differences = bool(factors) and not read.settings.get("use_dora")
    allocated = allocation(read) if read.kind == "ADALORA" else None
    with one_thread():
        squares = _of_differences(read, factors) if differences else _of_tensors(read)
    return Description(
        name=read.name,
        adapter=str(path),
        kind=read.kind,
        variants=[name for key, name in _VARIANTS.items() if read.settings.get(key)]
        + ([] if allocated is None else [allocated.variant]),
        base=read.base,
        ranks=sorted({one.rank for one in factors.values()} or _widths(read, allocated) or set(ranks.values())),
        scales=sorted({one.scale for one in factors.values()} or _scale(read)),
        targets=_names(read, "target_modules"),
        saved_whole=_names(read, "modules_to_save"),
        tensors=len(read.tensors),
        parameters=read.parameters,
        dtypes=sorted({tensor.dtype for tensor in read.tensors.values()}),
        bytes=sum(file.stat().st_size for file in read.files),
        norm_of="differences" if differences else "tensors",
        norm=math.sqrt(sum(squares.values())),
        norms={layer: math.sqrt(square) for layer, square in squares.items()},
        rank_map=ranks if allocated is None else allocated.ranks,
        orthogonality=None if allocated is None else allocated.orthogonality,
    )


def _as_stored(path: Path, deltas: DeltaFile) -> Stored:
    """A file of deltas as an adapter: its kinds are the type, the tensors that it changes the targets."""
    layers = {name: layer_of(name) for name in deltas.entries}
    settings = {
        "kind": ", ".join(sorted({entry.kind for entry in deltas.entries.values()})),
        "base_model_name_or_path": deltas.made.get("base", deltas.base),
        "target_modules": sorted({name if layer is None else layer[2] for name, layer in layers.items()}),
    }
    return Stored(path, settings, deltas.header)


def _ranks(deltas: DeltaFile) -> dict[str, int]:
    """Of the deltas that are made of two factors, by module."""
    factors = {name: entry.parts["b"] for name, entry in deltas.entries.items() if entry.parts.keys() >= {"a", "b"}}
    return {name.removesuffix(".weight"): min(b.shape) for name, b in factors.items()}


def _names(read: Stored, key: str) -> list[str]:
    """The modules in a setting: a list, or one pattern."""
    value = read.settings.get(key) or []
    return sorted(map(str, value)) if isinstance(value, list) else [str(value)]


def _lora(read: Stored) -> Adapter | None:
    """The adapter as a LoRA; None for types that are not read as one."""
    try:
        return read_adapter(read.path) if read.kind == "LORA" else None
    except ModelError:
        return None


def _of_differences(read: Stored, factors: dict[str, Factors]) -> dict[str, float]:
    """|s B A|^2 = s^2 <B'B, A A'> by layer: no matrix of the model's size."""
    found: dict[str, float] = {}
    with Files() as files:
        for layer, names in read.layers.items():
            for one in (factors[name] for name in names if name in factors):
                parts = low_rank.Factors(whole(files, one.b), whole(files, one.a), scale=one.scale)
                square = low_rank.energy(parts, one.shape)
                if not math.isfinite(square):
                    raise RunError(f"{one.a.file}: '{one.a.name}' or its B holds NaN or infinity")
                found[layer] = found.get(layer, 0.0) + square
    return found


def _of_tensors(read: Stored) -> dict[str, float]:
    with Files() as files:
        return {
            layer: sum(
                float(row.double().square().sum()) for name in names for _, (row,) in together(files, [read], name)
            )
            for layer, names in read.layers.items()
        }


def _widths(read: Stored, allocated: Allocation | None) -> set[int]:
    """The ranks of other adapters: those an AdaLoRA was left with, a bottleneck's width, or the `r` of other types."""
    if allocated is not None:
        return set(allocated.ranks.values())
    rank = read.settings.get("r")
    if isinstance(rank, int):
        return {rank}
    return {tensor.shape[0] for name, tensor in read.tensors.items() if name.endswith(".down.weight") and tensor.shape}


def _scale(read: Stored) -> set[float]:
    try:
        return {float(read.settings["scale"])}
    except (KeyError, TypeError, ValueError):
        return set()
