"""Write a model's linear layers as products of two: PELA's low-rank model before its training (arXiv:2310.10700).

One matrix is in memory at a time. Each layer's factors have a file of their own until all are known, so that a killed
run continues with the next layer.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench import __version__
from mergebench.checkpoint.content import identity
from mergebench.checkpoint.files import DTYPE_NAME, TORCH_DTYPE, Files, whole, write_atomically
from mergebench.checkpoint.header import ITEM_SIZE, read_header
from mergebench.checkpoint.model import FACTORS, Model
from mergebench.checkpoint.quantized import check_not_packed
from mergebench.checkpoint.shards import Shard, ShardFiles, described, lay_out, write_shard
from mergebench.checkpoint.side_files import CONFIG_DTYPE, copy_side_files, side_files
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_room, check_target, finished
from mergebench.checkpoint.values import Values
from mergebench.deltas.formats.compressed import RECORD, names
from mergebench.deltas.open import open_model
from mergebench.deltas.svd import Product, keep_energy, truncate
from mergebench.engine.plan import SHARD_SIZE
from mergebench.engine.provenance import inputs_of, places_of
from mergebench.engine.run import Result
from mergebench.errors import RecipeError, RunError
from mergebench.systems.pela import record
from mergebench.systems.pela.layers import Layers, find, rank_of, saves, written_as
from mergebench.systems.pela.writing import cast, copy, write_shards

ROWS = 256  # of the product compared with the matrix at a time


@dataclass(frozen=True)
class _Job:
    """What to compress, and how."""

    model: Model
    layers: Layers
    ratio: float | None
    energy: float | None
    dtype: str | None

    def stored(self, name: str) -> str:
        """The type that a tensor is written in."""
        info = self.model.tensors[name]
        if not info.is_float:
            return info.dtype
        return self.dtype or info.copied_dtype

    def part(self, name: str) -> str:
        """The file of one layer's factors, until all are known."""
        return f"{list(self.layers.factored).index(name):05d}.safetensors"


def compress(
    model: str,
    out: str | Path,
    *,
    ratio: float | None = None,
    energy: float | None = None,
    omit: Sequence[str] = (),
    dtype: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Write the linear layers of `model`, W [out, in], as `NAME.0.weight` [r, in] and `NAME.1.weight` [out, r].

    With W = U S V^T the factors are sqrt(S_r) V_r^T and U_r sqrt(S_r). They are laid out as those of torch's `Linear`
    also where the model stores [in, out]. `model` may be a task vector.

    ratio: r = in out // (ratio (in + out)), so that a layer has 1 / ratio of its parameters. energy: instead, the
    smallest r that keeps this share of the squared norm, where that saves parameters. omit: globs of weights that stay
    dense, as do heads, embeddings and layers of fewer than 10 outputs. dtype: float32, float16 or bfloat16 for all
    floats; by default as stored, and what is not factored is copied to the bit. progress: called with the elements
    done and the total.

    compress.json says what became of every matrix. Raises `RecipeError` if the settings are invalid or no layer is
    factored, `ModelError` if there is no such model, `RunError` if the work fails.
    Source: arXiv:2310.10700, section 3.1.
    """
    started = time.perf_counter()
    out = Path(out)
    _check(ratio, energy, dtype)
    source = open_model(model)
    kind = None if dtype is None else DTYPE_NAME[getattr(torch, dtype)]
    job = _Job(source, find(source, ratio, omit), ratio, energy, kind)
    check_not_packed(source, lambda _: True)
    if not job.layers.factored:
        raise _nothing(job)
    wanted = {"ratio": ratio, "energy": energy, "omit": list(omit), "dtype": dtype}
    fingerprint = _fingerprint(source, wanted)
    done = finished(out)
    if resume and done is not None and done.get("fingerprint") == fingerprint:
        return Result(out, done, already_done=True)
    check_target(out, places_of([source]), overwrite)
    beside = side_files(source)
    check_room(out, _at_most(job))
    with Staging(out, fingerprint, resume) as staging, Files() as files, torch.inference_mode():
        source.settle(files)
        values = source.values(files)
        entries = _factor_all(job, values, staging, progress)
        if not any("rank" in entry for entry in entries.values()):
            staging.resumable = False
            raise _nothing(job)
        shards = _gather(job, values, staging, entries)
        copied = copy_side_files(source, staging.directory, _only_type(shards), beside)
        before = {name: info.numel * ITEM_SIZE[info.stored_dtype] for name, info in source.tensors.items()}
        about = {
            "mergebench": __version__,
            "model": model,
            "identity": identity(source),
            "task_vector": source.is_task_vector,
            **wanted,
        }
        _write_record(job, staging, entries, about)
        provenance = {
            **about,
            "command": "compress",
            "kinds": record.summary(before, entries, shards),
            **copied,
            "inputs": inputs_of([source], hash_inputs=False),
            "fingerprint": fingerprint,
        }
        provenance = staging.finish(provenance, started, overwrite, record.card(out, provenance))
    return Result(out, provenance)


def _check(ratio: float | None, energy: float | None, dtype: str | None) -> None:
    if (ratio is None) == (energy is None):
        which = "one of them says" if ratio is not None else "neither is given"
        raise RecipeError(f"--ratio and --energy: {which}", "--ratio 2 for half of the parameters, or --energy 0.9")
    if ratio is not None and not 1 <= ratio < math.inf:
        raise RecipeError(f"--ratio: must be at least 1, got {ratio:g}", "how many times fewer parameters: 2 for half")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"--energy: must be above 0, at most 1, got {energy:g}", "a share: 95% is 0.95")
    if dtype is not None and dtype not in (known := [*CONFIG_DTYPE.values()][1:]):
        raise RecipeError(f"--dtype: '{dtype}' is not a stored type", ", ".join(known))


def _nothing(job: _Job) -> RecipeError:
    """The error where every matrix stays dense, with the reason of most linear layers."""
    reasons = Counter(why for why in job.layers.left.values() if not why.startswith("not the weight"))
    reasons.update(["none saves parameters at this energy"] * len(job.layers.factored))
    why = reasons.most_common(1)[0][0] if reasons else "it has no linear layers"
    return RecipeError(
        f"{job.model.reference}: there is nothing to compress: {why}", "see --ratio, --energy and --omit"
    )


def _fingerprint(source: Model, wanted: Mapping[str, Any]) -> str:
    made = {name: info.made.digest() for name, info in source.tensors.items() if info.made is not None}
    made_of = [inputs_of([source], hash_inputs=False), source.delta_digest, made, wanted, __version__]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _at_most(job: _Job) -> int:
    """Bytes on disk while the layers' files are joined; factors are never larger than the matrix."""
    dense = {name: info.numel * ITEM_SIZE[job.stored(name)] for name, info in job.model.tensors.items()}
    share = 1 / job.ratio if job.ratio else 0.0  # the ranks that an energy needs are not known
    factors = sum(share * dense[name] for name in job.layers.factored)
    return int(sum(size for name, size in dense.items() if name not in job.layers.factored) + 2 * factors)


def _factor_all(
    job: _Job, values: Values, staging: Staging, progress: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """Rank and errors of every linear layer; the factors of each are written to a file."""
    entries: dict[str, dict[str, Any]] = staging.journal["answers"]
    done, total = 0, sum(job.model.tensors[name].numel for name in job.layers.factored)
    for name, shape in job.layers.factored.items():
        file = job.part(name)
        if name not in entries or ("rank" in entries[name] and file not in staging.journal["shards"]):
            entries[name] = _factor(job, values, name, shape, staging.directory / file)
            staging.complete(*[file] * ("rank" in entries[name]))
        done += job.model.tensors[name].numel
        progress(done, total)
    return entries


def _factor(job: _Job, values: Values, name: str, shape: tuple[int, int], path: Path) -> dict[str, Any]:
    """Decompose one layer and write its factors."""
    matrix = values.whole(name)
    matrix = matrix.T.contiguous() if job.layers.in_out else matrix
    if not torch.isfinite(matrix.sum()) and not torch.isfinite(matrix).all():
        raise RunError(f"{name}: it holds NaN or infinity")
    found = _decompose(job, matrix, shape)
    about = {"shape": list(job.model.tensors[name].shape)}
    rank = len(found.a)
    if job.energy is not None and not saves(rank, shape):
        return about | {"left": f"rank {rank}, for this energy, saves no parameters"}
    dtype = job.stored(name)
    outer, inner = (cast(name, factor.contiguous().reshape(-1), dtype) for factor in (found.b, found.a))
    parts = {names(name).inner: inner.view(rank, shape[1]), names(name).outer: outer.view(shape[0], rank)}
    shard = Shard(path.name, tuple(described(key, part) for key, part in parts.items()))
    write_shard(path.parent, shard, parts.__getitem__)
    return about | {"rank": rank, **_errors(matrix, outer.view(-1, rank), inner.view(rank, -1), found)}


def _decompose(job: _Job, matrix: Tensor, shape: tuple[int, int]) -> Product:
    if job.energy is not None and matrix.any():
        return keep_energy(matrix, job.energy)
    # of an unchanged layer of a task vector, one direction is all
    return truncate(matrix, rank_of(shape, job.ratio) if job.ratio else 1, full=True)


def _errors(matrix: Tensor, outer: Tensor, inner: Tensor, found: Product) -> dict[str, float]:
    """The share of the squared norm that the rank keeps, and the errors of the product of the factors as stored."""
    squared, largest = 0.0, 0.0
    for row in range(0, len(matrix), ROWS):
        error = matrix[row : row + ROWS] - outer[row : row + ROWS].float() @ inner.float()
        squared += float(error.double().square().sum())
        largest = max(largest, float(error.abs().max()))
    return {
        "energy_kept": found.kept / found.total if found.total else 1.0,
        "relative_error": math.sqrt(squared / found.total) if found.total else 0.0,
        "max_error": largest,
        "squared_norm": found.total,
    }


def _gather(job: _Job, values: Values, staging: Staging, entries: Mapping[str, Any]) -> list[Shard]:
    """Write the checkpoint from the layers' files and the other tensors; the former go."""
    factored = {name: shape for name, shape in job.layers.factored.items() if "rank" in entries[name]}
    infos, dtypes, source = [], {}, {}
    for name, info in job.model.tensors.items():
        for number, key in enumerate(written_as(name, factored)):
            shape: tuple[int, ...] = info.shape
            if name in factored:
                rank, (rows, columns) = entries[name]["rank"], factored[name]
                shape = (rank, columns) if number == 0 else (rows, rank)
            infos.append(info._replace(name=key, shape=shape, scale=None))
            dtypes[key], source[key] = job.stored(name), name
    shards = lay_out(infos, dtypes, SHARD_SIZE, naming=job.model.naming)
    shards = [replace(shard, metadata=FACTORS) for shard in shards]
    parts = {name: staging.directory / job.part(name) for name in factored}

    def put(written: ShardFiles, key: str) -> None:
        name = source[key]
        if name in parts:
            stored = {tensor.name: tensor for tensor in read_header(parts[name]).tensors}
            written.write(key, 0, whole(opened, stored[key]).reshape(-1))
        else:
            copy(values, name, written, key, job.dtype)

    with Files() as opened:
        write_shards(staging, shards, put)
    for part in parts.values():
        part.unlink()
    return shards


def _only_type(shards: Sequence[Shard]) -> str | None:
    """The type of all floats, if they have one that a config names."""
    floats = {
        tensor.dtype for shard in shards for tensor in shard.tensors if TORCH_DTYPE[tensor.dtype].is_floating_point
    }
    kind = floats.pop() if len(floats) == 1 else None
    return kind if kind in CONFIG_DTYPE else None


def _write_record(job: _Job, staging: Staging, entries: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    shapes = {
        name: {"shape": list(job.model.tensors[name].shape), "left": why} for name, why in job.layers.left.items()
    }
    every = {**shapes, **entries}
    ordered = {name: every[name] for name in job.model.tensors if name in every}
    written = {**about, "stored": "[in, out]" if job.layers.in_out else "[out, in]", "tensors": ordered}
    write_atomically(staging.directory / RECORD, json.dumps(written, indent=1) + "\n")
