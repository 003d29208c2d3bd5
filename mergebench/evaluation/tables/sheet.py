"""A table of results apart from its looks, and how it looks on a terminal, in Markdown, in LaTeX and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mergebench.checkpoint.card import escape
from mergebench.errors import shown
from mergebench.evaluation.tables.layout import NONE, literal, markdown_line, render

if TYPE_CHECKING:
    from rich.table import Table

FORMATS = ("markdown", "latex", "csv")
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$", "≥": r"$\geq$", "≤": r"$\leq$",
    "–": "--", "…": r"\ldots{}", "<": r"\textless{}", ">": r"\textgreater{}", "λ": r"$\lambda$",
    "|": r"\textbar{}", "→": r"$\rightarrow$", "×": r"$\times$", "★": r"$\star$", "\u00a0": "~",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A text, and whether it is the best of the merged models in its column.

    parts: its numbers, such as a value and its error, which stand in columns of their own in CSV; None: the text.
    """

    text: str
    best: bool = False
    parts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Sheet:
    """Heads, rows and how to read them. The first `left` columns are set to the left, the others are numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    legend: str = ""
    left: int = 1
    ends: frozenset[int] = frozenset()  # rows after which a group ends
    parts: dict[int, tuple[str, ...]] = field(default_factory=dict)  # CSV's columns, where one column makes several

    def terminal(self, *, width: int | None = None, styled: bool = False) -> list[str]:
        """Lines, at most `width` columns wide (None: as wide as they need)."""
        from rich import box
        from rich.table import Table

        out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, head in enumerate(self.heads):
            side: Literal["left", "right"] = "left" if place < self.left else "right"
            out.add_column(literal(head), justify=side, overflow="fold", min_width=8 if head == "model" else None)
        for place, row in enumerate(self.rows):
            cells = [literal(cell.text, style="bold" if cell.best else "") for cell in row]
            out.add_row(*cells, end_section=place in self.ends)
        return render(out, self.legend, width=width, styled=styled)

    def markdown(self) -> str:
        """A GitHub table and its legend."""
        marks = ["---"] * self.left + ["---:"] * (len(self.heads) - self.left)
        lines = [markdown_line(map(escape, self.heads)), markdown_line(marks)]
        for row in self.rows:
            cells = (f"**{escape(cell.text)}**" if cell.best else escape(cell.text) for cell in row)
            lines.append(markdown_line(cells))
        return "\n".join([*lines, *(["", escape(self.legend)] if self.legend else [])])

    def latex(self) -> str:
        """A tabular for the package booktabs; the legend as a comment."""
        columns = "l" * self.left + "r" * (len(self.heads) - self.left)
        lines = [f"% {' '.join(self.legend.split())}"] if self.legend else []
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_line([_latex(head) for head in self.heads])]
        lines.append(r"\midrule")
        for place, row in enumerate(self.rows):
            text = [_latex(cell.text) for cell in row]
            lines.append(_latex_line([rf"\textbf{{{t}}}" if c.best else t for t, c in zip(text, row, strict=True)]))
            lines += [r"\addlinespace"] * (place in self.ends and place + 1 < len(self.rows))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])

    def csv(self) -> str:
        """Comma-separated values with a line of heads; what has an error or an interval takes several columns."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([name for place, head in enumerate(self.heads) for name in self.parts.get(place, (head,))])
        for row in self.rows:
            listed: list[str] = []
            for place, cell in enumerate(row):
                count = len(self.parts.get(place, (" ",)))
                found = cell.parts if cell.parts is not None else (_plain(cell.text),)
                listed += [*found, *[""] * (count - len(found))][:count]
            writer.writerow(listed)
        return out.getvalue().rstrip("\n")


def of(table: Table) -> Sheet:
    """A table that was made for the terminal."""
    columns = table.columns
    left = next((place for place, column in enumerate(columns) if column.justify == "right"), len(columns))
    rows = zip(*(map(str, column.cells) for column in columns), strict=True)
    return Sheet([str(column.header) for column in columns], [list(map(Cell, row)) for row in rows], left=left)


def written(sheets: Sequence[Sheet], form: str) -> str:
    """Tables one after another in one of `FORMATS`. CSV holds the first one only: a file has one line of heads."""
    if form == "csv":
        return sheets[0].csv()
    return "\n\n".join(sheet.latex() if form == "latex" else sheet.markdown() for sheet in sheets)


def _plain(text: str) -> str:
    """A number as other programs read it; no number is nothing."""
    return "" if text == NONE else re.sub(r"^[+−](?=\d)", lambda sign: "-" * (sign[0] == "−"), text)


def _latex(text: str) -> str:
    found = "".join(_LATEX.get(letter, letter) for letter in shown(text))
    if found.startswith(("[", "*")):  # which the end of the line before would take
        return f"{{{found[0]}}}{found[1:]}"
    return found


def _latex_line(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cells)} \\"
