"""HiRA (Huang et al., ICLR 2025), the residual form of HUT (arXiv:2409.13501): W' = W + W * (B A), element by element.

B and A minimise |W * (B A) - D|^2 by alternating least squares: with one factor fixed, every row of the other has r x r
normal equations whose weights are W^2. HUT's thesis is that a change is larger where the weight is: the provenance has
the correlation of |D| and |W|, and the share that a LoRA of the same rank keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergebench.adapters import peft_directory
from mergebench.adapters.fine_tune import Reading
from mergebench.adapters.target import Answers, Fit, Settings, Shapes, Target
from mergebench.adapters.targets.lora import RANK, ranks_within
from mergebench.deltas import svd
from mergebench.deltas.peft.directory import PREFIX, WEIGHTS

FLOORS = 0.01, 1.0  # of |W| in the two starts, as shares of its root mean square
SWEEPS, GAIN = 40, 1e-4  # the search ends when a sweep adds less than this share of what is left of |D|^2
RIDGE = 1e-10  # of the mean diagonal of the normal equations: a row that is all zeros has none
BLOCK = 1 << 20  # elements of W at a time, in float64


class Hadamard(NamedTuple):
    """B [out, r] and A [r, in] of W * (B A), and shares of |D|^2: what they keep and what the search began with."""

    b: Tensor
    a: Tensor
    kept: float
    start: float


def fit_hadamard(weight: Tensor, difference: Tensor, rank: int, seed: int = 0) -> Hadamard:
    """B and A for which |W * (B A) - D|^2 is least, from the better of two starts.

    weight, difference: W and D [out, in]. A start is the best product of D W / (W^2 + f^2): with a small f the ratio
    D / W, which is B A if D = W * (B A); with a large one nearly D W, without the ratio's outliers where W is small.
    No sweep loses anything, as each half of it is the least-squares solution for one factor. Zeros of W stay.
    """
    total = svd.squared_norm(difference)
    size = math.sqrt(svd.squared_norm(weight) / weight.numel())
    starts = []
    for floor in FLOORS:
        ratio = (
            difference * weight / (weight.square() + (floor * size) ** 2).clamp_(min=torch.finfo(torch.float32).tiny)
        )
        first = svd.truncate(ratio, rank, seed).a.T.double()
        starts.append((*_solve(weight, difference, first), first))
    b, kept, a = max(starts, key=lambda start: start[1])
    begun = kept
    for _ in range(SWEEPS):
        b, _ = torch.linalg.qr(b)  # the same space, well conditioned
        a, _ = _solve(weight.T, difference.T, b)
        basis, _ = torch.linalg.qr(a)
        b, better = _solve(weight, difference, basis)
        a, gained, kept = basis, better - kept, better
        if gained <= GAIN * (total - kept):
            break
    product = svd.compress(b, a.T, rank)  # half of the size to each factor
    return Hadamard(product.b, product.a, kept / total if total else 0.0, begun / total if total else 0.0)


def _solve(weight: Tensor, difference: Tensor, factor: Tensor) -> tuple[Tensor, float]:
    """X [rows, r] for which |W * (X F') - D|^2 is least, F [columns, r] given, and how much of |D|^2 that keeps."""
    rank = factor.shape[1]
    upper = torch.triu_indices(rank, rank)
    products = factor[:, upper[0]] * factor[:, upper[1]]  # of pairs of F's columns: the matrices are symmetric
    found, kept = [], 0.0
    step = max(BLOCK // weight.shape[1], 1)
    for first in range(0, len(weight), step):
        w, d = (one[first : first + step].double() for one in (weight, difference))
        normal = torch.zeros(len(w), rank, rank, dtype=torch.float64)
        normal[:, upper[0], upper[1]] = normal[:, upper[1], upper[0]] = w.square() @ products
        right = (w * d) @ factor
        diagonal = normal.diagonal(dim1=1, dim2=2)
        plain = normal.clone()
        diagonal += RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float64).tiny
        x = svd.solve(normal, right.unsqueeze(-1)).squeeze(-1)
        kept += float((2 * right * x).sum() - torch.einsum("nr,nrs,ns->", x, plain, x))
        found.append(x)
    return torch.cat(found), kept


class _Fitting:
    file, beside = WEIGHTS, ()

    def __init__(self, reading: Reading, settings: Settings) -> None:
        self._reading, self._settings, self._found = reading, settings, reading.found
        self.held: Mapping[str, str] = self._found.linear

    def fit(self, name: str) -> Fit:
        difference = self._reading.out_in(self._reading.difference(name))
        weight = self._reading.out_in(self._reading.base(name))
        rank, seed = min(self._settings["rank"], *weight.shape), self._settings["seed"]
        if not difference.any():
            return Fit({}, 0.0, 0.0)
        found, best = fit_hadamard(weight, difference, rank, seed), svd.truncate(difference, rank, seed)
        sums = magnitude_sums(difference, weight)
        about = {"rank": rank, "correlation": correlation([sums]), "energy_of_lora": best.kept / best.total}
        module = f"{PREFIX}{self.held[name]}"
        factors = {f"{module}.hira_A": found.a, f"{module}.hira_B": found.b}
        return Fit(factors, best.total, found.kept * best.total, about, {"magnitudes": sums, "lora": best.kept})

    def shapes(self, stored: Shapes, answers: Answers) -> Shapes:
        return stored

    def config(self, answers: Answers) -> dict[str, Any]:
        ranks = {self.held[name]: answer["about"]["rank"] for name, answer in answers.items()}
        usual, pattern = peft_directory.rank_pattern(ranks)
        about = {"r": usual, "rank_pattern": pattern, "fan_in_fan_out": self._found.transposed, "hira_dropout": 0.0}
        return peft_directory.plain_config("HIRA", self._found.base, ranks, **about)

    def metadata(self, answers: Answers) -> Mapping[str, str]:
        return {}

    def summary(self, answers: Answers) -> Mapping[str, Any]:
        total = sum(answer["total"] for answer in answers.values())
        return {
            "correlation": correlation(answer["sums"]["magnitudes"] for answer in answers.values()),
            "energy_of_lora": sum(answer["sums"]["lora"] for answer in answers.values()) / total,
        }

    def at_most(self) -> int:
        shapes, rank = map(self._found.shape, self.held), self._settings["rank"]
        return sum(4 * min(rank, *shape) * sum(shape) for shape in shapes)


def magnitude_sums(difference: Tensor, weight: Tensor) -> list[float]:
    """Sums over the elements, for `correlation`: of 1, |D|, |W|, |D|^2, |W|^2 and |D| |W|."""
    sums = torch.zeros(6, dtype=torch.float64)
    for row in range(0, len(weight), 256):
        d, w = (part[row : row + 256].abs().double() for part in (difference, weight))
        parts = (torch.tensor(float(d.numel())), d.sum(), w.sum(), d.square().sum(), w.square().sum(), (d * w).sum())
        sums += torch.stack([part.double() for part in parts])
    return sums.tolist()


def correlation(sums: Iterable[list[float]]) -> float:
    """The Pearson correlation of |D| and |W|, from sums over parts of the model; 0 if one of them is constant."""
    n, d, w, dd, ww, dw = (sum(parts) for parts in zip(*sums, strict=True))
    spread = (dd - d * d / n) * (ww - w * w / n)
    return (dw - d * w / n) / math.sqrt(spread) if spread > 0 else 0.0


def _check(settings: Settings) -> Settings:
    peft_directory.check_kept(settings["rank"], None)
    return settings


hira = Target(
    stores="B A that multiplies W, of linear layers",
    takes={"rank": RANK, "seed": 0},
    begin=_Fitting,
    within=ranks_within,
    check=_check,
)
