"""MUSCLE (Echterhoff et al., arXiv:2407.09435): an update of a model that loses few of the answers its users rely on.

The student is the new base with an adapter that starts as the new model's (`from:` in a config). Old and new model are
teachers. Of each row of logits z, with the target y and temperature T,

    L = mean of  m KL(old || student) + (1 - m) KL(new || student)      KL of softmax(z / T), without a factor T^2
    m = 1 where the student is wrong: there it follows the old model, else the new one

The paper's other masks: `old-right`, m = 1 where the old model is right; `old`, m = 1 everywhere; `likelihood-token`
and `likelihood-sequence`, m = 1 where the student gives y, or all of an item's targets, less probability than the old
model does. For large gaps the paper adds the task's loss: (1 - task) L + task CE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from mergebench.evaluation.compare.flips import flips
from mergebench.networks.network import Network
from mergebench.parameters import param
from mergebench.training.declared import objective
from mergebench.training.objective import Asked, Loss, Setup
from mergebench.training.student import Student
from mergebench.training.task import Head, Measured, Rows, TrainingTask

MASKS = ("muscle", "old-right", "old", "likelihood-token", "likelihood-sequence")


@dataclass(frozen=True, kw_only=True)
class Params:
    """The settings of MUSCLE."""

    old: str = param(help="the model whose right answers should stay, BASE+DIR of a run")
    new: str = param(help="the model that replaces it, BASE+DIR of a run")
    mask: str = param("muscle", "where the student follows the old model", choices=MASKS)
    temperature: float = param(2.0, "T, of both sides", above=0)
    task: float = param(0.0, "weight of the task's own loss", low=0, high=1)


@objective(paper="arXiv:2407.09435")
def compatible(setup: Setup, p: Params) -> Loss:
    """Like the new model where the student is right, like the old one where it is wrong: MUSCLE."""
    return _Compatible(setup.task, _Teacher(setup, p.old), _Teacher(setup, p.new), p)


class _Teacher:
    """A frozen model and its head; what it says of an item is computed once."""

    def __init__(self, setup: Setup, reference: str) -> None:
        self.network: Network = setup.teacher(reference)
        self.task: TrainingTask = setup.task
        self.head: Head = setup.head(reference)
        self._kept: dict[tuple[str, int], Tensor] = {}

    def logits(self, part: str, items: list[int]) -> Tensor:
        """[rows, classes], without gradients."""
        if not self.head:  # of a whole vocabulary: too many to keep
            return self._rows(part, items).logits
        missing = [item for item in dict.fromkeys(items) if (part, item) not in self._kept]
        if missing:
            for item, row in zip(missing, self._rows(part, missing).logits, strict=True):
                self._kept[part, item] = row
        return torch.stack([self._kept[part, item] for item in items])

    def measure(self, part: str) -> Measured:
        """Its answers."""
        with torch.inference_mode():
            return self.task.measure(self.network, self.head, part, lambda items: None)

    def _rows(self, part: str, items: list[int]) -> Rows:
        with torch.no_grad():
            return self.task.rows(self.network, self.head, part, items)


class _Compatible(Loss):
    def __init__(self, task: TrainingTask, old: _Teacher, new: _Teacher, p: Params) -> None:
        self._task, self._old, self._new, self._p = task, old, new, p
        self._student: Student | None = None

    def __call__(self, asked: Asked) -> Tensor:
        """The mean over the rows."""
        self._student = asked.student
        items = list(asked.items)
        old, new = (one.logits(asked.part, items) for one in (self._old, self._new))
        return loss(asked.rows, old, new, self._p)

    def about(self) -> Mapping[str, Any]:
        """The new model and the student against the old one, on the test items."""
        if self._student is None or "test" not in self._task.parts:
            return {}
        old = self._old.measure("test").score
        answers = {"new": self._new.measure("test").score, "student": self._student.measure("test").score}
        return {
            "flips": {
                name: flips(old.predictions, score.predictions, score.direction).to_dict()
                for name, score in answers.items()
            }
        }


def loss(student: Rows, old: Tensor, new: Tensor, p: Params) -> Tensor:
    """The loss of some rows; old, new: the teachers' logits of the same rows."""
    follow = mask(student, old, p.mask)
    per_row = torch.where(
        follow, divergence(old, student.logits, p.temperature), divergence(new, student.logits, p.temperature)
    )
    found = per_row.mean()
    return found if p.task == 0 else (1 - p.task) * found + p.task * cross_entropy(student.logits, student.targets)


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) of each row."""
    p, q = (log_softmax(one.float() / temperature, -1) for one in (teacher.detach(), student))
    return kl_div(q, p, reduction="none", log_target=True).sum(-1)


def mask(student: Rows, old: Tensor, name: str) -> Tensor:
    """Where the student follows the old model: bool [rows]."""
    logits, targets = student.logits.detach(), student.targets
    if name == "old":
        return torch.ones_like(targets, dtype=torch.bool)
    if name in ("muscle", "old-right"):
        right = (logits if name == "muscle" else old).argmax(-1) == targets
        return ~right if name == "muscle" else right
    likelihoods = [-cross_entropy(one.float(), targets, reduction="none") for one in (logits, old)]
    if name == "likelihood-sequence":
        items = student.items.to(targets.device)
        count = int(items.max()) + 1
        likelihoods = [one.new_zeros(count).index_add_(0, items, one)[items] for one in likelihoods]
    return likelihoods[0] < likelihoods[1]
