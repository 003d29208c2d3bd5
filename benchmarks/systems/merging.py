"""Merge fine-tunes of many tasks, of all weights or of adapters, and measure how much of them each method keeps.

    python recipes/systems/fetch.py --all
    python benchmarks/systems/merging.py benchmarks/systems/full.yaml OUT                       # all weights
    python benchmarks/systems/merging.py benchmarks/systems/full.yaml OUT --kinds lora hut bias # adapters

CONFIG's rows are the tasks. Each is trained with each seed (OUT/KIND; what is there is not trained again), and the
models of a seed are merged: at the method's defaults, and with what is best on 150 validation items of each task. Both
are measured on the test items. Prints Markdown: accuracy, mean over the tasks, then mean over the seeds with its
standard error, and differences of pairs of methods. Every measurement is kept in OUT/KIND-merged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import mergebench
from mergebench.deltas.open import open_model
from mergebench.evaluation import Candidate, evaluate_models, load_suite
from mergebench.training import load_config, train
from mergebench.training.report import mean_and_error

LAMBDAS = (0.7, 1.0, 1.5, 2.0)
# method: its defaults as in the papers without validation (TIES' for task arithmetic), what is tried beside them
METHODS: dict[str, tuple[dict[str, Any], dict[str, Sequence[float]]]] = {
    "linear": ({}, {}),
    "task_arithmetic": ({"lambda": 0.4}, {"lambda": (0.1, 0.2, 0.3, 0.5, 0.7)}),
    "ties": ({"density": 0.2, "lambda": 1.0}, {"density": (0.1, 0.2, 0.4), "lambda": LAMBDAS}),
    "pcb": ({"density": 0.1, "lambda": 1.0}, {"density": (0.05, 0.1, 0.2), "lambda": LAMBDAS}),
}
PAIRS = (("pcb", "ties"), ("pcb", "task_arithmetic"), ("ties", "task_arithmetic"), ("task_arithmetic", "linear"))
ALL = "all-linear"
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft": {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ALL}, "lr": [1e-3, 4e-3]},
    "hut": {"delta": {"kind": "hut", "rank": 8}, "lr": [1e-2, 4e-2]},
    "pafi": {"delta": {"kind": "pafi", "share": 0.0312}, "lr": [1e-3, 3e-3]},
    "largest": {"delta": {"kind": "pafi", "share": 0.0312, "choose": "largest"}, "lr": [1e-3, 3e-3]},
    "bias": {"delta": "bias", "lr": [1e-3, 4e-3]},
    "hiwi": {"delta": {"kind": "hiwi", "on": "weights", "rank": 8}, "lr": [1e-3, 3e-3]},
}
Right = dict[str, dict[str, bool]]  # task, item: whether the answer was right


def config(file: Path, kind: str, tasks: Sequence[str]) -> dict[str, Any]:
    """CONFIG with another delta, and full paths."""
    written: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    if KINDS[kind]:
        written = {key: value for key, value in written.items() if key != "delta"} | KINDS[kind]
    written["model"] = str((file.parent / written["model"]).resolve())
    for name in set(written["rows"]) - set(tasks or written["rows"]):
        del written["rows"][name]
    for row in written["rows"].values():
        task = row["task"]
        task |= {part: str((file.parent / task[part]).resolve()) for part in ("train", "validation", "test")}
    return written


class Bench:
    """The models of one kind and one seed; measures what it has not measured before."""

    def __init__(self, written: Mapping[str, Any], trained: Path, folder: Path, seed: int) -> None:
        self.base, self.seed, self.folder = written["model"], seed, folder / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        places = {task: trained / task / f"seed-{seed}" for task in written["rows"]}
        whole = {task: (place / "config.json").exists() for task, place in places.items()}
        self.models = {task: str(one) if whole[task] else f"{self.base}+{one}" for task, one in places.items()}
        self._suites = {}
        for split, limit in (("validation", 150), ("test", None)):
            tasks = []
            for name, row in written["rows"].items():
                one = {"name": name, "kind": row["task"]["kind"], "data": row["task"][split], "split": split}
                one |= {"limit": limit} if limit else {}
                tasks.append(one | {"head": str(places[name] / "head.safetensors")})
            self._suites[split] = load_suite({"tasks": tasks})

    def model(self, reference: str, split: str) -> Right:
        return self._kept(f"{Path(reference).parent.name}-{Path(reference).name}", split, lambda _: reference)

    def merge(self, method: str, parameters: Mapping[str, float], split: str) -> Right:
        def run(scratch: str) -> str:
            recipe = {
                "merge_method": method,
                "base_model": self.base,
                "models": [{"model": one} for one in self.models.values()],
                "parameters": dict(parameters),
                "scope": "tensor" if method in ("linear", "task_arithmetic") else "model",
            }
            plan = mergebench.plan(mergebench.load(recipe), memory=1 << 30, device="cpu")
            return str(mergebench.run(plan, Path(scratch) / "merged").out)

        return self._kept("-".join([method, *(f"{key}-{value:g}" for key, value in parameters.items())]), split, run)

    def _kept(self, name: str, split: str, make: Any) -> Right:
        file = self.folder / f"{split}-{name}.json"
        if not file.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                candidate = Candidate(name, "merged", open_model(make(scratch)))
                results = evaluate_models([candidate], self._suites[split], device="cpu")
            found = {
                record.task: {str(item): one.score == 1 for item, one in record.predictions.items()}
                for record in results.records
            }
            file.write_text(json.dumps(found), encoding="utf-8")
            print(f"{self.folder.name} {split} {name}: {100 * mean(found):.1f}", file=sys.stderr, flush=True)
        right: Right = json.loads(file.read_text(encoding="utf-8"))
        return right

    def best(self, method: str) -> dict[str, float]:
        """The parameters of the best mean on the validation items; the defaults first."""
        defaults, grid = METHODS[method]
        tried = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
        every = [defaults, *(one for one in tried if one != defaults)]
        return max(every, key=lambda one: mean(self.merge(method, one, "validation")))


def accuracy(right: Mapping[str, bool]) -> float:
    return statistics.fmean(right.values())


def mean(right: Right) -> float:
    return statistics.fmean(accuracy(items) for items in right.values())


def cell(values: Sequence[float], sign: str = "") -> str:
    average, error = mean_and_error([100 * value for value in values])
    return f"{average:{sign}.1f}" + (f" ± {error:.1f}" if error is not None else "")


def line(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def kind_of(name: str, file: Path, out: Path, tasks: Sequence[str]) -> None:
    """Train, merge and print one kind."""
    written = config(file, name, tasks)
    made = train(load_config(written), out / name, resume=True)
    benches = [Bench(written, out / name, out / f"{name}-merged", seed) for seed in written["seeds"]]
    names = list(written["rows"])
    runs = made.runs
    own = [{run["row"]: run["test"]["value"] for run in runs if run["seed"] == one.seed} for one in benches]
    base = [one.model(one.base, "test") for one in benches]
    print(f"\n{name}:\n")
    line("model", "parameters", *names, "mean", "of the fine-tunes'")
    line(*["---"] * (len(names) + 4))

    def row(label: str, parameters: str, found: Sequence[Mapping[str, float]]) -> None:
        shares = [
            statistics.fmean(one[task] / mine[task] for task in names) for one, mine in zip(found, own, strict=True)
        ]
        cells = [cell([one[task] for one in found]) for task in names]
        line(label, parameters, *cells, cell([statistics.fmean(one.values()) for one in found]), cell(shares) + " %")

    def by_task(found: Sequence[Right]) -> list[dict[str, float]]:
        return [{task: accuracy(one[task]) for task in names} for one in found]

    row("each fine-tune", "", own)
    row("base, with their heads", "", by_task(base))
    means: dict[str, dict[str, list[float]]] = {"default": {}, "chosen": {}}
    for method, (defaults, grid) in METHODS.items():
        found = [bench.merge(method, defaults, "test") for bench in benches]
        means["default"][method] = means["chosen"][method] = [mean(one) for one in found]
        row(method, ", ".join(f"{key} {value:g}" for key, value in defaults.items()), by_task(found))
        if grid:
            chosen = [bench.best(method) for bench in benches]
            found = [bench.merge(method, one, "test") for bench, one in zip(benches, chosen, strict=True)]
            means["chosen"][method] = [mean(one) for one in found]
            shown = "; ".join(dict.fromkeys(", ".join(f"{k} {v:g}" for k, v in one.items()) for one in chosen))
            row(method, f"chosen: {shown}", by_task(found))
    print()
    line("difference of means", *means)
    line(*["---"] * 3)
    for one, other in PAIRS:
        differences = ([a - b for a, b in zip(way[one], way[other], strict=True)] for way in means.values())
        line(f"{one} − {other}", *(cell(each, "+") for each in differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["full"])
    parser.add_argument("--tasks", nargs="+", default=[], help="of these alone")
    arguments = parser.parse_args()
    for name in arguments.kinds:
        kind_of(name, arguments.config, arguments.out.resolve(), arguments.tasks)


if __name__ == "__main__":
    main()
