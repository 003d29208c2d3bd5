"""What a kind of task is: the keys it has in a suite, and a function that reads its data and measures.

    @dataclass(frozen=True, kw_only=True)
    class Params(Common):
        data: Path = key("JSON lines: an id, a text and a label each")

    @task(network="AutoModel")
    def text_classification(p: Params) -> Ready:
        ...

The function reads and checks the data, before any model is there, and returns a `Ready`, whose
`measure` is called once for each model.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import statistics
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mergebench.networks.loadable import Tick

if TYPE_CHECKING:
    from mergebench.networks.network import Network

Direction = Literal["higher", "lower"]  # which values are better

REQUIRED: Any = object()
TEXTS = list[str]
WORDS = {
    Path: "a path",
    Path | str: "a name or a path",
    str: "a word",
    TEXTS: "a list of texts",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


@dataclass(frozen=True)
class Key:
    """One key of a task in a suite: what it means and what it may hold."""

    name: str
    type: Any
    default: Any
    help: str
    low: float | None = None
    choices: tuple[str, ...] = ()
    folder: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def complaint(self, value: object) -> str | None:
        """What the key must hold, where `value` is something else; else None."""
        if self.choices:
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if self.type == TEXTS:
            fits = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
            return None if fits else f"must be {WORDS[TEXTS]}"
        kinds: tuple[type, ...] = {Path: (str,), Path | str: (str,), float: (int, float)}.get(self.type, (self.type,))
        fits = isinstance(value, kinds) and (self.type is bool or not isinstance(value, bool))
        if isinstance(value, str):
            fits = fits and bool(value.strip())
        low = "" if self.low is None else f", at least {self.low:g}"
        if fits and self.low is not None:
            fits = typing.cast(float, value) >= self.low
        return None if fits else f"must be {WORDS[self.type]}{low}"


def key(
    help: str,
    default: Any = REQUIRED,
    *,
    low: float | None = None,
    choices: tuple[str, ...] = (),
    folder: bool = False,
) -> Any:
    """A key of a task in a suite: meaning, default and range in one place.

    A `Path` must be there, a file or a `folder`; a `Path | str` may be a name instead.
    """
    about = {"help": help, "low": low, "choices": choices, "folder": folder}
    if default is REQUIRED:
        return field(metadata=about)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Common:
    """The keys every kind of task has, beside `name` and `kind`."""

    split: str = key("what the data are for", "test", choices=("test", "validation"))
    limit: int | None = key("how many items are used: the first ones, or drawn with `seed`", None, low=1)
    seed: int | None = key("draw `limit` items at random, with this seed", None, low=0)


class Prediction(NamedTuple):
    """What a model answered to one item, and what that is worth (for an accuracy 1 or 0)."""

    output: str
    score: float


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
    files: tuple[Path, ...] = ()  # everything that was read, to tell results on other data apart
    items: Mapping[str, str] = field(default_factory=dict)  # where each stands, by its content: `items.contents`
    versions: Mapping[str, str] = field(default_factory=dict)  # of libraries and images that the result depends on
    home: Path | None = None  # the directory of the task's own fine-tune, if it has one
    on_patches: Callable[[Sequence[Path]], Ready] | None = None  # it waits for the patches that a recipe's edits write


@dataclass(frozen=True)
class Kind:
    """A kind of task and what a suite must know about it."""

    name: str  # as suites spell it: text-classification
    function: Callable[[Any], Ready]
    network: str  # the transformers auto class its models are built with
    params: type
    keys: Mapping[str, Key]

    def __call__(self, params: Any) -> Ready:
        return self.function(params)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


def task(*, network: str) -> Callable[[Callable[[Any], Ready]], Kind]:
    """Declare a function `(params) -> Ready` as a kind of task.

    `network` names the transformers class its models are built with, such as AutoModel: tasks that
    name the same one share the model in memory.
    """

    def declare(function: Callable[[Any], Ready]) -> Kind:
        params, keys = keys_of(function, Common)
        return Kind(function.__name__.replace("_", "-"), function, network, params, keys)

    return declare


def keys_of(function: Callable[[Any], Any], base: type = object) -> tuple[type, dict[str, Key]]:
    """The dataclass that a function `(params)` takes, and its keys."""
    names = list(inspect.signature(function).parameters)
    params = typing.get_type_hints(function).get(names[0]) if len(names) == 1 else None
    if not (isinstance(params, type) and issubclass(params, base) and dataclasses.is_dataclass(params)):
        made = "" if base is object else f" made from {base.__name__}"
        raise TypeError(f"{function.__name__}: it takes (params: a dataclass{made})")
    hints = typing.get_type_hints(params)
    keys = {}
    for f in dataclasses.fields(params):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        keys[f.name] = Key(
            f.name, _plain(hints[f.name]), REQUIRED if default is dataclasses.MISSING else default, **f.metadata
        )
    return params, keys


def _plain(hint: Any) -> Any:
    """`int` for both `int` and `int | None`; None is what a key that is not given holds."""
    if isinstance(hint, types.UnionType) and types.NoneType in hint.__args__:
        (hint,) = (part for part in hint.__args__ if part is not types.NoneType)
    return hint
