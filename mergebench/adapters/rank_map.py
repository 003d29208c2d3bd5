"""The rank of every module of an adapter, layers down and modules across: as a grid, and as a plot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mergebench.checkpoint import drawing

_LAYER = re.compile(r"(?:^|\.)\d+(?=\.)")


def grid(ranks: Mapping[str, int]) -> tuple[list[str], dict[str, dict[str, int]]]:
    """The modules' names within a layer, and by layer the rank of each that has one; outside the layers it is ""."""
    cells: dict[str, dict[str, int]] = {}
    for module, rank in ranks.items():
        layer = _LAYER.search(module)
        place, name = (module[: layer.end()], module[layer.end() + 1 :]) if layer else ("", module)
        cells.setdefault(place, {})[name] = rank
    return list(dict.fromkeys(name for row in cells.values() for name in row)), cells


def write_plot(ranks: Mapping[str, int], path: Path, title: str) -> None:
    """The grid as a PNG, each rank in its cell."""
    names, cells = grid(ranks)
    values = [[row.get(name, float("nan")) for name in names] for row in cells.values()]
    with drawing.plots(150 + 65 * len(names), 100 + 22 * len(values)) as (canvas, (axes,)):
        drawing.heat(axes, values, max(1, *ranks.values()))
        for y, row in enumerate(cells.values()):
            for x, name in enumerate(names):
                if name in row:
                    axes.text(x + 0.5, y + 0.5, str(row[name]), ha="center", va="center", fontsize=9)
        axes.set_xticks([x + 0.5 for x in range(len(names))], names, rotation=30, ha="right", fontsize=9)
        axes.set_yticks([y + 0.5 for y in range(len(cells))], list(cells), fontsize=9)
        axes.set_title(drawing.short(f"rank of each module: {title}", 18 + 11 * len(names)))
        drawing.write(canvas, path)
