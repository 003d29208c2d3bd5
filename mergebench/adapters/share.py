"""How much of a model its deltas change, by kind of module: |W' - W| / |W| over the changed tensors.

|W' - W| is exact for kinds with a closed form. Otherwise it is measured on a few tiles of a tensor, as |W| is: an
estimate within a few percent, for a small part of the time that a merge takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mergebench.checkpoint.delta import Chain, Delta, matrix_shape, tile_rows
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.fp8 import Scales
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.names import module_kind
from mergebench.checkpoint.values import CPU, Stored
from mergebench.deltas.verbs import closed_energy
from mergebench.engine.machine import one_thread

TILES = 4  # measured of a tensor, evenly spread
NEARLY_NOTHING = 1e-5  # of |W|: far less than bfloat16 can store


class Share(NamedTuple):
    """What deltas change of the tensors of one kind of module."""

    tensors: int
    share: float  # |W' - W| / |W|


def changed_share(model: Model) -> dict[str, Share]:
    """|W' - W| / |W| by kind of module, of the tensors that a model's deltas change; "all" comes first."""
    sums: dict[str, tuple[int, float, float]] = {}
    with Files() as files, one_thread():
        for name, deltas in model.deltas.items():
            difference, weight = _squares(files, model, name, deltas)
            for group in ("all", module_kind(name)):
                count, changed, total = sums.get(group, (0, 0.0, 0.0))
                sums[group] = count + 1, changed + difference, total + weight
    return {
        group: Share(count, math.sqrt(changed / total) if total else math.inf if changed else 0.0)
        for group, (count, changed, total) in sums.items()
    }


def say(shares: dict[str, Share]) -> str:
    """The shares in a line: `changes 1.2% of |W| in 40 tensors (attention 1.5%, MLP 0.9%)`."""
    total = shares["all"]
    groups = ", ".join(f"{group} {_percent(one.share)}" for group, one in shares.items() if group != "all")
    return f"changes {_percent(total.share)} of |W| in {total.tensors} tensor{'s' * (total.tensors > 1)} ({groups})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def warning(shares: dict[str, Share]) -> str | None:
    """A line about kinds of module whose change may be lost in the stored type; None if there are none."""
    groups = [group for group, one in shares.items() if group != "all" and one.share < NEARLY_NOTHING]
    what = "nothing at all" if all(not shares[group].share for group in groups) else "almost nothing"
    return f"changes {what} of: {', '.join(groups)}. Was it trained?" if groups else None


def _squares(files: Files, model: Model, name: str, deltas: Sequence[Delta]) -> tuple[float, float]:
    """|W' - W|^2 and |W|^2 of a tensor."""
    info = model.tensors[name]
    base = Stored(files, Scales(files), info)
    whole = Chain(files, CPU, base, deltas)
    exact = closed_energy(files, deltas[0]) if len(deltas) == 1 else None
    measured = changed = total = 0.0
    step = tile_rows(info.shape) * matrix_shape(info.shape)[1]
    count = -(-info.numel // step)
    for number in sorted({at * (count - 1) // max(TILES - 1, 1) for at in range(TILES)}):
        start = number * step
        values = torch.empty(min(step, info.numel - start))
        base.read(start, values)
        total += float(values.double().square().sum())
        if exact is None:
            folded = torch.empty_like(values)
            whole.read(start, folded)
            changed += float((folded.double() - values.double()).square().sum())
        measured += len(values)
    grown = info.numel / measured if measured else 1.0
    return (changed * grown if exact is None else exact), total * grown
