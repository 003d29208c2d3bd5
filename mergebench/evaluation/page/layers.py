"""The statistics of a merge by layer and by kind of tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergebench.checkpoint import drawing
from mergebench.checkpoint.drawing import INK, Look
from mergebench.checkpoint.names import layer_of
from mergebench.engine.profile import Counts
from mergebench.evaluation.page import figures
from mergebench.evaluation.page.figures import Figure
from mergebench.evaluation.page.parts import Fold, Gallery, Section, Table, cells
from mergebench.evaluation.page.profile import Profile
from mergebench.evaluation.page.sources import MERGE, Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

OUTSIDE = "other"  # embeddings, last norm, head
MAPS, KINDS, TENSORS, LABELLED = 6, 20, 600, 10  # heat maps, their rows, rows of the table, columns with numbers
KEPT = (
    "An element of a model counts as kept where the merged value changes when the model's weight (for methods without "
    "weights: its values) is halved, with all thresholds as the merge found them; where every task has a mask, if the "
    "mask holds it."
)


def sections(sources: Sources) -> Iterator[Section]:
    """Norms, conflicts, what is kept."""
    profile = sources.profile
    layers = {} if profile is None else _layers(profile)
    if profile is None or not layers:
        return
    drawn = [_norms(profile, layers, sources.looks)]
    caption = "Norm: length of each model's task vector."
    if len(profile.models) > 1:
        drawn.append(_conflicts(profile, layers))
        caption += " Conflicts: of the elements that two models or more changed, the share where signs differ."
    if profile.replayed:
        drawn.append(_kept(profile, layers, sources.looks))
        caption += f" Kept: {KEPT[0].lower()}{KEPT[1:]}"
    if profile.every > 1:
        caption += f" Estimated from one in {profile.every} chunks of each tensor."
    parts = [Gallery(drawn, caption + (f" “{OUTSIDE}” is what lies outside the layers." if OUTSIDE in layers else ""))]
    if profile.replayed and len(layers) > 1:
        parts.append(_maps(profile, layers))
    yield Section("Layer by layer", [*parts, _numbers(profile)])


def _layers(profile: Profile) -> dict[str, list[str]]:
    """The tensors of each layer that any model changed, what is outside first."""
    changed = [name for name, counts in profile.counts.items() if any(counts.squares)]
    stacks = {layer[0] for name in changed if (layer := layer_of(name)) is not None}
    found: dict[tuple[int, str, int], list[str]] = {}
    for name in changed:
        layer = layer_of(name)
        found.setdefault((0, "", 0) if layer is None else (1, *layer[:2]), []).append(name)
    labels = {}
    for (inside, stack, number), names in sorted(found.items()):
        label = f"{number}" if len(stacks) == 1 else f"{stack} {number}".strip()
        labels[label if inside else OUTSIDE] = names
    return labels


def _sum(profile: Profile, names: Sequence[str]) -> Counts:
    """Of all elements of these tensors, each estimated from what was looked at of it."""
    first, *rest = (profile.counts[name].of(profile.numel[name]) for name in names)
    for counts in rest:
        first = first + counts
    return first


def _norms(profile: Profile, layers: Mapping[str, Sequence[str]], looks: Mapping[str, Look]) -> Figure:
    groups = [_sum(profile, names) for names in layers.values()]
    lines = {model: [math.sqrt(one.squares[k]) for one in groups] for k, model in enumerate(profile.models)}
    if profile.replayed:
        lines[MERGE] = [math.sqrt(one.merged) for one in groups]
    return _lines("norms", "norm of the task vector", lines, layers, looks)


def _kept(profile: Profile, layers: Mapping[str, Sequence[str]], looks: Mapping[str, Look]) -> Figure:
    groups = [_sum(profile, names) for names in layers.values()]
    lines = {model: [100 * one.kept[k] / one.elements for one in groups] for k, model in enumerate(profile.models)}
    return _lines("kept", f"kept by {profile.method}, % of elements", lines, layers, looks)


def _conflicts(profile: Profile, layers: Mapping[str, Sequence[str]]) -> Figure:
    counts = [_sum(profile, names) for names in layers.values()]
    shares = [100 * one.conflicts / one.shared if one.shared else math.nan for one in counts]
    looks = {"all models": Look(INK, "o", "-")}
    return _lines("conflicts", "signs that conflict, %", {"all models": shares}, layers, looks)


def _lines(
    name: str,
    title: str,
    lines: Mapping[str, Sequence[float]],
    layers: Mapping[str, Sequence[str]],
    looks: Mapping[str, Look],
) -> Figure:
    """Values by layer from zero; what lies outside the layers stands apart."""
    apart = int(OUTSIDE in layers)
    xs = [-1 - len(layers) / 16] * apart + [*range(len(layers) - apart)]
    shown = [drawing.short(label, 30) for label in lines]

    def draw(width: float) -> Canvas:
        with figures.plot(width, 210 + drawing.legend_height(shown, width)) as (canvas, axes):
            for text, (label, values) in zip(shown, lines.items(), strict=True):
                look, merged = looks[label], label == MERGE
                style: Any = {
                    "color": look.colour, "marker": look.mark, "markersize": 4.5, "linestyle": look.dashes,
                    "linewidth": 2.4 if merged else 1.3, "zorder": 3 if merged else 2,
                }  # fmt: skip
                axes.plot(xs[apart:], values[apart:], label=text, **style)
                axes.plot(xs[:apart], values[:apart], **style)
            axes.set_ylim(0, 1.1 * max([v for values in lines.values() for v in values if v == v], default=1.0) or 1.0)
            axes.grid(True, axis="y")
            layer_ticks(axes, list(layers), xs)
            axes.set_xlabel("layer")
            axes.set_title(title)
            if len(lines) > 1:
                drawing.legend(canvas, width)
        return canvas

    ends = "; ".join(f"{label}: {min(values):.3g} to {max(values):.3g}" for label, values in lines.items())
    return Figure(name, f"{title} by layer. {ends}.", draw)


def layer_ticks(axes: Any, labels: Sequence[str], xs: Sequence[float]) -> None:
    """Names of layers below their places, as many as fit."""
    first, step = int(OUTSIDE in labels), -(-len(labels) // 16)
    shown = [place for place in range(len(labels)) if place < first or (place - first) % step == 0]
    turned, side = (45, "right") if max(map(len, labels)) > 6 else (0, "center")
    axes.set_xticks([xs[place] for place in shown], [labels[place] for place in shown], rotation=turned, ha=side)


def _maps(profile: Profile, layers: Mapping[str, Sequence[str]]) -> Gallery:
    """What is kept of each tensor, a map for each model: kinds of tensors over layers, on one scale."""
    columns = {label: names for label, names in layers.items() if label != OUTSIDE}
    table: dict[str, dict[str, list[str]]] = {}
    for label, names in columns.items():
        for name in names:
            table.setdefault(_kind(name), {}).setdefault(label, []).append(name)
    sizes = {kind: sum(profile.numel[n] for names in row.values() for n in names) for kind, row in table.items()}
    kinds = [kind for kind in table if kind in sorted(sizes, key=lambda kind: -sizes[kind])[:KINDS]]
    grids = [
        [[_share(profile, table[kind].get(label, ()), k) for label in columns] for kind in kinds]
        for k in range(min(len(profile.models), MAPS))
    ]
    most = max((value for grid in grids for row in grid for value in row if value == value), default=1.0) or 1.0
    drawn = [_map(model, grid, kinds, list(columns), most) for model, grid in zip(profile.models, grids, strict=False)]
    caption = f"Kept of each tensor, in % of its elements, by model; a stronger colour is more, up to {most:.3g}%."
    if len(table) > len(kinds):
        caption += f" The {len(kinds)} largest kinds of tensors of {len(table)}."
    if len(profile.models) > MAPS:
        caption += f" The first {MAPS} models of {len(profile.models)}."
    return Gallery(drawn, caption)


def _share(profile: Profile, names: Sequence[str], model: int) -> float:
    if not names:
        return math.nan
    counts = _sum(profile, names)
    return 100 * counts.kept[model] / counts.elements


def _kind(name: str) -> str:
    """What a tensor is called in any layer; experts are numbered in a layer, and taken together."""
    layer = layer_of(name)
    return re.sub(r"\.\d+(?=\.|$)", ".*", layer[2] if layer is not None else name)


def _map(
    model: str, grid: Sequence[Sequence[float]], kinds: Sequence[str], labels: Sequence[str], most: float
) -> Figure:
    def draw(width: float) -> Canvas:
        with figures.plot(width, 60 + 15 * len(kinds)) as (canvas, axes):
            drawing.heat(axes, grid, most)
            if len(labels) <= LABELLED:
                for y, row in enumerate(grid):
                    for x, value in enumerate(row):
                        if value == value:
                            text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
                            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9)
            axes.set_yticks([y + 0.5 for y in range(len(kinds))], [_tail(kind) for kind in kinds], fontsize=9)
            layer_ticks(axes, labels, [x + 0.5 for x in range(len(labels))])
            axes.set_xlabel("layer")
            axes.set_title(drawing.short(model, int(width / 9)))
        return canvas

    return Figure(figures.slug("kept", model), f"Kept of {model}, by kind of tensor and layer; see the table.", draw)


def _tail(kind: str) -> str:
    """The end of a long name, which tells most."""
    kind = kind.removesuffix(".weight")
    return kind if len(kind) <= 24 else f"…{kind[-23:]}"


def _numbers(profile: Profile) -> Fold:
    """Every number by tensor."""
    heads = ["tensor", "elements", *(f"norm {model}" for model in profile.models), "conflicts %"]
    if profile.replayed:
        heads += [f"norm {MERGE}", *(f"kept {model} %" for model in profile.models)]
    names = sorted(profile.counts, key=lambda name: -profile.numel[name])[:TENSORS]
    rows = []
    for name in (name for name in profile.counts if name in set(names)):
        counts = _sum(profile, [name])
        row = [name, f"{profile.numel[name]:,}", *(f"{math.sqrt(square):.4g}" for square in counts.squares)]
        row.append(f"{100 * counts.conflicts / counts.shared:.1f}" if counts.shared else "–")
        if profile.replayed:
            shares = (f"{100 * one / max(counts.elements, 1):.2f}" for one in counts.kept)
            row += [f"{math.sqrt(counts.merged):.4g}", *shares]
        rows.append(cells(*row))
    count = len(profile.counts)
    note = "" if count <= TENSORS else f"The {TENSORS} largest tensors of {count}; "
    return Fold(f"{count} tensors in numbers", [Table(heads, rows, f"{note}all are in statistics.json.")])
