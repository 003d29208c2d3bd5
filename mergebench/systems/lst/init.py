"""`mergebench side init`: a structured sub-network of a base, written as an ordinary checkpoint (arXiv:2206.06522)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench import __version__
from mergebench.checkpoint import card as markdown
from mergebench.checkpoint.card import code, linked, listed
from mergebench.checkpoint.content import identity, sha256_of
from mergebench.checkpoint.documents import read_json
from mergebench.checkpoint.files import DTYPE_NAME, Files, write_atomically
from mergebench.checkpoint.header import ITEM_SIZE
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.quantized import check_not_packed
from mergebench.checkpoint.shards import ShardFiles, lay_out
from mergebench.checkpoint.side_files import CONFIG_DTYPE, copy_side_files
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_room, check_target, finished
from mergebench.checkpoint.values import Values
from mergebench.deltas.open import open_model
from mergebench.engine.plan import SHARD_SIZE
from mergebench.engine.provenance import inputs_of, places_of
from mergebench.engine.run import Result
from mergebench.errors import ModelError, RecipeError
from mergebench.systems.lst.choose import BASES, Choice, Cut, choose
from mergebench.systems.lst.importance import BLOCK, IMPORTANCES, fisher, magnitude, of_values
from mergebench.systems.lst.layout import Layout
from mergebench.systems.pela.writing import write_shards

SIDE = "side.json"


def side_init(
    base: str,
    out: str | Path,
    *,
    reduction: float = 8.0,
    importance: str = "magnitude",
    basis: str = "chain",
    keep_layers: Sequence[int] = (),
    data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Write the rows and columns of a base that matter most, 1 / `reduction` of every width, as a checkpoint.

    importance: magnitude, or fisher on the items of `data`. basis: chain or shared (`choose.py`). keep_layers: the
    blocks that stay, numbers from 0; all by default. Values are copied to the bit; a reduction of 1 gives the base.
    side.json lists every tensor's rows and columns. progress: called with what is done and the total, of items and
    then of elements.

    Raises `RecipeError` if a setting is invalid, `ModelError` if there is no such model or it is of a kind that is
    not known. Source: arXiv:2206.06522, section 2.4.
    """
    started, out = time.perf_counter(), Path(out)
    _check(reduction, importance, basis, data)
    model = open_model(base)
    check_not_packed(model, lambda _: True)
    layout = Layout(model)
    layers = layout.layers(keep_layers)
    wanted = {"reduction": reduction, "importance": importance, "basis": basis, "keep_layers": layers}
    about = {"base": base, "identity": identity(model), **wanted, "data": data and str(data)}
    read = None if data is None else sha256_of(Path(data))
    inputs = inputs_of([model], hash_inputs=False)
    made_of = [inputs, model.delta_digest, wanted, read, __version__]
    fingerprint = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    done = finished(out)
    if resume and done is not None and done.get("fingerprint") == fingerprint:
        return Result(out, done, already_done=True)
    check_target(out, [*places_of([model]), *([] if data is None else [Path(data)])], overwrite)
    with Files() as files:
        model.settle(files)
        choice = choose_of(layout, files, reduction, layers, importance, basis, data, progress)
        small = _smaller(layout, choice)
        check_room(out, sum(info.numel * ITEM_SIZE[info.stored_dtype] for info in small.tensors.values()))
        with Staging(out, fingerprint, resume) as staging, torch.inference_mode():
            beside = _write(model, choice, small, files, staging, progress)
            write_atomically(
                staging.directory / SIDE, json.dumps({**about, **_record(layout, choice)}, indent=1) + "\n"
            )
            provenance = {
                "mergebench": __version__,
                "command": "side init",
                **about,
                "parameters": sum(info.numel for info in small.tensors.values()),
                "of": sum(info.numel for info in model.tensors.values()),
                "heads": _heads(layout, choice),
                "width": [layout.width, choice.width],
                **beside,
                "inputs": inputs,
                "fingerprint": fingerprint,
            }
            provenance = staging.finish(provenance, started, overwrite, _card(out, provenance))
    return Result(out, provenance)


def choose_of(
    layout: Layout,
    files: Files,
    reduction: float,
    layers: Sequence[int],
    importance: str,
    basis: str,
    data: str | Path | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """What a side network keeps."""
    if importance == "magnitude":
        found = magnitude(layout.model, files)
    else:
        assert data is not None
        found = of_values(fisher(layout.model, Path(data), layout.family.causal, progress))
    with torch.inference_mode():
        return choose(layout, reduction, layers, found, basis)


def pruned(values: Values, name: str, cut: Cut) -> Iterator[Tensor]:
    """What is kept of a tensor, flat, in pieces that are read whole rows at a time, in the stored type."""
    shape = values.tensors[name].shape
    columns = shape[1] if len(shape) == 2 else 1
    step = max(BLOCK // columns, 1)
    for first in range(0, shape[0], step):
        count = min(step, shape[0] - first)
        piece = values.elements(name, first * columns, count * columns).view(count, columns)
        if cut.rows is not None:
            piece = piece[cut.rows[(cut.rows >= first) & (cut.rows < first + count)] - first]
        if cut.columns is not None:
            piece = piece[:, cut.columns]
        yield piece.reshape(-1)


def read_side(place: Path) -> dict[str, Any]:
    """side.json of what `side_init` wrote; `ModelError` if there is none."""
    try:
        found: dict[str, Any] = read_json(place / SIDE, dict[str, Any])
    except (OSError, ValueError):
        raise ModelError(
            f"{place}: no readable {SIDE} in it", "a side network is what `mergebench side init` wrote"
        ) from None
    return found


def _check(reduction: float, importance: str, basis: str, data: str | Path | None) -> None:
    if not 1 <= reduction < float("inf"):
        raise RecipeError(f"--reduction: must be at least 1, got {reduction:g}", "how many times narrower: 8")
    if importance not in IMPORTANCES:
        raise RecipeError(f"--importance: '{importance}' is not possible", " or ".join(IMPORTANCES))
    if basis not in BASES:
        raise RecipeError(f"--basis: '{basis}' is not possible", " or ".join(BASES))
    if (importance == "fisher") != (data is not None):
        what = "fisher is computed on items" if data is None else "only fisher reads items"
        raise RecipeError(f"--data: {what}", "--importance fisher --data FILE")


def _smaller(layout: Layout, choice: Choice) -> Model:
    """The base with the side network's config and tensors, whose places are of the base."""
    model, found = layout.model, {}
    for new, cut in choice.cuts.items():
        info = model.tensors[cut.source]
        rows = info.shape[0] if cut.rows is None else len(cut.rows)
        others = info.shape[1:] if cut.columns is None else (len(cut.columns),)
        found[new] = info._replace(name=new, shape=(rows, *others))
    changes = {**(model.config_changes or {}), **choice.config}
    return replace(model, tensors=found, config_changes=changes or None)


def _write(
    model: Model,
    choice: Choice,
    small: Model,
    files: Files,
    staging: Staging,
    progress: Callable[[int, int], None],
) -> dict[str, list[str]]:
    values = model.values(files)
    dtypes = {new: DTYPE_NAME[values.copied_type(cut.source)] for new, cut in choice.cuts.items()}
    shards = lay_out(small.tensors.values(), dtypes, SHARD_SIZE, naming=model.naming)
    done, total = 0, sum(info.numel for info in small.tensors.values())

    def put(written: ShardFiles, new: str) -> None:
        nonlocal done
        at, cut = 0, choice.cuts[new]
        for piece in pruned(values, cut.source, cut):
            written.write(new, at, piece)
            at += len(piece)
        done += at
        progress(done, total)

    write_shards(staging, shards, put)
    kinds = set(dtypes.values())
    kind = kinds.pop() if len(kinds) == 1 else None
    return copy_side_files(small, staging.directory, kind if kind in CONFIG_DTYPE else None)


def _record(layout: Layout, choice: Choice) -> Mapping[str, Any]:
    """side.json: every tensor's rows and columns in the base, and the residual's set at each block's input."""

    def places(chosen: Tensor | None) -> list[int] | None:
        return None if chosen is None else chosen.tolist()

    tensors = {
        new: {"from": cut.source, "rows": places(cut.rows), "columns": places(cut.columns)}
        for new, cut in choice.cuts.items()
    }
    return {
        "layers": choice.layers,
        "width": [layout.width, choice.width],
        "heads": _heads(layout, choice),
        "residual": [one.tolist() for one in choice.residual],
        "left": layout.left,
        "tensors": tensors,
    }


def _heads(layout: Layout, choice: Choice) -> str:
    """`12 x 32 -> 12 x 4`."""
    old, new = layout.heads, choice.heads
    return " -> ".join(
        f"{one.queries} ({one.keys}) x {one.size}" if one.keys != one.queries else f"{one.queries} x {one.size}"
        for one in (old, new)
    )


def _card(out: Path, provenance: Mapping[str, Any]) -> str:
    """README.md of a side network."""
    made = (
        f"A structured sub-network of a model, {provenance['parameters']:,} of {provenance['of']:,} numbers, made by "
        f"mergebench {provenance['mergebench']}: reduction {provenance['reduction']:g}, by {provenance['importance']}, "
        f"basis {provenance['basis']}; width {provenance['width'][0]} -> {provenance['width'][1]}, heads "
        f"{provenance['heads']}. Nothing was trained. It is how Ladder Side-Tuning (arXiv:2206.06522) begins."
    )
    use = f"Train it beside its base: {code(f'delta: {{kind: ladder, side: {out.name}}}')}. What was kept: `{SIDE}`."
    return markdown.card(
        out.name,
        [made, listed([f"base: {linked(provenance['base'], out)}"]), use],
        tags=["mergebench", "pruned"],
        relation="finetune",
        models=[provenance["base"]],
    )
