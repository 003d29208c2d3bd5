"""Plots as inline SVG: small, of one width, readable on a phone, in the page's colours by day and by night."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDTH = 400  # units of a plot; text has 11
# Stand-ins for the style sheet's colours. Those of series tell apart for all eyes (Okabe and Ito, "Color universal
# design", 2008), and never tell anything alone.
INK, SOFT, LINE, PAPER = "#000001", "#000002", "#000003", "#000004"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#000011", "#000012", "#000013", "#000014", "#000015", "#000016"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_VARIABLES = {
    INK: "ink", SOFT: "soft", LINE: "line", PAPER: "paper", BLUE: "blue", ORANGE: "orange", GREEN: "green", RED: "red",
    PURPLE: "purple", SKY: "sky",
}  # fmt: skip
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mergebench",  # equal data, equal bytes
    "text.parse_math": False,
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
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
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


class Figure(NamedTuple):
    """A plot as SVG, and its description in words."""

    svg: str
    alt: str
    wide: bool = False
    kind: str = "figure"


@contextmanager
def plot(height: float) -> Iterator[tuple[Canvas, Axes]]:
    """A canvas of `WIDTH` by `height` units with one pair of axes, in the page's style."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hide its messages about the font cache
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about glyphs that its font lacks but the reader's has
        canvas = Canvas(figsize=(WIDTH / 72, height / 72), layout="constrained")
        FigureCanvasSVG(canvas)
        yield canvas, canvas.add_subplot()


def to_svg(canvas: Canvas, name: str) -> str:
    """The canvas for a page; `name`: of letters and hyphens, once a page, so that no two plots share an id."""
    stream = StringIO()
    canvas.savefig(stream, format="svg")
    text = stream.getvalue()
    text = text[text.index("<svg") :].strip()
    opening, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', opening)
    assert box is not None
    rest = re.sub(r"<style[^>]*>.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", rest, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', rest))
    rest = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", rest)
    rest = rest.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    rest = re.sub(r"<g>\s*</g>|<defs>\s*</defs>", "", rest)
    for stand_in, variable in _VARIABLES.items():
        rest = rest.replace(stand_in, f"var(--{variable})")
    rest = rest.replace("font-family: 'DejaVu Sans'; ", "").replace("\n", " ")
    return f'<svg {box[0]} aria-hidden="true" focusable="false">{rest}'


def short(text: str, most: int = 22) -> str:
    """A name that fits beside a bar: its two ends; control characters, which SVG cannot hold, as dots."""
    text = "".join(char if char.isprintable() else "·" for char in text)
    tail = most // 2
    return text if len(text) <= most else f"{text[: most - tail - 1]}…{text[-tail:]}"


def bars(
    name: str,
    alt: str,
    title: str,
    rows: Sequence[tuple[str, float, float | None, str, str]],
    *,
    hatched: Sequence[int] = (),
    marks: Sequence[tuple[float, str]] = (),
    most: float | None = None,
) -> Figure:
    """Horizontal bars from zero: (label, value, standard error, colour, text at the end) from top to bottom.

    hatched: the rows of other kinds. marks: values marked by a line through all bars, with how it is drawn.
    """
    with plot(44 + 22 * len(rows)) as (canvas, axes):
        reach = most or max([value + (error or 0) for _, value, error, _, _ in rows] + [0.0]) or 0.0
        least = min([value - (error or 0) for _, value, error, _, _ in rows if value < 0] + [0.0])
        room = (reach - least or 1) * max(0.37, 0.034 * max([len(text) for *_, text in rows], default=0))
        for place, (_, value, error, colour, text) in enumerate(rows):
            hatch = "////" if place in hatched else None
            axes.barh(place, value, color=colour, height=0.68, hatch=hatch, edgecolor=PAPER, linewidth=0)
            if error:
                axes.errorbar(value, place, xerr=error, color=INK, linewidth=1.2, capsize=2.5)
            axes.text(reach + room, place, text, ha="right", va="center", fontsize=10, color=INK)
        for value, dashes in marks:
            axes.axvline(value, color=INK, linestyle=dashes, linewidth=1, zorder=3)
        axes.set_yticks(range(len(rows)), [short(label) for label, *_ in rows])
        axes.set_xlim(least, reach + room * 1.03)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xticks([])
        axes.spines[["bottom"]].set_visible(False)
        if least < 0:
            axes.spines[["left"]].set_visible(False)
            axes.axvline(0, color=LINE, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        axes.set_title(short(title, 44), fontweight="bold")
        return Figure(to_svg(canvas, name), alt)


def legend(canvas: Canvas, columns: int = 2) -> None:
    """Names below the plot; each row of them takes 16 units."""
    canvas.legend(loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.4)
