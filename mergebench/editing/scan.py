"""Read the candidate matrices once, compute the rows' properties, and run the edit on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.files import Files
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.values import Values
from mergebench.editing.edit import Rows
from mergebench.editing.neurons import Neurons
from mergebench.editing.plan import Planned
from mergebench.editing.targets import EMBEDDINGS, Target, describe
from mergebench.engine.machine import cores, one_thread
from mergebench.errors import RunError

BLOCK = 1 << 16  # elements read at once: in float64 they fit into the cache
NOISE = 2.0  # |z| below which a random vector may well have the same cosine
STEPS = (0.1, 4.0)  # median row norms: below, an edit hardly shows; above, little else is left of a row
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Found:
    """The result of an edit: how much of the direction each candidate row gets."""

    planned: Planned
    rows: Rows
    amounts: Tensor  # float32 [N]

    def changes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The changed rows of each tensor, int64 [k] ascending, and their amounts, float32 [k]."""
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        at = 0
        for target in self.planned.targets:
            amounts = self.amounts[at : at + len(target.numbers)]
            at += len(amounts)
            kept = amounts.nonzero().ravel()
            if len(kept):
                numbers = torch.tensor(target.numbers)[kept]
                parts.setdefault(target.tensor, []).append((numbers, amounts[kept]))
        found = {}
        for name, pieces in parts.items():
            numbers, amounts = (torch.cat(column) for column in zip(*pieces, strict=True))
            order = numbers.argsort()
            found[name] = numbers[order], amounts[order]
        return found

    def report(self) -> dict[str, Any]:
        """A report of the changed rows, ready for JSON; z: sqrt(width) times the cosine, standard normal for random
        vectors."""
        planned, rows, chosen = self.planned, self.rows, self.amounts != 0
        cosines, width = rows.cosine[chosen], planned.probe.width
        amounts, median = self.amounts[chosen], float(rows.norm.median())
        about = planned.probe.about
        even = len(amounts) > 0 and bool((amounts.abs() == amounts[0].abs()).all())
        step = float(amounts[0]) * rows.length / median if even and median else math.inf
        weakest = float(cosines[cosines.abs().argmin()]) if len(cosines) else 0.0
        z = weakest * width**0.5
        selects = not bool((chosen | (rows.cosine == 0)).all())  # else there is no row that may be chosen by chance
        found = {
            "edit": planned.wanted.edit,
            "probe": {
                "file": str(planned.probe.file),
                "sha256": planned.probe.sha256,
                **{key: about[key] for key in ("layer", "norm", "pool", "test_accuracy", "majority") if key in about},
            },
            "direction": planned.wanted.direction,
            "parameters": {name: value for name, value in vars(planned.params).items() if value is not None},
            "target": planned.wanted.target,
            "layers": planned.wanted.layers,
            "candidates": describe(planned.wanted.target, planned.targets),
            "rows": int(chosen.sum()),
            "of": len(rows),
            "by_layer": {
                "embeddings" if layer == EMBEDDINGS else str(layer): int((chosen & (rows.layer == layer)).sum())
                for layer in sorted(set(rows.layer.tolist()))
            },
            "share": int(chosen.sum()) * width / planned.elements,
            "alpha": float(amounts[0]) if len(amounts) and bool((amounts == amounts[0]).all()) else None,
            "relative_step": step if math.isfinite(step) else None,
            "cosine": {
                "candidates": _quantiles(rows.cosine),
                **({"least": float(cosines.min()), "most": float(cosines.max())} if len(cosines) else {}),
            },
            "z": z if selects else None,
            "width": width,
        }
        doubts = _doubts(step) if len(cosines) else []
        if len(cosines) and selects and planned.wanted.values.get("select") != "random" and abs(z) < NOISE:
            doubts.append(f"the selection is noise at its end: a row with z = {z:.2f} is as near as a random vector")
        return found | {"warnings": doubts}


def _doubts(step: float) -> list[str]:
    """What the length of a step, in median norms of the candidate rows, says of the edit."""
    least, most = STEPS
    if least <= abs(step) <= most or not math.isfinite(step):
        return []
    does = "leaves little of the edited rows" if abs(step) > most else "hardly changes the edited rows"
    return [f"a step of {step:.3g} median row norms {does}: {least:g} to {most:g} is where an edit can work"]


def scan(planned: Planned, model: Model, progress: Progress = lambda _: None) -> Found:
    """Read the candidate rows of a model once, and run the edit on them.

    `RunError` if a row is not finite. The bits do not depend on the number of cores, nor on the order of files.
    """
    direction = planned.direction.double()
    with Files() as files, one_thread():

        def work(target: Target) -> tuple[Tensor, Tensor]:
            found = _facts(model.values(files), target, direction, model.reference)
            progress(len(target.numbers) * planned.probe.width * 2)
            return found

        with ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            columns = list(pool.map(work, planned.targets))
    dots, squares = (torch.cat(column) for column in zip(*columns, strict=True))
    norms, length = squares.sqrt(), float(direction.norm())
    rows = Rows(
        cosine=torch.where(norms > 0, dots / (norms * length), 0.0).float(),  # rounded: equal rows are equal
        norm=norms.float(),
        layer=torch.cat([torch.full((len(target.numbers),), target.layer) for target in planned.targets]),
        length=length,
    )
    return Found(planned, rows, planned.edit(rows, planned.params))


def _facts(values: Values, target: Target, direction: Tensor, reference: str) -> tuple[Tensor, Tensor]:
    """Dot products with the direction and squared norms of a target's rows, float64 [n]."""
    info = values.tensors[target.tensor]
    neurons = Neurons(info, target.transposed)
    width, side = neurons.width, neurons.side
    if not target.transposed:
        step = max(BLOCK // width, 1)
        dots, squares = (
            torch.empty(target.stop - target.first).double(),
            torch.empty(target.stop - target.first).double(),
        )
        for first in range(target.first, target.stop, step):
            stop = min(first + step, target.stop)
            block = values.elements(info.name, first * width, (stop - first) * width).view(-1, width).double()
            place = slice(first - target.first, stop - target.first)
            dots[place], squares[place] = block @ direction, block.square_().sum(1)
        dots, squares = dots[:: target.step], squares[:: target.step]
    else:
        step, expert = max(BLOCK // side, 1), target.first // side
        dots, squares = torch.zeros(side).double(), torch.zeros(side).double()
        for row in range(0, width, step):
            stop = min(row + step, width)
            block = (
                values.elements(info.name, (expert * width + row) * side, (stop - row) * side).view(-1, side).double()
            )
            dots += direction[row:stop] @ block
            squares += block.square_().sum(0)
        columns = slice(target.first - expert * side, target.stop - expert * side, target.step)
        dots, squares = dots[columns], squares[columns]
    bad = (~squares.isfinite()).nonzero().ravel()
    if len(bad):
        number = target.numbers[int(bad[0])]
        what = f"{info.name}: row {number} of {reference} holds a value that is not finite"
        raise RunError(what, "an edit of it would be broken: use another checkpoint")
    return dots, squares


def _quantiles(values: Tensor) -> dict[str, float]:
    """Quantiles by percentage, from the smallest value to the largest."""
    ordered = values.sort().values
    return {f"{100 * q:g}": float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES} if len(ordered) else {}
