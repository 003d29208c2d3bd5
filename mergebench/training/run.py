"""Train every row of a config with every seed, and write what came out.

    OUT/ROW/seed-0/     what was trained: `MODEL+OUT/ROW/seed-0` is the model; its head, its predictions
    OUT/results.json    every run; OUT/curves.png, OUT/README.md

It is all made in a hidden directory beside OUT and published when it is complete; a killed run goes on with `resume`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from mergebench import __version__
from mergebench.checkpoint.content import identity, sha256_of
from mergebench.checkpoint.files import write_atomically
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.staging import Staging, check_room, check_target, finished
from mergebench.deltas.open import open_model
from mergebench.engine.provenance import places_of
from mergebench.errors import RecipeError
from mergebench.networks.device import device_of
from mergebench.networks.network import Network
from mergebench.plugins import need
from mergebench.training import report
from mergebench.training.attached import Attached, Base
from mergebench.training.config import Config, Row
from mergebench.training.loop import Progress, Schedule, fit
from mergebench.training.memory import peak, reset_peak
from mergebench.training.objective import Loss, Procedure, Sessions, Setup
from mergebench.training.peft_adapters import peft_adapter
from mergebench.training.settings import Settings
from mergebench.training.student import Fit, Student

RUNS = ".training"  # checkpoints of a run that is not done


@dataclass(frozen=True)
class Trained:
    """What training made."""

    out: Path
    provenance: Mapping[str, Any]
    already_done: bool = False

    @property
    def runs(self) -> Sequence[Mapping[str, Any]]:
        """Every row with every seed."""
        runs: Sequence[Mapping[str, Any]] = self.provenance["runs"]
        return runs

    def table(self) -> str:
        """A line a row, with standard errors over the seeds, as Markdown."""
        return report.table(self.runs)


def train(
    config: Config,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Trained:
    """Train the rows of a config, each with every seed, and write them to the directory `out`.

    device: auto, cpu or cuda. progress: called with what is done, and steps done and the total of this run.

    Raises `RecipeError` for what a config gets wrong about its model, `ModelError` if a model is missing or does not
    fit, `RunError` if a loss is not finite or the data are damaged.
    """
    need("accelerate", "training")
    started, out = time.perf_counter(), Path(out)
    models = {row.model: open_model(row.model, folders=config.folders) for row in config.rows}
    fingerprint = _fingerprint(config, models)
    done = finished(out)
    if resume and done is not None and done.get("fingerprint") == fingerprint:
        return Trained(out, done, already_done=True)
    check_target(out, places_of(list(models.values())), overwrite)
    check_room(out, _at_most(config, models))
    chosen = device_of(device)
    for row in config.rows:  # what fits no model is said before the first step of any row
        _Run(row, models[row.model], config, chosen, 0, row.lrs[0]).attach()
    with Staging(out, fingerprint, resume) as staging:
        runs: dict[str, Any] = staging.journal["answers"]
        for row in config.rows:
            lr = row.lrs[0] if len(row.lrs) == 1 else None
            for seed in config.seeds:
                tried = row.lrs if lr is None else (lr,)
                for rate in tried:
                    name = f"{row.name}/seed-{seed}" + f"/lr-{rate:g}" * (len(tried) > 1)
                    if not _complete(runs.get(name), staging):
                        runs[name] = _one(row, models[row.model], config, chosen, seed, rate, name, staging, progress)
                        staging.save()
                if lr is None:
                    lr = _choose(row, seed, runs, staging)
        shutil.rmtree(staging.directory / RUNS, ignore_errors=True)
        kept = [run for run in runs.values() if not run.get("discarded")]
        provenance = {
            "mergebench": __version__,
            "command": "train",
            "config": dict(config.data),
            "identities": {name: identity(model) for name, model in models.items()},
            "runs": kept,
            "tried": [run for run in runs.values() if run.get("discarded")],
            "fingerprint": fingerprint,
        }
        write_atomically(staging.directory / "results.json", json.dumps({"runs": kept}, indent=1) + "\n")
        report.curves(kept, staging.directory / "curves.png")
        provenance = staging.finish(provenance, started, overwrite, report.card(out, provenance))
    return Trained(out, provenance)


def _complete(run: Mapping[str, Any] | None, staging: Staging) -> bool:
    """Whether an earlier process made this run, and its files are as they were."""
    if run is None:
        return False
    return bool(run.get("discarded")) or all(file in staging.journal["shards"] for file in run["files"])


def _choose(row: Row, seed: int, runs: dict[str, Any], staging: Staging) -> float:
    """The learning rate whose run was best on validation; the others' directories go."""
    names = {rate: f"{row.name}/seed-{seed}/lr-{rate:g}" for rate in row.lrs}
    better = max if row.task.choose_by == "score" else min
    best = better(row.lrs, key=lambda rate: runs[names[rate]]["chosen_by"])
    kept = f"{row.name}/seed-{seed}"
    for rate, name in names.items():
        if rate != best:
            shutil.rmtree(staging.directory / name)
            runs[name]["discarded"] = True
    place = staging.directory / kept
    for file in (staging.directory / names[best]).iterdir():
        file.rename(place / file.name)
    (staging.directory / names[best]).rmdir()
    _note_files(staging, kept)
    runs[names[best]] |= {
        "directory": kept,
        "reference": runs[names[best]]["reference"].replace(names[best], kept),
        "files": _files(staging, place),
        "learning_rates_tried": list(row.lrs),
    }
    return best


class _Run:
    """One row with one seed and learning rate."""

    def __init__(self, row: Row, model: Model, config: Config, device: torch.device, seed: int, lr: float) -> None:
        self.row, self.model, self.config, self.device, self.seed, self.lr = row, model, config, device, seed, lr

    def attach(self) -> Student:
        """A new student; raises what is wrong about the row and its model."""
        row = self.row
        network = Network(self.model, row.task.auto_class, self.device, packed=False)
        steps = Schedule(len(row.task.parts["train"]), row.settings).steps
        base = Base(self.model, network, Generator().manual_seed(self.seed), steps)
        attached: Attached
        try:
            if row.kind is not None:
                attached = row.kind(base, row.params)
            else:
                assert row.peft is not None
                attached = peft_adapter(base, row.peft)
        except RecipeError as error:
            where = str(self.config.path or "config")
            raise RecipeError(f"{where}: {row.name}: {error.message}", error.hint) from None
        network.module.to(self.device)
        return Student(network, attached, row.task)

    def objective(self, student: Student) -> Loss | Procedure:
        """The row's objective, its other models loaded."""

        def open_other(reference: str) -> Network:
            other = open_model(reference, folders=self.config.folders)
            return Network(other, self.row.task.auto_class, self.device)

        setup = Setup(self.model, student.network, self.row.task, open_other)
        return self.row.objective(setup, self.row.objective_params)


def _one(
    row: Row,
    model: Model,
    config: Config,
    device: torch.device,
    seed: int,
    lr: float,
    name: str,
    staging: Staging,
    progress: Progress,
) -> dict[str, Any]:
    """Train once; write what came out."""
    run = _Run(row, model, config, device, seed, lr)
    reset_peak()
    student = run.attach()
    begun = run.objective(student)
    checkpoints = staging.directory / RUNS / name

    def saved() -> None:
        staging.complete(*_files(staging, checkpoints))

    def told(what: str, done: int, total: int) -> None:
        progress(f"{what} {name}", done, total)

    def fitted(student: Student, loss: Loss, settings: Settings, part: str) -> Fit:
        return fit(student, loss, settings, lr=lr, seed=seed, directory=checkpoints / part, progress=told, saved=saved)

    if isinstance(begun, Procedure):
        found = begun(Sessions(row.settings, run.attach, fitted))
    else:
        found = fitted(student, begun, row.settings, "fit")
    directory = staging.directory / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    found.student.attached.save(directory)
    row.task.save(found.student.head, directory)
    result = _measured(row, found, directory)
    shutil.rmtree(checkpoints, ignore_errors=True)
    _note_files(staging, name)
    return {
        "row": row.name,
        "seed": seed,
        "directory": name,
        "reference": found.student.attached.reference(row.model, Path("OUT") / name),
        "files": _files(staging, directory),
        "model": row.model,
        "kind": row.label,
        "objective": row.objective.name,
        "lr": lr,
        **result,
        "peak_memory": peak(),
        "about": {**found.student.attached.about(), **begun.about()},
    }


def _measured(row: Row, found: Fit, directory: Path) -> dict[str, Any]:
    """What a fit says of itself and on every part but train; predictions go into files."""
    student, task = found.student, row.task
    out: dict[str, Any] = {}
    for part in task.parts:
        if part == "train":
            continue
        measured = student.measure(part)
        score = measured.score
        out[part] = {
            "loss": measured.loss, "metric": score.metric, "value": score.value, "stderr": score.stderr, "n": score.n,
        }  # fmt: skip
        gold = dict(zip(task.parts[part], task.gold(part), strict=True))
        lines = (
            json.dumps({"id": one, "gold": gold[one], "pred": answer.output}, ensure_ascii=False)
            for one, answer in score.predictions.items()
        )
        write_atomically(directory / f"{part}-predictions.jsonl", "\n".join(lines) + "\n")
    chosen = out.get("validation")
    return {
        **out,
        "chosen_by": None if chosen is None else chosen["value" if task.choose_by == "score" else "loss"],
        "parameters": student.attached.count,
        "bytes": sum(file.stat().st_size for file in directory.iterdir() if file.suffix == ".safetensors"),
        "steps": found.steps,
        "seconds": round(found.seconds, 3),
        "saved_by_autograd": found.saved,
        "history": found.history,
    }


def _files(staging: Staging, place: Path) -> list[str]:
    return [str(file.relative_to(staging.directory)) for file in sorted(place.rglob("*")) if file.is_file()]


def _note_files(staging: Staging, name: str) -> None:
    """Note what a run wrote, so that a resumed one keeps it; what is gone is forgotten."""
    kept = staging.journal["shards"]
    for file in [file for file in kept if not (staging.directory / file).is_file()]:
        del kept[file]
    staging.complete(*_files(staging, staging.directory / name))


def _fingerprint(config: Config, models: Mapping[str, Model]) -> str:
    files = sorted({file for row in config.rows for file in row.task.files})
    made_of = [
        dict(config.data),
        list(config.seeds),
        {name: identity(model) for name, model in models.items()},
        {str(file): sha256_of(file) for file in files},
        __version__,
    ]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def _at_most(config: Config, models: Mapping[str, Model]) -> int:
    """Bytes on disk at the end, and of one run's checkpoints: of full fine-tunes, in float32 with AdamW's moments."""
    full = [
        4 * sum(info.numel for info in models[row.model].tensors.values()) for row in config.rows if row.label == "full"
    ]
    return len(config.seeds) * sum(full) + 6 * max(full, default=0) + (50 << 20)
