"""The metric against d, beside full fine-tuning's."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path

from mergebench.systems.intrinsic_dimension.answer import Answer
from mergebench.training.plot import COLOURS


def plot(answers: Sequence[Answer], full: Sequence[float], file: Path) -> None:
    """A PNG: a curve a row through the means of its seeds, a dot a run; full fine-tuning's mean and the line."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hide its messages about the font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    first = answers[0]
    axes.axhline(statistics.fmean(full), color="black", linewidth=1, label="full fine-tuning")
    axes.axhline(first.line, color="black", linewidth=1, linestyle=":", label=f"{100 * first.share:g} % of it")
    for one, colour in zip(answers, COLOURS * len(answers), strict=False):
        ds = sorted(one.tested)
        axes.plot(ds, [statistics.fmean(one.tested[d]) for d in ds], color=colour, linewidth=1.2, label=one.row)
        dots = [(d, value) for d in ds for value in one.tested[d]]
        axes.plot([d for d, _ in dots], [value for _, value in dots], "o", color=colour, markersize=3, alpha=0.7)
        if one.dimension is not None:
            axes.axvline(one.dimension, color=colour, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("d")
    axes.set_ylabel(first.metric)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    canvas.savefig(file, dpi=120)
