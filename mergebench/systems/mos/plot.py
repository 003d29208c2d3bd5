"""The plot of a sequence of tasks: accuracy as they come and, beside it, retrieval as it refines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import GREY, INK, SERIES, Look
from mergebench.evaluation.page.figures import Figure
from mergebench.systems.mos.metrics import MOS, NAMES, Record, estimate, runs_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

BLUE, ORANGE, GREEN, VIOLET, RED, OLIVE, PLUM = SERIES
# Any two methods differ in two of colour, mark and line.
LOOKS = {
    "simplecil": Look(GREY, "s", ":"),
    "frozen-head": Look(GREY, "o", "-"),
    "first-task": Look(GREEN, "v", ":"),
    "sequential": Look(ORANGE, "X", "-"),
    "unmerged": Look(RED, "^", "--"),
    "first-guess": Look(VIOLET, "<", "-."),
    "no-retrieval": Look(PLUM, "P", "-"),
    "no-alignment": Look(OLIVE, "D", "--"),
    "no-ensemble": Look(INK, ">", "-."),
    MOS: Look(BLUE, "o", "-"),
}
OTHER = Look(INK, "*", ":")


def figures(records: Iterable[Record]) -> list[Figure]:
    """The accuracy on all classes so far after each task, a line a method with standard errors over seeds; and the
    share of items whose task is found at each step of the retrieval. `RunError` where no run is complete."""
    runs = runs_of(records)
    curves = {name: [[r["accuracy"] for r in run] for run in by_seed.values()] for name, by_seed in runs.items()}
    found = {name: [run[-1]["retrieval"] for run in by_seed.values()] for name, by_seed in runs.items()}
    steps = {name: [one["steps"] for one in by_seed] for name, by_seed in found.items() if None not in by_seed}
    refined = {name: by_seed for name, by_seed in steps.items() if len(by_seed[0]) > 1}
    sides = [(curves, 1, "tasks so far (whiskers: standard error)", "accuracy on all classes so far, %")]
    if refined:
        sides.append((refined, 0, "step of the retrieval", "own task found, after the last task, %"))
    names = [NAMES.get(name, name) for name in curves]

    def draw(width: float) -> Canvas:
        with drawing.plots(width, 270, len(sides), drawing.legend_height(names, width)) as (canvas, several):
            for axes, (lines, first, across, title) in zip(several, sides, strict=True):
                for place, (name, by_seed) in enumerate(lines.items()):
                    points = [estimate(values) for values in zip(*by_seed, strict=True)]
                    look = LOOKS.get(name, OTHER)
                    axes.errorbar(
                        [first + i + 0.04 * (place - len(lines) / 2) for i in range(len(points))],  # no bar hides one
                        [100 * point.mean for point in points],
                        [100 * (point.stderr or 0) for point in points] if len(by_seed) > 1 else None,
                        color=look.colour, marker=look.mark, linestyle=look.dashes, markersize=5, elinewidth=0.9,
                        capsize=1.5, linewidth=2.2 if name == MOS else 1.2, zorder=3 if name == MOS else 2,
                        label=NAMES.get(name, name) if lines is curves else None,
                    )  # fmt: skip
                axes.set_xlabel(across)
                axes.set_title(title)
                drawing.whole_numbers(axes)
                axes.grid(axis="y")
            drawing.legend(canvas, width)
        return canvas

    last = (
        f"{NAMES.get(name, name)} {100 * estimate([one[-1] for one in by_seed]).mean:.1f}"
        for name, by_seed in curves.items()
    )
    seeds = max(map(len, curves.values()))
    caption = f"Mean of {seeds} seeds, whiskers its standard error." if seeds > 1 else "One seed."
    return [Figure("results", f"Accuracy after the last task, %: {', '.join(last)}.", draw, wide=True, caption=caption)]
