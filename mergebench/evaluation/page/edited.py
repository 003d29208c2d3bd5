"""What was edited after the merge, and where in the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import BLUE
from mergebench.editing.summary import Entry, facts, layers_of, sentence
from mergebench.evaluation.page import figures
from mergebench.evaluation.page.figures import Figure
from mergebench.evaluation.page.layers import layer_ticks
from mergebench.evaluation.page.parts import Facts, Gallery, Part, Section, Text
from mergebench.evaluation.page.sources import Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def sections(sources: Sources) -> Iterator[Section]:
    """Each edit in the order they were made: where its rows are, and how it is taken back."""
    edits = [] if sources.provenance is None else sources.provenance.get("edits") or []
    parts: list[Part] = []
    for place, edit in enumerate(edits):
        parts += [Text(f"{place + 1}. {sentence(edit)}.")] if len(edits) > 1 else []
        parts.append(Facts(facts(edit)))
        parts += [Gallery([_bars(edit, place)], "Edited rows in each layer.")] if layers_of(edit) else []
    if edits:
        yield Section("Edits" if len(edits) > 1 else "Edit", parts)


def _bars(edit: Entry, place: int) -> Figure:
    """Counts of rows, one bar a layer."""
    layers = layers_of(edit)

    def draw(width: float) -> Canvas:
        with figures.plot(width, 150) as (canvas, axes):
            axes.bar(range(len(layers)), [count for _, count in layers], color=BLUE, width=0.8)
            axes.set_ylim(0, 1.1 * max([count for _, count in layers], default=1) or 1)
            axes.locator_params(axis="y", integer=True, nbins=5)
            axes.grid(True, axis="y")
            layer_ticks(axes, [layer for layer, _ in layers], range(len(layers)))
            axes.set_xlabel("layer")
            axes.set_title(f"rows of {drawing.short(edit['target'], 30)} edited")
        return canvas

    said = ", ".join(f"{layer}: {count}" for layer, count in layers if count)
    return Figure(figures.slug("edit", place + 1), f"Edited rows by layer: {said}.", draw)
