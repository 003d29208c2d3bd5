"""What a model is trained on: a task's train, validation and test items, and the rows of logits of some of them.

    @dataclass(frozen=True, kw_only=True)
    class Params(Common):
        max_length: int = param(64, "tokens a text is cut to", low=2)

    def text_classification(p: Params) -> TrainingTask: ...

A row has logits and a target: of an item its classes, of a token of a completion the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mergebench.errors import RecipeError
from mergebench.evaluation.task import Score
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import Parameter, param, parameters_of, params_of

PARTS = ("train", "validation", "test")
Head = Mapping[str, Tensor]  # by name; empty for a model that has its own


@dataclass(frozen=True, kw_only=True)
class Common:
    """The parameters of every kind of training task."""

    train: Path = param(help="the items to train on, JSON lines")
    validation: Path | None = param(None, "the items to choose on, in the same form")
    test: Path | None = param(None, "the items to report on, in the same form")
    limit: int | None = param(None, "how many items to train on, drawn with the run's seed", low=1)
    id: str = param("id", "the column with the item's id")


class Rows(NamedTuple):
    """The logits of some items."""

    logits: Tensor  # [rows, classes]
    targets: Tensor  # [rows] int64
    items: Tensor  # [rows] int64: the place among the items asked for


class Measured(NamedTuple):
    """What a part of the data says of a model."""

    loss: float
    score: Score


class TrainingTask(Protocol):
    """A task whose data are read and checked."""

    auto_class: str  # the transformers class of its models
    metric: str  # of `Measured.score`
    choose_by: str  # what validation chooses by: `loss`, or `score`

    @property
    def parts(self) -> Mapping[str, Sequence[str]]: ...  # the ids of each part's items

    @property
    def files(self) -> tuple[Path, ...]: ...

    def drawn(self, seed: int) -> TrainingTask: ...  # with the train items of a run with this seed

    def gold(self, part: str) -> Sequence[str]: ...  # what the items' answers should be

    def head(self, network: Network) -> Head: ...  # a new one, the same for any seed

    def lengths(self, network: Network, part: str) -> Sequence[int]: ...  # tokens of each item

    def rows(self, network: Network, head: Head, part: str, items: Sequence[int]) -> Rows: ...

    def measure(self, network: Network, head: Head, part: str, tick: Tick) -> Measured: ...

    def save(self, head: Head, directory: Path) -> None: ...

    def head_in(self, directory: Path) -> Head: ...  # what `save` wrote; `ModelError` if it is of another task


@dataclass(frozen=True)
class Kind:
    """A kind of training task."""

    name: str
    function: Callable[[Any], TrainingTask]
    params: type
    parameters: Mapping[str, Parameter]

    def __call__(self, params: Any) -> TrainingTask:
        return self.function(params)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


def training_task(function: Callable[[Any], TrainingTask]) -> Kind:
    """Declare a function `(params) -> TrainingTask` as a kind of training task."""
    params = params_of(function, 1, "it takes (params: a dataclass made from Common)", Common)
    return Kind(function.__name__.replace("_", "-"), function, params, parameters_of(params))


def keep_apart(items: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse parts that share an item; items: of each part, the place of each item by its content."""
    for number, part in enumerate(PARTS):
        for other in PARTS[:number]:
            both = items.get(part, {}).keys() & items.get(other, {}).keys()
            if both:
                where = min((items[part][one], items[other][one]) for one in both)
                more = f", and {len(both) - 1} more" if len(both) > 1 else ""
                raise RecipeError(
                    f"{where[0]}: the same item is in {other}, {where[1]}{more}", "train, choose and report on others"
                )
