"""Carry out a plan: sweep, apply, write, publish."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergebench import __version__
from mergebench.checkpoint import masked
from mergebench.checkpoint.header import TensorInfo, read_header
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.read import Files
from mergebench.checkpoint.staging import PROVENANCE, Staging, check_room, check_target, finished, fsync
from mergebench.checkpoint.write import copy_side_files, create, write_atomically, write_error, write_index
from mergebench.engine.lines import alpha_of
from mergebench.engine.memory import keep_freed_memory
from mergebench.engine.plan import Group, Plan, Unit
from mergebench.engine.statistics import Norms
from mergebench.engine.sweep import Sweeper, to_device
from mergebench.engine.work import Progress
from mergebench.errors import ModelError, RunError

BLOCK = 1 << 20  # bytes compared or hashed at a time


@dataclass(frozen=True)
class Result:
    """A merged checkpoint and what it took."""

    out: Path
    provenance: dict[str, Any]
    already_done: bool = False  # --resume found it finished


def run_plan(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    sync: bool = False,
    hash_inputs: bool = False,
    progress: Progress = lambda _: None,
    finish: Callable[[Path, dict[str, Any]], None] = lambda directory, provenance: None,
) -> Result:
    """Merge into the directory `out`; `finish(directory, provenance)` may add files before it is published.

    Raises `RecipeError` where `out` may not be written, `RunError` where the work fails. Inputs are
    only ever opened for reading.
    """
    started = time.perf_counter()
    fingerprint = _fingerprint(plan)
    done = finished(out)
    if resume and done is not None and done.get("fingerprint") == fingerprint:
        return Result(out, done, already_done=True)
    check_target(out, places(plan), overwrite)
    check_room(out, plan.bytes_written)
    with Files() as files:
        for model, alias, tensor in plan.alignment.must_equal:
            check_equal(files, model, alias, tensor)
        for model in [plan.merge.reference, *plan.merge.models]:
            for info in model.tensors.values():
                if info.made is not None:
                    info.made.settle(files)
    keep_freed_memory()
    # the workers come first, so that none inherits the lock, which dies with this process
    with (
        Files() as files,
        closing(Sweeper(plan, files, progress)) as sweeper,
        Staging(out, fingerprint, resume) as staging,
    ):
        of_all = _ask_of_all(plan, staging, sweeper) if plan.asked_of_all else None
        for group in plan.groups:
            _work(plan, staging, sweeper, group, of_all, sync)
        memory = peak_memory() + sweeper.workers.memory()
        _check_written(plan, staging.directory)
        write_index(staging.directory, plan.shards)
        tasks = _write_tasks(plan, staging, sweeper, of_all) if plan.merge.method.gives == "tasks" else {}
        kinds = {plan.dtypes[name] for name in plan.alignment.merged}
        try:
            copied = []
            if not tasks:  # a vector with a config beside it would load as a model
                kind = kinds.pop() if len(kinds) == 1 else None
                copied = copy_side_files(plan.merge.reference, staging.directory, kind)
        except OSError as error:
            raise write_error(staging.directory, error) from None
        provenance = {
            "mergebench": __version__,
            "fingerprint": fingerprint,
            "recipe": dict(plan.merge.recipe),
            "notes": list(plan.merge.notes),
            "method": {"name": plan.merge.method.name, "paper": plan.merge.method.paper, "scope": plan.merge.scope},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "inputs": inputs(plan, hash_inputs),
            "merged_tensors": len(plan.alignment.merged),
            "copied_tensors": len(plan.copied),
            "side_files": copied,
            "answers": staging.journal["answers"],
            "kept": _kept(plan, staging.journal["answers"]),
            **_lines(plan, of_all),
            **({"tasks": tasks} if tasks else {}),
            "sweeps": plan.sweeps,
            "extra_sweeps": sweeper.extra_sweeps,
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
            "seconds": round(time.perf_counter() - started, 3),
            "stages": {stage: round(seconds, 3) for stage, seconds in sweeper.seconds.items()},
            "peak_memory": memory,
        }
        finish(staging.directory, provenance)
        write_atomically(staging.directory / PROVENANCE, json.dumps(provenance, indent=1) + "\n")
        staging.publish(overwrite, sync)
    return Result(out, provenance)


def _ask_of_all(plan: Plan, staging: Staging, sweeper: Sweeper) -> Any:
    """All questions about all groups, before anything is written; the last answers together."""
    answers = []
    for group in plan.groups:
        answers += [known[-1] for known in _answers(plan, staging, sweeper, group)]
        staging.save()
    return Norms.of_all(answers)


def _work(plan: Plan, staging: Staging, sweeper: Sweeper, group: Group, of_all: Any, sync: bool) -> None:
    """One group: the questions that are still open, then what is still to be written, shard by shard.

    of_all: the answer to the last question where that is about all groups together.
    """
    wanted = set(group.written)
    shards = [
        (shard, [tensor.name for tensor in shard.tensors if tensor.name in wanted])
        for shard in plan.shards
        if shard.file not in staging.journal["shards"]
    ]
    shards = [(shard, names) for shard, names in shards if names or not shard.tensors]
    if not shards:
        return
    known = _answers(plan, staging, sweeper, group, of_all)
    for shard, names in shards:
        for file in shard.files:
            if not (staging.directory / file.file).exists():
                create(staging.directory / file.file, file)
        sweeper.apply(group, known, names, staging.directory)
        if not shard.tensors or names[-1] == shard.tensors[-1].name:  # groups come in the order of the shards
            for file in shard.files:
                if sync:
                    fsync(staging.directory / file.file)
                staging.journal["shards"].append(file.file)
            staging.save()


def _answers(plan: Plan, staging: Staging, sweeper: Sweeper, group: Group, of_all: Any = None) -> list[list[Any]]:
    """The answers about each unit of a group; what is still open is asked.

    of_all: takes the place of the last one, where that is about all groups together. Answers are kept by tensor, or
    once for the model: how units are grouped depends on the memory given.
    """
    kept: dict[str, list[Any]] = staging.journal["answers"]
    keys = [_key(plan, unit) for unit in group.units]
    known: list[list[Any]] = [[] for _ in group.units]
    for question in range(max((unit.passes for unit in group.units), default=0)):
        asked = [number for number, unit in enumerate(group.units) if question < unit.passes]
        if all(question < len(kept.get(keys[number], ())) for number in asked):
            answers = {number: to_device(plan.device, _decode(kept[keys[number]][question])) for number in asked}
        else:
            answers, remarks = sweeper.answer(group, known, asked)
            for number in asked:
                kept.setdefault(keys[number], [])[question:] = [_encode(answers[number]) | remarks[number]]
            if plan.merge.scope == "model":
                staging.save()  # a sweep over the whole model is worth keeping
        for number in asked:
            known[number].append(answers[number])
    return known if of_all is None else [[*answers[:-1], of_all] for answers in known]


def _write_tasks(plan: Plan, staging: Staging, sweeper: Sweeper, of_all: Any) -> dict[str, float]:
    """Put each task's factor beside its mask."""
    scales = sweeper.scales(_answers(plan, staging, sweeper, plan.groups[0], of_all))
    for task, model, scale in zip(plan.merge.tasks, plan.merge.models, scales, strict=True):
        about = {"scale": scale, "method": plan.merge.method.name, "model": model.reference}
        about["base_model"] = plan.merge.reference.reference
        path = staging.directory / masked.FOLDER / task / masked.CONFIG
        write_atomically(path, json.dumps(about, indent=1) + "\n")
    return dict(zip(plan.merge.tasks, scales, strict=True))


def _key(plan: Plan, unit: Unit) -> str:
    """What a unit's answers are kept under."""
    return "model" if plan.merge.scope == "model" else unit.tensors[0]


def _kept(plan: Plan, answers: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The share of each model's elements that a trim at its thresholds kept; empty for methods without one."""
    kept, total = [0.0] * len(plan.merge.models), 0
    for unit in (unit for group in plan.groups for unit in group.units):
        for answer in answers.get(_key(plan, unit), ()):
            if "kept" in answer:
                kept = [sum_ + share * unit.numel for sum_, share in zip(kept, answer["kept"], strict=True)]
                total += unit.numel
    return {name: sum_ / total for name, sum_ in zip(plan.merge.names, kept, strict=True)} if total else {}


def _lines(plan: Plan, of_all: Any) -> dict[str, Any]:
    """What the layers were scaled by, where they were."""
    lines = plan.merge.lines
    if lines is None:
        return {}
    alpha = alpha_of(of_all, len(plan.merge.models)) if lines.alpha is None else lines.alpha
    return {"lines": {"alpha": alpha, "beta": lines.beta}}


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def places(plan: Plan) -> list[Path]:
    """Where the models are: nothing is written there."""
    models = [*plan.merge.models, plan.merge.reference]
    found = []
    for model in models:
        found += [place for place in (model.directory, model.adapter) if place is not None]
        found += [header.file.parent if model.directory else header.file for header in model.headers]
    return found


def inputs(plan: Plan, hash_inputs: bool) -> list[dict[str, Any]]:
    """Every input file once: size, time and a hash of the header; of everything with `hash_inputs`."""
    headers = {h.file: h for model in [plan.merge.reference, *plan.merge.models] for h in model.files()}
    found = []
    for file, header in sorted(headers.items()):
        entry = {
            "file": str(file),
            "size": header.size,
            "mtime_ns": header.mtime_ns,
            "header_sha256": header.sha256,
        }
        if hash_inputs:
            with open(file, "rb") as stream:
                entry["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        found.append(entry)
    return found


def _fingerprint(plan: Plan) -> str:
    """What the result depends on: recipe, inputs, layout and version; not workers, memory or device."""
    made_of = {
        "recipe": {key: value for key, value in plan.merge.recipe.items() if key != "evaluate"},
        "inputs": inputs(plan, hash_inputs=False),
        "sources": {name: [info.name for info in infos] for name, infos in plan.alignment.sources.items()},
        "adapters": [{name: delta.scale for name, delta in model.deltas.items()} for model in plan.merge.models],
        "made": [
            {name: info.made.digest() for name, info in model.tensors.items() if info.made is not None}
            for model in [plan.merge.reference, *plan.merge.models]
        ],
        "shards": {
            file.file: hashlib.sha256(file.header()).hexdigest() for shard in plan.shards for file in shard.files
        },
        "mergebench": __version__,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def _check_written(plan: Plan, directory: Path) -> None:
    """Read every header back: the files hold what was planned, also those of an interrupted run."""
    for shard in [file for written in plan.shards for file in written.files]:
        found = [(tensor.name, tensor.dtype, tensor.shape) for tensor in read_header(directory / shard.file).tensors]
        if found != [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors]:
            raise RunError(f"{directory / shard.file}: it does not hold what was planned", "run without --resume")


def check_equal(files: Files, model: Model, alias: TensorInfo, tensor: TensorInfo) -> None:
    """A tied tensor stored twice must be the same twice: else it is no alias, and dropping it would guess."""
    alias, tensor = (info if info.made is None else info.made.own for info in (alias, tensor))
    same = alias.dtype == tensor.dtype and alias.nbytes == tensor.nbytes and not (alias.scale or tensor.scale)
    for start in range(0, alias.nbytes if same else 0, BLOCK):
        size = min(BLOCK, alias.nbytes - start)
        left, right = bytearray(size), bytearray(size)
        files.read_into(alias.file, alias.offset + start, memoryview(left))
        files.read_into(tensor.file, tensor.offset + start, memoryview(right))
        same = same and left == right
    if not same:
        raise ModelError(
            f"{alias.name}: {model.reference} stores it apart from '{tensor.name}', base ties the two",
            "the heads differ between the models: exclude the tensor to keep the base's",
        )


def _encode(answer: Any) -> dict[str, Any]:
    if isinstance(answer, tuple):
        return {"order_statistics": [part.reshape(-1).tolist() for part in answer]}
    return {"gram" if answer.dim() == 2 else "norms": answer.tolist()}


def _decode(answer: dict[str, Any]) -> Any:
    for kind in ("gram", "norms"):
        if kind in answer:
            return torch.tensor(answer[kind], dtype=torch.float64)
    return tuple(torch.tensor(part, dtype=torch.float32).unsqueeze(1) for part in answer["order_statistics"])
