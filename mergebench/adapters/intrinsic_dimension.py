"""Intrinsic dimension (arXiv:2012.13255) without training: the change of a fine-tune as d numbers and a seed.

    W_i' = W_i + lambda_i P_i theta        (theta [d] for all tensors; P_i: `deltas/subspace.py`)

DID: every lambda is 1. SAID: a lambda for each tensor, which counts among the d numbers. theta is the least-squares fit
to the fine-tune's change, found by conjugate gradients on

    sum_i lambda_i^2 P_i' P_i theta = sum_i lambda_i P_i' (W_i' - W_i)

P_i is nearly isometric where d is well below the size of W_i, so 3 to 40 iterations are enough. The change is read
once, for the right-hand side. One tensor is in memory at a time, beside some vectors [d]; for SAID one for each tensor.

The paper trains theta; this projects a change that was made without the subspace. A change that has nothing to do with
it keeps d / D of its squared norm in d of D dimensions. Expect little more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mergebench import __version__
from mergebench.adapters.fine_tune import Differences, Reading
from mergebench.checkpoint.content import identity
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.target import check_file
from mergebench.deltas.formats.native import WHAT, Writing, write_file
from mergebench.deltas.subspace import GRADIENTS, LARGEST, Subspace, length, prepared, subspace
from mergebench.engine.machine import one_thread
from mergebench.engine.provenance import places
from mergebench.engine.run import Result
from mergebench.errors import ModelError, RecipeError

TOLERANCE = 1e-6  # of the residual of the normal equations, against their right-hand side
LIMIT = 200  # iterations
ROUNDS = 8  # of SAID: lambda for theta, theta for lambda
HELD = 1 << 29  # bytes of what P is drawn from, kept between iterations; what does not fit is drawn again

Progress = Callable[[int, int], None]


class Captured(NamedTuple):
    """What a subspace holds of a change: shares of the squared norm."""

    dimension: int
    energy: float
    expected: float  # of a change that has nothing to do with the subspace: d / D


class _Fit(NamedTuple):
    theta: Tensor  # float64 [d]
    lambdas: Tensor  # float64, one for each tensor
    energy: float  # captured, not a share
    iterations: int


def pack(
    base: str,
    model: str,
    out: str | Path,
    *,
    dimension: int,
    seed: int = 0,
    said: bool = False,
    gradient: str = "exact",
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Write the change from `base` to `model`, projected on a random subspace, as the delta file `out`: BASE+OUT.

    dimension: d, how many numbers the file holds, lambdas included. seed: of the subspace. said: a lambda for each
    tensor. gradient: recorded for further training, `exact` or `fairseq`. progress: called with the
    elements read and the total.

    Raises `RecipeError` if the settings are invalid, `ModelError` if the models do not fit together or are equal,
    `RunError` if the work fails.
    """
    started, out = time.perf_counter(), Path(out)
    if gradient not in GRADIENTS:
        raise RecipeError(f"gradient '{gradient}': {' or '.join(GRADIENTS)}")
    found = Differences(base, model)
    check_file(out, places(found.plan), overwrite, WHAT, f"--out {out}.safetensors")
    with one_thread():  # the blocks are too small to share: threads would wait for each other
        change = _Change(found, [dimension], seed, said, progress)
        fit = change.fit(dimension)
    writings = {
        name: Writing("subspace", {"name": name, "seed": seed, "scale": scale, "gradient": gradient}, {}, _THETA)
        for name, scale in zip(change.names, fit.lambdas.tolist(), strict=True)
    }
    aliases = found.plan.alignment.aliases.items()  # stored twice: the same change on both
    writings |= {alias: writings[name] for alias, name in aliases if name in writings}
    kept = change.captured(dimension, fit)
    made = {
        "mergebench": __version__,
        "command": "adapters extract --as subspace",
        "base": base,
        "model": model,
        "dimension": dimension,
        "seed": seed,
        "said": said,
        "elements": change.elements,
        "tensors": len(change.names),
        "energy_kept": kept.energy,
        "expected": kept.expected,
        "iterations": fit.iterations,
        "other_tokens": found.other_tokens,
    }
    made_on = None if found.base.deltas else identity(found.base)
    write_file(out, writings, {"theta": fit.theta.float()}, made, made_on)
    return Result(out, {**made, "seconds": round(time.perf_counter() - started, 3)})


_THETA = {"theta": "theta"}


def captured(
    base: str,
    model: str,
    dimensions: Sequence[int],
    *,
    seed: int = 0,
    said: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Captured]:
    """The share of the change's squared norm that `pack` would keep, for each of the dimensions.

    The change is read once. The subspaces of one seed lie in each other. Arguments and errors as for `pack`.
    """
    with one_thread():
        change = _Change(Differences(base, model), dimensions, seed, said, progress)
        return [change.captured(dimension, change.fit(dimension)) for dimension in dimensions]


class _Change:
    """The change of a fine-tune, known by its products with P, and P itself.

    All is computed for the largest dimension: of the columns of P, smaller subspaces have the first.
    """

    def __init__(
        self, found: Differences, dimensions: Sequence[int], seed: int, said: bool, progress: Progress
    ) -> None:
        if min(dimensions, default=0) < 1:
            raise RecipeError("a subspace has one dimension at least", "--dimension 10000")
        self.found, self.said = found, said
        self._largest, self._seed = max(dimensions), seed
        self.names: list[str] = []  # of the tensors that change
        self.total = 0.0  # squared norm of the change
        self._along: list[Tensor] = []  # P_i' times the change of tensor i; for DID, their sum
        self._drawn: dict[str, Subspace] = {}
        self._read(progress)
        if not self.names:
            tuned, base = found.plan.merge.models[0].reference, found.base.reference
            raise ModelError(f"{tuned} has the tensors of {base}: there is nothing to pack")
        if said and min(dimensions) <= len(self.names):
            raise RecipeError(
                f"{min(dimensions)} dimensions: {len(self.names)} tensors change, and SAID has a lambda for each",
                "choose more dimensions, or DID, which has no lambdas",
            )

    @property
    def elements(self) -> int:
        """D."""
        return sum(self.found.base.tensors[name].numel for name in self.names)

    def captured(self, dimension: int, fit: _Fit) -> Captured:
        """What a fit holds."""
        return Captured(dimension, fit.energy / self.total, min(dimension / self.elements, 1.0))

    def fit(self, dimension: int) -> _Fit:
        """theta, and for SAID the lambdas in turn with it, each the best for the other."""
        if not self.said:
            lambdas = torch.ones(len(self.names), dtype=torch.float64)
            return self._solve(lambdas, torch.zeros(dimension, dtype=torch.float64))
        theta, lambdas = torch.zeros(dimension - len(self.names), dtype=torch.float64), self._start(dimension)
        before, iterations = 0.0, 0
        for _ in range(ROUNDS):
            fit = self._solve(lambdas, theta, tolerance=1e-2)
            theta, iterations = fit.theta, iterations + fit.iterations
            if fit.energy <= before * (1 + 1e-4):
                break
            _, norms = self._normal(theta, torch.ones_like(lambdas))
            along = torch.stack([theta @ one[: len(theta)].double() for one in self._along])
            lambdas, before = torch.where(norms > 0, along / norms, 0.0), fit.energy
        fit = self._solve(lambdas, theta)
        return fit._replace(iterations=iterations + fit.iterations)

    def _start(self, dimension: int) -> Tensor:
        """The best lambdas, were every P_i an isometry: with b_i = P_i' times the change, the energy is then
        |sum_i lambda_i b_i|^2 / |lambda|^2. Of fewer than d elements, P_i is sqrt(d / D_i) times one that cannot exceed
        the change itself."""
        d, tensors = dimension - len(self.names), self.found.base.tensors
        rows = [
            one[:d].double() * min(1.0, tensors[name].numel / d) ** 0.5
            for name, one in zip(self.names, self._along, strict=True)
        ]
        stacked = torch.stack(rows)
        first: Tensor = torch.linalg.eigh(stacked @ stacked.T).eigenvectors[:, -1]
        return first

    def _read(self, progress: Progress) -> None:
        sizes = {name: self.found.base.tensors[name].numel for name in self.found.shapes}
        done, total = 0, sum(sizes.values())
        with Files() as opened:
            reading = Reading(self.found, opened)
            for name, numel in sizes.items():
                if numel > LARGEST:
                    raise ModelError(f"{name}: {numel} elements, a subspace has 2^31 in a tensor at most")
                difference = reading.difference(name).reshape(-1)
                energy = float(difference.double().square().sum())
                if energy:
                    self.names.append(name)
                    self.total += energy
                    leaf = torch.zeros(self._largest, requires_grad=True)
                    (along,) = torch.autograd.grad(self._change_of(name, leaf), leaf, difference)
                    if self.said or not self._along:
                        self._along.append(along)
                    else:
                        self._along[0] += along
                done += numel
                progress(done, total)

    def _solve(self, lambdas: Tensor, start: Tensor, tolerance: float = TOLERANCE) -> _Fit:
        """theta for these lambdas, by conjugate gradients from `start`."""
        right = torch.zeros_like(start)
        for scale, along in zip(lambdas.tolist(), self._along, strict=False):  # DID: all are 1, and there is one sum
            right += scale * along[: len(start)].double()
        theta = start.clone()
        residual = right - self._normal(theta, lambdas)[0] if theta.any() else right.clone()
        direction, left = residual.clone(), float(residual @ residual)
        wanted, iteration = tolerance**2 * float(right @ right), 0
        while left > wanted and iteration < LIMIT:
            product, _ = self._normal(direction, lambdas)
            step = left / float(direction @ product)
            theta += step * direction
            residual -= step * product
            before, left = left, float(residual @ residual)
            direction = residual + left / before * direction
            iteration += 1
        # |change|^2 - |change - P theta|^2 = 2 theta' P' change - theta' P' P theta
        return _Fit(theta, lambdas, float(theta @ (right + residual)), iteration)

    def _normal(self, theta: Tensor, lambdas: Tensor) -> tuple[Tensor, Tensor]:
        """sum_i lambda_i^2 P_i' P_i theta, and each |P_i theta|^2."""
        total, norms = torch.zeros(self._largest, dtype=torch.float64), []
        for name, scale in zip(self.names, lambdas.tolist(), strict=True):
            leaf = torch.zeros(self._largest)
            leaf[: len(theta)] = theta
            leaf.requires_grad_()
            change = self._change_of(name, leaf)
            # the gradient of |P theta|^2 / 2
            (product,) = torch.autograd.grad(change, leaf, change.detach())
            total += scale**2 * product
            norms.append(float(change.detach().double().square().sum()))
        return total[: len(theta)], torch.tensor(norms, dtype=torch.float64)

    def _change_of(self, name: str, theta: Tensor) -> Tensor:
        """P theta of a tensor, flat."""
        shape = self.found.shapes[name]
        drawn = self._drawn.get(name)
        if drawn is None:
            drawn = prepared(Subspace(theta.detach(), name, self._seed), shape)
            size = 8 * length(self.found.base.tensors[name].numel)
            if size + sum(8 * len(held.gains) for held in self._drawn.values() if held.gains is not None) <= HELD:
                self._drawn[name] = drawn
        return subspace(replace(drawn, theta=theta), slice(None), None).reshape(-1)
