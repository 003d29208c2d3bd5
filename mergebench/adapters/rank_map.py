"""The rank of every module of an adapter, layers down and modules across: as a grid, and as a plot."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from mergebench.checkpoint.files import write_atomically

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
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hide its messages about the font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, cells = grid(ranks)
    values = [[row.get(name, float("nan")) for name in names] for row in cells.values()]
    canvas = Figure(figsize=(2 + 0.9 * len(names), 1.4 + 0.3 * len(values)), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    most = max(ranks.values())
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=max(most, 1), aspect="auto")
    for y, row in enumerate(cells.values()):
        for x, name in enumerate(names):
            if name in row:
                axes.text(x, y, str(row[name]), ha="center", va="center", fontsize=8, color=_ink(row[name], most))
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(cells)), list(cells), fontsize=8)
    axes.set_title(f"rank of each module: {title}", loc="left", fontsize=10, parse_math=False)
    canvas.colorbar(image, label="rank")
    stream = io.BytesIO()
    canvas.savefig(stream, format="png", dpi=150)
    write_atomically(path, stream.getvalue())


def _ink(rank: int, most: int) -> str:
    """Black on the light end of the colours, white on the dark one."""
    return "black" if 2 * rank > most else "white"
