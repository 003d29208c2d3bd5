"""The plot of every layer's scores, beside a probe whose layer was chosen among all."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.files import write_atomically

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"  # Okabe and Ito, "Color universal design", 2008


def write_curve(about: Mapping[str, Any], path: Path) -> None:
    """The curve of a probe's `about["layers"]` as a PNG: cross-validated accuracy with its standard error, and AUC."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hide its messages about the font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = about["layers"]
    numbers = [one["layer"] for one in layers]
    canvas = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    accuracy = [100 * one["cv_accuracy"] for one in layers]
    stderr = [100 * one["cv_stderr"] for one in layers]
    axes.errorbar(numbers, accuracy, stderr, color=BLUE, marker="o", markersize=3.5, elinewidth=0.8, label="accuracy")
    axes.plot(numbers, [100 * one["auc"] for one in layers], color=ORANGE, linestyle="--", label="AUC")
    axes.axhline(100 * about["cv_majority"], color=GREY, linestyle=":", label="larger class")
    best = numbers.index(about["layer"])
    axes.plot(
        numbers[best], accuracy[best], "o", markersize=11, markerfacecolor="none", color=BLUE,
        label=f"layer {about['layer']}, the probe's",
    )  # fmt: skip
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel("cross-validated, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"'{about['classes'][1]}' against '{about['classes'][0]}'", loc="left", fontsize=10, parse_math=False
    )
    canvas.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    stream = io.BytesIO()
    canvas.savefig(stream, format="png", dpi=150)
    write_atomically(path, stream.getvalue())
