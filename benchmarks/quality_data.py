"""Measure the merge methods that read texts on the quickstart's four fine-tunes, beside those that read none.

    python recipes/quickstart/fetch.py
    python recipes/systems/fetch.py
    python benchmarks/quality_data.py --out FOLDER

The models run over texts that the fine-tunes were trained on (recipes/systems/cache): 400 a task for Gram matrices,
100 for Fisher information and RegMean++, 300 for AdaMerging; none reads their labels. Parameters are chosen by the mean
accuracy on the quickstart's 300 validation texts a task and reported on its 300 test texts; none of these is among the
others.

Prints Markdown. Statistics and measurements are kept in FOLDER, so that a run that was killed goes on. About ten
minutes on one core.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from quality import BASE, QUICKSTART, TASKS, TRAINED, TUNED, Scores, Split, against, cells, head, line, shown
from speed import commit

import mergebench
from mergebench.deltas.open import open_model
from mergebench.evaluation import Candidate, Results, evaluate_models, load_suite, save
from mergebench.systems.on_data import make_statistics

TEXTS = QUICKSTART.parent / "systems" / "cache"
LIMITS = {"gram": 400, "fisher": 100, "regmean_plusplus": 100, "adamerging": 300}
SEED = 0
ADAMERGING: dict[str, Any] = {"steps": 40, "batch": 8, "lr": 1e-2}  # fewer, longer steps than the paper's 500 of 1e-3
# of each method, what it is merged with: the defaults first
GRID: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "task_arithmetic": [{"lambda": 0.4}],  # these two as chosen by quality.py, of more
    "ties": [{"density": 0.4, "lambda": 1.0}],
    "fisher": [{}, {"floor": 1e-9}],
    "regmean": [{}, {"alpha": 1.0}],
    "regmean_plusplus": [{}],
    "adamerging": [ADAMERGING, {**ADAMERGING, "coefficients": "task"}],
}
KINDS = {"fisher": "fisher", "regmean": "gram"}


class Bench:
    """Measures what it has not measured before; keeps it in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.suite = folder, load_suite(QUICKSTART / "suite.yaml")

    def recipe(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        models = []
        for task, model in TUNED.items():
            entry: dict[str, Any] = {"model": model}
            if method in KINDS:
                entry["statistics"] = str(self._statistics(task, model, KINDS[method]))
            elif method in ("regmean_plusplus", "adamerging"):
                entry["data"] = {"file": str(TEXTS / f"{task}.jsonl"), "limit": LIMITS[method], "seed": SEED}
            models.append(entry)
        common = {"merge_method": method, "base_model": str(BASE), "models": models, "seed": SEED}
        return {**common, "parameters": parameters, **TRAINED}

    def _statistics(self, task: str, model: str, kind: str) -> Path:
        place = self.folder / "statistics" / f"{task}-{kind}"
        if not place.exists():
            print(f"{kind} of {task}", file=sys.stderr, flush=True)
            make_statistics(model, TEXTS / f"{task}.jsonl", place, kind=kind, limit=LIMITS[kind], seed=SEED)
        return place

    def measured(self, name: str, split: Split, recipe: dict[str, Any] | str) -> Scores:
        """The scores of a model, or of the merge of a recipe."""
        place = self.folder / split / name.replace("/", "_").replace(" ", "_")
        if not place.exists():
            merged = self.folder / "merged" / name.replace(" ", "_")
            if not isinstance(recipe, str) and not merged.exists():
                mergebench.merge(mergebench.load(recipe), merged, memory=1 << 30, device="cpu")
            model = open_model(recipe if isinstance(recipe, str) else str(merged))
            results = evaluate_models([Candidate(name, "merged", model)], self.suite.only(split), device="cpu")
            done = Path(tempfile.mkdtemp(dir=self.folder))
            save(results, done)
            place.parent.mkdir(exist_ok=True)
            done.rename(place)
            print(f"{split} {name}: {Scores(results).mean:.4f}", file=sys.stderr, flush=True)
        return Scores(Results.load(place))


def main() -> None:
    """Choose on the validation texts, measure on the test texts, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps everything")
    options = parser.parse_args()
    bench = Bench(options.out.resolve())
    bench.folder.mkdir(parents=True, exist_ok=True)
    print(f"{platform.platform()}, torch {torch.__version__}, commit {commit()}")
    tuned = {task: bench.measured(task, "test", model) for task, model in TUNED.items()}
    own = {task: next(r.value for r in scores.records if r.task == task) for task, scores in tuned.items()}
    rival: Scores | None = None
    rows = []
    for method, grid in GRID.items():
        recipes = {f"{method}: {shown(parameters)}": bench.recipe(method, parameters) for parameters in grid}
        names, chosen = list(recipes), [bench.measured(name, "validation", one) for name, one in recipes.items()]
        best = max(range(len(grid)), key=lambda number: chosen[number].mean)
        for number in dict.fromkeys((0, best)):
            scores = bench.measured(names[number], "test", recipes[names[number]])
            rival = scores if method == "ties" else rival
            label = shown(grid[number]) + (f" (best of {len(grid)})" if number == best and len(grid) > 1 else "")
            rows.append((method, label, f"{100 * chosen[number].mean:.1f}", scores))
    assert rival is not None
    head("method", "parameters", "validation", *TASKS, "mean", "relative", "against ties")
    for method, label, on_validation, scores in rows:
        line(method, label, on_validation, *cells([scores], own), against(scores, rival))


if __name__ == "__main__":
    main()
