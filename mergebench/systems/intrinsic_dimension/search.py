"""The intrinsic dimension d90: the smallest subspace in which training reaches 90% of full fine-tuning's metric.

The full fine-tune is trained first. Then d runs through the powers of ten until one reaches the line, and log d is
halved between the last that did not and the first that did. Every d is trained with all of the config's seeds; their
mean decides. A directory holds every run; a killed search continues with `resume`.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergebench.checkpoint import card as markdown
from mergebench.checkpoint import drawing
from mergebench.checkpoint.files import write_atomically
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_room, check_target, finished
from mergebench.deltas.open import open_model
from mergebench.engine.provenance import places_of
from mergebench.errors import ModelError, RecipeError
from mergebench.networks.device import device_of
from mergebench.plugins import need
from mergebench.systems.intrinsic_dimension.answer import Answer, line_of
from mergebench.systems.intrinsic_dimension.kind import Params, subspace
from mergebench.systems.intrinsic_dimension.plot import figure
from mergebench.training import report
from mergebench.training.config import Config, Row
from mergebench.training.declared import Targets, kinds
from mergebench.training.loop import Progress
from mergebench.training.once import Once
from mergebench.training.processes import is_main, join, staged, wait
from mergebench.training.run import at_most, check_rows, fingerprint_of, provenance_of, train_row

CLOSE = 1.3  # the search ends when neighbours are within this ratio
MANY = 100_000  # more than a model has lambdas


@dataclass(frozen=True)
class Found:
    """What a search found."""

    out: Path
    provenance: Mapping[str, Any]
    already_done: bool = False

    @property
    def answers(self) -> list[Answer]:
        """One for each row that was searched."""
        names = Answer.__dataclass_fields__
        return [
            Answer(**{k: one[k] for k in names} | {"tested": {int(d): v for d, v in one["tested"].items()}})
            for one in self.provenance["answers"].values()
        ]


def search(
    config: Config,
    out: str | Path,
    *,
    share: float = 0.9,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Found:
    """Search the intrinsic dimension of every subspace row of a config; write all runs to the directory `out`.

    A row of another kind is what they are compared with; without one, full fine-tuning with the first row's settings.

    Raises `RecipeError` if the config has nothing to search or to compare with, and what `train` raises.
    """
    need("accelerate", "training")
    started, out = time.perf_counter(), Path(out)
    if not 0 < share <= 1:
        raise RecipeError(f"--share: must be above 0, at most 1, got {share:g}", "such as 0.9")
    chosen = join(device_of(device))
    full, searched = _rows(config)
    config = replace(config, rows=(full, *searched))
    models = {row.model: open_model(row.model, folders=config.folders) for row in config.rows}
    made_of = f"dimension {share} {CLOSE} {fingerprint_of(config, models)}"
    fingerprint = hashlib.sha256(made_of.encode()).hexdigest()
    done = finished(out)
    if resume and done is not None and done.get("fingerprint") == fingerprint:
        return Found(out, done, already_done=True)
    if is_main():
        check_target(out, places_of(list(models.values())), overwrite)
    check_room(out, at_most(config, models))
    ranges = {}
    for row in searched:
        widest = replace(_at(row, MANY), name=row.name)
        attached = Once(widest, models[row.model], config, chosen, 0, row.lrs[0]).student().attached
        lambdas = sum(one.numel() for name, one in attached.parameters.items() if name.endswith(".scale"))
        ranges[row.name] = lambdas + 1, int(attached.about()["elements"])
        del attached
    begun, _ = check_rows(replace(config, rows=(full,)), models, chosen)
    part = next(part for part in ("test", "validation") if part in full.task.parts)
    with staged(out, fingerprint, resume) as staging:

        def values(row: Row) -> list[float]:
            runs = train_row(row, models[row.model], config, chosen, staging, progress, begun)
            return [run[part]["value"] for run in runs]

        whole = values(full)
        mean = statistics.fmean(whole)
        if not mean > 0:
            raise ModelError(f"{full.name}: its {full.task.metric} is 0", "train it longer, or with another lr")
        answers = []
        for row in searched:
            tested: dict[int, list[float]] = {}

            def reaches(d: int, row: Row = row, tested: dict[int, list[float]] = tested) -> bool:
                tested[d] = values(_at(row, d))
                return statistics.fmean(tested[d]) >= line_of(share, mean)

            narrow(reaches, *ranges[row.name])
            answers.append(Answer(row.name, full.task.metric, share, mean, ranges[row.name][1], tested))
        if isinstance(staging, Staging):
            drawing.write(figure(answers).draw(drawing.WIDTH), staging.directory / "dimension.png")
            about = {"share": share, "part": part, "answers": {one.row: one.to_dict() for one in answers}}
            made = {"command": "dimension", **about, **provenance_of(config, models, staging)}
            results = json.dumps(about | {"runs": made["runs"]}, indent=1) + "\n"
            write_atomically(staging.directory / "results.json", results)
            card = _card(out.name, answers, made["runs"])
            staging.finish(made | {"fingerprint": fingerprint}, started, overwrite, card)
    wait()
    return Found(out, finished(out) or {})


def _card(name: str, answers: Sequence[Answer], runs: Sequence[Mapping[str, Any]]) -> str:
    """README.md of the directory."""
    parts = [
        markdown.escape(" ".join(f"{one.sentence()}." for one in answers)),
        "![the metric against d](dimension.png)",
        report.table(runs),
        report.legend(runs) + ".",
        "Found by `mergebench dimension`.",
    ]
    return markdown.card(name, parts, tags=["mergebench"])


def narrow(reaches: Callable[[int], bool], least: int, most: int) -> None:
    """Ask of powers of ten in [least, most] until one reaches, then between it and the one before, halving log d until
    two neighbours are within `CLOSE`."""
    below, above = least, None
    for d in [10**k for k in range(1, 19) if least < 10**k < most] + [most]:
        if reaches(d):
            above = d
            break
        below = d
    while above is not None and above / below > CLOSE:
        middle = math.sqrt(below * above)
        unit = 10 ** max(int(math.log10(middle)) - 1, 0)
        d = round(middle / unit) * unit  # two digits
        if not below < d < above:
            break
        if reaches(d):
            above = d
        else:
            below = d


def _at(row: Row, d: int) -> Row:
    return replace(row, name=f"{row.name}/d-{d}", params=replace(row.params, d=d))


def _rows(config: Config) -> tuple[Row, list[Row]]:
    """What the subspaces are compared with, and the rows whose d is searched."""
    where = str(config.path or "config")
    searched = [row for row in config.rows if row.kind is subspace]
    others = [row for row in config.rows if row.kind is not subspace]
    if not searched:
        raise RecipeError(f"{where}: no row trains in a subspace", "delta: {kind: subspace, said: true}")
    if len(others) > 1:
        names = ", ".join(row.name for row in others)
        raise RecipeError(f"{where}: rows: {names}: subspaces are compared with one", "full: {delta: full}")
    for row in searched:
        written = row.written["delta"]
        if isinstance(written, dict) and "d" in written:
            raise RecipeError(f"{where}: {row.name}: delta: d: it is what is searched", "leave it out")
    first = searched[0]
    full = others[0] if others else replace(first, name="full", kind=kinds.get("full"), params=Targets())
    for row in searched:
        if row.task is not full.task:
            raise RecipeError(f"{where}: {row.name}: task: another than {full.name}'s", "write task: beside rows:")
    if not {"test", "validation"} & full.task.parts.keys():
        raise RecipeError(f"{where}: task: no test items, and none to choose on", "task: {test: FILE}")
    assert all(isinstance(row.params, Params) for row in searched)
    return full, searched
