"""Convert an adapter of any type to one file of deltas: as the type computes them, or as full differences."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench import __version__
from mergebench.checkpoint.content import identity
from mergebench.checkpoint.delta import Delta
from mergebench.checkpoint.files import TORCH_DTYPE, Files, whole
from mergebench.checkpoint.kind import Part, StoredDelta
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.reference import locate_delta, reference_of
from mergebench.checkpoint.target import check_file
from mergebench.checkpoint.values import Values
from mergebench.deltas.formats.native import WHAT, Later, Writing, write_file
from mergebench.deltas.open import open_model, put_on
from mergebench.engine.machine import one_thread
from mergebench.engine.provenance import places_of
from mergebench.engine.run import Result
from mergebench.errors import ModelError, RecipeError


def convert_to_file(
    base: str,
    adapter: str | Path,
    out: str | Path,
    *,
    dense: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Write what an adapter changes in its base as the file of deltas `out`, to be named after a plus.

    dense: as W' - W of every changed tensor, float32; else as the parts and settings that the adapter's type computes
    it from, as they are stored. Tensors that it saves whole stay whole. progress: called with the tensors done and the
    total.

    Raises `RecipeError` if `out` is no place for the file, `ModelError` if the adapter is not for this base, adds
    tensors to it, or makes two changes to one tensor (`dense` takes those).
    """
    started = time.perf_counter()
    out, place = Path(out), locate_delta(adapter)
    plain = open_model(base)
    check_file(out, [*places_of([plain]), place], overwrite, WHAT, f"--out {out}.safetensors")
    if not out.parent.is_dir():
        raise RecipeError(f"{out}: no such directory: {out.parent}")
    model = put_on(plain, place)
    new = model.tensors.keys() - plain.tensors.keys()
    if new:
        raise ModelError(f"{adapter}: it adds '{min(new)}', which a file of deltas cannot", "fold it into the base")
    count = {name: len(plain.deltas.get(name, ())) for name in model.deltas}
    changed = {name: deltas[count[name] :] for name, deltas in model.deltas.items() if len(deltas) > count[name]}
    made = {
        "mergebench": __version__,
        "command": "adapters convert",
        "to": "dense" if dense else "delta",
        "base": base,
        "adapter": reference_of(place),
        "kinds": sorted({"dense" if dense else delta.kind for deltas in changed.values() for delta in deltas}),
        "tensors": len(changed),
    }
    with one_thread(), Files() as files:
        shared: dict[str, Later] = {}
        writings = _differences(files, plain, model, changed, progress) if dense else _parts(files, changed, shared)
        write_file(out, writings, shared, made, identity(plain))
    return Result(out, {**made, "bytes": out.stat().st_size, "seconds": time.perf_counter() - started})


def _differences(
    files: Files,
    plain: Model,
    model: Model,
    changed: dict[str, tuple[Delta, ...]],
    progress: Callable[[int, int], None],
) -> dict[str, Writing]:
    """W' - W of every changed tensor, computed when it is written; a tensor that is saved whole as it is stored."""
    before, after = plain.values(files), model.values(files)
    writings = {}
    for number, (name, deltas) in enumerate(changed.items(), 1):
        told = partial(progress, number, len(changed))
        replacement = deltas[-1].replacement
        if replacement is not None:
            values = _stored(files, Part(replacement))
            writings[name] = Writing("dense", {"replace": True}, {"values": values})
        else:
            shape = plain.tensors[name].shape
            later = Later(torch.float32, shape, partial(_difference, before, after, name, told))
            writings[name] = Writing("dense", {}, {"values": later})
    return writings


def _difference(before: Values, after: Values, name: str, told: Callable[[], None]) -> Tensor:
    numel = before.tensors[name].numel
    base, values = torch.empty(numel), torch.empty(numel)
    before.read(name, 0, base)
    after.read(name, 0, values)
    told()
    return values.sub_(base).view(before.tensors[name].shape)


def _parts(files: Files, changed: dict[str, tuple[Delta, ...]], shared: dict[str, Later]) -> dict[str, Writing]:
    """The parts of every delta as they are stored; those that several deltas have are added to `shared`."""
    deltas: dict[str, StoredDelta] = {}
    for name, (delta, *more) in changed.items():
        if more:
            kinds = ", ".join(one.kind for one in (delta, *more))
            raise ModelError(f"{name}: it changes in {1 + len(more)} ways ({kinds})", "write differences: --to dense")
        assert isinstance(delta, StoredDelta)
        deltas[name] = delta
    owners: dict[Any, list[str]] = {}
    for name, delta in deltas.items():
        for part in dict(delta.parts).values():
            owners.setdefault(_place(part), []).append(name)
    names: dict[Any, str] = {}
    writings = {}
    for name, delta in deltas.items():
        own, common = {}, {}
        for key, part in delta.parts:
            place = _place(part)
            if len(owners[place]) == 1:
                own[key] = _stored(files, part)
                continue
            if place not in names:
                names[place] = f"shared.{len(names)}"
                shared[names[place]] = _stored(files, part)
            common[key] = names[place]
        writings[name] = Writing(delta.kind, delta.setting, own, common)
    return writings


def _place(part: Part) -> tuple[Any, ...]:
    return part.info.place, part.transposed


def _stored(files: Files, part: Part) -> Later:
    """A part as a kind reads it, in its stored type."""
    return Later(TORCH_DTYPE[part.info.dtype], part.shape, partial(_read, files, part))


def _read(files: Files, part: Part) -> Tensor:
    values = whole(files, part.info)
    return values.T if part.transposed else values
