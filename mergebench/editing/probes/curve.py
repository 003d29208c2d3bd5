"""The plot of every layer's scores, beside a probe whose layer was chosen among all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import BLUE, GREY, SERIES, WIDTH


def write_curve(about: Mapping[str, Any], path: Path) -> None:
    """The curve of a probe's `about["layers"]` as a PNG: cross-validated accuracy in % with its standard error, and AUC
    on an axis of its own, from 0 to 1."""
    layers = about["layers"]
    numbers = [one["layer"] for one in layers]
    accuracy = [100 * one["cv_accuracy"] for one in layers]
    stderr = [100 * one["cv_stderr"] for one in layers]
    best = numbers.index(about["layer"])
    with drawing.plots(WIDTH, 270, 1, drawing.legend_height([""] * 4, WIDTH)) as (canvas, (axes,)):
        right = axes.twinx()
        right.plot(numbers, [one["auc"] for one in layers], color=SERIES[1], linestyle="--", label="AUC (right axis)")
        axes.errorbar(
            numbers,
            accuracy,
            stderr,
            color=BLUE,
            marker="o",
            markersize=3.5,
            elinewidth=0.8,
            label="accuracy ± standard error",
        )
        axes.axhline(100 * about["cv_majority"], color=GREY, linestyle=":", label="always the larger class")
        axes.plot(
            numbers[best], accuracy[best], "o", markersize=11, markerfacecolor="none", color=BLUE,
            label=f"layer {about['layer']}, the probe's",
        )  # fmt: skip
        low, high = axes.get_ylim()
        low, high = min(low, 50.0), max(high, 100.0)
        axes.set_ylim(low, high)
        right.set_ylim(low / 100, high / 100)
        right.spines["right"].set_visible(True)
        axes.set_xlabel("layer (0: embeddings)")
        axes.set_ylabel("cross-validated accuracy, %")
        right.set_ylabel("cross-validated AUC")
        drawing.whole_numbers(axes)
        axes.grid(axis="y")
        classes = [drawing.short(str(name), 20) for name in about["classes"]]
        axes.set_title(f"Probe of label {classes[1]} against {classes[0]}")
        drawing.legend(canvas, WIDTH)
        drawing.write(canvas, path)
