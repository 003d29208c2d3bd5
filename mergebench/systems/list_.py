"""LiST (arXiv:2110.06274): small adapters on few labels, then sessions of self-training on texts without labels.

The adapter stands behind the two output layers of a block, without bias and without an activation:

    h <- h + A2 A1 h,   A1 [a, d] and A2 [d, a] normal with deviation .02

so that it folds into the layer before it: W' = (I + A2 A1) W, b' = (I + A2 A1) b. A session takes the last student as
the teacher, starts a new student from the base, trains it on the teacher's soft labels, and then on the labels. The
weight of a soft label is uniform for the first .6 of the steps; then it is what one step on that label would do for the
loss on labelled items,

    w_j ~ max(0, <grad L_labelled, grad l_j>),

which is the derivative of the look-ahead loss at weight zero, exactly: the published code computes it by an unrolled
step. The weights of a batch add up to one here, or to zero where no label helps.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear, log_softmax

from mergebench.deltas.peanut import Network as Factors
from mergebench.deltas.peanut import peanut
from mergebench.errors import ModelError, RecipeError
from mergebench.networks.features import features
from mergebench.networks.network import Network
from mergebench.parameters import param
from mergebench.training.attached import Attached, Base, OnTensors, Put, put, start
from mergebench.training.classification import Classification
from mergebench.training.declared import Targets, objective, trained
from mergebench.training.objective import Asked, Loss, Procedure, Sessions, Setup
from mergebench.training.objectives.task import TaskLoss
from mergebench.training.student import Fit, Student
from mergebench.training.task import Head, Measured, Rows

OUTPUTS = ("*.output.dense.weight", "*.o_proj.weight", "*.out_proj.weight", "*.down_proj.weight", "*.fc2.weight")
DEVIATION = 0.02
UNIFORM = 0.6  # share of the steps on soft labels before they are weighted
SCHEMES = ("meta", "uniform")


@dataclass(frozen=True, kw_only=True)
class Params(Targets):
    """The settings of LiST's adapters."""

    bottleneck: int = param(128, "width of the adapters", low=1)


@trained(paper="arXiv:2110.06274", name="list")
def list_adapters(base: Base, p: Params) -> Attached:
    """Linear adapters behind the output layers of each block: LiST's."""
    weights = base.weights
    default = [name for name, one in weights.items() if one.linear and any(fnmatchcase(name, g) for g in OUTPUTS)]
    if not p.targets and not default:
        what = f"{base.model.reference}: no output layers are known in its blocks"
        raise ModelError(what, "name them: targets: ['*.dense.weight']")
    puts: dict[str, Put] = {}
    for name, weight in base.matrices(p.targets or default).items():
        out = weight.values.shape[1 if weight.in_out else 0]
        b = start((out, p.bottleneck), base.generator, DEVIATION)
        a = start((p.bottleneck, out), base.generator, DEVIATION)
        bias = name.removesuffix("weight") + "bias"
        for target, columns in ((name, weight.in_out), (bias, True)):
            if target in weights:
                factors = Factors(b, a, activation="linear", columns=columns)
                puts[target] = put(peanut, factors, activation="linear", columns=columns)
    return OnTensors(base, puts)


@dataclass(frozen=True, kw_only=True)
class SelfTraining:
    """The settings of self-training."""

    unlabelled: Path = param(help="items without labels, JSON lines")
    sessions: int = param(6, "times that a student becomes the teacher", low=1)
    steps: int = param(1000, "on soft labels in each session", low=1)
    weights: str = param("meta", "of the soft labels", choices=SCHEMES)
    labelled: int = param(4, "labelled items that weigh a batch of soft labels", low=1)
    noise: float = param(0.0, "share of the soft labels that are replaced by one of any class", low=0, below=1)


@objective(paper="arXiv:2110.06274", name="self-training")
def self_training(setup: Setup, p: SelfTraining) -> Procedure:
    """Labels, then sessions of soft labels of the last student: LiST."""
    if not isinstance(setup.task, Classification):
        raise RecipeError("objective: self-training needs a task with labels", "task: {kind: text-classification}")
    return _SelfTraining(setup, p, setup.task)


class _Unlabelled(Classification):
    """The items without labels as what is trained on; the head is another's."""

    def __init__(self, task: Classification, file: Path) -> None:
        self.__dict__ |= vars(task)
        self._data = {"train": task.read(file, None)}
        self._held, self._chosen = {}, None

    def rows(self, network: Network, head: Head, part: str, items: Sequence[int]) -> Rows:
        """A row an item; no target."""
        logits = linear(self.features(network, part, items), head["weight"], head["bias"])
        return Rows(logits, torch.full((len(items),), -1), torch.arange(len(items)))

    def measure(self, network: Network, head: Head, part: str, tick: Any) -> Measured:
        """Nothing is measured on them."""
        raise NotImplementedError

    def probabilities(self, student: Student) -> Tensor:
        """[items, classes] by a student, without dropout."""
        student.eval()
        with torch.inference_mode(), student.attached.held():
            student.network.kept.clear()
            rows = features(self._data["train"].inputs, student.network, self._pooling, lambda items: None)
            logits = linear(rows, *(student.head[name].cpu() for name in ("weight", "bias")))
        return logits.softmax(1).clone()


class _SelfTraining(Procedure):
    def __init__(self, setup: Setup, p: SelfTraining, task: Classification) -> None:
        self._p, self._task, self._seed = p, task, setup.seed
        self._unlabelled = _Unlabelled(task, p.unlabelled)
        self._sessions: list[dict[str, Any]] = []

    def __call__(self, sessions: Sessions) -> Fit:
        """The last session's student."""
        found = sessions.fit(sessions.new(), TaskLoss(), sessions.settings, "labels")
        self._note(0, found, None)
        for number in range(1, self._p.sessions + 1):
            soft = self._noisy(self._unlabelled.probabilities(found.student), number)
            student = sessions.new()
            on_soft = Student(student.network, student.attached, self._unlabelled, student.head)
            loss = _SoftLabels(soft, self._p, self._task, self._seed + 1000 * number)
            settings = replace(sessions.settings, max_steps=self._p.steps, every=None)
            sessions.fit(on_soft, loss, settings, f"session-{number}-soft")
            found = sessions.fit(student, TaskLoss(), sessions.settings, f"session-{number}-labels")
            self._note(number, found, loss)
        return found

    def about(self) -> Mapping[str, Any]:
        """What each session reached."""
        return {"sessions": self._sessions}

    def _noisy(self, soft: Tensor, number: int) -> Tensor:
        """Soft labels, some of them replaced by a class at random."""
        generator = torch.Generator().manual_seed(10_000 * self._seed + number)
        chosen = torch.rand(len(soft), generator=generator) < self._p.noise
        classes = torch.randint(soft.shape[1], (len(soft),), generator=generator)
        random_labels = nn.functional.one_hot(classes, soft.shape[1]).to(soft.dtype)
        self._replaced = chosen
        return torch.where(chosen[:, None], random_labels, soft)

    def _note(self, number: int, found: Fit, loss: _SoftLabels | None) -> None:
        noted: dict[str, Any] = {"session": number}
        if "validation" in self._task.parts:
            noted["validation"] = found.student.measure("validation").score.value
        if loss is not None and loss.seen:
            noted |= loss.weight_of(self._replaced)
        self._sessions.append(noted)


class _SoftLabels(Loss):
    """sum_j w_j KL(q_j | p_j) over a batch."""

    def __init__(self, soft: Tensor, p: SelfTraining, task: Classification, seed: int) -> None:
        self._soft, self._p, self._task = soft, p, task
        self._random, self._step = random.Random(seed), 0
        self.seen: dict[int, float] = {}  # the last meta weight of each item

    def __call__(self, asked: Asked) -> Tensor:
        """The weighted loss of a batch."""
        q = self._soft[list(asked.items)].to(asked.rows.logits.device)
        self._step += 1
        weights = torch.full((len(q),), 1 / len(q), device=q.device)
        if self._p.weights == "meta" and self._step > UNIFORM * self._p.steps:
            weights = self._meta(asked, q)
            self.seen |= dict(zip(asked.items, (len(q) * weights).tolist(), strict=True))
        return (weights * divergence(q, asked.rows.logits)).sum()

    def _meta(self, asked: Asked, q: Tensor) -> Tensor:
        count = len(self._task.parts["train"])
        items = self._random.sample(range(count), min(self._p.labelled, count))
        student = asked.student
        was = student.training
        student.eval()
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            labelled = self._task.rows(student.network, student.head, "train", items)
            again = student.task.rows(student.network, student.head, "train", asked.items)
            found = meta_weights(
                cross_entropy(labelled.logits, labelled.targets),
                divergence(q, again.logits),
                list(student.trained.values()),
            )
        student.train(was)
        return found

    def weight_of(self, replaced: Tensor) -> dict[str, float]:
        """The mean meta weight of replaced soft labels and of the others; 1 is uniform."""
        groups: dict[str, list[float]] = {"weight_of_replaced": [], "weight_of_others": []}
        for item, weight in self.seen.items():
            groups["weight_of_replaced" if replaced[item] else "weight_of_others"].append(weight)
        return {name: sum(values) / len(values) for name, values in groups.items() if values}


def divergence(q: Tensor, logits: Tensor) -> Tensor:
    """KL(q_j | p_j) of each item: [items], from q [items, classes] and the student's logits."""
    entropy: Tensor = torch.special.xlogy(q, q).sum(1)
    return entropy - (q * log_softmax(logits, 1)).sum(1)


def meta_weights(labelled: Tensor, losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Weights [items] ~ max(0, <grad labelled, grad losses_j>) that add up to one; zeros where no item helps.

    labelled: the loss on labelled items, a number. losses [items], with second derivatives. One backward pass through
    the gradient of sum_j v_j losses_j gives all inner products.
    """
    towards = torch.autograd.grad(labelled, parameters, allow_unused=True)
    v = torch.ones_like(losses, requires_grad=True)
    slopes = torch.autograd.grad((v * losses).sum(), parameters, create_graph=True, allow_unused=True)
    pairs = [(one, other) for one, other in zip(slopes, towards, strict=True) if one is not None and other is not None]
    inner = sum(((one * other.detach()).sum() for one, other in pairs), start=torch.zeros((), device=losses.device))
    (products,) = torch.autograd.grad(inner, v)
    helpful = products.clamp(min=0)
    total = helpful.sum()
    return helpful / total if total > 0 else helpful
