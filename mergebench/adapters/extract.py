"""Extract a LoRA from a fine-tune: the best low-rank approximation of the change to every linear layer.

One matrix is in memory at a time. Each module's factors have their own file until all are complete, so that a killed
run resumes with the next module.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from mergebench import __version__
from mergebench.adapters import peft_directory
from mergebench.adapters.fine_tune import Differences
from mergebench.adapters.peft_names import task_type
from mergebench.checkpoint.files import Files, whole, write_atomically
from mergebench.checkpoint.header import read_header
from mergebench.checkpoint.shards import ShardFiles, create
from mergebench.checkpoint.staging import Staging, check_room, check_target, finished
from mergebench.deltas.peft.directory import CONFIG, WEIGHTS
from mergebench.deltas.svd import Product, keep_energy, truncate
from mergebench.engine.provenance import inputs, places
from mergebench.engine.read import ChunkReader
from mergebench.engine.run import Result
from mergebench.errors import ModelError

RANK = 16
Answers = dict[str, dict[str, Any]]  # by tensor: its squared norm; of a linear layer also rank and energy kept


def extract_adapter(
    base: str,
    model: str,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Write the differences of the linear layers of `model` to those of `base` as the LoRA directory `out`, at scale 1.

    rank: of every module (default 16), at most the matrix's. energy: instead, the smallest rank of each module that
    keeps this share of its squared norm. seed: of the search for a large matrix's first directions. resume: continue an
    interrupted run. progress: called with the elements done and the total. Embeddings, heads, norms and biases are left
    out; the provenance says what share of the change they hold.

    Raises `RecipeError` if the settings are invalid, `ModelError` if the models do not fit together or have equal
    linear layers, `RunError` if the work fails.
    """
    started = time.perf_counter()
    out = Path(out)
    peft_directory.check_kept(rank, energy)
    wanted: dict[str, Any] = {"rank": rank or (None if energy else RANK), "energy": energy, "seed": seed}
    found = Differences(base, model)
    made_of = [inputs(found.plan, hash_inputs=False), wanted, __version__]
    fingerprint = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    done = finished(out)
    if resume and done is not None and done.get("fingerprint") == fingerprint:
        return Result(out, done, already_done=True)
    check_target(out, places(found.plan), overwrite)
    check_room(out, 0 if energy else _at_most(found, wanted["rank"]))
    with Staging(out, fingerprint, resume) as staging:
        answers = _decompose(found, staging, wanted, progress)
        ranks = {found.linear[name]: answer["rank"] for name, answer in answers.items() if answer["rank"]}
        if not ranks:
            staging.resumable = False
            raise ModelError(f"{model} has the linear layers of {base}: there is nothing to extract")
        _gather(found, staging, ranks)
        about = {"base_model_name_or_path": base, "task_type": task_type(found.base)}
        config = peft_directory.config(ranks, found.transposed, **about)
        write_atomically(staging.directory / CONFIG, json.dumps(config, indent=2) + "\n")
        provenance = {
            "mergebench": __version__,
            "command": "adapters extract",
            "base": base,
            "model": model,
            **wanted,
            **_energy(found, answers),
            "inputs": inputs(found.plan, hash_inputs=False),
            "fingerprint": fingerprint,
        }
        provenance = staging.finish(provenance, started, overwrite, peft_directory.extracted_card(out, provenance))
    return Result(out, provenance)


def _decompose(
    found: Differences, staging: Staging, wanted: dict[str, Any], progress: Callable[[int, int], None]
) -> Answers:
    """The squared norm of every difference; the factors of each linear layer are written to a file."""
    answers: Answers = staging.journal["answers"]
    sizes = {name: found.base.tensors[name].numel for name in found.shapes}
    done, total = 0, sum(sizes.values())
    with Files() as opened, torch.inference_mode():
        reader = ChunkReader(found.plan, opened)
        for name in found.shapes:
            file = _part(found, name)
            if name not in answers or (answers[name]["rank"] and file not in staging.journal["shards"]):
                if name in found.linear:
                    product = _factors(found, reader, name, wanted)
                    answer = {"total": product.total, "kept": product.kept, "rank": product.a.shape[0]}
                    if answer["rank"]:
                        _write(staging.directory, file, found.linear[name], found.shape(name), product)
                        staging.journal["shards"].append(file)
                else:
                    answer = {"total": found.squared_norm(reader, name), "kept": 0.0, "rank": 0}
                answers[name] = answer
                staging.save()
            done += sizes[name]
            progress(done, total)
    return answers


def _factors(found: Differences, reader: ChunkReader, name: str, wanted: dict[str, Any]) -> Product:
    matrix = found.matrix(reader, name)
    if not matrix.any():  # the fine-tune did not change this layer
        return Product(matrix[:, :0], matrix[:0], 0.0, 0.0)
    if wanted["energy"]:
        return keep_energy(matrix, wanted["energy"], wanted["seed"])
    return truncate(matrix, min(wanted["rank"], *matrix.shape), wanted["seed"])


def _part(found: Differences, name: str) -> str:
    """The file of one module's factors, until all are complete."""
    return f"{list(found.shapes).index(name):05d}.safetensors"


def _write(directory: Path, file: str, module: str, shape: tuple[int, int], product: Product) -> None:
    shard = dataclasses.replace(peft_directory.lay_out({module: shape}, {module: product.a.shape[0]}), file=file)
    create(directory / file, shard)
    with closing(ShardFiles(directory, [shard])) as written:
        peft_directory.put(written, module, product)


def _gather(found: Differences, staging: Staging, ranks: dict[str, int]) -> None:
    """Join the modules' files of factors into one file."""
    names = {module: name for name, module in found.linear.items()}
    shard = peft_directory.lay_out({module: found.shape(names[module]) for module in ranks}, ranks)
    create(staging.directory / WEIGHTS, shard)
    parts = [staging.directory / _part(found, names[module]) for module in ranks]
    with closing(ShardFiles(staging.directory, [shard])) as written, Files() as opened:
        for part in parts:
            for tensor in read_header(part).tensors:
                written.write(tensor.name, 0, whole(opened, tensor).reshape(-1))
    for part in parts:
        part.unlink()


def _at_most(found: Differences, rank: int) -> int:
    """Bytes on disk while the modules' files are joined."""
    return sum(2 * 4 * min(rank, *found.shape(name)) * sum(found.shape(name)) for name in found.linear)


def _energy(found: Differences, answers: Answers) -> dict[str, Any]:
    """The share of the linear layers' squared norm that the ranks keep, and the share of the whole change in other
    tensors."""
    held = {name: answer for name, answer in answers.items() if answer["rank"]}
    other = {name: answer["total"] for name, answer in answers.items() if not answer["rank"] and answer["total"]}
    inside = sum(answer["total"] for answer in held.values())
    everything = inside + sum(other.values())
    return {
        "energy_kept": sum(answer["kept"] for answer in held.values()) / inside,
        "modules": {
            found.linear[name]: {"rank": answer["rank"], "energy_kept": answer["kept"] / answer["total"]}
            for name, answer in held.items()
        },
        "left_out": sum(other.values()) / everything,
        "left_out_tensors": {name: energy / everything for name, energy in sorted(other.items(), key=_by_size)},
        "other_tokens": found.other_tokens,
    }


def _by_size(item: tuple[str, float]) -> float:
    return -item[1]
