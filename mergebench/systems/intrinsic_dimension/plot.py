"""The metric against d, beside full fine-tuning's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import INK, WIDTH, look
from mergebench.evaluation.tables.layout import SHARES
from mergebench.systems.intrinsic_dimension.answer import Answer


def plot(answers: Sequence[Answer], full: Sequence[float], file: Path) -> None:
    """A PNG: a curve a row through the means of its seeds, a dot a run; full fine-tuning's mean and the line."""
    first = answers[0]
    scale = 100.0 if first.metric in SHARES else 1.0
    names = ["full fine-tuning", f"{100 * first.share:g} % of it", *(one.row for one in answers)]
    with drawing.plots(WIDTH, 280 + drawing.legend_height(names, WIDTH)) as (canvas, (axes,)):
        axes.axhline(scale * statistics.fmean(full), color=INK, linewidth=1, label=names[0])
        axes.axhline(scale * first.line, color=INK, linewidth=1, linestyle=":", label=names[1])
        for number, one in enumerate(answers):
            colour, mark, _ = look(number)
            ds = sorted(one.tested)
            means = [scale * statistics.fmean(one.tested[d]) for d in ds]
            axes.plot(ds, means, color=colour, linewidth=1.2, marker=mark, markersize=4, label=one.row)
            dots = [(d, scale * value) for d in ds for value in one.tested[d]]
            axes.plot([d for d, _ in dots], [value for _, value in dots], mark, color=colour, markersize=3, alpha=0.5)
            if one.dimension is not None:
                axes.axvline(one.dimension, color=colour, linewidth=0.8, linestyle="--")
        drawing.powers(axes)
        axes.set_xlabel("d, numbers that are trained (dashed: the smallest that reaches the line)")
        axes.set_ylabel(f"{first.metric}, %" if scale == 100 else first.metric)
        axes.grid(axis="y")
        drawing.legend(canvas, WIDTH)
        drawing.write(canvas, file)
