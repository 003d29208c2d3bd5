"""What an objective is: the loss of a batch, or a procedure of several trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergebench.checkpoint.model import Model
from mergebench.errors import ModelError
from mergebench.networks.network import Network
from mergebench.training.attached import Attached
from mergebench.training.settings import Settings
from mergebench.training.student import Fit, Student
from mergebench.training.task import Head, Rows, TrainingTask


@dataclass(frozen=True)
class Asked:
    """A batch of a step: its rows by the student, and which items they are."""

    rows: Rows
    items: Sequence[int]  # of the train part
    student: Student
    part: str = "train"


class Loss:
    """The loss of a batch."""

    def __call__(self, asked: Asked) -> Tensor:
        """A number, with gradients to the trained parameters alone."""
        raise NotImplementedError

    def before(self, student: Student) -> None:
        """Called before each forward pass of the student, for what listens to it."""

    def about(self) -> Mapping[str, Any]:
        """What results say of it."""
        return {}


@dataclass(frozen=True)
class Setup:
    """What an objective may use: the model and its network, the task, and other models."""

    model: Model
    network: Network
    task: TrainingTask
    seed: int
    open: Callable[[str], Network]  # another model, frozen, on the same device
    head: Callable[[str], Head]  # the task's head that was trained with it, on the same device
    attached: Attached  # what is on the network

    def teacher(self, reference: str, tokens: bool = True) -> Network:
        """Another model; `ModelError` if its tokenizer gives other tokens."""
        other = self.open(reference)
        if tokens and other.tokenizer_key.split()[1:] != self.network.tokenizer_key.split()[1:]:
            raise ModelError(
                f"{reference}: it has another tokenizer than {self.model.reference}",
                "the losses compare token by token",
            )
        return other


class Procedure:
    """An objective that is more than a loss: it trains several times."""

    def __call__(self, sessions: Sessions) -> Fit:
        """Train, and return the last fit."""
        raise NotImplementedError

    def about(self) -> Mapping[str, Any]:
        """What results say of it."""
        return {}


@dataclass(frozen=True)
class Sessions:
    """What a procedure trains with."""

    settings: Settings
    new: Callable[[], Student]  # as it starts, on a network of its own
    fit: Callable[[Student, Loss, Settings, str], Fit]  # train once; the name is unique to this training
