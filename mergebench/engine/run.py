"""Carry out a plan: sweep, apply, write, publish."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergebench.checkpoint.files import Files, write_atomically
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.lineage import portable
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.shards import create, is_as_planned, write_index
from mergebench.checkpoint.side_files import copy_side_files, side_files
from mergebench.checkpoint.staging import Staging, fsync
from mergebench.checkpoint.target import PROVENANCE, check_room, check_target, finished
from mergebench.deltas.formats import emr
from mergebench.engine.answers import Known, answers_of, ask_of_all, keep
from mergebench.engine.batches import Progress
from mergebench.engine.groups import Group
from mergebench.engine.inmemory import InMemory
from mergebench.engine.machine import keep_freed_memory
from mergebench.engine.plan import Plan
from mergebench.engine.provenance import as_text, fingerprint_of, peak_memory, places, record, rounding
from mergebench.engine.sweep import Sweeper
from mergebench.errors import ModelError, RecipeError, RunError

BLOCK = 1 << 20  # bytes compared or hashed at a time


@dataclass(frozen=True)
class Result:
    """A merged checkpoint and the cost of the run."""

    out: Path
    provenance: dict[str, Any] = field(repr=False)
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
    change: Callable[[Staging], dict[str, Any]] = lambda staging: {},
    known: Known | None = None,
) -> Result:
    """Merge into the directory `out`; `finish(directory, provenance)` may add files before it is published.

    change: changes the complete checkpoint before that; its result goes into the provenance. known: answers from
    earlier merges of the same models, reused here; new answers are added.

    Raises `RecipeError` if `out` may not be written, `RunError` if the work fails. Inputs are only opened for reading.
    """
    started = time.perf_counter()
    fingerprint = fingerprint_of(plan)
    done = finished(out)
    if resume and done is not None and done.get("fingerprint") == fingerprint:
        return Result(out, done, already_done=True)
    check_target(out, places(plan), overwrite)
    check_room(out, plan.bytes_written)
    beside = side_files(plan.merge.reference, keeps_scales=plan.encoded.config == plan.merge.reference.config)
    check_inputs(plan)
    # workers start first, so that none inherits the lock, which must end with this process
    with (
        Files() as files,
        closing(Sweeper(plan, files, progress)) as sweeper,
        Staging(out, fingerprint, resume) as staging,
    ):
        if known is not None:
            staging.journal["answers"] = known.recall(plan) | staging.journal["answers"]
        with sweeper.workers.writing(staging.directory):
            of_all = ask_of_all(plan, staging, sweeper) if plan.asked_of_all else None
            for group in plan.groups:
                _work(plan, staging, sweeper, group, of_all, sync)
        if known is not None:
            known.remember(plan, staging.journal["answers"])
        memory = peak_memory() + sweeper.workers.memory()
        _check_written(plan, staging.directory)
        write_index(staging.directory, plan.shards)
        tasks = _write_tasks(plan, staging, sweeper, of_all) if plan.merge.method.gives == "deltas" else {}
        kinds = {plan.dtypes[name] for name in plan.alignment.merged if name not in plan.encoded.tensors}
        files_beside: dict[str, list[str]] = {"side_files": []}
        if not tasks:  # a task vector with a config beside it would load as a model
            kind = kinds.pop() if len(kinds) == 1 else None
            files_beside = copy_side_files(plan.merge.reference, staging.directory, kind, beside, plan.encoded.config)
        changed = change(staging)
        provenance = portable(record(plan, fingerprint, staging.journal["answers"], of_all, hash_inputs), out) | {
            **changed,
            **files_beside,
            **({"tasks": tasks} if tasks else {}),
            **rounding(plan, staging.journal.get("rounding", {})),
            "extra_sweeps": sweeper.extra_sweeps,
            "seconds": round(time.perf_counter() - started, 3),
            "stages": {stage: round(seconds, 3) for stage, seconds in sweeper.seconds.items()},
            "peak_memory": max(memory, peak_memory()),
        }
        finish(staging.directory, provenance)
        write_atomically(staging.directory / PROVENANCE, as_text(provenance))
        staging.publish(overwrite, sync)
    return Result(out, provenance)


def run_in_memory(plan: Plan, target: InMemory, known: Known, progress: Progress = lambda _: None) -> None:
    """Merge into `target`, made for the same output; the same bits as in files. `known` as in `run_plan`."""
    check_inputs(plan)
    notes = _Notes({"answers": known.recall(plan)})
    with Files() as files, closing(Sweeper(plan, files, progress, target)) as sweeper:
        of_all = ask_of_all(plan, notes, sweeper) if plan.asked_of_all else None
        for group in plan.groups:
            answers = answers_of(plan, notes, sweeper, group, of_all)
            keep(plan, notes, group, answers, sweeper.apply(group, answers, group.written))
    known.remember(plan, notes.journal["answers"])


@dataclass(frozen=True)
class _Notes:
    """A journal that is not saved."""

    journal: dict[str, Any]

    def save(self) -> None:
        """Does nothing."""


def check_inputs(plan: Plan) -> None:
    """Before the first sweep, check what headers do not show, and compute what all workers need."""
    method = plan.merge.method
    if method.statistics is not None and not plan.merge.statistics:
        what = f"'{method.name}' reads statistics, and only `merge` makes them of data:"
        raise RecipeError(
            what, "name them, statistics: DIR; `mergebench statistics` makes them, a merge in OUT.statistics"
        )
    with Files() as files:
        for model, alias, tensor in plan.alignment.must_equal:
            check_equal(files, model, alias, tensor)
        for model in [plan.merge.reference, *plan.merge.models]:
            model.settle(files)
    keep_freed_memory()


def _work(plan: Plan, staging: Staging, sweeper: Sweeper, group: Group, of_all: Any, sync: bool) -> None:
    """Run one group: ask the open questions, then write the missing tensors, shard by shard.

    of_all: the answer to the last question if that is about all groups together.
    """
    wanted = set(group.written)
    shards = [
        (shard, [tensor.name for tensor in shard.tensors if tensor.name in wanted])
        for shard in plan.shards
        if not staging.journal["shards"].keys() >= {file.file for file in shard.files}
    ]
    shards = [(shard, names) for shard, names in shards if names or not shard.tensors]
    if not shards:
        return
    known = answers_of(plan, staging, sweeper, group, of_all)
    for shard, names in shards:
        for file in shard.files:
            if not (staging.directory / file.file).exists():
                create(staging.directory / file.file, file)
        keep(plan, staging, group, known, sweeper.apply(group, known, names, staging.directory))
        staging.journal.setdefault("rounding", {}).update(sweeper.rounded)
        if not shard.tensors or names[-1] == shard.tensors[-1].name:  # groups are in the order of the shards
            for file in shard.files:
                if sync:
                    fsync(staging.directory / file.file)
            staging.complete(*(file.file for file in shard.files))


def _write_tasks(plan: Plan, staging: Staging, sweeper: Sweeper, of_all: Any) -> dict[str, float]:
    """Write each task's factor beside its mask."""
    scales = sweeper.scales(answers_of(plan, staging, sweeper, plan.groups[0], of_all))
    for task, model, scale in zip(plan.merge.tasks, plan.merge.models, scales, strict=True):
        about = {"scale": scale, "method": plan.merge.method.name, "model": model.reference}
        about["base_model"] = plan.merge.reference.reference
        path = staging.directory / emr.FOLDER / task / emr.CONFIG
        write_atomically(path, json.dumps(about, indent=1) + "\n")
    return dict(zip(plan.merge.tasks, scales, strict=True))


def _check_written(plan: Plan, directory: Path) -> None:
    """Read every header back, to check that all files, also those of an interrupted run, are as planned."""
    for shard in [file for written in plan.shards for file in written.files]:
        if not is_as_planned(directory / shard.file, shard):
            raise RunError(f"{directory / shard.file}: it does not hold what was planned", "run without --resume")


def check_equal(files: Files, model: Model, alias: TensorInfo, tensor: TensorInfo) -> None:
    """Check that both copies of a tied tensor are equal; otherwise it is no alias and cannot be dropped."""
    alias, tensor = (info if info.made is None else info.made.own for info in (alias, tensor))
    same = alias.dtype == tensor.dtype and alias.nbytes == tensor.nbytes and not (alias.scale or tensor.scale)
    for start in range(0, alias.nbytes if same else 0, BLOCK):
        size = min(BLOCK, alias.nbytes - start)
        left, right = bytearray(size), bytearray(size)
        files.read_into(alias, start, memoryview(left))
        files.read_into(tensor, start, memoryview(right))
        same = same and left == right
    if not same:
        raise ModelError(
            f"{alias.name}: {model.reference} stores it apart from '{tensor.name}', base ties the two",
            "the heads differ between the models: exclude the tensor to keep the base's",
        )
