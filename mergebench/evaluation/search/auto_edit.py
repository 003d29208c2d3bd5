"""The automatic choice of an edit: a probe fitted, two edits tried, and one taken from the front of what the edit
changes and the damage that it does elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench import __version__
from mergebench.checkpoint.files import write_atomically
from mergebench.editing.probes.fit import fit_probe
from mergebench.editing.probes.labels import Labelled, read_labelled
from mergebench.errors import RecipeError
from mergebench.evaluation.search.auto import Auto, grid_arm, label_of, row_of
from mergebench.evaluation.search.history import BEST, WORK, History, Point, held
from mergebench.evaluation.search.verdict import edit_verdict
from mergebench.recipe import load

if TYPE_CHECKING:
    import os

    from mergebench.evaluation import Step, Suite
    from mergebench.evaluation.search.loop import Arm

BEHAVIOUR, DAMAGE = "behaviour", "damage"
SHARES = {"fit": 3, "validation": 1, "test": 1}  # of five texts of each class, what they are for
LEAST = 20  # texts of a class: the fit and its test have ten or more
PROBE = "probe.safetensors"
# Point 0 leaves the model as it is.
EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "ablate": ({"strength": 0.0}, "strength=0.25/0.5/0.75/1"),
    "surgery": ({"step": 0.75, "rows": "4.65%"}, "step=0.4/0.75/1.2/1.8,rows=1%/4.65%"),
}


def choose_edit(
    model: str,
    models: Sequence[str],
    suite: Suite | str | os.PathLike[str] | None,
    behaviour: str | Path,
    *,
    out: str | Path,
    device: str = "auto",
    memory: int | None = None,
    workers: int | None = None,
    on: str | None = None,
    results: str | Path | None = "results",
    resume: bool = False,
    overwrite: bool = False,
    searched: Callable[[Point, History], None] = lambda point, history: None,
    progress: Callable[[Step], None] | None = None,
) -> Auto:
    """Try edits of a model away from the undesired texts of a file; as `mergebench.auto` with `edit`.

    The behaviour is the suite's first validation task; without a suite the probe's score of undesired texts that it
    was not fitted on. The damage is the divergence of the next tokens on desired texts.
    """
    from mergebench.evaluation import evaluate_models, page, save
    from mergebench.evaluation.measure import inputs_of
    from mergebench.evaluation.search.loop import arm_of
    from mergebench.evaluation.search.search import about, check_tasks, look, set_up, write_best

    if models:
        raise RecipeError(f"auto --edit edits one model, got {len(models) + 1}", "mergebench auto --edit FILE MODEL")
    data = read_labelled(Path(behaviour))
    _check(Path(behaviour), data)
    target = Path(out)
    candidates, how = set_up(target, device, memory, workers, on, results)
    with held(target, resume=resume, overwrite=overwrite):
        files = _parts(data, target / "data")
        probe = target / PROBE
        if not (resume and probe.is_file()):
            test = str(files["validation"])
            fit_probe(
                model, files["fit"], probe, device=device, results=results, overwrite=True, layer="all", test=test
            )
        whole = _suite(model, suite, probe, files)
        check_tasks(whole)
        validation = whole.only("validation")
        names = [validation.tasks[0].name, DAMAGE]
        arms = [_arm(model, name, probe) for name in EDITS]
        made = {
            "mergebench": __version__,
            "recipe": arms[0].recipe.to_dict(),
            "over": [{"name": dict(arm.named)["edit"], "over": [d.to_plain() for d in arm.space]} for arm in arms],
            "strategy": "grid",
            "budget": sum(arm.budget for arm in arms),
            "seed": 0,
            "objective": ",".join(names),
            "start": "model as it is",
            "suite": about(validation),
            "merge": candidates.key(candidates.plan(arms[0].recipe)),
        }
        history = History(target, made)
        if resume:
            history.resume()
        inputs = inputs_of(arms[0].recipe, list(EDITS))
        try:
            resumed = look(arms, validation, names, inputs, candidates, history, searched, how)
            chosen = history.best
            assert chosen is not None
            write_best(arms, history, target / BEST)
            recipe = arm_of(arms, chosen.values).at(chosen.values)
            label, found = label_of(chosen.values), None
            if any(task.split == "test" for task in whole.tasks):
                edited = replace(row_of(arms, chosen.values, candidates), role="merged")
                rows = [replace(inputs[0], name="base", role="base"), edited]
                found = evaluate_models(rows, whole.only("test"), progress=progress, **how)
                found = replace(found, made={**found.made, "chosen": label})
                save(found, target)
        finally:
            shutil.rmtree(target / WORK, ignore_errors=True)
        said = edit_verdict(label, "base", names, found, history)
        page.attempt(target)
    return Auto(target, history, chosen, recipe, found, said, (), resumed)


def _check(file: Path, data: Labelled) -> None:
    for name, side in zip(data.classes, (False, True), strict=True):
        count = data.undesired.count(side)
        if count < LEAST:
            what = f"{file}: {count} text{'s' * (count != 1)} of class '{name}'"
            raise RecipeError(
                what, f"auto --edit needs at least {LEAST} of each class, to fit on, choose on and report on"
            )


def _parts(data: Labelled, folder: Path) -> dict[str, Path]:
    """The texts of each class dealt to files for the fit, the choice and the report, in their order; of the last two
    the desired texts alone too."""
    turns = [name for name, share in SHARES.items() for _ in range(share)]
    dealt: dict[str, list[dict[str, Any]]] = {name: [] for name in SHARES}
    for side in (False, True):
        texts = [text for text, bad in zip(data.texts, data.undesired, strict=True) if bad == side]
        for place, text in enumerate(texts):
            dealt[turns[place % len(turns)]].append({"text": text, "label": int(side)})
    for name in ("validation", "test"):
        dealt[f"harmless-{name}"] = [row for row in dealt[name] if not row["label"]]
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in dealt}
    for name, rows in dealt.items():
        write_atomically(files[name], "".join(json.dumps(row) + "\n" for row in rows))
    return files


def _suite(model: str, given: Suite | str | os.PathLike[str] | None, probe: Path, files: dict[str, Path]) -> Suite:
    """The behaviour's tasks, and the damage on desired texts, for both splits."""
    from mergebench.checkpoint.reference import locate
    from mergebench.evaluation import Suite, load_suite

    tasks: list[dict[str, Any]] = []
    for split in ("validation", "test"):
        if given is None:
            seen = {"kind": "probe", "probe": str(probe), "data": str(files[split])}
            tasks.append({"name": BEHAVIOUR, **seen, "of": "undesired", "metric": "score", "split": split})
        reference, harmless = str(locate(model).checkpoint), str(files[f"harmless-{split}"])
        how = {"kind": "divergence", "reference": reference, "data": harmless}
        tasks.append({"name": DAMAGE, **how, "split": split})
    own = load_suite({"tasks": tasks})
    if given is None:
        return own
    suite = given if isinstance(given, Suite) else load_suite(given)
    suite.only("validation")
    if any(task.name == DAMAGE for task in suite.tasks):
        raise RecipeError(
            f"{suite.path or 'suite'}: a task is called '{DAMAGE}'", "auto adds one of that name: rename it"
        )
    splits = {task.split for task in suite.tasks}
    return replace(suite, tasks=(*suite.tasks, *(task for task in own.tasks if task.split in splits)))


def _arm(model: str, name: str, probe: Path) -> Arm:
    """The search of one edit."""
    values, over = EDITS[name]
    step = {"edit": name, "probe": str(probe), **values}
    recipe = load({"merge_method": "passthrough", "models": [{"model": model}], "edits": [step]})
    return grid_arm(recipe, over, ("edit", name))
