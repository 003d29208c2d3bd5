"""WUDI-Merging: the task vector that disturbs every task least, guided by the task vectors alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergebench.engine.chunks import total
from mergebench.engine.context import Context
from mergebench.engine.method import Passes, TaskVectors, Tensor
from mergebench.methods._adam import adam
from mergebench.methods._matrices import matrices, matrix_method, mean
from mergebench.parameters import param


@dataclass(frozen=True)
class Params:
    solve: str = param("adam", "the paper's steps, or the point they go to", choices=("adam", "closed"))
    steps: int = param(300, "adam: number of steps", low=0)
    lr: float = param(1e-5, "adam: learning rate", above=0)
    lambda_: float = param(1.0, "factor on the merged task vector")


def workspace(shape: tuple[int, ...], models: int, p: Params) -> int:
    """The task matrices at length one, their Gram matrix (and its eigenvectors), and the size of tau a few times."""
    size, gram = shape[0] * shape[1], min(shape[1], models * shape[0]) ** 2
    adam, closed = 4 * ((models + 6) * size + gram), 8 * ((2 * models + 3) * size + 6 * gram)
    return (adam if p.solve == "adam" else closed) + (1 << 20)


@matrix_method(
    paper="arXiv:2503.08099",
    decompositions=lambda models, p: p.steps / 8 if p.solve == "adam" else models + 1,
    workspace=workspace,
    exempt=dict.fromkeys(("one model", "equal models"), "Adam's steps are of one length, and it stops early"),
)
def wudi(tvs: TaskVectors, p: Params, ctx: Context) -> Passes:
    """The task vector that disturbs every task least, matrix by matrix.

        theta = theta_0 + lambda tau,
        tau the argmin of sum_i |(tau - tau_i) tau_i'|^2 / |tau_i|^2

    Cheng et al., "Whoever started the interference should end it". `adam` is the paper's: `steps` of Adam
    from sum tau_i, stopped early: the result depends on the scale of the task vectors. `closed` is the
    stationary point sum tau_i C_i (sum C_i)^+ with C_i = tau_i^T tau_i / |tau_i|^2, in float64, the
    pseudo-inverse without eigenvalues at rounding level. A zero task matrix has no say. Other tensors,
    embeddings and heads are averaged.
    """
    stack = matrices(tvs, ctx)
    if stack is None:
        return mean(tvs) * p.lambda_
    if p.solve == "closed":
        return closed(*directions(stack, torch.float64)).view(-1) * p.lambda_
    units, pull = directions(stack, torch.float32)
    sides = [units.mT @ units] if units.shape[1] <= len(units) else [units.mT, units]  # the cheaper order of products
    tau = adam(total(stack), lambda tau: torch.linalg.multi_dot([tau, *sides]).sub_(pull).mul_(2), p.steps, p.lr)
    return tau.view(-1) * p.lambda_


def directions(stack: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """T = [tau_1 / |tau_1|; ..; tau_N / |tau_N|], so that T^T T = sum C_i, and sum tau_i C_i."""
    units, pull = stack.to(dtype, copy=True), torch.zeros(stack.shape[1:], dtype=dtype, device=stack.device)
    for unit in units:
        length = torch.linalg.matrix_norm(unit.double())  # float64: it may lie beyond float32
        if length:
            unit.copy_(unit.double() / length)
            pull.add_(torch.linalg.multi_dot([unit, unit.mT, unit]).double() * length)
    return units.view(-1, stack.shape[2]), pull


def closed(units: Tensor, pull: Tensor) -> Tensor:
    """sum tau_i C_i (sum C_i)^+ by the eigenvectors of T^T T or, where it is smaller, T T^T."""
    wide = units.shape[1] > len(units)
    values, vectors = torch.linalg.eigh(units @ units.mT if wide else units.mT @ units)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[kept], vectors[:, kept]
    rows = (vectors / values.sqrt()).mT @ units if wide else vectors.mT
    merged: Tensor = torch.linalg.multi_dot([pull, rows.mT / values, rows])
    return merged.float()
