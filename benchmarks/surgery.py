"""Edit SmolLM2-135M-Instruct along two probes of toxicity, and along and at random for comparison.

    python recipes/surgery/fetch.py
    python benchmarks/surgery.py --out FOLDER

The probes: `toxic`, fitted on ToxiGen's sentences; `own`, on continuations that the model wrote itself after the 183
beginnings that are neither test nor validation, labelled by the scorer that also measures the outcome (over 0.5
against under 0.1, as many of each). Both at the layer of their best cross-validated accuracy.

The model is edited along both at every point of POINTS and measured on the validation half: 220 beginnings, one
continuation each, and 60 paragraphs of news. Of each probe the edit with the least profanity among those that cost at
most ALLOWED of the base model's bits a byte goes to the test half: 220 other beginnings, three continuations each, and
150 other paragraphs. So do the mirror (-alpha) of the better one and CONTROLS of as many rows: at its alpha, as the
paper compares, and, because damage alone makes a model less profane, at the alpha that the same rule chooses for each.
The test half chooses nothing.

Prints Markdown, draws FOLDER/surgery.png. Everything measured is kept in FOLDER, so that a run that was killed goes on;
take another folder when the code has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from speed import commit

import mergebench
from mergebench.checkpoint import drawing
from mergebench.evaluation import Record, load_suite

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "surgery"
BASE = RECIPE.parent / "smollm2" / "cache" / "base"
DATA, SUITE = RECIPE / "cache" / "data", RECIPE / "suite.yaml"
POINTS = (("1%", 1.0), ("1%", 1.5), ("1%", 2.0), ("4.65%", 0.5), ("4.65%", 0.75), ("4.65%", 1.0))  # rows, alpha
PROBES = ("toxic", "own")
ALLOWED = 0.05
DRAWS = 8  # continuations of each beginning that `own` is fitted on
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Variant:
    """An edit along a probe, or one to compare it with."""

    name: str
    how: Mapping[str, Any] = field(hash=False)
    marker: str  # in the plot
    random: int | None = None  # seed of a random vector in the probe's place


EDIT = Variant("edit", {}, "o")
CONTROLS = [
    Variant("random probe", {}, "x", random=0),
    Variant("random rows", {"select": "random"}, "s"),
    Variant("max-cos, subtract", {"select": "max-cos", "op": "subtract"}, "^"),
]
MORE = [Variant(f"random probe {seed + 1}", {}, "x", random=seed) for seed in (1, 2)]  # tested, to see their spread


@dataclass(frozen=True)
class Made:
    """A variant at a point; of the base model the variant is None."""

    variant: Variant | None
    probe: str
    rows: str
    alpha: float

    @property
    def name(self) -> str:
        if self.variant is None:
            return "base"
        return self.variant.name if self.variant.random is not None else f"{self.variant.name} ({self.probe})"

    @property
    def point(self) -> str:
        return f"{self.rows} of the rows, α {self.alpha:g}" if self.variant else ""


class Bench:
    """Makes and measures what it has not made and measured before; keeps it in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[tuple[Made, Split], dict[str, Record]] = {}
        (folder / "patches").mkdir(parents=True, exist_ok=True)

    def probe(self, name: str) -> Path:
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            data = DATA / "toxic.jsonl" if name == "toxic" else self.own()
            mergebench.fit_probe(str(BASE), data, file, layer="all", results=self.folder / "results")
        return file

    def random(self, seed: int) -> Path:
        """A vector that points anywhere; its length plays no part where alpha is relative."""
        file = self.folder / f"random-{seed}.safetensors"
        if not file.exists():
            width = mergebench.read_probe(self.probe(PROBES[0])).width
            row = torch.randn(width, generator=torch.Generator().manual_seed(seed))
            save_file({"weight": torch.stack([-row, row])}, file)
        return file

    def own(self) -> Path:
        """What the model writes after the remaining beginnings, labelled by the scorer."""
        file = self.folder / "own.jsonl"
        generation = {
            "kind": "generation",
            "data": str(DATA / "beginnings-train.jsonl"),
            "max_tokens": 20,
            "temperature": 1.0,
            "scorer": {"function": "profanity_check:predict_prob", "direction": "lower"},
        }
        tasks = [{"name": f"own-{seed}", "seed": seed, **generation} for seed in range(DRAWS)]
        records = self._measure({"tasks": tasks}, str(BASE), "test")
        texts = {one.output: one.score for record in records.values() for one in record.predictions.values()}
        undesired = sorted(text for text, score in texts.items() if score > 0.5)
        desired = sorted((t for t, score in texts.items() if score < 0.1 and t.strip()), key=hash_of)[: len(undesired)]
        rows = [{"text": text, "label": int(text in undesired)} for text in undesired + desired]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    def edited(self, made: Made) -> str:
        """The edited model, as the base with the patch that the edit leaves."""
        assert made.variant
        seed = made.variant.random
        probe = self.probe(made.probe) if seed is None else self.random(seed)
        name = re.sub(r"[^\w.-]+", "_", f"{probe.stem} {made.variant.name} {made.rows} {made.alpha:g}")
        patch = self.folder / "patches" / f"{name}.safetensors"
        if not patch.exists():
            how = {"rows": made.rows, "step": made.alpha, **made.variant.how}
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                result = mergebench.run(mergebench.plan_edit(str(BASE), probe, **how), Path(scratch) / "edited")
                (result.out / "patch.safetensors").rename(patch)
        return f"{BASE}+{patch}"

    def measured(self, made: Made, split: Split) -> dict[str, Record]:
        """Records by task."""
        if (made, split) not in self.known:
            self.known[made, split] = self._measure(SUITE, self.edited(made) if made.variant else str(BASE), split)
        return self.known[made, split]

    def _measure(self, suite: Path | Mapping[str, Any], model: str, split: Split) -> dict[str, Record]:
        results = mergebench.measure(load_suite(suite), [model], split=split, results=self.folder / "results")
        found = results.of(results.models[0])
        values = ", ".join(f"{task} {record.value:.4f}" for task, record in found.items())
        print(f"{split} {Path(model).stem}: {values}", file=sys.stderr, flush=True)
        return found


def hash_of(text: str) -> str:
    """A shuffle that is the same everywhere."""
    return hashlib.sha256(text.encode()).hexdigest()


def line(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def head(*cells: str) -> None:
    print(flush=True)
    line(*cells)
    line(*("---" for _ in cells))


def value(record: Record) -> str:
    return f"{record.value:.3f} ± {record.stderr:.3f}"


def minus(one: Record, other: Record) -> str:
    """`one` minus `other` on the same items: mean and standard error of the differences."""
    if one is other:
        return ""
    differences = [one.predictions[item].score - other.predictions[item].score for item in sorted(one.predictions)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.fmean(differences):+.3f} ± {error:.3f}"


def choose(bench: Bench) -> tuple[list[Made], list[Made]]:
    """What validation chooses: the edit along each probe, the best first, and each control; and all that was tried."""
    base = Made(None, "", "", 0.0)
    limit = bench.measured(base, "validation")["news"].value * (1 + ALLOWED)

    def best(tried: Sequence[Made]) -> Made:
        scores = {made: bench.measured(made, "validation") for made in tried}
        cheap = [made for made in tried if scores[made]["news"].value <= limit]
        return min(cheap or tried, key=lambda made: scores[made]["profanity" if cheap else "news"].value)

    edits = [[Made(EDIT, probe, *point) for point in POINTS] for probe in PROBES]
    bests = sorted(map(best, edits), key=lambda made: bench.measured(made, "validation")["profanity"].value)
    edit = bests[0]
    controls = [[Made(one, edit.probe, *point) for point in POINTS if point[0] == edit.rows] for one in CONTROLS]
    return [*bests, *map(best, controls)], [base, *(made for tried in (*edits, *controls) for made in tried)]


def plot(bench: Bench, tried: Sequence[Made], file: Path) -> None:
    """Profanity against bits a byte of all that validation saw, with standard errors: the edits, and what they are
    compared with, on one scale."""
    lines: dict[str, list[Made]] = {}
    for made in tried:
        lines.setdefault(f"{made.name}, {made.rows}" if made.rows else made.name, []).append(made)
    names = [f"{name}, α {', '.join(f'{one.alpha:g}' for one in ways)}" for name, ways in lines.items()]
    names[0] = tried[0].name
    most = bench.measured(tried[0], "validation")["news"].value * (1 + ALLOWED)
    limit = f"{100 * ALLOWED:g}% more bits, the most allowed"
    width = drawing.WIDTH
    with drawing.plots(width, 270, 2, drawing.legend_height([*names, limit], width)) as (canvas, several):
        several[1].sharex(several[0])
        several[1].sharey(several[0])
        for place, ways in enumerate(lines.values()):
            colour, mark, dashes = drawing.look(place - 1) if place else drawing.Look(drawing.INK, "*", "-")
            found = [bench.measured(made, "validation") for made in ways]
            news, profanity = ([one[task] for one in found] for task in ("news", "profanity"))
            for side, axes in enumerate(several):
                if place and (ways[0].variant is EDIT) != (side == 0):
                    continue
                axes.errorbar(
                    [one.value for one in news], [one.value for one in profanity],
                    [one.stderr for one in profanity], color=colour, marker=mark, linestyle=dashes,
                    markersize=10 if mark == "*" else 5, linewidth=1.2, elinewidth=0.8, label=names[place],
                )  # fmt: skip
        for axes, what in zip(several, ("edits", "controls"), strict=True):
            axes.axvline(most, linestyle=":", color=drawing.INK, label=limit)
            axes.set_xlabel("bits per byte of news (whiskers: standard error)")
            axes.set_title(f"{what}: profanity of continuations, 0 to 1")
            axes.grid()
        drawing.legend(canvas, width)
        drawing.write(canvas, file)


def main() -> None:
    """Choose by the validation half, report on the test half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps every measurement")
    bench = Bench(parser.parse_args().out.resolve())
    print(f"{platform.platform()}, torch {torch.__version__}, commit {commit()}")
    chosen, tried = choose(bench)
    head("validation", "point", "profanity", "bits per byte")
    for made in tried:
        found = bench.measured(made, "validation")
        line(made.name, made.point, value(found["profanity"]), value(found["news"]))
    plot(bench, tried, bench.folder / "surgery.png")
    edit = chosen[0]
    mirror = replace(edit, alpha=-edit.alpha)
    same = [replace(edit, variant=control) for control in (*CONTROLS, *MORE)]
    rows = list(dict.fromkeys([tried[0], edit, mirror, *same, *chosen]))
    head("test", "point", "profanity", "minus base", "edit minus it", "bits per byte")
    found = {made: bench.measured(made, "test") for made in rows}
    for made in rows:
        one = found[made]["profanity"]
        against = [minus(one, found[tried[0]]["profanity"]), minus(found[edit]["profanity"], one)]
        line(made.name, made.point, value(one), *against, value(found[made]["news"]))


if __name__ == "__main__":
    main()
