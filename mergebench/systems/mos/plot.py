"""The plot of a sequence of tasks: accuracy as they come and, beside it, retrieval as it refines."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from pathlib import Path

from mergebench.checkpoint.files import write_atomically
from mergebench.systems.mos.metrics import MOS, NAMES, Record, estimate, runs_of

# Colour (Okabe and Ito, "Color universal design", 2008), marker and line: any two methods differ in two of them.
LOOKS = {
    "simplecil": ("#999999", "s", ":"),
    "frozen-head": ("#999999", "o", "-"),
    "first-task": ("#56b4e9", "v", ":"),
    "sequential": ("#e69f00", "X", "-"),
    "unmerged": ("#d55e00", "^", "--"),
    "first-guess": ("#009e73", "<", "-."),
    "no-retrieval": ("#cc79a7", "P", "-"),
    "no-alignment": ("#8c8200", "D", "--"),
    "no-ensemble": ("#0072b2", ">", "-."),
    MOS: ("#000000", "o", "-"),
}


def plot(records: Iterable[Record], file: Path) -> None:
    """A PNG: the accuracy on all classes so far after each task, a line a method with standard errors over seeds; and
    the share of items whose task is found at each step of the retrieval. `RunError` where no run is complete."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hide its messages about the font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    runs = runs_of(records)
    curves = {name: [[r["accuracy"] for r in run] for run in by_seed.values()] for name, by_seed in runs.items()}
    found = {name: [run[-1]["retrieval"] for run in by_seed.values()] for name, by_seed in runs.items()}
    steps = {name: [one["steps"] for one in by_seed] for name, by_seed in found.items() if None not in by_seed}
    refined = {name: by_seed for name, by_seed in steps.items() if len(by_seed[0]) > 1}
    plots = [(curves, 1, "tasks so far", "accuracy on all classes so far, %")]
    if refined:
        plots.append((refined, 0, "step of the retrieval", "own task found, after the last task, %"))
    canvas = Figure(figsize=(1 + 4.4 * len(plots), 5), layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, (lines, first, across, up) in zip(canvas.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        for place, (name, by_seed) in enumerate(lines.items()):
            points = [estimate(values) for values in zip(*by_seed, strict=True)]
            colour, marker, style = LOOKS.get(name, ("#444444", "*", ":"))
            axes.errorbar(
                [first + i + 0.02 * (place - len(lines) / 2) for i in range(len(points))],  # no bar behind another
                [100 * point.mean for point in points],
                [100 * (point.stderr or 0) for point in points] if len(by_seed) > 1 else None,
                color=colour, marker=marker, linestyle=style, markersize=5, elinewidth=0.9, capsize=1.5,
                linewidth=2.2 if name == MOS else 1.2, zorder=3 if name == MOS else 2,
                label=NAMES.get(name, name) if lines is curves else None,
            )  # fmt: skip
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    stream = io.BytesIO()
    canvas.savefig(stream, format="png", dpi=150)
    write_atomically(file, stream.getvalue())
