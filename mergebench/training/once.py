"""One training: a row of a config with one seed and one learning rate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn

from mergebench.checkpoint.files import write_atomically
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.reference import locate
from mergebench.checkpoint.staging import Staging
from mergebench.deltas.open import open_model
from mergebench.errors import RecipeError
from mergebench.networks.network import Network
from mergebench.training.attached import Attached, Base
from mergebench.training.config import Config, Row
from mergebench.training.loop import Progress, Schedule, fit
from mergebench.training.memory import peak, reset_peak
from mergebench.training.objective import Loss, Procedure, Sessions, Setup
from mergebench.training.peft_adapters import peft_adapter
from mergebench.training.processes import Guest, is_main, wait
from mergebench.training.settings import Settings
from mergebench.training.student import Fit, Student
from mergebench.training.task import Head

RUNS = ".training"  # checkpoints of a run that is not done


class Once:
    """One row with one seed and learning rate."""

    def __init__(self, row: Row, model: Model, config: Config, device: torch.device, seed: int, lr: float) -> None:
        self.row, self.model, self.config, self.device, self.seed, self.lr = row, model, config, device, seed, lr
        self.task = row.task.drawn(seed)
        self.scratch = 0  # bytes on disk that training needs for a while, at most; known when it has begun
        self._begun: Loss | Procedure | None = None
        self._first: Student | None = None

    def begin(self) -> Loss | Procedure:
        """The row's objective, its models loaded, and the first student made; raises what is wrong about them."""
        if self._begun is None:
            student = self._attach()
            self._begun = self._objective(student)
            self._first, self.scratch = student, student.attached.scratch(self.row.task)
        return self._begun

    def student(self) -> Student:
        """A student as it starts, on a network of its own: first that of `begin`, then new ones."""
        student, self._first = self._first, None
        return self._attach() if student is None else student

    def _attach(self) -> Student:
        row = self.row
        network = Network(self.model, row.task.auto_class, self.device, packed=False)
        steps = Schedule(len(self.task.parts["train"]), row.settings).steps
        base = Base(self.model, network, Generator().manual_seed(self.seed), steps, self.task.head(network))
        attached: Attached
        with self._named():
            if row.kind is not None:
                attached = row.kind(base, row.params)
            else:
                assert row.peft is not None
                attached = peft_adapter(base, row.peft)
            if row.start is not None:
                attached.load(row.start)
        network.module.to(self.device)
        head = None
        if row.start is not None:
            head = {name: nn.Parameter(one.to(self.device)) for name, one in self.task.head_in(row.start).items()}
        return Student(network, attached, self.task, head)

    def _objective(self, student: Student) -> Loss | Procedure:
        def open_other(reference: str) -> Network:
            other = open_model(reference, folders=self.config.folders, to_run=True)
            return Network(other, self.row.task.auto_class, self.device)

        def head_of(reference: str) -> Head:
            place = locate(reference, self.config.folders)
            last = [place.checkpoint, *place.adapters][-1]
            head = self.task.head_in(last if last.is_dir() else last.parent)
            return {name: one.to(self.device) for name, one in head.items()}

        setup = Setup(self.model, student.network, self.task, self.seed, open_other, head_of, student.attached)
        with self._named():
            begun = self.row.objective(setup, self.row.objective_params)
            if isinstance(begun, Procedure) and student.attached.one_training:
                several = f"objective: {self.row.objective.name} trains several times, and {self.row.label} counts the"
                raise RecipeError(f"{several} steps of one training", "another kind, such as delta: {kind: list}")
            return begun

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors name the config and the row."""
        try:
            yield
        except RecipeError as error:
            where = str(self.config.path or "config")
            raise RecipeError(f"{where}: {self.row.name}: {error.message}", error.hint) from None


def train_once(run: Once, name: str, staging: Staging | Guest, progress: Progress) -> dict[str, Any]:
    """Train; write what came out into the directory `name`."""
    row, lr, seed = run.row, run.lr, run.seed
    reset_peak()
    begun = run.begin()
    checkpoints = staging.directory / RUNS / name

    def saved() -> None:
        staging.complete(*files_in(staging, checkpoints))

    def told(what: str, done: int, total: int) -> None:
        progress(f"{what} {name}", done, total)

    def fitted(student: Student, loss: Loss, settings: Settings, part: str) -> Fit:
        return fit(student, loss, settings, lr=lr, seed=seed, directory=checkpoints / part, progress=told, saved=saved)

    if isinstance(begun, Procedure):
        found = begun(Sessions(row.settings, run.student, fitted))
    else:
        found = fitted(run.student(), begun, row.settings, "fit")
    directory = staging.directory / name
    if is_main():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        found.student.attached.save(directory)
        row.task.save(found.student.head, directory)
    wait()
    result = _measured(row, found, directory)
    wait()
    if is_main():
        shutil.rmtree(checkpoints, ignore_errors=True)
        note_files(staging, name)
    return {
        "row": row.name,
        "seed": seed,
        "directory": name,
        "reference": found.student.attached.reference(row.model, Path("OUT") / name),
        "files": files_in(staging, directory),
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
        if is_main():
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


def files_in(staging: Staging | Guest, place: Path) -> list[str]:
    return [str(file.relative_to(staging.directory)) for file in sorted(place.rglob("*")) if file.is_file()]


def note_files(staging: Staging | Guest, name: str) -> None:
    """Note what a run wrote, so that a resumed one keeps it; what is gone is forgotten."""
    kept = staging.journal["shards"]
    for file in [file for file in kept if not (staging.directory / file).is_file()]:
        del kept[file]
    staging.complete(*files_in(staging, staging.directory / name))
