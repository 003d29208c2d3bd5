"""PELA's intermediate training (arXiv:2310.10700, section 3.2): a compressed model learns from a dense one.

    L = task L_task + features L_fd + logits L_logit + perturbation L_wp

L_fd is the mean over the blocks of the mean squared difference of their outputs, L_logit that of the logits; L_wp is
the mean over the factored layers of (max |B A - W| - epsilon)^2. Epsilon is a target from both sides, as in the
authors' code: a smaller difference costs too. Padding takes no part in L_fd. The teacher is not trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from mergebench.errors import ModelError, RecipeError
from mergebench.evaluation.head import read_head
from mergebench.networks.network import Network
from mergebench.parameters import param
from mergebench.systems.pela.training import Factored, Factors
from mergebench.training.declared import objective
from mergebench.training.objective import Asked, Loss, Setup
from mergebench.training.student import Student
from mergebench.training.task import Rows


@dataclass(frozen=True, kw_only=True)
class Params:
    """The terms' weights."""

    teacher: str = param(help="the model to learn from: the dense one")
    features: float = param(1.0, "weight of the term on the blocks' outputs", low=0)
    logits: float = param(0.0, "weight of the term on the logits", low=0)
    perturbation: float = param(0.0, "weight of the term on the factors' products", low=0)
    epsilon: float = param(0.001, "of that term: the largest difference that it aims at", low=0)
    task: float = param(1.0, "weight of the task's own loss", low=0)
    head: Path | None = param(None, "the teacher's head.safetensors, for logits of a classifier")


@objective(paper="arXiv:2310.10700")
def distil(setup: Setup, p: Params) -> Loss:
    """A compressed model learns the features, logits or weights of a dense one: PELA."""
    teacher = setup.teacher(p.teacher)
    factors: Sequence[Factors] = ()
    if isinstance(setup.attached, Factored):
        factors = tuple(setup.attached.factors.values())
    if p.perturbation and not factors:
        raise RecipeError("objective.perturbation: nothing is factored", "it is for delta: {kind: pela}")
    if p.features:
        deep, wide = ((len(one.blocks), one.hidden) for one in (teacher, setup.network))
        if deep != wide:
            what = f"it has {deep[0]} blocks of width {deep[1]}, {setup.model.reference} has {wide[0]} of {wide[1]}"
            raise ModelError(f"{p.teacher}: {what}", "write features: 0, or name a teacher of the same size")
    return _Distil(p, teacher, factors, _head(setup, p))


def _head(setup: Setup, p: Params) -> Mapping[str, Tensor] | None:
    """The teacher's head; None where it takes none, or logits are not asked for."""
    labels = getattr(setup.task, "labels", None)
    if not p.logits or labels is None:
        return None
    if p.head is None:
        raise RecipeError("objective.head: missing: the teacher's logits need its head", "head: DIR/head.safetensors")
    head = read_head(p.head)
    if head.labels != tuple(labels):
        raise RecipeError(
            f"objective.head: its labels are {', '.join(head.labels)}", f"the task's: {', '.join(labels)}"
        )
    device = setup.network.device
    return {"weight": head.weight.to(device), "bias": head.bias.to(device)}


class _Distil(Loss):
    def __init__(
        self, p: Params, teacher: Network, factors: Sequence[Factors], head: Mapping[str, Tensor] | None
    ) -> None:
        self._p, self._teacher, self._factors, self._head = p, teacher, factors, head
        self._listening: Any = None
        self._states: list[Tensor] = []

    def before(self, student: Student) -> None:
        """Keep the outputs of the student's blocks."""
        if self._p.features:
            self._listening = _outputs(student.network)
            self._states = self._listening.__enter__()

    def __call__(self, asked: Asked) -> Tensor:
        """The weighted sum of the terms."""
        p, rows = self._p, asked.rows
        if self._listening is not None:
            self._listening.__exit__(None, None, None)
            self._listening = None
        total = p.task * cross_entropy(rows.logits, rows.targets) if p.task else rows.logits.new_zeros(())
        if p.features or p.logits:
            theirs, states = self._taught(asked)
            if p.features:
                mask = _real(asked, states[0])
                total = total + p.features * feature_loss(self._states, states, mask)
                self._states = []
            if p.logits:
                total = total + p.logits * mse_loss(rows.logits, theirs.logits)
        if p.perturbation:
            total = total + p.perturbation * perturbation_loss(self._factors, p.epsilon)
        return total

    def _taught(self, asked: Asked) -> tuple[Rows, list[Tensor]]:
        """The teacher's rows and the outputs of its blocks, without dropout or gradients."""
        student, head = asked.student, self._head
        own: Any = student.head if head is None else head  # for features alone any head will do
        with torch.no_grad(), _outputs(self._teacher) as states:
            rows = student.task.rows(self._teacher, own, asked.part, asked.items)
        return rows, states


@contextmanager
def _outputs(network: Network) -> Iterator[list[Tensor]]:
    """The list of the outputs of a network's blocks [batch, tokens, width] in passes inside the context."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    handles = [block.register_forward_hook(keep) for block in network.blocks.values()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _real(asked: Asked, states: Tensor) -> Tensor | None:
    """[batch, tokens]: which tokens are no padding; None where none are."""
    every = asked.student.task.lengths(asked.student.network, asked.part)
    lengths = torch.tensor([every[item] for item in asked.items], device=states.device)
    if states.dim() != 3 or int(lengths.max()) != states.shape[1]:
        return None  # patches of images, which are never padded
    return torch.arange(states.shape[1], device=states.device) < lengths[:, None]


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor | None) -> Tensor:
    """The mean over blocks of the mean squared difference of outputs [batch, tokens, width] at the real tokens."""
    terms = []
    for mine, theirs in zip(student, teacher, strict=True):
        terms.append(mse_loss(mine, theirs) if real is None else mse_loss(mine[real], theirs[real]))
    return torch.stack(terms).mean()


def perturbation_loss(factors: Sequence[Factors], epsilon: float) -> Tensor:
    """The mean over layers of (max |B A - W| - epsilon)^2."""
    largest = [(one.outer @ one.inner - one.dense).abs().max() for one in factors]
    return (torch.stack(largest) - epsilon).square().mean()
