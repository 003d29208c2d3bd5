"""The metric against d, beside full fine-tuning's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import GREY, INK, look
from mergebench.evaluation.page.figures import Figure
from mergebench.evaluation.tables.layout import SHARES
from mergebench.systems.intrinsic_dimension.answer import Answer, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def figures(made: Mapping[str, Any]) -> list[Figure]:
    """The plot of what a search wrote."""
    return [figure(read(made["answers"]))]


def figure(answers: Sequence[Answer]) -> Figure:
    """A curve a row through the means of its seeds, a dot a run; full fine-tuning's mean and the line."""
    first = answers[0]
    scale = 100.0 if first.metric in SHARES else 1.0
    names = ["full fine-tuning", f"{100 * first.share:g}% of it", "smallest d that reaches it"]
    names += [one.row for one in answers]

    def draw(width: float) -> Canvas:
        with drawing.plots(width, 270, 1, drawing.legend_height(names, width)) as (canvas, (axes,)):
            axes.axhline(scale * first.full, color=INK, linewidth=1, label=names[0])
            axes.axhline(scale * first.line, color=INK, linewidth=1, linestyle=":", label=names[1])
            axes.plot([], [], color=GREY, linewidth=1, linestyle="--", label=names[2])
            for number, one in enumerate(answers):
                colour, mark, _ = look(number)
                ds = sorted(one.tested)
                means = [scale * statistics.fmean(one.tested[d]) for d in ds]
                axes.plot(ds, means, color=colour, linewidth=1.4, marker=mark, markersize=5, label=one.row)
                dots = [(d, scale * value) for d in ds for value in one.tested[d]]
                axes.plot(*zip(*dots, strict=True), mark, color=colour, markersize=3, alpha=0.5)
                if one.dimension is not None:
                    axes.axvline(one.dimension, color=colour, linewidth=0.8, linestyle="--")
            drawing.powers(axes)
            axes.set_xlabel("d, numbers that are trained")
            axes.set_title(f"{first.metric}, %" if scale == 100 else first.metric)
            axes.grid(axis="y")
            drawing.legend(canvas, width)
        return canvas

    alt = " ".join(f"{one.sentence()}." for one in answers)
    caption = "Small dots: the seeds; lines: their means."
    return Figure("dimension", alt, draw, wide=True, caption=caption)
