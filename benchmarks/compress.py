"""Measure PELA's low-rank models before any training: of weights, and of task vectors instead.

    python recipes/quickstart/fetch.py
    python recipes/smollm2/fetch.py
    python benchmarks/compress.py --out FOLDER [--part vectors | weights | smollm2] [--limit N]

weights: each of the quickstart's fine-tunes (all-MiniLM-L6-v2 and a LoRA) folded, compressed, expanded and measured on
its own task's 300 test texts. vectors: each fine-tune's task vector compressed and expanded, on the dense base.
smollm2: SmolLM2-135M-Instruct, bits a byte of news; --limit N for the first N paragraphs of each model. Prints
Markdown. What is made and measured is kept in FOLDER, so that a run that was killed goes on; take another folder when
the code has changed.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from speed import commit

import mergebench
from mergebench.evaluation import load_suite

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TASKS = ("tweets", "products", "reviews", "nouns")
WEIGHTS: tuple[Mapping[str, float], ...] = ({"ratio": 1.5}, {"ratio": 2.0}, {"ratio": 3.0}, {"energy": 0.9})
VECTORS = (*WEIGHTS, {"energy": 0.999})


def said(how: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in how.items())


class Bench:
    """Makes and measures what it has not made and measured before; keeps it in `folder`."""

    def __init__(self, folder: Path, recipes: Path, limit: int | None) -> None:
        self.limit = {} if limit is None else {"limit": limit}
        self.folder, self.recipes = folder, recipes
        self.base = recipes / "quickstart" / "cache" / "base"
        folder.mkdir(parents=True, exist_ok=True)

    def compressed(self, model: str, name: str, how: Mapping[str, float]) -> tuple[Path, dict[str, Any]]:
        """The model compressed and expanded, and its linear layers' sums."""
        small, dense = (self.folder / f"{name} {said(how)}{end}" for end in (" factors", ""))
        made = mergebench.compress(model, small, **how, resume=True).provenance
        mergebench.expand(small, dense, resume=True)
        return dense, self.linear(made, small)

    def linear(self, made: Mapping[str, Any], small: Path) -> dict[str, Any]:
        entries = json.loads((small / "compress.json").read_text())["tensors"]
        layers = [one for one in entries.values() if not one.get("left", "rank").startswith("not")]
        before = sum(one["shape"][0] * one["shape"][1] for one in layers)
        after = sum(one["rank"] * sum(one["shape"]) if "rank" in one else before_of(one) for one in layers)
        return {**made["kinds"]["all"], "linear": len(layers), "share": after / before}

    def measure(self, suite: str, task: str, model: str | Path) -> float:
        suites = self.recipes / suite
        tasks = YAML(typ="safe").load(suites / "suite.yaml")["tasks"]
        (one,) = [one for one in tasks if one["name"] == task and one.get("split", "test") == "test"]
        files = {key: str((suites / one[key]).resolve()) for key in ("data", "head") if key in one}
        alone = self.folder / f"{task}.yaml"  # the other tasks may need a scorer that is not installed
        alone.write_text(json.dumps({"tasks": [{**one, **files, **self.limit}]}))
        loaded = load_suite(alone).only("test")
        found = mergebench.measure(loaded, [str(model)], results=self.folder / "results")
        return found.records[0].value

    def tuned(self, task: str) -> str:
        return f"{self.base}+{self.recipes / 'quickstart' / 'adapters' / task}"

    def vector(self, task: str) -> Path:
        out = self.folder / f"{task} vector"
        if not out.exists():
            mergebench.task_vector(self.tuned(task), str(self.base), out)
        return out

    def weights(self) -> Iterator[list[str]]:
        yield ["fine-tune, dense", *self.row({task: self.tuned(task) for task in TASKS}, [])]
        for how in WEIGHTS:
            made = {task: self.compressed(self.tuned(task), f"{task} weights", how) for task in TASKS}
            yield [
                said(how),
                *self.row({t: str(place) for t, (place, _) in made.items()}, [x for _, x in made.values()]),
            ]

    def vectors(self) -> Iterator[list[str]]:
        yield ["fine-tune", *self.row({task: self.tuned(task) for task in TASKS}, [])]
        yield ["base alone", *self.row({task: str(self.base) for task in TASKS}, [])]
        for how in VECTORS:
            made = {task: self.compressed(str(self.vector(task)), f"{task} vector", how) for task in TASKS}
            models = {task: f"{self.base}+{place}" for task, (place, _) in made.items()}
            yield [said(how), *self.row(models, [x for _, x in made.values()])]

    def row(self, models: Mapping[str, str], sums: list[dict[str, Any]]) -> list[str]:
        values = [self.measure("quickstart", task, model) for task, model in models.items()]
        return [*spread(sums), *[f"{value:.3f}" for value in values], f"{sum(values) / len(values):.3f}"]

    def smollm2(self) -> Iterator[list[str]]:
        base = self.recipes / "smollm2" / "cache" / "base"
        for how in (None, *WEIGHTS):
            place, sums = (base, []) if how is None else self.made(base, how)
            yield [
                "dense" if how is None else said(how),
                *spread(sums),
                f"{self.measure('smollm2', 'news', place):.3f}",
            ]

    def made(self, base: Path, how: Mapping[str, float]) -> tuple[Path, list[dict[str, Any]]]:
        place, sums = self.compressed(str(base), "smollm2", how)
        return place, [sums]


def before_of(entry: Mapping[str, Any]) -> int:
    return int(entry["shape"][0] * entry["shape"][1])


def spread(sums: list[dict[str, Any]]) -> list[str]:
    """Ranks, layers factored, their parameters' share, energy kept and relative error; least to most over models."""
    if not sums:
        return [""] * 5
    ranks = [rank for one in sums for rank in one["ranks"]]
    layers = sorted({one["factored"] for one in sums})
    span = {key: sorted({f"{one[key]:.3f}" for one in sums}) for key in ("share", "energy_kept", "relative_error")}
    ends = [" to ".join(dict.fromkeys((values[0], values[-1]))) for values in span.values()]
    many = " to ".join(map(str, dict.fromkeys((layers[0], layers[-1]))))
    return [f"{min(ranks)} to {max(ranks)}", f"{many} of {sums[0]['linear']}", *ends]


MEASURED = {
    "weights": [*TASKS, "mean"],
    "vectors": [*TASKS, "mean"],
    "smollm2": ["news, bits a byte"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=MEASURED, action="append")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="where the caches are")
    parser.add_argument("--limit", type=int, help="items a task")
    options = parser.parse_args()
    print(f"{platform.platform()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}")
    for part in options.part or MEASURED:
        bench = Bench(options.out, options.recipes, options.limit)
        titles = ["ranks", "layers factored", "their parameters", "energy kept", "relative error", *MEASURED[part]]
        print(f"\n| {part} | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}", flush=True)
        for cells in getattr(bench, part)():
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
