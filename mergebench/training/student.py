"""What the loop trains: a network with something attached and a task's head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mergebench.errors import ModelError
from mergebench.networks.network import Network
from mergebench.training.attached import Attached
from mergebench.training.task import Head, Measured, Rows, TrainingTask


class Student(nn.Module):
    """A network with something attached and a head; its parameters are the trained ones."""

    def __init__(self, network: Network, attached: Attached, task: TrainingTask, head: Head | None = None) -> None:
        """head: another student's, to train it further."""
        super().__init__()
        if attached.head is not None:
            head = {}
        elif head is None:
            head = {name: nn.Parameter(one.to(network.device)) for name, one in task.head(network).items()}
        named = {f"head/{name}": one for name, one in head.items()}
        named |= {name.replace(".", "/"): one for name, one in attached.parameters.items()}
        if not named:
            raise ModelError(f"{network.name}: there is nothing to train", "name a kind of delta")
        self.trained = nn.ParameterDict(named)
        for name, one in attached.state.items():
            self.register_buffer(name.replace(".", "/"), one)
        # a tuple, so that they are no parts of this module
        self._parts = (network, attached, task, head)

    @property
    def network(self) -> Network:
        """The network, with what is attached in its place."""
        return self._parts[0]

    @property
    def attached(self) -> Attached:
        """What is trained."""
        return self._parts[1]

    @property
    def task(self) -> TrainingTask:
        """What it is trained on."""
        return self._parts[2]

    @property
    def head(self) -> Head:
        """The task's head."""
        return self._parts[3] if self.attached.head is None else self.attached.head()

    def forward(self, items: Tensor, part: str = "train") -> Rows:
        """The rows of some items."""
        return self.task.rows(self.network, self.head, part, items.tolist())

    def train(self, mode: bool = True) -> Student:
        """Dropout on or off, in the network too."""
        super().train(mode)
        self.attached.set_mode(self.network, mode)
        return self

    def measure(self, part: str, tick: Callable[[int], None] = lambda items: None) -> Measured:
        """Loss and score on a part of the data, without dropout."""
        was = self.training
        self.eval()
        with torch.inference_mode(), self.attached.held():
            measured = self.task.measure(self.network, self.head, part, tick)
        self.train(was)
        return measured


@dataclass
class Fit:
    """One training, done."""

    student: Student
    history: list[dict[str, float]] = field(default_factory=list)  # step, loss, and what was measured
    seconds: float = 0.0
    steps: int = 0
    saved: int = 0  # bytes that autograd keeps of one step's forward pass
    best: float | None = None  # the chosen measurement on validation
