"""Kinds of tasks: parameters in a suite, and a function that reads the data and measures.

    @dataclass(frozen=True, kw_only=True)
    class Params(Common):
        data: Path = param(help="JSON lines: an id, a text and a label each")

    @task(network="AutoModel")
    def text_classification(p: Params) -> Ready:
        ...

The function reads and checks the data before any model is loaded. It returns a `Ready`, whose `measure` is called once
for each model.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mergebench.networks.loadable import Tick
from mergebench.parameters import Parameter, param, parameters_of, params_of

if TYPE_CHECKING:
    from mergebench.networks.items import Row
    from mergebench.networks.network import Network

Direction = Literal["higher", "lower"]  # which values are better


@dataclass(frozen=True, kw_only=True)
class Common:
    """The parameters of every kind of task, beside `name` and `kind`."""

    split: str = param("test", "what the data are for", choices=("test", "validation"))
    limit: int | None = param(None, "how many items are used: the first ones, or drawn with `seed`", low=1)
    seed: int | None = param(None, "draw `limit` items at random, with this seed", low=0)


class Prediction(NamedTuple):
    """A model's answer to one item, and its score (for an accuracy 1 or 0)."""

    output: str
    score: float


class Item(NamedTuple):
    """What an item asks, cut, and its right answer if it has one; for people."""

    text: str
    gold: str | None = None


LONGEST = 300  # letters of an item that are kept beside the results


def cut(text: str) -> str:
    """A text on one line, with an ellipsis where it was too long."""
    line = " ".join(text[: 4 * LONGEST].split())
    return line if len(line) <= LONGEST and len(text) <= 4 * LONGEST else line[: LONGEST - 1] + "…"


def asked(rows: Sequence[Row], texts: Sequence[str], gold: Sequence[str] = ()) -> dict[str, Item]:
    """The items of rows by their ids; gold: the right answers, where there are any."""
    right: Sequence[str | None] = gold or [None] * len(rows)
    return {row.id: Item(cut(text), one) for row, text, one in zip(rows, texts, right, strict=True)}


@dataclass(frozen=True)
class Score:
    """A model's result on a task. `predictions` are by the items' ids, in the order of the data."""

    value: float
    stderr: float | None
    n: int
    predictions: Mapping[str, Prediction]
    metric: str = "accuracy"
    direction: Direction = "higher"


def accuracy(predictions: Mapping[str, Prediction]) -> Score:
    """The share p of n right answers, with the standard error sqrt(p (1 - p) / n) of a binomial share."""
    n = len(predictions)
    p = sum(prediction.score for prediction in predictions.values()) / n
    return Score(p, math.sqrt(p * (1 - p) / n), n, predictions)


def mean(predictions: Mapping[str, Prediction], metric: str, direction: Direction) -> Score:
    """The mean of n items' scores, with the standard error s / sqrt(n) of their standard deviation s."""
    scores = [prediction.score for prediction in predictions.values()]
    stderr = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return Score(math.fsum(scores) / len(scores), stderr, len(scores), predictions, metric, direction)


@dataclass(frozen=True)
class Ready:
    """A task whose data are read and checked."""

    n: int  # items
    measure: Callable[[Network, Tick], Score]
    files: tuple[Path, ...] = ()  # all files read; results depend on their content
    items: Mapping[str, str] = field(default_factory=dict)  # the place of each item, by its content: `items.contents`
    asked: Mapping[str, Item] = field(default_factory=dict)  # each item by its id, for people
    versions: Mapping[str, str] = field(default_factory=dict)  # of libraries and images that the result depends on
    home: Path | None = None  # the directory of the task's own fine-tune, if it has one
    on_patches: Callable[[Sequence[Path]], Ready] | None = None  # for a task that waits for patches of edits


@dataclass(frozen=True)
class Kind:
    """A kind of task and its properties for a suite."""

    name: str  # as suites spell it: text-classification
    function: Callable[[Any], Ready]
    network: str  # the transformers auto class its models are built with
    params: type
    parameters: Mapping[str, Parameter]

    def __call__(self, params: Any) -> Ready:
        return self.function(params)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


def task(*, network: str) -> Callable[[Callable[[Any], Ready]], Kind]:
    """Declare a function `(params) -> Ready` as a kind of task.

    `network` names the transformers class its models are built with, such as AutoModel: tasks with the same class share
    the model in memory.
    """

    def declare(function: Callable[[Any], Ready]) -> Kind:
        params = params_of(function, 1, "it takes (params: a dataclass made from Common)", Common)
        return Kind(function.__name__.replace("_", "-"), function, network, params, parameters_of(params))

    return declare
