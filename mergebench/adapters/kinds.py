"""What each kind of adapter would keep of a fine-tune within a number of bytes, beside a LoRA of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mergebench.adapters import targets
from mergebench.adapters.extract import is_held, nothing, settings_of, share_of
from mergebench.adapters.fine_tune import Differences, Reading
from mergebench.adapters.intrinsic_dimension import captured
from mergebench.adapters.target import Fitting
from mergebench.adapters.targets.lora import RANK, rank_bytes
from mergebench.checkpoint.files import Files
from mergebench.deltas import svd
from mergebench.errors import ModelError, RecipeError

SUBSPACE = "subspace"


class Kept(NamedTuple):
    """What one kind keeps; shares are of |D|^2 of the whole fine-tune, all its tensors."""

    kind: str
    settings: Mapping[str, Any]
    stores: str
    nbytes: int
    kept: float
    lora: float  # kept by a LoRA of as many bytes, between two ranks in proportion
    summary: Mapping[str, Any]  # what else the kind says


@dataclass(frozen=True)
class Kinds:
    """A fine-tune as each kind of adapter."""

    budget: int | None  # bytes
    rows: Sequence[Kept]
    other_tokens: Sequence[str]  # tensors with another number of tokens, which are not counted


def measure_kinds(
    base: str,
    model: str,
    *,
    kind: str | None = None,
    budget: int | None = None,
    include: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> Kinds:
    """Fit the changes of `model` to `base` as a kind of adapter, or as each, and write nothing.

    kind: with its `settings`, as `extract_adapter` takes them; None: every kind, within `budget` bytes (default: those
    of a LoRA of rank 16). include: globs of the tensors that an adapter may hold. progress: called with the elements
    done and the total. Raises as `extract_adapter` does; of every kind, one that the model has no place for has no row.
    """
    if kind == SUBSPACE:
        if include:
            raise RecipeError("--include: 'subspace' takes none", "it holds every tensor that changed")
    elif kind is not None:
        settings = settings_of(kind, settings | ({"seed": seed} if "seed" in targets.get(kind).takes else {}))
    found = Differences(base, model)
    with Files() as files, torch.inference_mode():
        reading = Reading(found, files, include)
        total = sum(reading.squared_norms.values())
        if not total:
            raise ModelError(f"{model} is {base}: there is nothing to extract")
        runs: list[tuple[str, dict[str, Any], Fitting]] = []
        if kind == SUBSPACE:
            pass  # it has no part for a single tensor
        elif kind is not None:
            runs.append((kind, settings, targets.get(kind).begin(reading, settings)))
        else:
            budget = budget or RANK * rank_bytes(reading)
            for name in targets.names():
                target = targets.get(name)
                for some in target.within(reading, budget):
                    wanted = settings_of(name, {**some, **({"seed": seed} if "seed" in target.takes else {})})
                    runs.append((name, wanted, target.begin(reading, wanted)))
        rows = _fit(reading, runs, progress)
        if kind == SUBSPACE:
            rows.append(_subspace(base, model, seed=seed, **settings))
        elif kind is not None and not rows[0].nbytes:
            raise ModelError(nothing(kind, model, base))
        if kind is None and not include:
            assert budget is not None
            rows.append(_subspace(base, model, dimension=max(budget // 4, 1), seed=seed))
        energies = _lora_energies(reading, [row.nbytes for row in rows], seed)
    rows = [row._replace(lora=energy / total) for row, energy in zip(rows, energies, strict=True)]
    return Kinds(budget, rows, found.other_tokens)


def _subspace(base: str, model: str, dimension: int, seed: int, **how: Any) -> Kept:
    """What a random subspace keeps."""
    with torch.inference_mode(False):  # its transpose is a gradient
        (one,) = captured(base, model, [dimension], seed=seed, **how)
    settings = {"dimension": dimension, "seed": seed, **how}
    stores = "numbers in a random subspace"
    return Kept(SUBSPACE, settings, stores, 4 * dimension, one.energy, 0.0, {"expected": one.expected})


def _fit(
    reading: Reading, runs: Sequence[tuple[str, dict[str, Any], Fitting]], progress: Callable[[int, int], None]
) -> list[Kept]:
    answers: list[dict[str, dict[str, Any]]] = [{} for _ in runs]
    sizes = {name: reading.found.base.tensors[name].numel for name in reading.found.shapes}
    done = 0
    for name, size in sizes.items():
        for (_, _, fitting), mine in zip(runs, answers, strict=True):
            if is_held(reading, fitting, name):
                fit = fitting.fit(name)
                if fit.tensors:
                    mine[name] = {**fit._asdict(), "nbytes": fit.nbytes, "tensors": None}
        done += size
        progress(done, sum(sizes.values()))
    total = sum(reading.squared_norms.values())
    rows = []
    for (kind, settings, fitting), mine in zip(runs, answers, strict=True):
        nbytes, kept = (sum(answer[key] for answer in mine.values()) for key in ("nbytes", "kept"))
        summary = fitting.summary(mine) if mine else {}
        rows.append(Kept(kind, settings, targets.get(kind).stores, nbytes, share_of(kept, total), 0.0, summary))
    return rows


def _lora_energies(reading: Reading, sizes: Sequence[int], seed: int) -> list[float]:
    """|D'|^2 of a LoRA of each number of bytes, of one rank in every linear layer that changed."""
    one = rank_bytes(reading)
    if not one or not any(sizes):
        return [0.0] * len(sizes)
    most = max(sizes) // one + 1
    squares = torch.zeros(most, dtype=torch.float64)  # of the singular values, summed over the layers
    widths = torch.zeros(most, dtype=torch.float64)  # bytes of each rank: a small layer has no more than its own
    for name in reading.changed_layers:
        matrix = reading.out_in(reading.difference(name))
        product = svd.truncate(matrix, min(most, *matrix.shape), seed)
        values = product.a.double().square().sum(1).square()  # half of each singular value is in each factor
        squares[: len(values)] += values
        widths[: len(values)] += 4 * sum(matrix.shape)
    energies = []
    for size in sizes:
        parts = ((size - (widths.cumsum(0) - widths)) / widths.clamp(min=1)).clamp(0, 1)  # of each rank
        energies.append(float((parts * squares).sum()))
    return energies
