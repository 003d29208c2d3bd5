"""Train every row of a config with every seed, and write what came out.

    OUT/ROW/seed-0/     what was trained: `MODEL+OUT/ROW/seed-0` is the model; its head, its predictions
    OUT/results.json    every run; OUT/scores.png, OUT/curves.png, OUT/README.md

It is all made in a hidden directory beside OUT and published when it is complete; a killed run continues with `resume`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench import __version__
from mergebench.checkpoint.content import identity, sha256_of
from mergebench.checkpoint.files import write_atomically
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_room, check_target, finished
from mergebench.deltas.open import open_model
from mergebench.engine.provenance import places_of
from mergebench.networks.device import device_of
from mergebench.plugins import need
from mergebench.training import plot, report
from mergebench.training.config import Config, Row
from mergebench.training.loop import Progress
from mergebench.training.once import RUNS, Once, files_in, note_files, train_once
from mergebench.training.processes import Guest, is_main, join, staged, wait

if TYPE_CHECKING:
    import torch


Begun = dict[tuple[str, int, float], Once]  # by row, seed and learning rate


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
    chosen = join(device_of(device))
    models = {row.model: open_model(row.model, folders=config.folders) for row in config.rows}
    fingerprint = fingerprint_of(config, models)
    done = finished(out)
    if resume and done is not None and done.get("fingerprint") == fingerprint:
        return Trained(out, done, already_done=True)
    if is_main():
        check_target(out, places_of(list(models.values())), overwrite)
    begun, scratch = check_rows(config, models, chosen)
    check_room(out, at_most(config, models) + scratch)
    with staged(out, fingerprint, resume) as staging:
        for row in config.rows:
            train_row(row, models[row.model], config, chosen, staging, progress, begun)
        if isinstance(staging, Staging):
            _publish(config, models, fingerprint, staging, started, overwrite)
    wait()
    return Trained(out, finished(out) or {})


def check_rows(config: Config, models: Mapping[str, Model], device: torch.device) -> tuple[Begun, int]:
    """Begin every row, so that what fits no model is said before the first step; the bytes of disk they need.

    One row's models are in memory at a time, at last those of the first row: it is trained with them.
    """
    scratch, begun = 0, Begun()
    for row in reversed(config.rows):
        begun.clear()
        run = Once(row, models[row.model], config, device, config.seeds[0], row.lrs[0])
        run.begin()
        scratch = max(scratch, run.scratch)
        begun[row.name, run.seed, run.lr] = run
        del run
    return begun, scratch


def train_row(
    row: Row,
    model: Model,
    config: Config,
    device: torch.device,
    staging: Staging | Guest,
    progress: Progress,
    begun: Begun,
) -> list[Mapping[str, Any]]:
    """Train one row with every seed, except what the journal has; returns the runs. begun: runs to go on with."""
    runs: dict[str, Any] = staging.journal["answers"]
    lr = row.lrs[0] if len(row.lrs) == 1 else None
    for seed in config.seeds:
        tried = row.lrs if lr is None else (lr,)
        for rate in tried:
            name = f"{row.name}/seed-{seed}" + f"/lr-{rate:g}" * (len(tried) > 1)
            run = begun.pop((row.name, seed, rate), None)
            if not _complete(runs.get(name), staging):
                run = run or Once(row, model, config, device, seed, rate)
                runs[name] = train_once(run, name, staging, progress)
                staging.save()
        if lr is None:
            lr = _choose(row, seed, staging)
    return [run for run in runs.values() if run["row"] == row.name and not run.get("discarded")]


def provenance_of(config: Config, models: Mapping[str, Model], staging: Staging) -> dict[str, Any]:
    """What is written of all runs when they are done; their checkpoints go."""
    shutil.rmtree(staging.directory / RUNS, ignore_errors=True)
    runs = staging.journal["answers"].values()
    return {
        "mergebench": __version__,
        "config": dict(config.data),
        "identities": {name: identity(model) for name, model in models.items()},
        "runs": [run for run in runs if not run.get("discarded")],
        "tried": [run for run in runs if run.get("discarded")],
    }


def _publish(
    config: Config, models: Mapping[str, Model], fingerprint: str, staging: Staging, started: float, overwrite: bool
) -> None:
    """Write what all runs together say."""
    provenance = {"command": "train", **provenance_of(config, models, staging), "fingerprint": fingerprint}
    kept = provenance["runs"]
    write_atomically(staging.directory / "results.json", json.dumps({"runs": kept}, indent=1) + "\n")
    plot.write(kept, staging.directory)
    staging.finish(provenance, started, overwrite, report.card(staging.out, provenance))


def _complete(run: Mapping[str, Any] | None, staging: Staging | Guest) -> bool:
    """Whether an earlier process made this run, and its files are as they were."""
    if run is None:
        return False
    return bool(run.get("discarded")) or all(file in staging.journal["shards"] for file in run["files"])


def _choose(row: Row, seed: int, staging: Staging | Guest) -> float:
    """The learning rate whose run was best on validation; the others' directories go."""
    runs = staging.journal["answers"]
    names = {rate: f"{row.name}/seed-{seed}/lr-{rate:g}" for rate in row.lrs}
    chosen = next((rate for rate, name in names.items() if "chosen_of" in runs[name]), None)
    if chosen is not None:  # by an earlier process
        return chosen
    better = max if row.task.choose_by == "score" else min
    best = better(row.lrs, key=lambda rate: runs[names[rate]]["chosen_by"])
    kept = f"{row.name}/seed-{seed}"
    place, run = staging.directory / kept, runs[names[best]]
    if isinstance(staging, Staging):
        for file in (staging.directory / names[best]).iterdir():
            file.rename(place / file.name)
        for name in names.values():
            shutil.rmtree(staging.directory / name)
    wait()
    for rate, name in names.items():
        if rate != best:
            runs[name]["discarded"] = True
    run |= {
        "directory": kept,
        "reference": run["reference"].replace(names[best], kept),
        "files": files_in(staging, place),
        "chosen_of": list(row.lrs),
    }
    note_files(staging, kept)
    return best


def fingerprint_of(config: Config, models: Mapping[str, Model]) -> str:
    """What the result depends on."""
    files = {file for row in config.rows for file in row.task.files}
    files |= {file for row in config.rows if row.start for file in row.start.glob("*.safetensors")}
    made_of = [
        dict(config.data),
        list(config.seeds),
        {name: identity(model) for name, model in models.items()},
        {str(file): sha256_of(file) for file in sorted(files)},
        __version__,
    ]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def at_most(config: Config, models: Mapping[str, Model]) -> int:
    """Bytes on disk at the end, and of one run's checkpoints: of full fine-tunes, in float32 with AdamW's moments."""
    full = [
        4 * sum(info.numel for info in models[row.model].tensors.values()) for row in config.rows if row.label == "full"
    ]
    return len(config.seeds) * sum(full) + 6 * max(full, default=0) + (50 << 20)
