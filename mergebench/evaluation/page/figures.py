"""Plots as inline SVG, readable on a phone, in the page's colours by day and by night; and as files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import COLOURS, GREY, INK, LINE, PAPER, Look, look, short, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

THIRD, WIDTH, FULL = (
    262.0,
    400.0,
    drawing.WIDTH,
)  # units of a plot in a third of the page, half, all: letters of one size
KINDS = ("pdf", "png")


class Figure(NamedTuple):
    """A plot: its name, of letters, digits and hyphens, once a page; its description in words; how it is drawn at a
    width."""

    name: str
    alt: str
    draw: Callable[[float], Canvas]
    wide: bool = False  # it needs the whole width of the page
    like: bool = False  # it has the scale of those beside it: all of one size, or lengths would mislead
    caption: str = ""  # below it, where it stands alone

    def svg(self, width: float, end: str = "") -> str:
        return to_svg(self.draw(width), self.name + end)

    def save(self, folder: Path) -> list[Path]:
        """NAME.pdf and NAME.png, by day, of the width that the page shows."""
        canvas = self.draw(FULL if self.wide else WIDTH)
        files = [folder / f"{self.name}.{kind}" for kind in KINDS]
        for file in files:
            drawing.write(canvas, file)
        return files


class Drawn(NamedTuple):
    """A plot as the page shows it. narrow: for small screens, where it differs; third: three are in a row."""

    svg: str
    alt: str
    narrow: str = ""
    third: bool = False


def drawn(figures: Sequence[Figure]) -> list[Drawn]:
    """The plots of a gallery, two beside each other; a last one that stands alone takes the whole width, but three or
    more on one scale stand three in a row then."""
    if len(figures) > 2 and len(figures) % 2 and all(figure.like for figure in figures):
        return [Drawn(one.svg(THIRD, "-third"), one.alt, one.svg(WIDTH), third=True) for one in figures]
    found, beside = [], 0
    for place, figure in enumerate(figures):
        whole = figure.wide or (beside % 2 == 0 and (place + 1 == len(figures) or figures[place + 1].wide))
        beside += not whole
        if whole:
            found.append(Drawn(figure.svg(FULL, "-full"), figure.alt, figure.svg(WIDTH)))
        else:
            found.append(Drawn(figure.svg(WIDTH), figure.alt))
    return found


@contextmanager
def plot(width: float, height: float) -> Iterator[tuple[Canvas, Axes]]:
    """A canvas of that many units with one pair of axes."""
    with drawing.plots(width, height) as (canvas, (axes,)):
        yield canvas, axes


def to_svg(canvas: Canvas, name: str) -> str:
    """The canvas for a page."""
    stream = StringIO()
    with styled():
        canvas.savefig(stream, format="svg", transparent=True)
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
    for variable, (day, _) in COLOURS.items():
        rest = rest.replace(day, f"var(--{variable})")
    rest = rest.replace("font-family: 'DejaVu Sans'; ", "").replace("\n", " ")
    return f'<svg {box[0]} aria-hidden="true" focusable="false">{rest}'


def slug(*parts: object) -> str:
    """A name for a figure: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")[:60]


def room(width: float) -> int:
    """Letters that a name at the side of a plot may have."""
    return int(width * 0.066)


def looks(names: Mapping[str, str]) -> dict[str, Look]:
    """How each model is drawn in all plots of a page. names: of the models with their roles.

    The first merge is blue, the base grey; the others follow in their order.
    """
    merged = next((name for name, role in names.items() if role == "merged"), None)
    base = next((name for name, role in names.items() if role == "base"), None)
    others = [name for name in names if name not in (merged, base)]
    found = {name: look(place + (merged is not None)) for place, name in enumerate(others)}
    if merged is not None:
        found[merged] = look(0)
    if base is not None:
        found[base] = Look(GREY, "o", ":")
    return found


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

    def draw(width: float) -> Canvas:
        with plot(width, 44 + 22 * len(rows)) as (canvas, axes):
            reach = most or max([value + (error or 0) for _, value, error, _, _ in rows] + [0.0]) or 0.0
            least = min([value - (error or 0) for _, value, error, _, _ in rows if value < 0] + [0.0])
            letters = max([len(text) for *_, text in rows], default=0)
            room_ = (reach - least or 1) * max(0.37, 0.034 * letters) * (WIDTH / width) ** 1.2
            for place, (_, value, error, colour, text) in enumerate(rows):
                hatch = "////" if place in hatched else None
                axes.barh(place, value, color=colour, height=0.68, hatch=hatch, edgecolor=PAPER, linewidth=0)
                for colour_, wide in ((PAPER, 3.2), (INK, 1.2)) if error else ():  # to be seen on the bar too
                    axes.errorbar(value, place, xerr=error, color=colour_, elinewidth=wide, capsize=2.5, capthick=wide)
                axes.text(reach + room_, place, text, ha="right", va="center", fontsize=10, color=INK)
            for value, dashes in marks:
                axes.axvline(value, color=INK, linestyle=dashes, linewidth=1, zorder=3)
            axes.set_yticks(range(len(rows)), [short(label, room(width)) for label, *_ in rows])
            axes.set_xlim(least, reach + room_ * 1.03)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_xticks([])
            axes.spines[["bottom"]].set_visible(False)
            if least < 0:
                axes.spines[["left"]].set_visible(False)
                axes.axvline(0, color=LINE, linewidth=0.8)
            axes.tick_params(axis="y", length=0)
            axes.set_title(short(title, int(width / 9)))
        return canvas

    return Figure(name, alt, draw, like=most is not None)
