"""Multiply a compressed model's factors back: a dense checkpoint with the names and layout of the one compressed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mergebench import __version__
from mergebench.checkpoint.files import Files, whole, write_error
from mergebench.checkpoint.header import FLOATS, TensorInfo
from mergebench.checkpoint.model import VECTOR, Model, open_checkpoint
from mergebench.checkpoint.shards import ShardFiles, lay_out
from mergebench.checkpoint.side_files import copy_side_files, side_files
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_room, check_target, finished
from mergebench.deltas.formats.compressed import RECORD, names, read_record
from mergebench.engine.plan import SHARD_SIZE
from mergebench.engine.provenance import inputs_of, places_of
from mergebench.engine.run import Result
from mergebench.errors import ModelError
from mergebench.systems.pela import record
from mergebench.systems.pela.writing import cast, copy, write_shards


class _Pair(NamedTuple):
    """A layer's factors [r, in] and [out, r]."""

    inner: TensorInfo
    outer: TensorInfo


def expand(
    compressed: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Write the directory `compressed`, as `compress` made it, dense in `out`: a model, or a task vector if it was one.

    Products are computed in float32 and stored in the factors' type, in the layout of the original; everything else is
    copied to the bit. The factors may have been trained since, and their ranks may differ. progress: called with the
    elements done and the total.

    Raises `ModelError` if the directory holds no compressed model or factors are missing, `RunError` if the work fails.
    """
    started = time.perf_counter()
    out, place = Path(out), Path(compressed)
    made = read_record(place)
    model = open_checkpoint(str(compressed), place)
    in_out = made.get("stored") == "[in, out]"
    pairs = _pairs(model, made["tensors"], in_out)
    described = json.dumps([inputs_of([model], hash_inputs=False), made, __version__], sort_keys=True)
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    done = finished(out)
    if resume and done is not None and done.get("fingerprint") == fingerprint:
        return Result(out, done, already_done=True)
    check_target(out, places_of([model]), overwrite)
    beside = side_files(model)
    infos, source = _dense(model, pairs, in_out)
    shards = lay_out(infos, {info.name: info.dtype for info in infos}, SHARD_SIZE, naming=model.naming)
    if made.get("task_vector"):
        shards = [replace(shard, metadata=VECTOR) for shard in shards]
    check_room(out, sum(shard.nbytes for shard in shards))
    written_elements, total = 0, sum(info.numel for info in infos)
    with Staging(out, fingerprint, resume) as staging, Files() as files, torch.inference_mode():
        values = model.values(files)

        def put(written: ShardFiles, name: str) -> None:
            nonlocal written_elements
            pair = pairs.get(name)
            if pair is None:
                copy(values, source[name], written, name, None)
                written_elements += model.tensors[source[name]].numel
            else:
                product = whole(files, pair.outer).float() @ whole(files, pair.inner).float()
                flat = (product.T if in_out else product).reshape(-1)
                written.write(name, 0, cast(name, flat, pair.inner.dtype))
                written_elements += product.numel()
            progress(written_elements, total)

        write_shards(staging, shards, put)
        try:
            copied = copy_side_files(model, staging.directory, None, beside)
        except OSError as error:
            raise write_error(staging.directory, error) from None
        provenance: dict[str, Any] = {
            "mergebench": __version__,
            "command": "compress expand",
            "compressed": str(compressed),
            "made_from": made.get("model"),
            "task_vector": bool(made.get("task_vector")),
            "multiplied": len(pairs),
            "copied": len(infos) - len(pairs),
            **copied,
            "inputs": inputs_of([model], hash_inputs=False),
            "fingerprint": fingerprint,
        }
        provenance = staging.finish(provenance, started, overwrite, record.expanded_card(out, provenance))
    return Result(out, provenance)


def _pairs(model: Model, entries: Mapping[str, Mapping[str, Any]], in_out: bool) -> dict[str, _Pair]:
    """The factors of every layer that is not dense, by its weight's name, checked against its shape."""
    found = {}
    for name, entry in entries.items():
        if "rank" not in entry:
            continue
        inner, outer = (model.tensors.get(part) for part in names(name)[:2])
        if inner is None or outer is None:
            missing = names(name).inner if inner is None else names(name).outer
            raise ModelError(f"{model.reference}: '{missing}' is missing, which {RECORD} names")
        rows, columns = reversed(entry["shape"]) if in_out else entry["shape"]
        fits = inner.shape[1:] == (columns,) and outer.shape == (rows, *inner.shape[:1])
        if not fits or inner.dtype != outer.dtype or inner.dtype not in FLOATS:
            what = f"{inner.dtype} {list(inner.shape)} and {outer.dtype} {list(outer.shape)}"
            raise ModelError(f"{model.reference}: the factors of {name} {entry['shape']} do not fit: {what}")
        found[name] = _Pair(inner, outer)
    return found


def _dense(model: Model, pairs: Mapping[str, _Pair], in_out: bool) -> tuple[list[TensorInfo], dict[str, str]]:
    """The dense tensors, in the order of the files; where the other tensors are copied from, by name."""
    weights = {pair.inner.name: name for name, pair in pairs.items()}
    outer = {pair.outer.name for pair in pairs.values()}
    biases = {names(name).bias: f"{name.removesuffix('.weight')}.bias" for name in pairs}
    infos, source = [], {}
    for key, info in model.tensors.items():
        if key in outer:
            continue
        name = weights.get(key) or biases.get(key, key)
        if key in weights:
            shape = (pairs[name].outer.shape[0], info.shape[1])
            info = info._replace(shape=shape[::-1] if in_out else shape)
        else:
            source[name] = key
        infos.append(info._replace(name=name))
    return infos, source
