"""Check the identities of merged adapters on every kind of LoRA: the second table of `mergebench doctor`."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench.adapters import merge_adapters
from mergebench.deltas.peft.directory import CONFIG, WEIGHTS
from mergebench.engine.machine import one_thread
from mergebench.testing.checks import Broken, Inapplicable, Report, find

SHAPES = {"up": (9, 7), "down": (7, 9)}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "rank_pattern": {"rank_pattern": {"down": 2}, "alpha_pattern": {"down": 5}},
}
RANK, ALPHA, WEIGHTING = 3, 4, (0.5, -1.25)
ROUNDING = 1e-5  # relative to the norm of the compared tensors


def examine_adapters() -> list[Report]:
    """All checks on small adapters of every kind that the merge reads."""
    reports = []
    for kind in KINDS:
        with one_thread(), tempfile.TemporaryDirectory(prefix="mergebench-") as folder:  # matrices too small for more
            trial = AdapterTrial(kind, Path(folder))
            reports.append(
                Report(kind, "mergebench", tuple(find(check, partial(run, trial)) for check, run in CHECKS.items()))
            )
    return reports


class AdapterTrial:
    """Two adapters of a kind on a base, and their differences by the papers' formulas."""

    def __init__(self, kind: str, place: Path) -> None:
        self.kind, self.place, self._number = kind, place, 0
        self.settings = KINDS[kind]
        random = torch.Generator().manual_seed(1)
        self.base = {module: torch.randn(shape, generator=random) for module, shape in SHAPES.items()}
        save_file({f"{module}.weight": value for module, value in self.base.items()}, place / "base.safetensors")
        self.paths, self.deltas = [], []
        for name in ("first", "second"):
            self.deltas.append(self._write(place / name, random))
            self.paths.append(place / name)

    def _write(self, directory: Path, random: torch.Generator) -> dict[str, Tensor]:
        directory.mkdir()
        stored: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        for module, (rows, columns) in SHAPES.items():
            rank = self.settings.get("rank_pattern", {}).get(module, RANK)
            alpha = self.settings.get("alpha_pattern", {}).get(module, ALPHA)
            a, b = torch.randn(rank, columns, generator=random), torch.randn(rows, rank, generator=random)
            key = f"base_model.model.{module}.lora_"
            stored |= {f"{key}A.weight": a, f"{key}B.weight": b}
            delta = b @ a * (alpha / (math.sqrt(rank) if "use_rslora" in self.settings else rank))
            if "lora_bias" in self.settings:
                stored[f"{key}B.bias"] = torch.randn(rows, generator=random)
            if "use_dora" in self.settings:
                magnitude = stored[f"{key}magnitude_vector"] = torch.rand(rows, generator=random) + 0.5
                adapted = self.base[module] + delta
                delta = magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True) - self.base[module]
            deltas[module] = delta
        save_file(stored, directory / WEIGHTS)
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA} | self.settings
        (directory / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        return deltas

    def merge(self, adapters: Sequence[Path], method: str, **settings: Any) -> Path:
        self._number += 1
        out = self.place / f"out{self._number}"
        merge_adapters(adapters, out, method=method, **settings)
        return out

    def check_several(self) -> None:
        if "lora_bias" in self.settings:
            raise Inapplicable("a bias of lora_B is no difference of a matrix: it merges as a model")

    @property
    def with_base(self) -> dict[str, Any]:
        """Further arguments for merging several adapters of this kind; DoRA's sum has full rank."""
        return {"base": str(self.place / "base.safetensors"), "rank": 7} if "use_dora" in self.settings else {}


def _products(directory: Path) -> dict[str, Tensor]:
    """B A of every module; mergebench writes adapters at scale 1."""
    stored, key = load_file(directory / WEIGHTS), "base_model.model.{}.lora_{}.weight"
    return {module: stored[key.format(module, "B")] @ stored[key.format(module, "A")] for module in SHAPES}


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    for module, value in expected.items():
        distance = float((found[module] - value).norm() / value.norm())
        if not distance <= ROUNDING:
            raise Broken(f"off by {distance:.1e}", f"{module}: {what} differ by {distance:.1e} of their size")


def _one_adapter(trial: AdapterTrial) -> None:
    """One adapter at weight 1 comes out byte for byte."""
    for method in ("linear", "cat", "svd", "ties", "tsv_m"):
        weights = None if method == "tsv_m" else [1.0]
        out = trial.merge(trial.paths[:1], method, weights=weights)
        for name in (CONFIG, WEIGHTS):
            if (out / name).read_bytes() != (trial.paths[0] / name).read_bytes():
                raise Broken("other bytes", f"{method}: {name} is not that of the one adapter")


def _sum(trial: AdapterTrial) -> None:
    """linear, cat and svd at full rank are the weighted sum of the differences."""
    trial.check_several()
    first, second = trial.deltas
    expected = {module: WEIGHTING[0] * first[module] + WEIGHTING[1] * second[module] for module in SHAPES}
    for method in ("linear", "svd") if trial.with_base else ("linear", "cat", "svd"):
        more = {"rank": 7} if method == "svd" else {}
        out = trial.merge(trial.paths, method, weights=WEIGHTING, **trial.with_base | more)
        _compare(_products(out), expected, f"{method} and the sum of the differences")


def _order(trial: AdapterTrial) -> None:
    """The order of the adapters, with their weights, changes nothing beyond rounding."""
    trial.check_several()
    for method in ("linear", "ties", "knots"):
        more: list[dict[str, Any]] = [{"weights": turn(WEIGHTING)} for turn in (list, _turned)]
        one, other = [{}, {}] if method == "knots" else more
        first = trial.merge(trial.paths, method, **trial.with_base | one)
        second = trial.merge(_turned(trial.paths), method, **trial.with_base | other)
        _compare(_products(second), _products(first), f"{method} in two orders")


def _turned(values: Sequence[Any]) -> list[Any]:
    return list(reversed(values))


CHECKS: dict[str, Callable[[AdapterTrial], None]] = {
    "one adapter": _one_adapter,
    "sum": _sum,
    "order": _order,
}
