"""Write what a fine-tune changes as an adapter: a LoRA, or any other kind in `targets/`.

One matrix is in memory at a time. Each tensor's part of the adapter has its own file until all are complete, so that a
killed run resumes with the next tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench import __version__
from mergebench.adapters import cards, targets
from mergebench.adapters.fine_tune import Differences, Reading
from mergebench.adapters.target import Fitting
from mergebench.checkpoint.files import Files, whole, write_atomically
from mergebench.checkpoint.header import ITEM_SIZE, read_header
from mergebench.checkpoint.shards import OutTensor, Shard, described, write_shard
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_room, check_target, finished
from mergebench.deltas.peft.directory import CONFIG
from mergebench.engine.provenance import inputs, places
from mergebench.engine.run import Result
from mergebench.errors import ModelError, RecipeError, did_you_mean

Answers = dict[str, dict[str, Any]]  # by tensor: `total`, its squared norm; of what is stored all of `Fit`


def extract_adapter(
    base: str,
    model: str,
    out: str | Path,
    *,
    as_: str = "lora",
    include: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> Result:
    """Write what `model` changes of `base` as an adapter of a kind: the directory `out`.

    as_: the kind. lora: PEFT's, at scale 1. hira: PEFT's HIRA. sparse: PEFT's SUPERTUNING, or a delta file. bias:
    PEFT's BEFT, or a delta file. include: globs of the tensors that it may hold (none: all that the kind can).
    resume: continue an interrupted run. progress: called with the elements done and the total.

    settings of lora: rank of every module (default 16), or energy: the smallest rank that keeps this share of its
    squared norm; seed of the search for a large matrix's first directions. hira: rank, seed. sparse: mask (smallest,
    largest, topdelta, random, or a mask file), share of the elements (0.005), scope (tensor or model), seed.

    The provenance says what share of the change is kept, and what the tensors left out hold. Raises `RecipeError` if
    the settings are invalid, `ModelError` if the models do not fit together or nothing that changed can be held,
    `RunError` if the work fails.
    """
    started = time.perf_counter()
    out, target, wanted = Path(out), targets.get(as_), settings_of(as_, settings)
    found = Differences(base, model)
    made_of = [inputs(found.plan, hash_inputs=False), as_, wanted, list(include), __version__]
    fingerprint = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    done = finished(out)
    if resume and done is not None and done.get("fingerprint") == fingerprint:
        return Result(out, done, already_done=True)
    check_target(out, places(found.plan), overwrite)
    with Files() as files, torch.inference_mode():
        reading = Reading(found, files, include)
        fitting = target.begin(reading, wanted)
        check_beside(out, fitting.beside)
        check_room(out, fitting.at_most())
        with Staging(out, fingerprint, resume) as staging:
            answers = _fit(reading, fitting, staging, progress)
            stored = {name: answer for name, answer in answers.items() if "nbytes" in answer}
            if not stored:
                staging.resumable = False
                raise ModelError(nothing(as_, model, base))
            _gather(found, fitting, staging, stored)
            config = fitting.config(stored)
            if config is not None:
                write_atomically(staging.directory / CONFIG, json.dumps(config, indent=2) + "\n")
            provenance = {
                "mergebench": __version__,
                "command": "adapters extract",
                "as": as_,
                "base": base,
                "model": model,
                **wanted,
                **({"include": list(include)} if include else {}),
                "file": fitting.file,
                **_energy(found, fitting, answers),
                "inputs": inputs(found.plan, hash_inputs=False),
                "fingerprint": fingerprint,
            }
            card = cards.extracted_card(out, provenance, peft=config is not None)
            provenance = staging.finish(provenance, started, overwrite, card)
    return Result(out, provenance)


def settings_of(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a kind, checked, with its defaults; `RecipeError` for those it does not take."""
    target = targets.get(kind)
    for key in given:
        if key not in target.takes:
            takes = ", ".join(f"--{name}" for name in target.takes)
            raise RecipeError(
                f"--{key}: '{kind}' takes none", did_you_mean(key, target.takes) or (takes and f"it takes {takes}")
            )
    return dict(target.check({**target.takes, **given}))


def is_held(reading: Reading, fitting: Fitting, name: str) -> bool:
    """Whether the adapter may hold a tensor."""
    return name in fitting.held and reading.included(name)


def nothing(kind: str, model: str, base: str) -> str:
    """What is said where a kind can hold none of the changes."""
    what = {"bias": "biases", "sparse": "tensors"}.get(kind, "linear layers")
    return f"{model} has the {what} of {base}: there is nothing to extract"


def check_beside(out: Path, files: Sequence[Path]) -> None:
    """`RecipeError` if a file that the adapter needs beside its directory is elsewhere."""
    for file in files:
        if file.resolve().parent != out.absolute().parent.resolve():
            raise RecipeError(
                f"{file}: it must lie beside --out, so that the adapter finds it",
                f"name a directory beside it: --out {file.parent / out.name}",
            )


def _fit(reading: Reading, fitting: Fitting, staging: Staging, progress: Callable[[int, int], None]) -> Answers:
    """The squared norm of every difference; what the adapter stores of each tensor is written to a file."""
    answers: Answers = staging.journal["answers"]
    found = reading.found
    sizes = {name: found.base.tensors[name].numel for name in found.shapes}
    done, total = 0, sum(sizes.values())
    for name in found.shapes:
        file = _part(found, name)
        if name not in answers or ("nbytes" in answers[name] and file not in staging.journal["shards"]):
            if is_held(reading, fitting, name):
                fit = fitting.fit(name)
                answer: dict[str, Any] = {"total": fit.total}
                if fit.tensors:
                    _write(staging.directory, file, fit.tensors)
                    answer |= {"kept": fit.kept, "nbytes": fit.nbytes, "about": fit.about, "sums": fit.sums}
            else:
                answer = {"total": reading.squared_norm(name)}
            answers[name] = answer
            staging.complete(*[file] * ("nbytes" in answer))
        done += sizes[name]
        progress(done, total)
    return answers


def _part(found: Differences, name: str) -> str:
    """The file of one tensor's part of the adapter, until all are complete."""
    return f"{list(found.shapes).index(name):05d}.safetensors"


def _write(directory: Path, file: str, tensors: Mapping[str, Tensor]) -> None:
    shard = Shard(file, tuple(described(name, values) for name, values in tensors.items()))
    write_shard(directory, shard, tensors.__getitem__)


def _gather(found: Differences, fitting: Fitting, staging: Staging, stored: Answers) -> None:
    """Join the parts into one file."""
    parts = [staging.directory / _part(found, name) for name in stored]
    tensors = {tensor.name: tensor for part in parts for tensor in read_header(part).tensors}
    shapes = fitting.shapes({name: tensor.shape for name, tensor in tensors.items()}, stored)
    types = {name: tensors[name].dtype if name in tensors else "F32" for name in shapes}
    names = sorted(shapes, key=lambda name: -ITEM_SIZE[types[name]])  # so that each is aligned
    outs = [OutTensor(n, types[n], shapes[n], math.prod(shapes[n]) * ITEM_SIZE[types[n]]) for n in names]
    with Files() as opened:

        def padded(name: str) -> Tensor:
            values = whole(opened, tensors[name]) if name in tensors else None
            if values is not None and values.shape == shapes[name]:
                return values
            out = torch.zeros(shapes[name])
            if values is not None:
                out[tuple(map(slice, values.shape))] = values
            return out

        write_shard(staging.directory, Shard(fitting.file, tuple(outs), fitting.metadata(stored)), padded)
    for part in parts:
        part.unlink()


def _energy(found: Differences, fitting: Fitting, answers: Answers) -> dict[str, Any]:
    """The shares of the squared norm that are kept, of the tensors held and of the whole, and the share of the whole
    change in other tensors."""
    held = {name: answer for name, answer in answers.items() if "nbytes" in answer}
    other = {name: answer["total"] for name, answer in answers.items() if "nbytes" not in answer and answer["total"]}
    inside, kept = (sum(answer[key] for answer in held.values()) for key in ("total", "kept"))
    everything = inside + sum(other.values())
    return {
        "energy_kept": share_of(kept, inside),
        "energy_of_all": share_of(kept, everything),
        "bytes": sum(answer["nbytes"] for answer in held.values()),
        **fitting.summary(held),
        "modules": {
            fitting.held[name]: {**answer["about"], "energy_kept": share_of(answer["kept"], answer["total"])}
            for name, answer in held.items()
        },
        "left_out": share_of(sum(other.values()), everything),
        "left_out_tensors": {
            name: share_of(energy, everything) for name, energy in sorted(other.items(), key=_by_size)
        },
        "other_tokens": found.other_tokens,
    }


def share_of(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _by_size(item: tuple[str, float]) -> float:
    return -item[1]
