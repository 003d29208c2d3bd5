"""PaFi's sparse fine-tune (Liao, Meng, Monz, arXiv:2305.16742), and other choices of the same number of weights.

    W' = W + S        (S: values at the chosen positions, zeros elsewhere)

PaFi trains the elements whose magnitudes are smallest in the base; the largest and random ones are what it is compared
with (PEFT's Super-Tuning, arXiv:2607.09287, takes the largest by default). The values are the parameters, so that no
optimiser can move another element; weight decay draws W' to W.

A step writes the values into W in place. The gradient is computed at the chosen positions alone: of a linear layer with
few of them by as many scalar products, which is less work than the matrix W' has. W' is never copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mergebench.adapters.fine_tune import tiles
from mergebench.adapters.smallest import Keys, check_length, magnitude_keys
from mergebench.checkpoint.files import Files, whole
from mergebench.deltas.formats.masked import read_mask_of
from mergebench.engine import noise
from mergebench.engine.span import Span
from mergebench.errors import ModelError, RecipeError
from mergebench.parameters import param
from mergebench.systems.pafi.masks import SCOPES, ranked_in
from mergebench.training.attached import Attached, Base, OnTensors, Put, Weight
from mergebench.training.declared import Targets, trained

MANY = 0.1  # of a matrix: from this share on its whole gradient is quicker (measured on CPUs, 1,280 tokens)


@dataclass(frozen=True, kw_only=True)
class Params(Targets):
    """The settings of PaFi."""

    share: float = param(0.005, "of the elements of all targets", above=0, high=1)
    choose: str = param("smallest", "magnitudes of the base, or at random", choices=("smallest", "largest", "random"))
    scope: str = param("model", "one ranking over all targets, or one in each tensor", choices=SCOPES)
    mask: Path | None = param(None, "a mask file instead, which says targets and positions")


@trained(paper="arXiv:2305.16742")
def pafi(base: Base, p: Params) -> Attached:
    """Single elements of the weights, those of smallest magnitude: PaFi; of the largest, or random ones."""
    weights = base.weights if p.mask else base.chosen(p.targets, lambda weight: weight.linear)
    positions = _chosen(base, weights, p) if p.mask is None else _masked(base, weights, p.mask, p.targets)
    puts = {name: _put(weights[name], indices) for name, indices in positions.items()}
    return _Sparse(base, puts, sum(weight.values.numel() for weight in weights.values()))


def _chosen(base: Base, weights: Mapping[str, Weight], p: Params) -> dict[str, Tensor]:
    """Positions by the weights' magnitudes, or at random by the seed: round(share * elements) of them."""
    seed = base.generator.initial_seed()

    def keys(name: str) -> Iterator[Keys]:
        flat = weights[name].values.reshape(-1).cpu()
        if p.choose == "random":
            yield from (noise.keys(seed, Span(name, start, stop)) for start, stop in tiles(len(flat)))
            return
        if not flat.isfinite().all():
            raise ModelError(f"{base.model.reference}: {name}: it holds NaN or infinity, which has no rank")
        yield magnitude_keys(flat, largest=p.choose == "largest")

    sizes = {name: weight.values.numel() for name, weight in weights.items()}
    for name, size in sizes.items():
        check_length(name, size)
    groups = [list(sizes)] if p.scope == "model" else [[name] for name in sizes]
    counts, positions = ranked_in(groups, sizes, keys, p.share)
    if not counts:
        raise RecipeError(f"share: {p.share:g} of {sum(sizes.values()):,} elements is less than one", "a larger share")
    return {name: positions(name) for name in counts}


def _masked(base: Base, weights: Mapping[str, Weight], file: Path, targets: list[str]) -> dict[str, Tensor]:
    """The positions of a mask file."""
    if targets:
        raise RecipeError("targets: the mask says which tensors are changed", "take targets out")
    mask = read_mask_of(file, base.model)
    lost = next((name for name in mask.positions if name not in weights), None)
    if lost is not None:
        raise ModelError(f"{file}: {lost}: {base.network.auto_class} does not run this tensor")
    with Files() as files:
        return {name: whole(files, info) for name, info in mask.positions.items()}


class _Sparse(OnTensors):
    def __init__(self, base: Base, puts: Mapping[str, Put], elements: int) -> None:
        super().__init__(base, puts)
        self._elements = elements

    def about(self) -> Mapping[str, Any]:
        """The share of the targets' elements that is trained."""
        return {"share_trained": self.count / self._elements}


def _put(weight: Weight, indices: Tensor) -> Put:
    places = Places(weight.values, indices.to(weight.values.device))
    values = nn.Parameter(torch.zeros(len(indices), device=weight.values.device))
    few = weight.values.is_cpu and not weight.in_out and len(indices) < MANY * weight.values.numel()
    return Put(
        lambda original: _Written.apply(values, original, places),  # type: ignore[no-untyped-call]
        {"values": values},
        "scattered",
        fixed={"indices": indices},
        folds=True,
        layer=partial(_layer, values, places) if few and weight.values.dim() == 2 else None,
    )


class Places:
    """Chosen positions in a weight, and what stood there.

    weight: as it was. indices: int32 [k], ascending positions in the flat weight.
    """

    def __init__(self, weight: Tensor, indices: Tensor) -> None:
        self.indices = indices.long()
        self._before = weight.reshape(-1)[self.indices]
        self._shape = weight.shape
        self._pattern: Tensor | None = None

    def write(self, weight: Tensor, values: Tensor) -> Tensor:
        """W', in the memory of W. What autograd kept of W' stays valid: the values change between steps alone."""
        changed = weight.data  # shares the memory and no count of its versions
        changed.view(-1)[self.indices] = self._before + values
        return changed

    def sampled(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The elements of gradient' x at these positions, from gradient [n, out] and x [n, in]."""
        if self._pattern is None:
            rows, columns = self.indices // self._shape[1], self.indices % self._shape[1]
            starts = torch.searchsorted(rows, torch.arange(self._shape[0] + 1))
            with warnings.catch_warnings(action="ignore"):  # torch calls its sparse matrices a beta
                self._pattern = torch.sparse_csr_tensor(
                    starts, columns, torch.zeros(len(columns)), self._shape, check_invariants=False
                )
        product: Tensor = torch.sparse.sampled_addmm(self._pattern, gradient.T, x, beta=0)
        return product.values()


class _Written(Function):
    """W' of any tensor; the gradient of its values is taken from that of W'."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return places.write(weight, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.reshape(-1)[ctx.places.indices], None, None


class _Linear(Function):
    """x W'' + b; the gradient of the values is computed without that of W'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, values: Tensor, weight: Tensor, places: Places) -> Tensor:
        changed = places.write(weight, values)
        ctx.save_for_backward(x, changed)
        ctx.places = places
        return linear(x, changed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, changed = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_x = gradient @ changed if ctx.needs_input_grad[0] else None
        of_bias = flat.sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, ctx.places.sampled(flat, x.reshape(-1, x.shape[-1])), None, None


def _layer(values: Tensor, places: Places, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # which does not reach into a function's backward pass
        return linear(x, _Written.apply(values, weight, places), bias)  # type: ignore[no-untyped-call]
    return _Linear.apply(x, bias, values, weight, places)  # type: ignore[no-any-return, no-untyped-call]
