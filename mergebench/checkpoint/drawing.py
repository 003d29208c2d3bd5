"""The look of all plots: colours by day and by night, marks, style; a canvas, and a file of it.

Plots are drawn by day. The page turns the colours into variables of its style sheet, which follow the reader's theme.
The colours of series tell apart for all eyes: any two differ by 0.07 or more in OKLab, also as the three kinds of
colour blindness see them (Machado et al. 2009, doi:10.1109/TVCG.2009.113), and stand out from the paper by 3 to 1.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergebench.checkpoint.files import write_atomically
from mergebench.errors import human

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLOURS = {  # name: by day, by night
    "ink": ("#1c1e21", "#e6e8ea"), "soft": ("#565b62", "#a3a9b1"), "line": ("#d4d7db", "#3b4046"),
    "paper": ("#ffffff", "#15171a"), "heat": ("#2f8fcf", "#1f6ba0"), "grey": ("#70757c", "#8b9198"),
    "blue": ("#0072b2", "#4aa8e0"), "orange": ("#f26808", "#d97e23"), "green": ("#21a66a", "#66e0be"),
    "violet": ("#c166fb", "#8b49e4"), "red": ("#6e1318", "#da072c"), "olive": ("#665f03", "#acd135"),
    "plum": ("#902268", "#a05087"), "link": ("#0b5cad", "#7db8f0"), "shade": ("#f4f5f7", "#1e2125"),
}  # fmt: skip
INK, SOFT, LINE, PAPER, HEAT, GREY, *SERIES = [day for day, _ in COLOURS.values()][:13]
BLUE = SERIES[0]
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":")
WIDTH = 829.0  # units across a page, and of a file, 1/72 inch; text has 11
NARROWEST = 240.0  # of one plot beside others
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mergebench",  # equal data, equal bytes
    "pdf.fonttype": 42,
    "text.parse_math": False,
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.prop_cycle": "cycler('color', ['" + "', '".join(SERIES) + "'])",
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "hatch.color": PAPER,
    "hatch.linewidth": 1.2,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


class Look(NamedTuple):
    """How a series is drawn in every plot."""

    colour: str
    mark: str
    dashes: str


def look(place: int) -> Look:
    """Of the series at this place: colours come round again with other marks and dashes."""
    return Look(SERIES[place % len(SERIES)], MARKS[place % len(MARKS)], DASHES[place // len(SERIES) % len(DASHES)])


@contextmanager
def styled() -> Iterator[None]:
    """In which plots are drawn and written."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hide its messages about the font cache
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about glyphs that its font lacks but the reader's has
        yield


@contextmanager
def plots(width: float, height: float, count: int = 1, below: float = 0) -> Iterator[tuple[Canvas, Sequence[Axes]]]:
    """A canvas with pairs of axes in the house's style: beside each other, or where that is too narrow for text, one
    below the other, `height` each. below: what a legend takes."""
    with styled():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas

        across = count if width >= NARROWEST * count else 1
        canvas = Canvas(figsize=(width / 72, (count // across * height + below) / 72), layout="constrained")
        FigureCanvasAgg(canvas)
        canvas.get_layout_engine().set(w_pad=0.12 if across > 1 else 0.04)  # type: ignore[call-arg,union-attr]
        yield canvas, list(canvas.subplots(count // across, across, squeeze=False).flat)


def write(canvas: Canvas, file: Path) -> None:
    """The canvas by day as a file, of the format that its name ends with."""
    stream = io.BytesIO()
    form = file.suffix.removeprefix(".")
    with styled():
        about: Any = {"metadata": {"CreationDate": None}} if form == "pdf" else {}
        canvas.savefig(stream, format=form, dpi=144, facecolor=PAPER, **about)
    write_atomically(file, stream.getvalue())


def short(text: str, most: int = 22) -> str:
    """A name that fits beside a bar: its two ends; control characters, which SVG cannot hold, as dots."""
    text = "".join(char if char.isprintable() else "·" for char in text)
    tail = most // 2
    return text if len(text) <= most else f"{text[: most - tail - 1]}…{text[-tail:]}"


def whole_numbers(axes: Axes) -> None:
    """Ticks of the axis across."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def powers(axes: Axes, base: int = 10) -> None:
    """A logarithmic axis across, with plain numbers."""
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")


def columns(names: Sequence[str], width: float) -> int:
    """How many names fit beside each other in a legend of that width."""
    most = max(1, min(len(names), int(width // (46 + 6.2 * max(map(len, names), default=1)))))
    rows = max(1, -(-len(names) // most))
    return -(-len(names) // rows) or 1  # in rows of one length, as near as can be


def legend_height(names: Sequence[str], width: float) -> float:
    """What a legend below a plot takes; nothing for one series."""
    return 18.0 * -(-len(names) // columns(names, width)) if len(names) > 1 else 0.0


def legend(canvas: Canvas, width: float, entries: Mapping[str, Any] | None = None) -> None:
    """Names below the plot, as many in a row as fit."""
    if entries is None:
        entries = {}
        for axes in canvas.axes:
            entries |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    across = columns(list(entries), width)
    where: Any = {"loc": "outside lower center", "ncols": across, "handlelength": 2.4, "columnspacing": 1.2}
    canvas.legend(list(entries.values()), list(entries), **where)


def heat(axes: Axes, values: Sequence[Sequence[float]], most: float) -> None:
    """A map: the more, the less of the paper is seen; nothing for what is not a number. Ink is legible on all of it."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    known = [(x, y, value) for y, row in enumerate(values) for x, value in enumerate(row) if value == value]
    colours = [(*to_rgb(HEAT), min(max(value / most, 0.0), 1.0)) for *_, value in known]
    boxes = [Rectangle((x, y), 1, 1) for x, y, _ in known]
    axes.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors="none", linewidths=0))
    axes.set_xlim(0, max(map(len, values), default=1))
    axes.set_ylim(len(values), 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def bytes_across(axes: Axes) -> None:
    """A logarithmic axis across, of sizes."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.15, high * 1.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: human(round(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
